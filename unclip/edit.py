"""What can be done to pictures in CLIP's space (Section 3): each is a pair (z_image, x_T).

`UnCLIP` has these as methods. B pictures, D CLIP embedding, R the decoder's side.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import torch
from PIL.Image import Image
from torch import Tensor

from unclip.clip import sphere
from unclip.errors import ConfigError

STEPS = 50  # of an inversion, and of the way back


class Pipe(Protocol):
    """What is asked of the pipeline here."""

    def encode_image(self, images: Image | Sequence[Image]) -> Tensor:
        """**Shapes**: B pictures → (B, D)."""
        ...

    def encode_text(self, prompts: str | Sequence[str]) -> Tensor:
        """**Shapes**: B prompts → (B, D)."""
        ...

    def text_to_embedding(
        self, prompt: str | Sequence[str], n: int = 1, seed: int = 0, **options: Any
    ) -> Tensor:
        """**Shapes**: B prompts → (B n, D)."""
        ...

    def invert(
        self, images: Image | Sequence[Image], z_image: Tensor | None = None, steps: int = STEPS
    ) -> Tensor:
        """**Shapes**: B pictures → (B, 3, R, R)."""
        ...

    def noise(self, seeds: Sequence[int]) -> Tensor:
        """**Shapes**: B seeds → (B, 3, R, R)."""
        ...

    def redraw(self, z_image: Tensor, x_T: Tensor, **options: Any) -> list[Image]:
        """Pictures of pairs, the way back of `invert`. **Shapes**: (B, D), (B, 3, R, R)."""
        ...

    def image_from_embedding(
        self, z_image: Tensor, n: int = 1, seed: int = 0, **options: Any
    ) -> list[Image]:
        """**Shapes**: (B, D) → B n pictures."""
        ...


def reconstruct(pipe: Pipe, image: Image, steps: int = STEPS, **options: Any) -> Image:
    """A picture from its own z_image and x_T: what a pair can say of it."""
    z_image = pipe.encode_image(image)
    x_T = pipe.invert(image, z_image, steps)
    return pipe.redraw(z_image, x_T, steps=steps, **options)[0]


def interpolate(
    pipe: Pipe,
    images: Sequence[Image],
    frames: int = 9,
    *,
    fixed_noise: bool = False,
    seed: int = 0,
    steps: int = STEPS,
    **options: Any,
) -> list[Image]:
    """Pictures between pictures: z_image on the great circle, x_T too, or fixed (Section 3.2).

    So many frames from each picture to the next, both included; at the ends it is `reconstruct`.
    With `fixed_noise` x_T is drawn once by the seed, and the ends are variations of the pictures.

    **Raises**: `ConfigError` for fewer than two pictures or two frames.
    """
    if len(images) < 2:
        raise ConfigError(f"{len(images)} picture: two or more are needed to go between")
    if frames < 2:
        raise ConfigError(f"frames = {frames}: at least 2, the first and the last picture")
    z_image = pipe.encode_image(images)  # (n, D)
    x_T = None if fixed_noise else pipe.invert(images, z_image, steps)  # (n, 3, R, R)
    shares = torch.linspace(0, 1, frames)
    z, noise = [], []
    for k in range(len(images) - 1):
        for share in shares[min(k, 1) :]:  # a picture in the middle comes once
            z.append(sphere.slerp(z_image[k], z_image[k + 1], share))
            if x_T is not None:
                a, b = x_T[k].flatten(), x_T[k + 1].flatten()
                noise.append(sphere.slerp(a, b, share).view_as(x_T[k]))
    drawn = pipe.noise([seed]).expand(len(z), -1, -1, -1) if x_T is None else torch.stack(noise)
    return pipe.redraw(torch.stack(z), drawn, seed=seed, steps=steps, **options)


def text_diff(
    pipe: Pipe,
    image: Image,
    target: str,
    source: str = "",
    strength: float | Sequence[float] = 0.35,
    steps: int = STEPS,
    **options: Any,
) -> Image | list[Image]:
    """A picture turned towards what the target caption adds to the source's (Section 3.3).

    z_image goes the share `strength` of the way to the difference of the two captions' embeddings,
    x_T stays that of the picture; strength 0 is `reconstruct`. Several strengths give a list.

    **Raises**: `ConfigError` for captions of one embedding, or a strength that is not finite.
    """
    one = isinstance(strength, int | float)
    strengths = torch.tensor([strength] if isinstance(strength, int | float) else list(strength))
    if not len(strengths) or not bool(strengths.isfinite().all()):
        raise ConfigError(f"strength = {strength}: must be one or more finite numbers")
    z_image = pipe.encode_image(image)  # (1, D)
    old, new = pipe.encode_text([source, target])  # (D,) each
    z = torch.cat([sphere.text_diff(z_image, old, new, float(s)) for s in strengths])
    x_T = pipe.invert(image, z_image, steps).expand(len(z), -1, -1, -1)
    drawn = pipe.redraw(z, x_T, steps=steps, **options)
    return drawn[0] if one else drawn


def mix(
    pipe: Pipe,
    parts: Sequence[Image | str | Tensor],
    weights: Sequence[float] | None = None,
    n: int = 1,
    seed: int = 0,
    **options: Any,
) -> list[Image]:
    """Pictures of several pictures, texts and embeddings as one: the spherical mean of them.

    Texts count as what the prior makes of them. A single part of any weight is its variation.

    **Raises**: `ConfigError` without parts, or for weights that make no mean.
    """
    if not parts:
        raise ConfigError("nothing to mix: name pictures, texts or embeddings")
    texts = [part for part in parts if isinstance(part, str)]
    images = [part for part in parts if isinstance(part, Image)]
    of_text = iter(pipe.text_to_embedding(texts, seed=seed)) if texts else iter(())
    of_image = iter(pipe.encode_image(images)) if images else iter(())
    rows = []
    for part in parts:
        if isinstance(part, str):
            rows.append(next(of_text))
        elif isinstance(part, Image):
            rows.append(next(of_image))
        else:
            rows.append(part.reshape(-1).float())
    z_image = sphere.mix(torch.stack([row.float() for row in rows]), weights or [1.0] * len(rows))
    return pipe.image_from_embedding(z_image[None], n=n, seed=seed, **options)
