"""Training the autoregressive prior: z_image's components one after the other (Section 2.2).

B batch, D CLIP embedding, k components.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch.nn.functional as F
from accelerate import Accelerator
from torch import Tensor

from unclip.conditioning import Cond
from unclip.config import Config, Place
from unclip.data.open import PairsConfig
from unclip.data.sample import Batch
from unclip.models.ar_prior import ArPriorConfig
from unclip.stages.ar_prior import ArSamplingConfig
from unclip.training.drafts import fit_quantizer
from unclip.training.fit import TrainConfig
from unclip.training.prior import PairsTask, open_pairs
from unclip.training.task import DropConfig, Prepared, embeddings_of, train


class ArPriorRun(Config):
    """A training run of the autoregressive prior; `clip` names the frozen encoder."""

    clip: Place
    data: PairsConfig
    model: ArPriorConfig
    sampling: ArSamplingConfig
    drop: DropConfig
    train: TrainConfig


class ArPriorTask(PairsTask):
    """Predict each quantised component of z_image from its caption and those before it."""

    run: ArPriorRun

    def loss(self, model: Any, batch: Batch, step: int) -> dict[str, Tensor]:
        """Cross-entropy in nats a component, and the share of buckets guessed right.

        **Shapes**: → (B,).
        """
        quantizer = self.stage.network.quantizer
        z_image = embeddings_of(self.clip, batch)
        text = self.clip.encode_text(batch.text)
        dot = quantizer.dot(z_image, text.embed)  # of the caption, though it may be dropped
        cond = self.drop(Cond(text=text), batch.ids)
        numbers = quantizer.quantize(z_image)  # (B, k)
        logits = model(numbers, dot, cond).float()  # (B, k, V)
        loss = F.cross_entropy(logits.transpose(1, 2), numbers, reduction="none").mean(1)
        right = (logits.argmax(-1) == numbers).float().mean(1)
        return {"loss": loss, "right": right}


def train_ar_prior(run: ArPriorRun, accelerator: Accelerator) -> Path:
    """Train the autoregressive prior; the newest checkpoint's folder."""
    dataset, clip = open_pairs(run, accelerator)
    task = ArPriorTask(run, clip, dataset)

    def begin() -> None:
        fit_quantizer(task.stage.network.quantizer, clip, dataset, run.train.seed)

    made = Prepared(run.train.seed, None, clip.towers.tokenizer)
    return train(task, run, dataset, accelerator, made, begin)
