"""Estimates of memory and disk, and what is refused for them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from engines.errors import BuildError
from engines.precision import DEFAULT_PRECISIONS, Precision
from tmpdiff_export.bundling.estimates import (
    Available,
    BuildSize,
    Estimate,
    activation_bytes,
    estimate,
    find_available,
    require_fit,
)

GB = 10**9
ENGINES = "engines, or the models beside the denoiser"
PLENTY = Available(host_bytes=10**15, gpu_bytes=10**15, disk_bytes=10**15)
# FLUX.1-dev with small text encoders, as torch packages on an H200.
FLUX = BuildSize(
    backend="torch",
    device="cuda",
    range_device="cuda",
    precisions=(Precision.FP16, Precision.FP8),
    parameters=11_900_000_000,
    component_parameters=200_000_000,
    largest_layer=56_600_000,
    activation_bytes=activation_bytes(4608, 2, 56_600_000, 1024, 1024),
)
PIXART = BuildSize(
    backend="onnxruntime",
    device="cpu",
    range_device="cpu",
    precisions=DEFAULT_PRECISIONS,
    parameters=1_000_000_000,
    component_parameters=100_000_000,
    largest_layer=5_300_000,
    activation_bytes=activation_bytes(1024 + 300, 4, 5_300_000, 512, 512),
)


def test_flux_in_figures() -> None:
    found = require_fit(FLUX, PLENTY)
    assert 3 * GB < found.host_bytes < 31 * GB, "the goal of its build"
    assert 26 * GB < found.gpu_bytes < 34 * GB
    assert 35.7 * GB < found.disk_bytes < 39 * GB
    assert found.onnx_bytes == 0
    with_t5 = estimate(replace(FLUX, component_parameters=4_900_000_000))
    assert with_t5.host[ENGINES] == 9.8 * GB, "it runs for the ranges, from 16-bit weights"
    assert set(found.host) == {"libraries", "a layer in FP32, four times", ENGINES}
    with_compilers = require_fit(replace(FLUX, workers=2, compiler_processes=16), PLENTY)
    assert 14 * GB < with_compilers.host_bytes < 19 * GB, "18.3 GB measured, shared pages counted per process"
    assert found.described(Available(125 * GB, 141 * GB, 42 * GB)) == (
        f"estimate: host memory {found.host_bytes / GB:.1f} GB (of 125.0 GB), GPU memory {found.gpu_bytes / GB:.1f} GB "
        f"(of 141.0 GB), disk {found.disk_bytes / GB:.1f} GB (of 42.0 GB)"
    )


def test_a_build_on_a_cpu_in_figures() -> None:
    found = require_fit(PIXART, replace(PLENTY, gpu_bytes=None))
    assert found.gpu_bytes == 0
    assert found.host[ENGINES] == 4 * PIXART.parameters
    assert found.host["activations"] == PIXART.activation_bytes
    assert "GPU" not in found.described(replace(PLENTY, gpu_bytes=None, host_bytes=None))
    assert "host memory 7" in found.described(replace(PLENTY, host_bytes=None))


def test_large_pictures_are_the_decoders() -> None:
    small, large = (activation_bytes(1, 1, 1, size, size) for size in (64, 2048))
    assert large == 1024 * small
    assert activation_bytes(4096, 8, 10**8, 64, 64) == 2 * activation_bytes(4096, 4, 10**8, 64, 64)


@pytest.mark.parametrize(
    ("size", "have", "says"),
    [
        (FLUX, {"disk_bytes": 30 * GB},
         r"needs about 38\.\d GB of disk \(text encoders and VAE decoder 0\.4 GB, fp16 23\.8 GB, fp8 11\.9 GB, .*\) and "
         r"30\.0 GB is free; --precisions fp16 would fit \(25\.\d GB\)$"),
        (replace(FLUX, keeps_onnx=True), {"disk_bytes": 40 * GB}, r"a build without --onnx-dir would fit \(38\.\d GB\)$"),
        (replace(FLUX, keeps_onnx=True), {"disk_bytes": 40 * GB, "onnx_bytes": GB},
         r"35\.7 GB of disk in --onnx-dir .*1\.0 GB is free; a build without --onnx-dir would fit"),
        (FLUX, {"disk_bytes": GB}, r"1\.0 GB is free; it needs 3\d\.\d GB more$"),
        (FLUX, {"host_bytes": 2 * GB}, r"needs about 3\.\d GB of host memory \(libraries 2\.1 GB, .*; it needs 1\.\d GB more$"),
        (replace(FLUX, workers=2), {"host_bytes": 5 * GB}, r"of host memory .*; --workers 1 would fit"),
        (replace(FLUX, workers=2), {"gpu_bytes": 40 * GB}, r"of GPU memory .*; --workers 1 would fit"),
        (FLUX, {"gpu_bytes": 26 * GB}, r"of GPU memory .* and 26\.0 GB is free; --range-device cpu would fit \(25\.9 GB\)$"),
        (FLUX, {"gpu_bytes": 20 * GB}, r"GPU memory .*; it needs \d\.\d GB more$"),
        (replace(PIXART, activation_bytes=9 * GB), {"host_bytes": 8 * GB}, r"host memory .*; --range-device cuda would fit"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_refused_with_what_would(size: BuildSize, have: dict[str, int], says: str) -> None:
    with pytest.raises(BuildError, match=says) as raised:
        require_fit(size, replace(PLENTY, **have))
    assert "\n" not in str(raised.value)


def test_workers_and_backends_take_their_own() -> None:
    one, two = estimate(FLUX), estimate(replace(FLUX, workers=2))
    assert two.gpu["engines"] == 2 * one.gpu["engines"]
    assert two.host["libraries"] == 3 * one.host["libraries"]
    plans = estimate(replace(FLUX, backend="tensorrt"))
    assert plans.host[ENGINES] > 3 * 2 * FLUX.parameters, "network, engine and plan"
    assert plans.disk["the backend's own layout"] > 35 * GB


def test_what_there_is_here(tmp_path: Path) -> None:
    found = find_available(tmp_path / "deep" / "er" / "bundle", tmp_path / "onnx", kept_bytes=10**15)
    assert found.host_bytes is None or found.host_bytes > 0
    assert found.disk_bytes > 10**15
    assert found.onnx_bytes is None, "the same file system"
    apart = find_available(tmp_path / "bundle", Path("/dev/shm/onnx"))
    assert apart.onnx_bytes is None or apart.onnx_bytes < apart.disk_bytes + 10**15
    assert isinstance(require_fit(PIXART, replace(PLENTY, gpu_bytes=found.gpu_bytes)), Estimate)
