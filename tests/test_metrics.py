"""Metrics against second implementations and their invariants."""

import math

import pytest
import torch
from skimage.metrics import peak_signal_noise_ratio, structural_similarity

from accel import AccelError, metrics


def pictures(seed: int, size: int = 48, count: int = 2) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    small = torch.rand(count, 3, 8, 8, generator=generator)
    return torch.nn.functional.interpolate(small, size, mode="bilinear").clamp(0, 1)


def noisy(x: torch.Tensor, amount: float) -> torch.Tensor:
    generator = torch.Generator().manual_seed(9)
    return (x + amount * torch.randn(x.shape, generator=generator)).clamp(0, 1)


def test_psnr_equals_scikit_image() -> None:
    a, b = pictures(0), noisy(pictures(0), 0.1)
    expected = peak_signal_noise_ratio(a.numpy(), b.numpy(), data_range=1.0)
    assert metrics.psnr(a, b) == pytest.approx(expected, abs=1e-4)
    assert metrics.psnr(a, a) == math.inf


def test_ssim_equals_scikit_image_and_pytorch_msssim() -> None:
    from pytorch_msssim import ssim

    a, b = pictures(0), noisy(pictures(0), 0.1)
    assert metrics.ssim(a, b) == pytest.approx(float(ssim(a, b, data_range=1.0)), abs=1e-4)
    by_skimage = [
        structural_similarity(
            one.numpy(),
            two.numpy(),
            channel_axis=0,
            gaussian_weights=True,
            sigma=1.5,
            use_sample_covariance=False,
            data_range=1.0,
        )
        for one, two in zip(a, b, strict=True)
    ]
    assert metrics.ssim(a, b) == pytest.approx(sum(by_skimage) / 2, abs=2e-3)


def test_ms_ssim_equals_pytorch_msssim() -> None:
    from pytorch_msssim import ms_ssim

    a, b = pictures(0, 192), noisy(pictures(0, 192), 0.1)
    assert metrics.ms_ssim(a, b) == pytest.approx(float(ms_ssim(a, b, data_range=1.0)), abs=1e-3)


def test_small_pictures_are_refused_with_the_reason() -> None:
    with pytest.raises(AccelError, match="too small for five scales"):
        metrics.ms_ssim(pictures(0), pictures(1))
    with pytest.raises(AccelError, match="at least 11"):
        metrics.ssim(torch.rand(1, 3, 8, 8), torch.rand(1, 3, 8, 8))


@pytest.mark.parametrize("metric", [metrics.ssim, metrics.feature_distance, metrics.psnr])
def test_more_noise_is_worse(metric) -> None:
    a = pictures(0)
    values = [metric(a, noisy(a, amount)) for amount in (0.02, 0.1, 0.3)]
    falling = metric is not metrics.feature_distance
    assert values == sorted(values, reverse=falling)


def test_equal_pictures_are_perfect_and_order_does_not_matter() -> None:
    a, b = pictures(0), pictures(1)
    assert metrics.ssim(a, a) == pytest.approx(1)
    assert metrics.feature_distance(a, a) == 0
    assert metrics.feature_distance(a, b) == pytest.approx(metrics.feature_distance(b, a))


def test_videos_count_as_their_frames() -> None:
    a, b = pictures(0, count=4), noisy(pictures(0, count=4), 0.1)
    assert metrics.ssim(a.view(2, 2, 3, 48, 48), b.view(2, 2, 3, 48, 48)) == metrics.ssim(a, b)


def test_kid_equals_a_double_loop() -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(7, 5, generator=generator, dtype=torch.float64)
    y = torch.randn(6, 5, generator=generator, dtype=torch.float64) + 0.5

    def kernel(a: torch.Tensor, b: torch.Tensor) -> float:
        return float((a @ b / 5 + 1) ** 3)

    xx = sum(kernel(x[i], x[j]) for i in range(7) for j in range(7) if i != j) / 42
    yy = sum(kernel(y[i], y[j]) for i in range(6) for j in range(6) if i != j) / 30
    xy = sum(kernel(a, b) for a in x for b in y) / 42
    assert metrics.kid(x, y) == pytest.approx(xx + yy - 2 * xy)


def test_kid_tells_distributions_apart() -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(200, 8, generator=generator)
    assert abs(metrics.kid(x[:100], x[100:])) < 0.1 * metrics.kid(x[:100], x[100:] + 1)


def test_shapes_must_agree() -> None:
    with pytest.raises(AccelError, match="equal shapes"):
        metrics.psnr(torch.rand(1, 3, 8, 8), torch.rand(1, 3, 8, 9))
    with pytest.raises(AccelError, match="same number of columns"):
        metrics.kid(torch.rand(4, 3), torch.rand(4, 2))
