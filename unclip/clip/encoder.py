"""The frozen CLIP encoder (Section 2): what it gives, and which one it is.

B batch, D CLIP embedding, L text positions, W text width, R the tower's picture side.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from unclip.clip.fingerprint import PROBE_TEXTS, Fingerprint, digest, probes
from unclip.clip.open import Parts, describe, open_encoder
from unclip.clip.preprocessing import PreprocessConfig, resize_and_crop, resize_pil
from unclip.clip.towers import OpenClipTowers, Towers, tokens
from unclip.conditioning import TextEncoding
from unclip.files.folder import write_stage
from unclip.images import to_rgb, to_tensor

# Gradients on their way through float16, which knows nothing below 6e-8: a sample's share of a
# batch's mean is often less.
RAISED = 2.0**14


class _Scaled(torch.autograd.Function):
    """A tensor as it is, and its gradient times a factor."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, factor: float) -> Tensor:
        ctx.factor = factor
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return ctx.factor * gradient, None


class FrozenCLIP(nn.Module):
    """CLIP's towers, frozen, in evaluation mode, with their own preprocessing and tokenizer.

    `width` D, `text_width` W, `context` L, `image_size` R. Embeddings are raw (not normalised).
    The towers passed in are frozen in place.
    """

    def __init__(self, towers: Towers, preprocess: PreprocessConfig, name: str) -> None:
        super().__init__()
        self.towers = towers.eval().requires_grad_(False)
        self.preprocess, self.name = preprocess, name
        self.width, self.text_width = towers.width, towers.text_width
        self.context, self.image_size = towers.tokenizer.context, preprocess.size
        self._null: TextEncoding | None = None
        self._pixels: Tensor | None = None

    @classmethod
    def load(
        cls, source: str, device: str | torch.device = "cpu", dtype: torch.dtype = torch.float32
    ) -> FrozenCLIP:
        """Load an encoder; `open_encoder` says which sources there are.

        Its fingerprint is that of its float32 towers, whatever it computes in later.

        **Raises**: `CheckpointError` if it can't be found or read; `ConfigError` if it is unclear.
        """
        clip = cls(*open_encoder(source)).to(device)
        if dtype != clip.dtype:
            _ = clip.fingerprint  # taken now and kept
        return clip.to(dtype)

    def save(self, folder: str | Path, dtype: torch.dtype | None = None) -> None:
        """Write the stage `clip` of a model folder; `load` reads it back."""
        ours = isinstance(self.towers, OpenClipTowers)
        weights: Any = self.towers.model if ours else self.towers  # open_clip's own names
        write_stage(folder, "clip", self.describe(), weights.state_dict(), dtype)

    def describe(self) -> dict[str, Any]:
        """What the `config.json` of its stage says.

        **Raises**: `CheckpointError` for what a model folder can't describe.
        """
        return {
            **describe(Parts(self.towers, self.preprocess, self.name)),
            "fingerprint": self.fingerprint.model_dump(),
        }

    def train(self, mode: bool = True) -> FrozenCLIP:
        """A frozen encoder stays in evaluation mode."""
        return super().train(False)

    @property
    def device(self) -> torch.device:
        """Where the towers are."""
        return next(self.towers.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        """The towers' precision, and that of the embeddings."""
        return next(self.towers.parameters()).dtype

    @torch.no_grad()
    def encode_image(self, images: Tensor) -> Tensor:
        """Raw image embeddings `z_image`.

        **Shapes**: (B, 3, H, W) of any size → (B, D). **Units**: pixels in [-1, 1].
        """
        with self._own_precision():
            return self.towers.encode_image(self._seen(images))

    def features(self, images: Tensor) -> list[Tensor]:
        """What the image tower sees of pictures, stage by stage; its gradient reaches the pictures.

        **Shapes**: (B, 3, H, W) of any size → (B, C, h, w) for each of its stages or blocks, in
        float32 where the towers are in float16. **Units**: pixels in [-1, 1].
        """
        with self._own_precision():
            if self.dtype != torch.float16:
                return self.towers.features(self._seen(images))
            seen = self._seen(_Scaled.apply(images.float(), 1 / RAISED))
            return [_Scaled.apply(x.float(), RAISED) for x in self.towers.features(seen)]

    def _seen(self, images: Tensor) -> Tensor:
        """Pictures as the tower wants them. **Shapes**: (B, 3, H, W) → (B, 3, R, R)."""
        x = images.to(self.device, torch.float32, non_blocking=True)
        x = resize_and_crop(x, self.preprocess)  # (B, 3, R, R)
        if self._pixels is None or self._pixels.device != x.device:
            pixels = torch.tensor([self.preprocess.mean, self.preprocess.std])
            self._pixels = pixels[..., None, None].to(x.device)
        mean, std = self._pixels  # (3, 1, 1)
        # Bicubic overshoots; an 8-bit picture, which the towers were trained on, can't.
        x = ((x + 1) / 2).clamp(0, 1)
        return ((x - mean) / std).to(self.dtype)

    def encode_pil(self, images: Sequence[Image.Image]) -> Tensor:
        """Raw image embeddings of PIL pictures, resized by PIL. **Shapes**: B pictures → (B, D)."""
        pixels = [to_tensor(resize_pil(to_rgb(image), self.preprocess)) for image in images]
        return self.encode_image(torch.stack(pixels))

    @torch.no_grad()
    def encode_text(self, texts: Sequence[str] | Tensor) -> TextEncoding:
        """The captions' token states after the final norm, their mask, and raw `z_text`.

        **Shapes**: B captions, or their `tokens` (2, B, L).
        """
        found = texts if isinstance(texts, Tensor) else tokens(self.towers.tokenizer, texts)
        ids, mask = found.to(self.device, non_blocking=True)  # (B, L)
        mask = mask.bool()
        with self._own_precision():
            states, embed = self.towers.encode_text(ids, mask)  # (B, L, W), (B, D)
        return TextEncoding(states, mask, embed)

    def _own_precision(self) -> torch.autocast:
        """Compute in the towers' precision also where a network around them does in another."""
        return torch.autocast(self.device.type, enabled=False)

    @property
    def has_images(self) -> bool:
        """Whether there is an image tower."""
        return getattr(self.towers, "vision", self.towers) is not None

    @property
    def null_text(self) -> TextEncoding:
        """The encoded empty string, one row."""
        if self._null is None or self._null.embed.device != self.device:
            self._null = self.encode_text([""])
        return self._null.to(self.device, self.dtype)

    @cached_property
    def norm(self) -> float:
        """The norm that raw embeddings usually have, of three pictures or sentences."""
        z = self.encode_image(probes()) if self.has_images else self.encode_text(PROBE_TEXTS).embed
        return float(z.float().norm(dim=-1).mean())

    @cached_property
    def fingerprint(self) -> Fingerprint:
        """What tells this encoder from others; equal for copies in other formats or precisions."""
        z_text = self.encode_text(PROBE_TEXTS).embed  # (3, D)
        # An encoder without image tower has no answer to the pictures.
        pictures = self.encode_image(probes()) if self.has_images else z_text.new_zeros(3, 0)
        unit = [F.normalize(z.float().cpu(), dim=-1) for z in (pictures, z_text)]
        return Fingerprint(
            name=self.name,
            width=self.width,
            text_width=self.text_width,
            context=self.context,
            tokenizer=digest(self.towers.tokenizer.raw(PROBE_TEXTS)),
            padding="on the right, masked",
            preprocessing=self.preprocess.describe(),
            probes=[[round(value, 6) for value in row] for part in unit for row in part.tolist()],
        )
