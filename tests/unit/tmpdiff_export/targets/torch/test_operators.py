"""A package that calls an operator of ours, from C++: tools/cpp has the operators for programs without Python."""

from __future__ import annotations

import subprocess
from pathlib import Path

import numpy as np
import pytest
from helpers.cpp_program import compile_program
from helpers.needs_compiler import needs_compiler
from helpers.tiny_pipeline import denoiser_inputs

from engines.manifest import MODEL_OUTPUT
from engines.runtime import DenoiseRuntime

pytestmark = needs_compiler


@pytest.mark.long  # the program's own compilation
def test_a_package_with_fp8_attention_runs_without_python(torch_variants: Path, tmp_path: Path) -> None:
    from safetensors.numpy import save_file

    program = tmp_path / "run_package"
    compile_program(program, "attention_fp8.cpp")
    with DenoiseRuntime.load(torch_variants) as loaded:
        entry = loaded.manifest.denoisers["nvfp4"][0]
        assert entry.package is not None
        assert entry.package.operators == ("attention_fp8",)
        inputs = denoiser_inputs(loaded, entry.package.batch)
        expected = loaded.denoiser("nvfp4").run(inputs)[MODEL_OUTPUT]
    given = {str(number): np.ascontiguousarray(inputs[spec.name]) for number, spec in enumerate(entry.inputs)}
    save_file(given, tmp_path / "inputs.safetensors")
    files = [torch_variants / file.path for file in entry.files()]
    subprocess.run([program, *files, tmp_path / "inputs.safetensors", tmp_path / "outputs.bin"], check=True)
    found = np.fromfile(tmp_path / "outputs.bin", np.float32).reshape(expected.shape)
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)
