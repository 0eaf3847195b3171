"""Error and picture metrics."""

from __future__ import annotations

import numpy as np
import pytest

from calibration.measure.metrics import limited, picture_mse, picture_ssim, psnr_db, relative_error


def test_relative_error_is_squared_and_relative():
    reference = np.full((4, 2, 2), 2.0, dtype=np.float32)
    assert relative_error(reference, reference) == 0
    assert relative_error(reference * np.float32(1.1), reference) == pytest.approx(0.01, rel=1e-5)
    assert relative_error(np.zeros_like(reference), reference) == 1


def test_relative_error_keeps_digits_that_float32_sums_lose():
    reference = np.ones((4, 512, 512), dtype=np.float32)
    latents = reference.copy()
    latents[0, 0, 0] += np.float32(2**-10)
    assert relative_error(latents, reference) == pytest.approx(2**-20 / reference.size, rel=1e-12)


def test_relative_error_refuses_what_has_no_meaning():
    with pytest.raises(ValueError, match="the reference \\(4,\\)"):
        relative_error(np.ones(3), np.ones(4))
    with pytest.raises(ValueError, match="all zero"):
        relative_error(np.ones(3), np.zeros(3))


def test_picture_metrics_of_known_differences():
    reference = np.random.default_rng(0).integers(0, 200, size=(32, 32, 3), dtype=np.uint8)
    assert picture_mse(reference + np.uint8(5), reference) == 25
    assert psnr_db([25.0]) == pytest.approx(20 * np.log10(255 / 5))
    assert picture_ssim(reference, reference) == 1
    noise = np.random.default_rng(1).integers(0, 200, size=(32, 32, 3), dtype=np.uint8)
    assert picture_ssim(noise, reference) < 0.2 < 0.8 < picture_ssim(reference + np.uint8(2), reference)


def test_identical_pictures_do_not_drown_the_others():
    assert psnr_db([0.0, 50.0]) == psnr_db([25.0, 25.0])
    assert psnr_db([0.0, 0.0]) is None


def test_pictures_of_another_kind_are_refused():
    picture = np.zeros((16, 16, 3), dtype=np.uint8)
    with pytest.raises(ValueError, match="float64"):
        picture_mse(picture / 255, picture)
    with pytest.raises(ValueError, match="its reference"):
        picture_ssim(picture, picture[:8])


def test_one_departed_sample_decides_no_mean():
    errors = np.array([[1.0, 2.0, 3.0, 900.0], [2.0, 0.0, 0.0, 0.0]])
    found = limited(errors)
    assert np.array_equal(found[0], [1.0, 2.0, 3.0, 25.0])  # ten medians of 2.5
    assert np.array_equal(found[1], errors[1])  # a median of 0 says nothing about what is far
    assert np.array_equal(limited(found), found)
