"""The weight files of a bundle: every tensor once, all of them listed, and nothing else is read."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import onnx
import pytest
from helpers.demo_build import linked_copy
from helpers.runtime_command import replace
from helpers.tiny_pipeline import tiny_options
from onnx import external_data_helper

from engines.backends.onnx_references import references
from engines.bundle import Bundle
from engines.errors import BackendError, BundleError
from engines.files import sha256_file
from engines.manifest import FileEntry
from engines.runtime import DenoiseRuntime
from tmpdiff_export.bundling.bundle import build
from tmpdiff_export.weights.files import places

PRECISIONS = ("fp16", "int8", "int4")


@pytest.fixture
def three(built) -> Path:
    """A bundle of three precisions; do not write into it."""
    return built(tiny_options(*PRECISIONS))


def files_of(bundle: Path, name: str) -> set[str]:
    return {Path(file.path).name for file in Bundle.open(bundle).manifest.denoisers[name][0].weights}


def test_the_manifest_lists_every_file_and_engines_read_all_that_is_theirs(three: Path) -> None:
    bundle = Bundle.open(three)
    listed = {file.path for file in bundle.manifest.files()} | {"manifest.json"}
    assert {path.relative_to(three).as_posix() for path in three.rglob("*") if path.is_file()} == listed
    assert bundle.verify() == len(listed) - 1
    for name in PRECISIONS:
        read = {item.location for item in references(three / bundle.manifest.denoisers[name][0].file.path)}
        assert read == files_of(three, name)
    assert files_of(three, "fp16") & files_of(three, "int8") & files_of(three, "int4") == {"fp16+int8+int4.safetensors"}


def test_what_is_not_quantized_is_stored_once(three: Path) -> None:
    """Names and types of tensors, over all files; and what is in several precisions' files is not the same bytes."""
    stored = {path: places(path) for path in sorted((three / "engines").glob("*.safetensors"))}
    engines = {path: tensors for path, tensors in stored.items() if not path.stem.startswith(("text_", "vae_"))}
    counts = Counter((name, item.dtype) for tensors in engines.values() for name, item in tensors.items())
    twice = {key for key, count in counts.items() if count > 1}
    assert {name.rpartition(".")[2] for name, _ in twice} <= {"weight_codes", "weight_scale"}, "of different precisions"
    contents = Counter(
        item.read().numpy().tobytes()
        for tensors in engines.values()
        for name, item in tensors.items()
        if item.size_bytes > 1000
    )
    assert set(contents.values()) == {1}
    sixteen_bit = sum(
        item.size_bytes for tensors in engines.values() for item in tensors.values() if item.dtype == "F16"
    )
    parameters = Bundle.open(three).manifest.model.parameters
    assert sixteen_bit <= 2 * parameters * 1.01, "FP16's alone"


def test_engines_of_one_store_run(three: Path) -> None:
    runtime = DenoiseRuntime.load(three)
    conditioning, noise = runtime.encode(["a red circle"]), runtime.noise([0])
    found = [runtime.denoise(conditioning, runtime.schedule(f"uniform:{name}"), noise) for name in PRECISIONS]
    assert all(np.isfinite(latents).all() for latents in found)
    assert len({latents.tobytes() for latents in found}) == len(PRECISIONS)


def test_an_altered_weight_file_is_refused_by_the_engines_that_read_it(three: Path, tmp_path: Path) -> None:
    bundle = linked_copy(three, tmp_path / "bundle")
    (codes,) = (bundle / "engines").glob("int8.codes*")
    content = bytearray(codes.read_bytes())
    content[-1] ^= 1
    replace(codes, bytes(content))
    runtime = DenoiseRuntime.load(bundle)
    with pytest.raises(BundleError, match=rf"{codes.name} was altered"):
        runtime.denoiser("int8")
    runtime.denoiser("fp16")
    with pytest.raises(BundleError, match=rf"{codes.name} was altered"):
        Bundle.open(bundle).verify()


def test_a_further_file_is_refused(three: Path, tmp_path: Path) -> None:
    """One that the graph reads and the manifest does not list: with a graph whose hash the manifest has."""
    from helpers.runtime_command import rewrite_manifest

    bundle = linked_copy(three, tmp_path / "bundle")
    graph = bundle / "engines" / "int8.onnx"
    model = onnx.load(graph, load_external_data=False)
    moved = next(item for item in model.graph.initializer if external_data_helper.uses_external_data(item))
    info = external_data_helper.ExternalDataInfo(moved)
    (bundle / "engines" / "more.bin").write_bytes((bundle / "engines" / info.location).read_bytes())
    next(entry for entry in moved.external_data if entry.key == "location").value = "more.bin"
    replace(graph, model.SerializeToString())
    entry = FileEntry(path="engines/int8.onnx", sha256=sha256_file(graph), bytes=graph.stat().st_size)
    rewrite_manifest(bundle, lambda data: data["denoisers"]["int8"][0].update(file=entry.model_dump(mode="json")))
    assert Bundle.open(bundle).verify() > 0
    with pytest.raises(BackendError, match=r"engine int8: tensor .* lies in 'more\.bin', expected a weight file"):
        DenoiseRuntime.load(bundle).denoiser("int8")


def test_text_encoders_are_stored_in_8_bit_on_request(tiny_pipeline: Path, three: Path, tmp_path: Path) -> None:
    out = tmp_path / "bundle"
    options = tiny_options("fp16", text_encoder_weights="int8", onnx_dir=tmp_path / "onnx")
    (entry,) = build(tiny_pipeline, out, options).text_encoder
    (plain,) = Bundle.open(three).manifest.text_encoder
    assert (entry.recipe, entry.sqnr_floor_db) == ("int8-weights", 20.0)
    assert entry.sqnr_db > 25
    assert entry.bytes < 0.7 * plain.bytes  # embeddings stay
    names = {Path(file.path).name for file in entry.weights}
    assert names == {"text_encoder.safetensors", "text_encoder.codes.safetensors"}
    assert {item.location for item in references(tmp_path / "onnx" / "text_encoder.onnx")} == names
    with DenoiseRuntime.load(out, threads=1) as narrow, DenoiseRuntime.load(three, threads=1) as wide:
        found, expected = (runtime.encode(["a red circle"]).guided for runtime in (narrow, wide))
    difference = np.linalg.norm(found["encoder_hidden_states"] - expected["encoder_hidden_states"])
    assert 1e-4 < difference / np.linalg.norm(expected["encoder_hidden_states"]) < 0.05
