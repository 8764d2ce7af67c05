"""Training the autoregressive prior: z_image's components one after the other (Section 2.2).

B batch, D CLIP embedding, k components.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch.nn.functional as F
from accelerate import Accelerator
from PIL import Image
from torch import Tensor, nn

from unclip.clip.encoder import FrozenCLIP
from unclip.conditioning import Cond
from unclip.config import Config, Place
from unclip.data.open import DataConfig
from unclip.data.sample import Batch, Dataset
from unclip.models.ar_prior import ArPrior, ArPriorConfig
from unclip.stages.ar_prior import ArSamplingConfig, ArStage
from unclip.training.drafts import fit_quantizer
from unclip.training.fit import TrainConfig, fit
from unclip.training.prior import nearest_pictures, open_pairs
from unclip.training.task import (
    DropConfig,
    Prepared,
    Shown,
    check_widths,
    drop,
    embeddings_of,
    start_from,
    stream,
)


class ArPriorRun(Config):
    """A training run of the autoregressive prior; `clip` names the frozen encoder."""

    clip: Place
    data: DataConfig
    model: ArPriorConfig
    sampling: ArSamplingConfig
    drop: DropConfig
    train: TrainConfig


class ArPriorTask:
    """Predict each quantised component of z_image from its caption and those before it."""

    name = "ar_prior"

    def __init__(self, run: ArPriorRun, clip: FrozenCLIP, train: Dataset | None = None):
        check_widths(clip, run.clip, run.model.embed, run.model.text_width)
        self.run, self.clip, self.shown = run, clip, Shown(run.data, train)
        self.model: nn.Module = ArPrior(run.model)
        self.product: nn.Module = self.model
        self.stage = ArStage.of(self.model, run.sampling, clip.fingerprint)

    def loss(self, model: Any, batch: Batch, step: int) -> dict[str, Tensor]:
        """Cross-entropy in nats a component, and the share of buckets guessed right.

        **Shapes**: → (B,).
        """
        quantizer = self.stage.network.quantizer
        z_image = embeddings_of(self.clip, batch)
        text = self.clip.encode_text(batch.text)
        dot = quantizer.dot(z_image, text.embed)  # of the caption, though it may be dropped
        cond = Cond(text=text)
        cond = cond.drop(self.clip.null_text, drop_text=drop(self.run, "text", batch.ids, z_image))
        numbers = quantizer.quantize(z_image)  # (B, k)
        logits = model(numbers, dot, cond).float()  # (B, k, V)
        loss = F.cross_entropy(logits.transpose(1, 2), numbers, reduction="none").mean(1)
        right = (logits.argmax(-1) == numbers).float().mean(1)
        return {"loss": loss, "right": right}

    def preview(self, model: Any) -> Image.Image | None:
        """Each row: a validation picture, then those nearest to what its caption gave."""
        return nearest_pictures(self.stage, model, self.run.data, self.shown, self.clip)

    def describe(self, tensors: dict[str, Tensor]) -> dict[str, Any]:
        """The stage's `config.json`."""
        return self.stage.describe()

    def start_from(self, path: str) -> None:
        """Take over the weights of the same stage."""
        start_from(self.stage, path)


def train_ar_prior(run: ArPriorRun, accelerator: Accelerator) -> Path:
    """Train the autoregressive prior; the newest checkpoint's folder."""
    dataset, clip = open_pairs(run, accelerator)
    task = ArPriorTask(run, clip, dataset)

    def begin() -> None:
        fit_quantizer(task.stage.network.quantizer, clip, dataset, run.train.seed)

    made = Prepared(run.train.seed, None, clip.towers.tokenizer)
    return fit(task, stream(dataset, run, accelerator, made), run.train, run, accelerator, begin)
