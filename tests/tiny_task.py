"""A regression task small enough to train in milliseconds, and a script for several processes."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn

from unclip import randomness
from unclip.config import Config
from unclip.training.fit import TrainConfig, fit
from unclip.training.launch import main
from unclip.training.sharding import part
from unclip.training.start import load_weights


class TinyConfig(Config):
    train: TrainConfig
    dropout: float = 0.0
    bad_from: int = 1_000_000
    bad_until: int = 1_000_000
    bad_every: int = 1
    crash_at: int = 1_000_000
    kill_at: int = 1_000_000


@dataclass
class TinyBatch:
    ids: Tensor

    def to(self, device: torch.device) -> TinyBatch:
        return TinyBatch(self.ids.to(device))


class TinyModel(nn.Module):
    """A linear layer, a scaling buffer, dropout and a channels-last convolution."""

    def __init__(self, dropout: float) -> None:
        super().__init__()
        self.lift = nn.Linear(4, 8)
        self.dropout = nn.Dropout(dropout)
        self.mix = nn.Conv2d(2, 3, 2, bias=False).to(memory_format=torch.channels_last)
        self.out = nn.Linear(3, 1)
        self.register_buffer("scale", torch.tensor(0.5))

    def forward(self, x: Tensor) -> Tensor:
        h = self.dropout(self.lift(x) * self.scale).unflatten(1, (2, 2, 2))
        return self.out(self.mix(h).flatten(1))


class TinyTask:
    """Learn y = sum(x) from noise; B samples of 4 numbers."""

    name = "prior"

    def __init__(self, config: TinyConfig) -> None:
        torch.manual_seed(config.train.seed)
        self.config = config
        self.model: nn.Module = TinyModel(config.dropout)
        self.product = self.trained = self.model

    def loss(self, model: nn.Module, batch: TinyBatch, step: int) -> dict[str, Tensor]:
        x = randomness.normal(self.config.train.seed, "x", batch.ids, (4,))
        error = (model(x).squeeze(1) - x.sum(1)) ** 2
        within = self.config.bad_from <= step < self.config.bad_until
        within = within and step % self.config.bad_every == 0
        bad = within & (batch.ids == batch.ids[0])
        # Only the first sample of the global batch (of 8), so that processes disagree.
        bad = bad & (batch.ids % 8 == 0)
        odd = error.where(batch.ids % 2 == 1, torch.nan)
        loss = error * torch.where(bad, torch.nan, 1.0)
        return {"loss": loss, "absolute": error.sqrt(), "odd": odd}

    def preview(self, model: nn.Module) -> Image.Image:
        assert not model.training
        torch.rand(3)
        level = int(model(torch.ones(1, 4)).sigmoid() * 255)
        return Image.new("L", (2, 2), level)

    def describe(self, tensors: dict[str, Tensor]) -> dict[str, Any]:
        return {"width": 8}

    def start_from(self, path: str) -> None:
        load_weights(self.model, self.name, path)


def stream(config: TinyConfig, start: int, rank: int = 0, world: int = 1) -> Iterator[TinyBatch]:
    train = config.train
    per = train.batch // (train.accumulate * world)
    step = start
    while True:
        if step == config.crash_at:
            raise RuntimeError("crash")
        if step == config.kill_at and rank == world - 1 and not Path(train.out, "killed").exists():
            Path(train.out, "killed").touch()
            os.kill(os.getpid(), signal.SIGKILL)
        for micro in range(train.accumulate):
            first = step * train.batch + (micro * world + rank) * per
            yield TinyBatch(torch.arange(first, first + per))
        step += 1


def run(config: TinyConfig, accelerator) -> Path:  # type: ignore[no-untyped-def]
    rank, world = accelerator.process_index, accelerator.num_processes
    if accelerator.is_main_process:
        print(f"world {world}", flush=True)
    task = TinyTask(config)
    folder = fit(task, lambda s: stream(config, s, rank, world), config.train, config, accelerator)
    if accelerator.is_main_process:
        held = sum(part(p).numel() for p in task.model.parameters())
        print(f"holds {held} of {sum(p.numel() for p in task.model.parameters())}", flush=True)
    return folder


def start(*arguments: str) -> None:
    main(TinyConfig, run, "Train the tiny task.", arguments)


if __name__ == "__main__":
    start(*sys.argv[1:])
