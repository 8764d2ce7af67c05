"""What can be done to pictures in CLIP's space (Section 3): each is a pair (z_image, x_T).

`UnCLIP` has these as methods. B pictures, D CLIP embedding, R the decoder's side.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from unclip.clip import sphere
from unclip.conditioning import Cond
from unclip.diffusion.inpainting import Kept, mask_at
from unclip.errors import ConfigError
from unclip.images import fit_square, to_tensor
from unclip.inputs import Picture, as_embeddings, as_number, as_picture, as_pictures, as_seeds
from unclip.options import Options
from unclip.progress import Progress
from unclip.randomness import generator, noise_of
from unclip.stack import AnyStack, Stack
from unclip.stages import decoder as decoders
from unclip.stages.resident import resident
from unclip.stages.stage import Manner, Start

STEPS = 50  # of an inversion and of the way back, unless asked for others


def exact(pipe: AnyStack) -> AnyStack:
    """A model that draws as inverted noise wants it: DDIM, eta 0, no guidance, nothing clipped."""
    return pipe.with_decoder_sampling(decoders.exact(STEPS))


def anew(pipe: AnyStack, strength: float) -> AnyStack:
    """A model that draws as `inpaint` does: DDIM, eta 0, in so much of 50 steps.

    **Raises**: `ConfigError` for a strength outside (0, 1].
    """
    if not 0 < strength <= 1:
        raise ConfigError(f"strength = {strength}: must be above 0, and at most 1")
    usual = {"sampler": "ddim", "steps": math.ceil(strength * STEPS), "eta": 0.0}
    own = pipe.need("decoder", "pictures").sampling
    return pipe.with_decoder_sampling(own.model_copy(update=usual))


def invert(
    pipe: Stack,
    images: Picture | Sequence[Picture],
    z_image: Any = None,
    steps: int = STEPS,
    progress: Progress = False,
) -> Tensor:
    """x_T of pictures, padded to squares: the noise from which `redraw` draws them again.

    `z_image` are their embeddings, if they are known. **Shapes**: B pictures, z_image (B, D) →
    (B, 3, R, R). **Raises**: `ConfigError` for embeddings that do not fit, or steps that can't be.
    """
    steps = as_number("steps", steps, 1)
    decoder, pictures = pipe.need("decoder", "inversion"), as_pictures(images)
    z = as_embeddings(pipe.encode_image(pictures) if z_image is None else z_image, decoder.width)
    if len(z) != len(pictures):
        raise ConfigError(f"{len(z)} embeddings for {len(pictures)} pictures")
    x = torch.stack([to_tensor(fit_square(p, decoder.side)) for p in pictures]).to(pipe.device)
    read = pipe.reader
    text = None if read.clip is None else read.text([""] * len(x))  # as when redrawn
    cond = Cond(image_embed=z.to(pipe.device), text=text)
    how = Manner(pipe.dtype, progress=progress)
    with resident([decoder.network], pipe.device):
        return decoders.inverted(decoder, x, cond, steps, how)


def pair(
    pipe: Stack, images: Picture | Sequence[Picture], options: dict[str, Any]
) -> tuple[Tensor, Tensor]:
    """z_image and x_T of pictures, by `invert` in as many steps as these options of `redraw` ask
    for. **Shapes**: B pictures → (B, D), (B, 3, R, R)."""
    opts, z_image = Options.of(options), pipe.encode_image(images)
    steps = opts.sampling(exact(pipe).need("decoder", "inversion")).steps
    return z_image, invert(pipe, images, z_image, steps, opts.progress)


def noise(pipe: Stack, seeds: Sequence[int]) -> Tensor:
    """An x_T for each seed, of other numbers than what else is drawn by that seed: the prior's, and
    fresh noise on the way. **Shapes**: B seeds → (B, 3, R, R)."""
    generators = [generator(seed, "x_T") for seed in seeds]
    return noise_of(generators, pipe.need("decoder", "pictures").shape)


def redraw(
    pipe: Stack,
    z_image: Any,
    x_T: Tensor,
    seed: int | Sequence[int] | None = 0,
    **options: Any,
) -> Iterator[Image.Image]:
    """Pictures of pairs, the way back of `invert`: by DDIM in 50 steps, without guidance.

    `eta` above 0 leaves x_T behind, up to variations at 1. `seed`, or each picture's own, is for
    that and the upsamplers. **Shapes**: (B, D), (B, 3, R, R).
    """
    return exact(pipe).iterate(seed=seed, z_image=z_image, x_T=x_T, **options)


def vary(
    pipe: Stack, image: Picture | Sequence[Picture], n: int, seed: int | None, **options: Any
) -> Iterator[Image.Image]:
    """n variations from each picture's own x_T: at eta 0 they are `reconstruct` (Section 3.1)."""
    n = as_number("n", n, 1)
    z_image, x_T = pair(pipe, image, options)
    x_T, own = x_T.repeat_interleave(n, 0), exact(pipe)
    opts = own.varied(Options.of(options))
    return own.iterate(None, n, seed, z_image=z_image, x_T=x_T, options=opts)


def reconstruct(pipe: Stack, image: Picture, seed: int | None = 0, **options: Any) -> Image.Image:
    """A picture from its own z_image and x_T: what a pair can say of it."""
    return next(redraw(pipe, *pair(pipe, as_picture(image), options), seed, **options))


def interpolate(
    pipe: Stack,
    images: Sequence[Picture],
    frames: int = 9,
    *,
    fixed_noise: bool = False,
    seed: int | None = 0,
    **options: Any,
) -> Iterator[Image.Image]:
    """Pictures between pictures: z_image on the great circle, x_T too, or fixed (Section 3.2).

    So many frames from each picture to the next, both included; at the ends it is `reconstruct`.
    With `fixed_noise` x_T is drawn once by the seed, and the ends are variations of the pictures.

    **Raises**: `ConfigError` for fewer than two pictures or two frames.
    """
    pictures = as_pictures(images)
    if len(pictures) < 2:
        raise ConfigError("1 picture: two or more are needed to go between")
    frames = as_number("frames", frames, 2)  # the first and the last picture
    first = as_seeds(seed, 1)
    if fixed_noise:
        z_image, x_T = pipe.encode_image(pictures), noise(pipe, first)
    else:
        z_image, ends = pair(pipe, pictures, options)
        x_T = _between(ends, frames)
    z = _between(z_image, frames)
    return redraw(pipe, z, x_T, first * len(z), **options)


def _between(ends: Tensor, frames: int) -> Tensor:
    """So many on the great circle from each to the next. **Shapes**: (n, *) → (B, *)."""
    shares = torch.linspace(0, 1, frames)
    between = [
        sphere.slerp(a, b, share)
        for k, (a, b) in enumerate(pairwise(ends.flatten(1)))
        for share in shares[min(k, 1) :]  # one in the middle comes once
    ]
    return torch.stack(between).view(-1, *ends.shape[1:])


def text_diff(
    pipe: Stack,
    image: Picture,
    target: str,
    source: str = "",
    strength: float | Sequence[float] = 0.35,
    seed: int | None = 0,
    **options: Any,
) -> Iterator[Image.Image]:
    """A picture turned towards what the target caption adds to the source's (Section 3.3).

    z_image goes the share `strength` of the way to the difference of the two captions' embeddings,
    x_T stays that of the picture; strength 0 is `reconstruct`. One picture for each strength.

    **Raises**: `ConfigError` for captions of one embedding, or a strength that is not finite.
    """
    strengths = torch.tensor([strength] if isinstance(strength, int | float) else list(strength))
    if not len(strengths) or not bool(strengths.isfinite().all()):
        raise ConfigError(f"strength = {strength}: must be one or more finite numbers")
    z_image, x_T = pair(pipe, as_picture(image), options)  # (1, D), (1, 3, R, R)
    old, new = pipe.encode_text([source, target])  # (D,) each
    z = torch.cat([sphere.text_diff(z_image, old, new, float(s)) for s in strengths])
    return redraw(pipe, z, x_T, as_seeds(seed, 1) * len(z), **options)


def mix(
    pipe: Stack,
    parts: Sequence[Picture | Tensor],
    weights: Sequence[float] | None = None,
    n: int = 1,
    seed: int | None = 0,
    **options: Any,
) -> Iterator[Image.Image]:
    """Pictures of several pictures, texts and embeddings as one: the spherical mean of them.

    A string is a text and counts as what the prior makes of it; a picture's file is a `Path`. A
    single part of any weight is its variation.

    **Raises**: `ConfigError` without parts, or for weights that make no mean.
    """
    if not parts:
        raise ConfigError("nothing to mix: name pictures, texts or embeddings")
    pipe.need("decoder", "pictures")
    seeds, opts = as_seeds(seed, as_number("n", n, 1)), Options.of(options)
    texts = [part for part in parts if isinstance(part, str)]
    images = [part for part in parts if isinstance(part, Image.Image | Path | np.ndarray)]
    told: dict[str, Any] = {"seed": seeds[0], "options": opts.of_priors()}
    of_text = iter(pipe.text_to_embedding(texts, **told) if texts else ())
    of_image = iter(pipe.encode_image(images) if images else ())
    rows = []
    for part in parts:
        if isinstance(part, Tensor):
            width = pipe.need("decoder", "pictures").width
            rows.append(as_embeddings(part.reshape(1, -1), width)[0].to(pipe.device))
        else:
            rows.append(next(of_text if isinstance(part, str) else of_image).float())
    weights = [1.0] * len(rows) if weights is None else weights
    z_image = sphere.mix(torch.stack(rows), weights)[None]
    opts = pipe.varied(opts.of_pictures() if texts else opts)
    return pipe.iterate(n=n, seed=seeds[0], z_image=z_image, options=opts)


def inpaint(
    pipe: Stack,
    image: Picture,
    mask: Picture | None = None,
    prompt: str | None = None,
    strength: float = 1.0,
    n: int = 1,
    seed: int | None = 0,
    *,
    repeats: int = 1,
    **options: Any,
) -> Iterator[Image.Image]:
    """Pictures in which what is white in the mask is drawn anew, and the rest kept to the bit.

    Without a mask all of it is, and a `strength` below 1 starts from the picture with so much of
    the noise's time (image to image). Without a prompt the new part is told the picture's own
    embedding. `repeats` above 1 lets the two parts agree better (RePaint), in so many times the
    time. DDIM draws, unless another sampler is asked for.

    **Raises**: `ConfigError` for a strength outside (0, 1], a mask of another size or all black.
    """
    ddim, n, repeats = anew(pipe, strength), as_number("n", n, 1), as_number("repeats", repeats)
    picture, opts, seeds = as_picture(image), Options.of(options), as_seeds(seed, n)
    decoder, x_T, levels = pipe.need("decoder", "pictures"), None, None
    kept = None
    if mask is not None:
        kept = _kept(picture, mask, opts.size or pipe.sizes[-1]).repeat(n, pipe.device)
    if strength < 1:
        levels = max(1, round(strength * decoder.diffusion.config.steps))
        x_0 = to_tensor(fit_square(picture, decoder.side)).expand(n, -1, -1, -1)
        times = torch.full((n,), levels - 1)
        x_T = decoder.diffusion.q_sample(x_0, times, noise(pipe, seeds))
    z_image = pipe.encode_image(picture) if prompt is None else None
    start = Start(x_T, levels, kept, repeats)
    return ddim.iterate(prompt, n, seeds[0], z_image=z_image, x_T=start, options=opts)


def _kept(picture: Image.Image, mask: Picture, side: int) -> Kept:
    """What is black in a mask, of the picture as it is at that side."""
    if isinstance(mask, np.ndarray) and mask.dtype == np.bool_:
        mask = mask.astype(np.uint8) * 255
    shape = as_picture(mask)
    if shape.size != picture.size:
        raise ConfigError(
            f"a mask of {shape.width} x {shape.height} for a picture of {picture.width} x "
            f"{picture.height}: they must have the same size"
        )
    longer = max(shape.size)
    square = Image.new("L", (longer, longer))  # black around it, where `pad_to_square` is white
    square.paste(shape.convert("L"), ((longer - shape.width) // 2, (longer - shape.height) // 2))
    white = torch.from_numpy(np.asarray(square) >= 128)[None, None]  # (1, 1, H, H)
    if not bool(white.any()):
        raise ConfigError("the mask is black everywhere: paint what is to be drawn anew white")
    return Kept(to_tensor(fit_square(picture, side))[None], mask_at(white, side))
