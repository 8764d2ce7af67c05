"""What can be trained: one table, a row a training, with its configuration and its work."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from accelerate import Accelerator

from unclip.clip.encoder import FrozenCLIP
from unclip.config import Config, read_yaml
from unclip.data.sample import Dataset
from unclip.errors import ConfigError
from unclip.training.ar_prior import ArPriorRun, train_ar_prior
from unclip.training.clip import ClipRun, train_clip
from unclip.training.clip_text import ClipTextRun, open_clip_text, train_clip_text
from unclip.training.decoder import DecoderRun, open_decoder, train_decoder
from unclip.training.prior import PriorRun, open_pairs, train_prior
from unclip.training.run import training_of
from unclip.training.upsampler import UpsamplerRun, train_upsampler


def open_pictures(run: Any, accelerator: Accelerator) -> tuple[Dataset, None]:
    """What a training learns from that needs no encoder, which would be beside it."""
    return run.data.open(run.data.train), None


@dataclass(frozen=True)
class Trainer:
    """A training: the schema of its configuration, what it opens first (its data, and the encoder
    beside it), what is called to train, and what that does."""

    schema: type[Config]
    opens: Callable[[Any, Accelerator], tuple[Dataset, FrozenCLIP | None]]
    train: Callable[[Any, Accelerator], object]
    says: str


TRAINERS = {
    "clip": Trainer(
        ClipRun, open_pictures, train_clip, "Train a CLIP encoder from scratch (Section 2)."
    ),
    "clip_text": Trainer(
        ClipTextRun,
        open_clip_text,
        train_clip_text,
        "Teach a trained CLIP's text tower more words (Section 2).",
    ),
    "prior": Trainer(PriorRun, open_pairs, train_prior, "Train the diffusion prior (Section 2.2)."),
    "ar_prior": Trainer(
        ArPriorRun, open_pairs, train_ar_prior, "Train the autoregressive prior (Section 2.2)."
    ),
    "decoder": Trainer(DecoderRun, open_decoder, train_decoder, "Train the decoder (Section 2.1)."),
    "upsampler": Trainer(
        UpsamplerRun, open_pictures, train_upsampler, "Train an upsampler (Section 2.1)."
    ),
}


def trained_by(config: str | Path) -> str:
    """What a configuration trains, by its keys. **Raises**: `ConfigError` if that can't be said."""
    name = training_of(read_yaml(config))
    if name is None:
        raise ConfigError(f"{config} is no configuration of a training: {', '.join(TRAINERS)}")
    return name
