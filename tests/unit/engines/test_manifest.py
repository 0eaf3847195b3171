"""The manifest: formats of earlier releases, and files that several engines share."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from helpers.runtime_command import rewrite_manifest
from pydantic import ValidationError

from engines.bundle import Bundle
from engines.documents import FileEntry
from engines.errors import BundleError
from engines.manifest import Manifest, manifest_identity, manifest_text

Json = dict[str, Any]
OLD = Path(__file__).with_name("manifest_4.json")  # as the last release of that format wrote it
SHARED = {"path": "engines/fp16+int8.safetensors", "sha256": "a" * 64, "bytes": 1000}


def signed(data: Json) -> Json:
    """Data of version 6 with hashes that fit."""
    found: Json = json.loads(manifest_text(data))
    return found


def signed_old(data: Json, version: int) -> Json:
    """Data of an earlier version with an identity that fits."""
    data["version"] = version
    return data | {"bundle_id": manifest_identity(data)}


@pytest.fixture
def old() -> Json:
    """Denoisers with a weight file, other engines with null."""
    data: Json = json.loads(OLD.read_text())
    return data


@pytest.fixture
def of_5(old: Json) -> Json:
    """As `new`, in the form of version 5."""
    for entry in (old["text_encoder"], old["vae_decoder"], old["denoisers"]["int4"]):
        entry["weights"] = []
    for name in ("fp16", "int8"):
        old["denoisers"][name]["weights"] = [old["denoisers"][name]["weights"], SHARED]
    return signed_old(old, 5)


@pytest.fixture
def new(of_5: Json) -> Json:
    """FP16 and INT8 read a file of their own each, and one that they share."""
    data: Json = Manifest.model_validate(of_5).model_dump(mode="json", exclude_unset=True)
    return data


def test_a_manifest_of_version_4_is_read_with_its_identity(old: Json) -> None:
    manifest = Manifest.model_validate_json(OLD.read_text())
    assert manifest.bundle_id == old["bundle_id"] == manifest_identity(old)
    (int8,) = manifest.denoisers["int8"]
    assert int8.weights == (FileEntry(**old["denoisers"]["int8"]["weights"]),)
    assert int8.bytes == int8.file.bytes + int8.weights[0].bytes
    (text_encoder,) = manifest.text_encoder
    assert text_encoder.weights == ()
    assert text_encoder.files() == (text_encoder.file,)
    assert text_encoder.file == FileEntry(**old["text_encoder"]["file"])


@pytest.mark.parametrize("version", [4, 5])
def test_an_older_manifest_has_one_setting(old: Json, of_5: Json, version: int) -> None:
    data = json.loads(OLD.read_text()) if version == 4 else of_5
    manifest = Manifest.model_validate(data)
    (setting,) = manifest.settings
    assert setting.model_dump(mode="json", exclude_unset=True) == data["sampling"] | {"sampler": data["sampler"]}
    assert (setting.name, setting.folder, setting.text_length) == ("default", ".", None)
    assert manifest.scheduler is None
    assert manifest.texts[0].model_dump(mode="json", exclude_unset=True) == data["text"]
    assert {name for name in manifest.denoisers if all(entry.runs(setting) for entry in manifest.denoisers[name])} == {
        *data["denoisers"]
    }


def test_further_texts_of_an_older_manifest_follow_the_first(of_5: Json) -> None:
    second = of_5["text"] | {"max_tokens": 41}
    manifest = Manifest.model_validate(signed_old(of_5 | {"further_texts": [second]}, 5))
    assert [text.max_tokens for text in manifest.texts] == [of_5["text"]["max_tokens"], 41]


def test_an_altered_older_manifest_is_refused(old: Json) -> None:
    old["sampling"]["guidance_scale"] = 9.0
    with pytest.raises(ValidationError, match="bundle_id does not match"):
        Manifest.model_validate(old)


def test_older_ones_lack_the_field(old: Json) -> None:
    for version in (1, 2, 3):
        for entry in (*old["denoisers"].values(), old["text_encoder"], old["vae_decoder"]):
            entry.pop("weights", None)
            entry.pop("package", None)
        data = signed_old(old, version)
        manifest = Manifest.model_validate(data)
        assert manifest.denoisers["fp16"][0].weights == ()
        assert manifest.bundle_id == data["bundle_id"]


def test_files_that_engines_share_are_listed_once(new: Json) -> None:
    manifest = Manifest.model_validate(signed(new))
    (fp16,), (int8,) = (manifest.denoisers[name] for name in ("fp16", "int8"))
    assert fp16.weights[1] == int8.weights[1] == FileEntry(**SHARED)
    assert fp16.bytes == sum(file.bytes for file in (fp16.file, *fp16.weights))
    paths = [file.path for file in manifest.files()]
    assert len(paths) == len(set(paths))
    assert {file.path for entry in manifest.engines().values() for file in entry.files()} <= set(paths)
    assert json.loads(manifest.model_dump_json(exclude_unset=True)) == signed(new)


@pytest.mark.parametrize("field", ["sha256", "bytes"])
def test_one_file_with_two_hashes_or_sizes_is_refused(new: Json, field: str) -> None:
    new["denoisers"]["int8"][0]["weights"][1] = SHARED | {field: "b" * 64 if field == "sha256" else 1001}
    with pytest.raises(ValidationError, match=r"engines/fp16\+int8\.safetensors is named with two different"):
        Manifest.model_validate(signed(new))


def test_a_file_twice_in_one_engine_is_refused(new: Json) -> None:
    new["denoisers"]["int8"][0]["weights"] = [SHARED, SHARED]
    with pytest.raises(ValidationError, match="denoiser int8 names one of its files twice"):
        Manifest.model_validate(signed(new))


@pytest.mark.parametrize(("version", "weights"), [(5, None), (5, SHARED), (4, [SHARED]), (4, []), (4, False)])
def test_weights_in_the_form_of_another_version_are_refused(of_5: Json, version: int, weights: Any) -> None:
    for entry in of_5["denoisers"].values():
        entry["weights"] = weights
    if version == 4:
        of_5["text_encoder"]["weights"] = of_5["vae_decoder"]["weights"] = None
    with pytest.raises(ValidationError, match=r"denoisers\.fp16\.0\.weights"):
        Manifest.model_validate(signed_old(of_5, version))


PROFILE = {"latents": [[1, 4, 16, 16], [2, 4, 16, 16], [8, 4, 16, 16]], "timestep": [[1], [2], [8]]}
WIDE = PROFILE | {"latents": [[1, 4, 16, 24], [2, 4, 16, 24], [8, 4, 16, 24]]}


def with_plan(data: Json, **fields: Any) -> Json:
    """The manifest data, of any version, with a TensorRT plan for INT8."""
    int8 = data["denoisers"]["int8"]
    (int8[0] if isinstance(int8, list) else int8)["plan"] = {
        "version_compatible": False,
        "hardware_compatibility": "none",
        "weight_streaming": False,
        "weights_bytes": 1,
        "scratch_bytes": 1,
        "layers": {},
        "inspector": {"path": "engines/int8.layers.json", "sha256": "c" * 64, "bytes": 2},
        "warnings": [],
        **fields,
    }
    return data


@pytest.mark.parametrize("version", [4, 5])
def test_a_plan_of_an_older_manifest_has_one_profile(of_5: Json, version: int) -> None:
    data = signed_old(with_plan(json.loads(OLD.read_text()) if version == 4 else of_5, profile=PROFILE), version)
    manifest = Manifest.model_validate(data)
    plan = manifest.denoisers["int8"][0].plan
    assert plan is not None
    assert plan.profiles == ({name: tuple(map(tuple, shapes)) for name, shapes in PROFILE.items()},)


def test_a_plan_has_profiles_for_the_same_inputs(new: Json) -> None:
    data = signed(with_plan(new, profiles=[PROFILE, WIDE]))
    plan = Manifest.model_validate(data).denoisers["int8"][0].plan
    assert plan is not None
    assert [profile["latents"][1] for profile in plan.profiles] == [(2, 4, 16, 16), (2, 4, 16, 24)]
    assert Manifest.model_validate(data).model_dump(mode="json", exclude_unset=True) == data


@pytest.mark.parametrize(
    ("profiles", "words"),
    [
        ([], "at least 1 item"),
        ([PROFILE, {"latents": PROFILE["latents"]}], "optimization profiles are for different inputs"),
        (
            [PROFILE | {"timestep": [[2], [1], [8]]}],
            r"profile of timestep is \(2,\), \(1,\), \(8,\), expected min <= opt",
        ),
        ([PROFILE | {"timestep": [[1], [2, 2], [8]]}], "expected min <= opt <= max"),
        (PROFILE, "should be a valid tuple"),
    ],
)
def test_profiles_that_no_plan_has_are_refused(new: Json, profiles: Any, words: str) -> None:
    with pytest.raises(ValidationError, match=words):
        Manifest.model_validate(signed(with_plan(new, profiles=profiles)))


def test_an_engine_may_have_no_onnx_file(new: Json) -> None:
    new["denoisers"]["fp16"][0]["onnx_sha256"] = None
    assert Manifest.model_validate(signed(new)).denoisers["fp16"][0].onnx_sha256 is None


def test_files_are_hashed_side_by_side_once_and_the_first_damage_is_told(tmp_path: Path, small_bundle: Path) -> None:
    from helpers.demo_build import linked_copy

    folder = linked_copy(small_bundle, tmp_path / "bundle")
    bundle = Bundle.open(folder)
    paths = bundle.paths_of(bundle.manifest.files())
    assert paths == [folder / file.path for file in bundle.manifest.files()]
    for path in paths:
        path.unlink()
    assert bundle.paths_of(bundle.manifest.files()) == paths  # checked before
    rewrite_manifest(folder, lambda data: data["denoisers"]["int8"][0]["file"].update(path="engines/none.onnx"))
    with pytest.raises(BundleError, match=r"bundle file settings/.+/sampler\.json is missing"):
        Bundle.open(folder).verify()
