"""What a denoiser is told besides x_t and t (Section 2 of the paper), and how to leave it out.

B batch, D CLIP embedding, L text positions, W text width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor


class TextEncoding(NamedTuple):
    """What the frozen text encoder gives for B captions.

    **Shapes**: tokens (B, L, W) after the final norm; mask (B, L) bool, True = real token (the
    start and end tokens count as real); embed (B, D) raw `z_text`.
    """

    tokens: Tensor
    mask: Tensor
    embed: Tensor

    def length(self) -> int:
        """Positions up to the last real token of any row."""
        return int(self.mask.any(0).nonzero().max()) + 1

    def rows(self, index: Tensor | slice) -> TextEncoding:
        """The chosen rows."""
        return TextEncoding(*(part[index] for part in self))

    def repeat(self, n: int) -> TextEncoding:
        """Each row n times in a row (prompt-major)."""
        return TextEncoding(*(part.repeat_interleave(n, 0) for part in self))

    def to(self, device: torch.device | str, dtype: torch.dtype) -> TextEncoding:
        """The same on another device; the mask stays bool."""
        return TextEncoding(
            self.tokens.to(device, dtype), self.mask.to(device), self.embed.to(device, dtype)
        )


@dataclass(frozen=True)
class Cond:
    """The conditions of B samples; a part that a model does not use is None.

    Null text is a value (the encoded empty string with its mask); the null image embedding is a
    vector learned by the model and chosen by `keep_image`. Nothing is ever marked by zeros.

    **Shapes**: image_embed (B, D) raw `z_image`; keep_image (B,) bool, False = use the learned
    null vector; text: see `TextEncoding`; low_res (B, 3, H, W) already resized to x_t's size; known
    (B, 4, H, W) what an inpainting decoder is shown: pictures, 0 where they are unknown, and 1 in a
    last channel where they aren't; None is nothing of them.
    `cache` holds what `model.prepare` computed once for all steps; its tensors have B rows.
    """

    image_embed: Tensor | None = None
    keep_image: Tensor | None = None
    text: TextEncoding | None = None
    low_res: Tensor | None = None
    known: Tensor | None = None
    cache: Any = None

    def drop(
        self,
        null_text: TextEncoding | None,
        *,
        drop_image: Tensor | None = None,
        drop_text: Tensor | None = None,
    ) -> Cond:
        """Leave out the image embedding or the text in chosen rows (classifier-free guidance).

        **Shapes**: drop_image, drop_text (B,) bool; null_text has one row.
        """
        assert self.cache is None, "drop conditions before model.prepare"
        cond = self
        if drop_image is not None and self.image_embed is not None:
            cond = replace(cond, keep_image=self.kept() & ~drop_image)
        if drop_text is not None and self.text is not None:
            assert null_text is not None, "dropping text needs the encoded empty string"
            rows = zip(self.text, null_text, strict=True)
            cond = replace(
                cond,
                text=TextEncoding(
                    *(torch.where(_like(drop_text, kept), null, kept) for kept, null in rows)
                ),
            )
        return cond

    def null(self, null_text: TextEncoding | None) -> Cond:
        """The same with no image embedding and no text; the low-resolution image stays."""
        everywhere = torch.ones(len(self), dtype=torch.bool, device=self.device)
        return self.drop(null_text, drop_image=everywhere, drop_text=everywhere)

    def kept(self) -> Tensor:
        """Where the image embedding is not left out. **Shapes**: → (B,) bool."""
        if self.keep_image is None:
            return torch.ones(len(self), dtype=torch.bool, device=self.device)
        return self.keep_image

    def rows(self, index: Tensor | slice) -> Cond:
        """The chosen rows, before `model.prepare`."""
        assert self.cache is None, "choose rows before model.prepare"
        parts: dict[str, Any] = {}
        for field in fields(self):
            value = getattr(self, field.name)
            if value is not None:
                parts[field.name] = value.rows(index) if field.name == "text" else value[index]
        return Cond(**parts)

    @classmethod
    def cat(cls, conds: Sequence[Cond]) -> Cond:
        """Stack conditions along the batch, in order.

        **Raises**: `ValueError` if some of them have a part that others lack.
        """
        assert all(cond.cache is None for cond in conds), "stack conditions before model.prepare"
        parts: dict[str, Any] = {}
        for field in fields(cls):
            values = [getattr(cond, field.name) for cond in conds]
            if field.name == "keep_image" and any(v is not None for v in values):
                values = [cond.kept() for cond in conds]
            if all(value is None for value in values):
                parts[field.name] = None
            elif any(value is None for value in values):
                raise ValueError(f"some conditions have {field.name} and others do not")
            elif field.name == "text":
                parts["text"] = TextEncoding(*map(torch.cat, zip(*values, strict=True)))
            else:
                parts[field.name] = torch.cat(values)
        return cls(**parts)

    def __len__(self) -> int:
        return len(self._first())

    @property
    def device(self) -> torch.device:
        """Where the conditions live."""
        return self._first().device

    def _first(self) -> Tensor:
        for part in (self.image_embed, self.text and self.text.embed, self.low_res):
            if part is not None:
                return part
        raise ValueError("an empty Cond has no batch size")


def _like(flag: Tensor, other: Tensor) -> Tensor:
    return flag.view(-1, *[1] * (other.ndim - 1))
