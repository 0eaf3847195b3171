"""What is asked for before any work: modules, compilers, folders."""

from __future__ import annotations

import importlib
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from helpers.needs_compiler import needs_compiler
from helpers.paths import ROOT

from engines.errors import BackendError, BuildError, TmpDiffError
from tmpdiff_export.bundling import preflight
from tmpdiff_export.bundling.preflight import (
    Needs,
    device_of,
    require_apart,
    require_folders,
    require_modules,
    stages_folder,
)
from tmpdiff_export.pipelines.load import open_pipeline

CPU = Needs("onnxruntime", "cpu")


def without(monkeypatch: pytest.MonkeyPatch, module: str, error: Exception) -> None:
    """Has imports of a module fail."""
    real = importlib.import_module

    def import_module(name: str, *args: Any) -> Any:
        if name == module:
            raise error
        return real(name, *args)

    monkeypatch.setattr(preflight.importlib, "import_module", import_module)


def test_what_this_machine_can_build_has_its_modules() -> None:
    require_modules(CPU)


@needs_compiler
def test_the_torch_backend_has_its_modules_and_its_compiler() -> None:
    require_modules(Needs("torch", "cpu"))


@pytest.mark.parametrize(
    ("needs", "module", "error", "says"),
    [
        (CPU, "onnxscript", ModuleNotFoundError("No module named 'onnxscript'", name="onnxscript"),
         r"the module onnxscript, which is not installed; pip install onnxscript, or .*'\.\[export\]'$"),
        (CPU, "diffusers", ModuleNotFoundError("No module named 'orloge.x'", name="orloge.x"),
         r"the module diffusers, which cannot be imported without the module orloge\.x; pip install orloge"),
        (CPU, "transformers", ImportError("libx.so.1: cannot open shared object file"),
         r"transformers, which cannot be imported \(libx\.so\.1: .*\); pip install --force-reinstall transformers$"),
        (CPU, "onnx", RuntimeError("built for another numpy\nmore"), r"onnx, .* \(RuntimeError: built for another numpy\)$"),
        (Needs("torch", "cuda"), "cuda.bindings.runtime", ModuleNotFoundError("", name="cuda.bindings"),
         r"is not installed; pip install cuda-bindings"),
        (Needs("torch", "cuda"), "triton", ModuleNotFoundError("", name="triton"), r"pip install triton"),
        (Needs("torch", "cuda", fp8_attention=True), "cudnn", ModuleNotFoundError("", name="cudnn"),
         r"pip install nvidia-cudnn-frontend"),
        (Needs("tensorrt", "cuda"), "tensorrt", ModuleNotFoundError("", name="tensorrt"), r"pip install tensorrt"),
        (Needs("tensorrt-rtx", "cuda"), "onnxruntime_ep_nv_tensorrt_rtx",
         ModuleNotFoundError("", name="onnxruntime_ep_nv_tensorrt_rtx"), r"onnxruntime-ep-nv-tensorrt-rtx-cu13"),
    ],
)  # fmt: skip
def test_a_missing_module_is_named_with_what_to_install(
    monkeypatch: pytest.MonkeyPatch, needs: Needs, module: str, error: Exception, says: str
) -> None:
    for stand_in in ("triton", "cuda.bindings.runtime", "tensorrt"):
        if stand_in != module:
            monkeypatch.setitem(sys.modules, stand_in, sys)
    without(monkeypatch, module, error)
    with pytest.raises(BuildError, match=says) as raised:
        require_modules(needs)
    assert "\n" not in str(raised.value)


def test_a_class_whose_requirements_are_missing_is_named(monkeypatch: pytest.MonkeyPatch, demo_pipeline: Path) -> None:
    import diffusers
    from diffusers.utils import DummyObject

    stand_in = DummyObject("PixArtSigmaPipeline", (), {"_backends": ["transformers", "sentencepiece"]})
    monkeypatch.setattr(diffusers, "PixArtSigmaPipeline", stand_in)
    with pytest.raises(
        BuildError, match="PixArtSigmaPipeline of diffusers needs the modules transformers, sentencepiece"
    ) as raised:
        open_pipeline(demo_pipeline)
    assert "\n" not in str(raised.value)


def test_without_a_compiler_torch_packages_are_refused() -> None:
    program = (
        "from tmpdiff_export.bundling.preflight import Needs, require_modules\n"
        "from engines.errors import BuildError\n"
        "try:\n    require_modules(Needs('torch', 'cpu'))\nexcept BuildError as error:\n    print(error)\n"
    )
    for changes, says in (
        (
            {"CXX": "absent-c++"},
            "needs a C++ compiler, and 'absent-c++' does not run; install g++, or name another in CXX",
        ),
        ({"PATH": "/nowhere"}, "needs a C++ compiler, and 'g++' does not run"),
    ):
        environment = {**os.environ, "PYTHONPATH": str(ROOT), **changes}
        environment = environment if "CXX" in changes else {**environment, "CXX": "g++"}
        result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=environment)
        assert says in result.stdout, result.stderr


def test_a_gpu_takes_a_c_compiler_and_headers(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    compiler = tmp_path / "g++"
    compiler.write_text("#!/bin/sh\n")
    compiler.chmod(0o755)
    monkeypatch.setattr(preflight.shutil, "which", lambda name: None)
    monkeypatch.delenv("CC", raising=False)
    from torch._inductor import cpp_builder

    monkeypatch.setattr(cpp_builder, "get_cpp_compiler", lambda: str(compiler))
    with pytest.raises(BuildError, match="Triton needs a C compiler, and 'gcc' is not there"):
        preflight._require_compilers("cuda")
    monkeypatch.setattr(preflight.shutil, "which", lambda name: f"/usr/bin/{name}")
    monkeypatch.setattr(preflight.sysconfig, "get_path", lambda name: str(tmp_path))
    with pytest.raises(BuildError, match=r"has no Python\.h; install python3-dev"):
        preflight._require_compilers("cuda")
    preflight._require_compilers("cpu")


def test_folders_that_cannot_be_written(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_text("x")
    dangling = tmp_path / "dangling"
    dangling.symlink_to(tmp_path / "absent")
    fine, before = tmp_path / "bundle", sorted(tmp_path.iterdir())
    for out, says in (
        (file / "bundle", "cannot be made: .*file is no folder"),
        (file / "deep" / "bundle", "cannot be made: .*file is no folder"),
        (dangling, "is a link to .*absent, which does not exist"),
        (dangling / "bundle", "cannot be made: .*dangling is no folder"),
        (Path("/proc/bundle"), "output folder /proc/bundle cannot be written"),
        (file, "already exists"),
        (tmp_path / ("n" * 240), "cannot be written: .*File name too long"),
    ):
        with pytest.raises(TmpDiffError, match=says):
            require_folders(out, None, force=False)
    for onnx, says in (
        (file, "is a file"),
        (file / "onnx", "--onnx-dir .* cannot be made: .*file is no folder"),
        (dangling, "--onnx-dir .* is a link to"),
        (Path("/proc/onnx"), "--onnx-dir /proc/onnx cannot be written"),
        (fine, "is inside the bundle"),
        (fine / "onnx", "is inside the bundle"),
    ):
        with pytest.raises(TmpDiffError, match=says):
            require_folders(fine, onnx, force=False)
    require_folders(tmp_path / "a" / "b" / "bundle", tmp_path / "a" / "onnx", force=False)
    assert sorted(tmp_path.iterdir()) == before, "nothing is left"


def test_a_link_into_the_bundle_is_inside_it(tmp_path: Path) -> None:
    bundle = tmp_path / "bundle"
    bundle.mkdir()
    (bundle / "manifest.json").write_text("{}")
    (tmp_path / "link").symlink_to(bundle)
    with pytest.raises(TmpDiffError, match="is inside the bundle"):
        require_folders(bundle, tmp_path / "link" / "onnx", force=True)


def test_what_the_end_of_a_build_would_remove(tmp_path: Path) -> None:
    out, pipeline = tmp_path / "bundle", tmp_path / "pipeline"
    (out / "pipeline").mkdir(parents=True)
    (tmp_path / "link").symlink_to(out)
    for inside in (out, out / "pipeline", tmp_path / "link" / "pipeline"):
        with pytest.raises(TmpDiffError, match=r"is inside the bundle .*, which would be replaced; move one of them"):
            require_apart(inside, out, None)
    for onnx in (stages_folder(out), stages_folder(out) / "runs-0123456789abcdef"):
        with pytest.raises(TmpDiffError, match="is among the stages of the build; name a folder beside the bundle"):
            require_apart(pipeline, out, onnx)
    for fine in (None, tmp_path, tmp_path / "onnx", pipeline):
        require_apart(pipeline, out, fine)
        require_apart(pipeline, pipeline / "bundle", fine)


@pytest.mark.skipif(os.geteuid() == 0 and shutil.which("setpriv") is None, reason="root writes everywhere")
def test_a_folder_of_somebody_else(tmp_path: Path) -> None:
    program = (
        "import sys\nfrom pathlib import Path\nfrom tmpdiff_export.bundling.preflight import require_folders\n"
        "try:\n    require_folders(Path(sys.argv[1]), None, force=False)\nexcept Exception as error:\n    print(error)\n"
    )
    locked = tmp_path / "locked"
    locked.mkdir(mode=0o555)
    words = [sys.executable, "-c", program, str(locked / "bundle")]
    if os.geteuid() == 0:
        words = ["setpriv", "--inh-caps=-all", "--bounding-set=-all", *words]
    result = subprocess.run(words, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": str(ROOT)})
    assert "cannot be written: " in result.stdout, result.stderr
    assert "Permission denied" in result.stdout


def test_what_engines_are_for_by_default() -> None:
    assert [device_of(name, None) for name in ("onnxruntime", "torch", "tensorrt")] == ["cpu", "cuda", "cuda"]
    assert device_of("torch", "cpu") == "cpu"
    with pytest.raises(BackendError, match="unknown backend 'x'"):
        device_of("x", None)
