"""What is done to low-resolution images while upsamplers train (Section 2.1, Appendix C).

H high and h low resolution. Both are pure functions of one picture and its generator.
"""

from __future__ import annotations

import io
import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from unclip.errors import ConfigError
from unclip.images import to_pil, to_tensor

Step = Callable[[Tensor, torch.Generator], Tensor]


def blur(low: Tensor, sigma: tuple[float, float], generator: torch.Generator) -> Tensor:
    """Gaussian blur of kernel 3 and a sigma from a range, as the 64 → 256 stage trains with.

    **Shapes**: (3, h, w) → (3, h, w), [-1, 1]. **Source**: SR3 (Saharia et al. 2021); the range:
    cascaded diffusion (Ho et al. 2021), Section 3.2.
    """
    drawn = sigma[0] + (sigma[1] - sigma[0]) * _uniform(generator)
    return _convolve(low, gaussian_kernel(1, torch.eye(2) * drawn**2))


def bsr(high: Tensor, size: int, generator: torch.Generator) -> Tensor:
    """BSR degradation to `size` pixels, as the 256 → 1024 stage trains with.

    Two blurs, a random resize down, the resize to `size`, noise and JPEG in random order, then a
    final JPEG: the light variant that latent diffusion uses.

    **Shapes**: high (3, H, H) → (3, size, size), [-1, 1].
    **Raises**: `ConfigError` when `size` exceeds H.
    **Source**: Zhang et al. 2021 (arXiv 2103.14006), Section 3; constants of its light variant.
    """
    height, width = high.shape[-2:]
    if height != width or size > height:
        raise ConfigError(
            f"can't degrade {height} x {width} to {size} x {size}: want a larger square"
        )
    ratio = height / size
    steps: list[Step] = [
        lambda x, g: _random_blur(x, ratio, g),
        lambda x, g: _random_blur(x, ratio, g),
        lambda x, g: _random_shrink(x, ratio, g),
        lambda x, g: _random_resize(x, size, g),
        _noise,
        lambda x, g: _random_jpeg(x, g) if _uniform(g) < 0.9 else x,
    ]
    order = torch.randperm(len(steps), generator=generator).tolist()
    first, second = sorted((order.index(2), order.index(3)))
    order[first], order[second] = 2, 3  # the resize to `size` comes after the random one
    x = high
    for k in order:
        x = steps[k](x, generator).clamp(-1, 1)
    return _random_jpeg(x, generator)


def gaussian_kernel(radius: int, covariance: Tensor) -> Tensor:
    """A normalised Gaussian. **Shapes**: covariance (2, 2) in pixels² → (2 radius + 1,) * 2."""
    axis = torch.arange(-radius, radius + 1, dtype=torch.float32)
    points = torch.stack(torch.meshgrid(axis, axis, indexing="xy"), -1)
    exponent = torch.einsum("hwi,ij,hwj->hw", points, torch.linalg.inv(covariance), points)
    kernel = torch.exp(-exponent / 2)
    return kernel / kernel.sum()


def _convolve(x: Tensor, kernel: Tensor) -> Tensor:
    radius = kernel.shape[-1] // 2
    padded = F.pad(x[None], (radius,) * 4, mode="replicate")
    padded = padded.contiguous(memory_format=torch.channels_last)  # five to ten times faster
    weight = kernel.to(x).expand(len(x), 1, -1, -1)  # each colour by itself
    return F.conv2d(padded, weight, groups=len(x))[0].contiguous()


def _random_blur(x: Tensor, ratio: float, g: torch.Generator) -> Tensor:
    """Half the time isotropic, else of random axes and angle; wider for larger ratios."""
    isotropic = _uniform(g) < 0.5
    turn = _uniform(g) * math.pi
    if isotropic:
        sigma = (2 + 0.2 * ratio) / 4 * _uniform(g)
        variances = torch.tensor([sigma**2, sigma**2])
    else:
        variances = (4 + ratio) / 4 * torch.rand(2, generator=g)
    variances = variances + 1e-3  # a width of nought has no inverse; this blurs nothing
    axes = torch.tensor([[math.cos(turn), -math.sin(turn)], [math.sin(turn), math.cos(turn)]])
    radius = min(10, math.ceil(3 * float(variances.max().sqrt())))
    return _convolve(x, gaussian_kernel(radius, axes @ variances.diag() @ axes.T))


def _random_shrink(x: Tensor, ratio: float, g: torch.Generator) -> Tensor:
    """Four times in five a resize down by a random factor, which may go below the final size."""
    happens = _uniform(g) < 0.8
    factor = 1 + (2 * ratio - 1) * _uniform(g)
    return _random_resize(x, max(1, round(x.shape[-1] / factor)), g) if happens else x


def _random_resize(x: Tensor, size: int, g: torch.Generator) -> Tensor:
    """Resize by a random method."""
    mode = ("area", "bilinear", "bicubic")[int(torch.randint(3, (), generator=g))]
    if mode == "area":
        return F.interpolate(x[None], (size, size), mode=mode)[0]
    return F.interpolate(x[None], (size, size), mode=mode, antialias=True, align_corners=False)[0]


def _noise(x: Tensor, g: torch.Generator) -> Tensor:
    """Gaussian noise of 1 to 2 grey levels, coloured or grey."""
    level = (1 + _uniform(g)) / 127.5
    channels = 3 if _uniform(g) < 0.6 else 1
    return x + level * torch.randn(channels, *x.shape[-2:], generator=g)


def _random_jpeg(x: Tensor, g: torch.Generator) -> Tensor:
    """JPEG of quality 80 to 95."""
    loss = 5 + 15 * _uniform(g)
    file = io.BytesIO()
    to_pil(x).save(file, "JPEG", quality=round(100 - loss))
    with Image.open(file, formats=("JPEG",)) as image:
        return to_tensor(image)


def _uniform(g: torch.Generator) -> float:
    return float(torch.rand((), generator=g))
