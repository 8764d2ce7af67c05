"""What trainings share: their data, random draws, previews, where they start from, their loop."""

from __future__ import annotations

import itertools
import os
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from pydantic import Field
from torch import Tensor, nn

from unclip import randomness
from unclip.clip.encoder import FrozenCLIP
from unclip.clip.fingerprint import Fingerprint
from unclip.clip.towers import Tokenizer, tokens
from unclip.conditioning import Cond
from unclip.config import Config
from unclip.data.open import DataConfig
from unclip.data.order import batches
from unclip.data.sample import Batch, Dataset, Sample, fixed
from unclip.diffusion.process import GaussianDiffusion
from unclip.errors import UnclipWarning
from unclip.models.unet import dead_blocks
from unclip.precision import default_dtype
from unclip.stages import lora
from unclip.stages.ar_prior import ArStage
from unclip.stages.kinds import kind_of, stage_name
from unclip.stages.stage import Stage
from unclip.training.fit import Task, fit
from unclip.training.log import add_up, means_of
from unclip.training.start import adapted, check_widths, start_from

PREVIEWS = 8
HELD_OUT = 128  # samples of the validation set whose loss is logged, or a batch if that is more


class DropConfig(Config):
    """Shares of samples that train without a condition, for classifier-free guidance."""

    image: float = Field(0.0, ge=0, le=1)
    text: float = Field(0.0, ge=0, le=1)


def frozen_clip(name: str, accelerator: Accelerator) -> FrozenCLIP:
    """The encoder on this process's device; in half precision where an accelerator trains in it."""
    half = accelerator.mixed_precision != "no"
    dtype = default_dtype(accelerator.device) if half else torch.float32
    return FrozenCLIP.load(name, accelerator.device, dtype)


class Shown:
    """What previews show: the first pictures of the validation set, or where there is none of the
    training set, which is open already. They are read once and kept.

    **Raises**: as `open_dataset`, before anything is trained.
    """

    def __init__(self, data: DataConfig, train: Dataset | None = None) -> None:
        if data.val is None and train is not None:
            self.dataset = train
        else:
            self.dataset = data.open(data.val or data.train)
        self._kept: list[Sample] = []

    def first(self, count: int) -> tuple[Tensor, list[str]]:
        """**Shapes**: → (n, 3, H, W) in [-1, 1] and n captions, n at most `count`."""
        if not self._kept:
            dataset = self.dataset
            self._kept = [fixed(dataset, i) for i in range(min(count, len(dataset)))]
        shown = self._kept[:count]
        return torch.stack([s.image for s in shown]), [s.caption for s in shown]


def stage_of(run: Any, network: nn.Module, encoder: Fingerprint | None) -> Stage:
    """The stage that a run trains, of its network and the encoder beside it."""
    if kind_of(run.model).name == "ar_prior":
        return ArStage.of(network, run.sampling, encoder)
    process = GaussianDiffusion(run.diffusion)
    return Stage(stage_name(run.model), network, process, run.sampling, encoder)


class StageTask:
    """What trainings of stages share: all of `fit`'s `Task` but the loss and what a preview shows.

    **Raises**: `ConfigError` for a model whose widths are not its encoder's.
    """

    clip: FrozenCLIP  # of all but upsamplers

    def __init__(self, run: Any, clip: FrozenCLIP | None = None, train: Dataset | None = None):
        if clip is not None:
            self.clip = clip
            check_widths(clip, run)
        self.run, self.shown = run, Shown(run.data, train)
        self.model: nn.Module = kind_of(run.model).network(run.model)
        self.stage = stage_of(run, self.model, None if clip is None else clip.fingerprint)
        self.name = self.stage.name
        self.product: nn.Module = self.model
        self.rank: int | None = getattr(run, "lora", None)
        if self.rank is not None:
            self.product = adapted(self.stage, self.rank, run.train)
        self.trained: nn.Module = self.product
        self.dead: set[str] = set()  # residual blocks that a warning has named

    def describe(self, tensors: dict[str, Tensor]) -> dict[str, Any]:
        """The stage's `config.json`."""
        if self.rank is not None:
            return lora.describe(self.stage.kind, self.rank, self.run.train.init)
        return self.stage.describe()

    def start_from(self, path: str) -> None:
        """Take over the weights of the same stage, or of its only kin; see `start_from`."""
        if self.rank is None:  # else the task was made with them
            start_from(self.stage, path)

    def drop(self, cond: Cond, ids: Tensor) -> Cond:
        """Conditions, of which some samples go without the image or the text."""
        chosen: dict[str, Tensor] = {}
        for what, share in self.run.drop:
            if share > 0:
                dropped = randomness.uniform(self.run.train.seed, f"drop {what}", ids) < share
                chosen[f"drop_{what}"] = dropped.to(cond.device, non_blocking=True)
        return cond.drop(self.clip.null_text, **chosen)

    def drawn(self, model: Any, cond: Cond) -> Tensor:
        """One sample for each condition, seeds 0, 1, …, with the stage's own sampling settings.

        Residual blocks found dead meanwhile are named in a warning, each once.
        """
        generators = [torch.Generator().manual_seed(k) for k in range(len(cond))]
        null_text = None if self.stage.encoder is None else self.clip.null_text
        drawing = replace(self.stage, network=model)
        with dead_blocks(model) as dead:
            out = drawing.draw(cond, self.stage.sampling, generators, null_text=null_text)
        died = [name for name in dead if name not in self.dead]
        if died and os.environ.get("RANK", "0") == "0":  # every process draws the same
            warnings.warn(
                "residual blocks that have died, giving every picture the same: "
                f"{', '.join(died)}; a train.weight_decay may keep blocks alive, and train.init "
                "with train.anew begins some anew",
                UnclipWarning,
                stacklevel=2,
            )
        self.dead.update(died)
        return out


def train(
    task: Task,
    run: Any,
    dataset: Dataset,
    accelerator: Accelerator,
    made: Callable[[Batch], Batch] | None = None,
    begin: Callable[[], None] | None = None,
    prepare: Callable[[Path | None], None] | None = None,
) -> Path:
    """`fit` on this process's part of a dataset, `made` as in `batches`.

    Of a stage with `data.val` the log says what that costs: always the same samples and noise.
    """

    def stream(
        step: int, dataset: Dataset = dataset, workers: int = run.data.workers
    ) -> Iterator[Batch]:
        return batches(
            dataset,
            batch=run.train.batch,
            seed=run.train.seed,
            start_step=step,
            rank=accelerator.process_index,
            world=accelerator.num_processes,
            accumulate=run.train.accumulate,
            crop=run.data.crop,
            workers=workers,
            made=made,
            pin=accelerator.device.type == "cuda",
        )

    def held_out(model: nn.Module) -> dict[str, float]:
        assert isinstance(task, StageTask)
        sums: dict[str, Tensor] = {}
        count = run.train.accumulate * max(1, HELD_OUT // run.train.batch)
        workers = min(run.data.workers, count - 1)  # each makes whole batches, two ahead
        for batch in itertools.islice(stream(0, task.shown.dataset, workers), count):
            add_up(sums, task.loss(model, batch.to(accelerator.device), 0))
        return means_of(sums, accelerator)

    measured = isinstance(task, StageTask) and run.data.val is not None
    said = held_out if measured else None
    return fit(task, stream, run.train, run, accelerator, begin, said, prepare)


@dataclass(frozen=True)
class Prepared:
    """Adds to a batch its samples' noise and its captions' tokens: work for a loader's workers,
    which would else hold up an accelerator."""

    seed: int
    shape: tuple[int, ...] | None  # of one sample's noise
    tokenizer: Tokenizer | None
    draws: int = 1

    def __call__(self, batch: Batch) -> Batch:
        """**Shapes**: noise (nB, *shape) for n draws, tokens (2, B, L)."""
        if self.shape is not None:
            ids = numbers_of_draws(batch.ids, self.draws)
            noise = randomness.normal(self.seed, "noise", ids, self.shape)
            batch = replace(batch, noise=noise)
        if self.tokenizer is not None:
            batch = replace(batch, tokens=tokens(self.tokenizer, batch.captions))
        return batch


def numbers_of_draws(ids: Tensor, n: int) -> Tensor:
    """Each of n draws of every sample has its own, those of one in a row. **Shapes**: → (nB,)."""
    return (ids[:, None] * n + torch.arange(n)).flatten()


def draw(run: Any, ids: Tensor, x0: Tensor, noise: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Timestep (B,) and noise (B, *) of each sample, by its global id, or with noise at hand."""
    seed = run.train.seed
    steps, power = run.diffusion.steps, run.diffusion.time_power
    if power == 1:
        t = randomness.integers(seed, "t", ids, steps)
    else:
        u = randomness.uniform(seed, "t", ids).double() ** (1 / power)
        t = (u * steps).long().clamp(max=steps - 1)
    if noise is None:
        noise = randomness.normal(seed, "noise", ids, x0.shape[1:])
    t, noise = (part.to(x0.device, non_blocking=True) for part in (t, noise))
    return t, noise


def embeddings_of(clip: FrozenCLIP, batch: Batch) -> Tensor:
    """Raw image embeddings of a batch where the encoder is, made of its pictures if it brings none.

    **Shapes**: → (B, D) float32.
    """
    if batch.z_image is None:
        return clip.encode_image(batch.images).float()
    return batch.z_image.to(clip.device, non_blocking=True)


def told_of(
    clip: FrozenCLIP,
    decoder: Stage,
    images: Tensor,
    text: Sequence[str] | Tensor,
    z_image: Tensor | None = None,
) -> Cond:
    """What a decoder is told of pictures: their embeddings, at hand or not, and their captions if
    it reads any. **Shapes**: (B, 3, H, W), B captions or their tokens → B rows."""
    return Cond(
        image_embed=clip.encode_image(images).float() if z_image is None else z_image,
        text=clip.encode_text(text) if decoder.reads_text else None,
    )
