"""What CLIP learns from beside captions: pictures to restore, sentences of a teacher.

Both only help in training; neither is saved. B batch, D CLIP embedding, E teacher's width,
L text positions, R picture side, s restored side.
"""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass

import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from unclip.clip.contrastive import contrastive_loss
from unclip.clip.towers import OpenClipTowers
from unclip.config import Config
from unclip.images import resize
from unclip.models.layers import Draft, DraftConfig
from unclip.training.teacher import TaughtConfig


class RestoreConfig(Config):
    """A head that draws a small picture from the embedding, by least squares of its pixels.

    Contrast alone keeps what tells captions apart; what is drawn from an embedding needs the rest.
    """

    side: int = Field(default=32, gt=0)
    weight: float = Field(default=5.0, ge=0)
    noise: float = Field(default=0.0, ge=0)
    """Length of the noise on the unit-norm embedding: what it hides must lie further apart."""
    network: DraftConfig = DraftConfig(width=1024, blocks=2)


@dataclass(frozen=True)
class Lesson:
    """What goes into a forward pass beside pictures and captions.

    **Shapes**: noise (B, D); sentences, phrases (B, E); phrase_ids, phrase_mask (B, L).
    """

    noise: Tensor | None = None
    sentences: Tensor | None = None
    phrases: Tensor | None = None
    phrase_ids: Tensor | None = None
    phrase_mask: Tensor | None = None


class AidedCLIP(nn.Module):
    """CLIP with a head that restores pictures, a map from a teacher's sentences, or both."""

    def __init__(
        self,
        towers: OpenClipTowers,
        restore: RestoreConfig | None,
        teacher: TaughtConfig | None,
        teacher_width: int,
    ) -> None:
        super().__init__()
        self.towers, self.restore, self.teacher = towers, restore, teacher
        width = towers.width
        self.head = self.map = None
        if restore is not None:
            self.head = Draft(restore.network, width, 3 * restore.side**2, time=1)
            self.head.requires_grad_(True)
            self.head.gate.requires_grad_(False)  # nothing to weigh it against
        if teacher is not None:
            self.map = nn.Linear(teacher_width, width)

    def forward(
        self, images: Tensor, ids: Tensor, mask: Tensor, lesson: Lesson
    ) -> dict[str, Tensor]:
        """Everything that the losses compare, embeddings with unit norm.

        **Shapes**: (B, 3, R, R), (B, L), (B, L) → image, text (B, D), scale (); with a head
        restored (B, 3, s, s); with a teacher sentence, phrase, phrase_text (B, D).
        """
        z_image = F.normalize(self.towers.encode_image(images).float(), dim=-1)  # (B, D)
        out = {"image": z_image, "text": embed_text(self.towers, ids, mask)}
        out["scale"] = self.towers.model.logit_scale.exp()  # type: ignore[operator]
        if self.head is not None:
            out["restored"] = self.draw(z_image if lesson.noise is None else z_image + lesson.noise)
        if self.map is not None:
            assert lesson.sentences is not None and lesson.phrases is not None
            assert lesson.phrase_ids is not None and lesson.phrase_mask is not None
            out["sentence"] = F.normalize(self.map(lesson.sentences).float(), dim=-1)  # (B, D)
            out["phrase"] = F.normalize(self.map(lesson.phrases).float(), dim=-1)  # (B, D)
            out["phrase_text"] = embed_text(self.towers, lesson.phrase_ids, lesson.phrase_mask)
        return out

    def draw(self, z_image: Tensor) -> Tensor:
        """Small pictures. **Shapes**: (B, D) unit norm → (B, 3, s, s)."""
        assert self.head is not None and self.restore is not None
        side = self.restore.side
        flat = self.head(z_image * z_image.shape[1] ** 0.5)  # components of variance about one
        return flat.view(-1, 3, side, side)

    def error(self, z_image: Tensor, images: Tensor) -> Tensor:
        """Mean squared error of what the head draws. **Shapes**: (B, D), (B, 3, R, R) → (B,)."""
        assert self.restore is not None
        drawn = self.draw(F.normalize(z_image.float(), dim=-1)).float()
        return (drawn - resize(images, self.restore.side)).square().mean((1, 2, 3))

    def losses(self, out: dict[str, Tensor], images: Tensor, ids: Tensor) -> dict[str, Tensor]:
        """**Shapes**: `forward`'s, the pictures (B, 3, R, R), ids (B, L) → loss and parts (B,)."""
        found = contrastive_loss(out["image"], out["text"], ids, out["scale"])
        loss = found["contrast"] = found["loss"]
        if self.restore is not None:
            small = resize(images, self.restore.side)
            error = (out["restored"].float() - small).square().mean((1, 2, 3))
            loss = loss + self.restore.weight * error
            found["restored"] = error
        if self.teacher is not None:
            # The map learns from pictures only: it follows no text tower.
            taught = contrastive_loss(out["image"], out["sentence"], ids, out["scale"])
            found["taught"] = taught["loss"]
            found["captions_off"] = 1 - (out["text"] * out["sentence"].detach()).sum(-1)
            found["phrases_off"] = 1 - (out["phrase_text"] * out["phrase"].detach()).sum(-1)
            loss = loss + self.teacher.weight * taught["loss"]
            off = found["captions_off"] + found["phrases_off"]
            loss = loss + self.teacher.text_weight / 2 * off
        return {**found, "loss": loss}


def embed_text(towers: OpenClipTowers, ids: Tensor, mask: Tensor) -> Tensor:
    """Unit-norm embeddings of texts. **Shapes**: (B, L), (B, L) → (B, D) float32."""
    length = mask.shape[1]
    if ids.is_cpu:  # attention is causal: what comes after the text has no part in the result
        length = int(mask.sum(1).max())
    # Going backward in bf16, a CPU's fused attention over few keys takes four times as long.
    with sdpa_kernel(SDPBackend.MATH) if ids.is_cpu else nullcontext():
        _, z = towers.encode_text(ids[:, :length], mask[:, :length])
    return F.normalize(z.float(), dim=-1)
