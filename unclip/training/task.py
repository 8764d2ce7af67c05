"""What trainings share: their data, random draws, previews, where they start from, their loop."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from pydantic import Field
from torch import Tensor, nn

from unclip import randomness
from unclip.clip.encoder import FrozenCLIP
from unclip.clip.fingerprint import Fingerprint, check_same_encoder
from unclip.clip.towers import Tokenizer, tokens
from unclip.conditioning import Cond
from unclip.config import Config, flat
from unclip.data.open import DataConfig
from unclip.data.order import batches
from unclip.data.sample import Batch, Dataset, Sample, fixed
from unclip.diffusion.process import GaussianDiffusion
from unclip.errors import CheckpointError, ConfigError
from unclip.files.checkpoints import newest_checkpoint
from unclip.files.find import resolve_folder
from unclip.files.folder import WEIGHTS, read_stage_config
from unclip.files.tensors import TensorFile, load_tensors
from unclip.models.lora import adapt
from unclip.precision import default_dtype
from unclip.sources import Source
from unclip.stages import lora
from unclip.stages.kinds import kind_of, stage_name
from unclip.stages.stage import Stage
from unclip.stages.stored import StoredStage
from unclip.training.fit import Task, fit
from unclip.training.log import add_up, means_of

PREVIEWS = 8
HELD_OUT = 128  # samples of the validation set whose loss is logged, or a batch if that is more
# What may differ between weights and the run that starts from them.
FREE = {
    "dropout",
    "checkpointing",
    "low",
    "high",
    "resolution",
    "steps",
    "schedule",
    "weight",
    "bias",
    "time_power",
    "inpaint",
}
FIRST = "unet.conv_in.weight"


class DropConfig(Config):
    """Shares of samples that train without a condition, for classifier-free guidance."""

    image: float = Field(0.0, ge=0, le=1)
    text: float = Field(0.0, ge=0, le=1)


class Widths(Protocol):
    """An encoder's, of its embeddings and of its text states."""

    @property
    def width(self) -> int: ...
    @property
    def text_width(self) -> int: ...


def frozen_clip(name: str, accelerator: Accelerator) -> FrozenCLIP:
    """The encoder on this process's device; in half precision where an accelerator trains in it."""
    half = accelerator.mixed_precision != "no"
    dtype = default_dtype(accelerator.device) if half else torch.float32
    return FrozenCLIP.load(name, accelerator.device, dtype)


def open_pictures(run: Any, accelerator: Accelerator) -> tuple[Dataset, None]:
    """What a training learns from that needs no encoder, which would be beside it."""
    return run.data.open(run.data.train), None


def check_lora(run: Any) -> None:
    """**Raises**: `ValueError` for low-rank changes of nothing."""
    if run.lora is not None and run.train.init is None:
        raise ValueError("lora needs train.init, the model that it changes")


def check_widths(clip: Widths, run: Any) -> None:
    """**Raises**: `ConfigError` for a model whose widths are not its encoder's."""
    for key, width in (("embed", clip.width), ("text_width", clip.text_width)):
        value = getattr(run.model, key)
        if value is not None and value != width:
            raise ConfigError(
                f"model.{key} = {value}, but the CLIP encoder {run.clip} has {width}: set them "
                "equal"
            )


class Shown:
    """What previews show: the first pictures of the validation set, or where there is none of the
    training set, which is open already. They are read once and kept."""

    def __init__(self, data: DataConfig, train: Dataset | None = None) -> None:
        self.data, self.train = data, train
        self._kept: list[Sample] = []

    @cached_property
    def dataset(self) -> Dataset:
        """The set that they are of."""
        if self.data.val is None and self.train is not None:
            return self.train
        return self.data.open(self.data.val or self.data.train)

    def first(self, count: int) -> tuple[Tensor, list[str]]:
        """**Shapes**: → (n, 3, H, W) in [-1, 1] and n captions, n at most `count`."""
        if not self._kept:
            dataset = self.dataset
            self._kept = [fixed(dataset, i) for i in range(min(count, len(dataset)))]
        shown = self._kept[:count]
        return torch.stack([s.image for s in shown]), [s.caption for s in shown]


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
        self.name = stage_name(run.model)
        self.model: nn.Module = kind_of(run.model).network(run.model)
        self.stage = self._stage(None if clip is None else clip.fingerprint)
        self.product: nn.Module = self.model
        self.rank: int | None = getattr(run, "lora", None)
        if self.rank is not None:
            self.product = self._adapted(self.rank, run.train)
        self.trained: nn.Module = self.product

    def _stage(self, encoder: Fingerprint | None) -> Stage:
        diffusion = GaussianDiffusion(self.run.diffusion)
        return Stage(self.name, self.model, diffusion, self.run.sampling, encoder)

    def describe(self, tensors: dict[str, Tensor]) -> dict[str, Any]:
        """The stage's `config.json`."""
        if self.rank is not None:
            return lora.describe(self.stage.kind, self.rank, self.run.train.init)
        return self.stage.describe()

    def start_from(self, path: str) -> None:
        """Take over the weights of the same stage, or of its only kin; see `start_from`."""
        if self.rank is None:  # else the task was made with them
            start_from(self.stage, path)

    def _adapted(self, rank: int, train: Any) -> nn.Module:
        """The low-rank changes of the network, with its base's weights. They alone are trained and
        saved, so that a run which goes on reads its base again.

        **Raises**: `CheckpointError` if it began with another base.
        """
        start_from(self.stage, train.init)
        begun = newest_checkpoint(Path(train.out), training=True)
        for change in lora.read_loras([begun] if begun else []):
            for layer in change.layers:
                change.check(layer, self.model.get_parameter(f"{layer}.weight"))
        return adapt(self.model, rank)

    def drop(self, what: str, ids: Tensor, like: Tensor) -> Tensor:
        """Which samples go without a condition. **Shapes**: (B,) → (B,) bool."""
        share = getattr(self.run.drop, what)
        dropped = randomness.uniform(self.run.train.seed, f"drop {what}", ids) < share
        return dropped.to(like.device, non_blocking=True)

    def drawn(self, model: Any, cond: Cond) -> Tensor:
        """One sample for each condition, seeds 0, 1, …, with the stage's own sampling settings."""
        generators = [torch.Generator().manual_seed(k) for k in range(len(cond))]
        null_text = None if self.stage.encoder is None else self.clip.null_text
        drawing = replace(self.stage, network=model)
        return drawing.draw(cond, self.stage.sampling, generators, null_text=null_text)


def train(
    task: Task,
    run: Any,
    dataset: Dataset,
    accelerator: Accelerator,
    made: Callable[[Batch], Batch] | None = None,
    begin: Callable[[], None] | None = None,
) -> Path:
    """`fit` on this process's part of a dataset, `made` as in `batches`.

    Of a stage with `data.val` the log says what that costs: always the same samples and noise.
    """

    def stream(step: int, dataset: Dataset = dataset) -> Iterator[Batch]:
        return batches(
            dataset,
            batch=run.train.batch,
            seed=run.train.seed,
            start_step=step,
            rank=accelerator.process_index,
            world=accelerator.num_processes,
            accumulate=run.train.accumulate,
            crop=run.data.crop,
            workers=run.data.workers,
            made=made,
            pin=accelerator.device.type == "cuda",
        )

    def held_out(model: nn.Module) -> dict[str, float]:
        assert isinstance(task, StageTask)
        sums: dict[str, Tensor] = {}
        count = run.train.accumulate * max(1, HELD_OUT // run.train.batch)
        for batch in itertools.islice(stream(0, task.shown.dataset), count):
            add_up(sums, task.loss(model, batch.to(accelerator.device), 0))
        return means_of(sums, accelerator)

    measured = isinstance(task, StageTask) and run.data.val is not None
    return fit(task, stream, run.train, run, accelerator, begin, held_out if measured else None)


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
    """Raw image embeddings of a batch, made of its pictures if it brings none.

    **Shapes**: → (B, D) float32.
    """
    return clip.encode_image(batch.images).float() if batch.z_image is None else batch.z_image


def told_of(
    clip: FrozenCLIP,
    images: Tensor,
    text: Sequence[str] | Tensor | None,
    z_image: Tensor | None = None,
) -> Cond:
    """What a decoder is told of pictures: their embeddings, at hand or not, and their captions, or
    None to one that reads none. **Shapes**: (B, 3, H, W), B captions or their tokens → B rows."""
    return Cond(
        image_embed=clip.encode_image(images).float() if z_image is None else z_image,
        text=None if text is None else clip.encode_text(text),
    )


def load_weights(model: nn.Module, name: str, path: str | Path) -> None:
    """The weights of the stage `name` in a folder, a run or a hub id.

    **Raises**: `CheckpointError` if there is no such stage, or its shapes differ.
    """
    folder = resolve_folder(path)
    read_stage_config(folder, name)
    weights = folder / name / WEIGHTS
    load_tensors(model, TensorFile(weights), str(weights))


def start_from(stage: Stage, path: str | Path) -> None:
    """Take over the weights of the same stage in a folder, a run or a hub id, or of its only kin.

    Kin are stages of one kind: an upsampler may start from the only upsampler there is. Folders in
    Karlo's layout are read as they are. Channels that an inpainting decoder sees and the other
    doesn't begin at zero, as no change (GLIDE).

    **Raises**: `CheckpointError` if there is no such stage, its shapes or settings differ, or it
    was trained with another encoder.
    """
    stored = kin_of(stage, path)
    tensors = stored.tensors
    if getattr(stage.config, "inpaint", False) and not stored.stage.config.inpaint:
        narrow = tensors[FIRST]
        lacking = stage.network.state_dict()[FIRST].shape[1] - narrow.shape[1]
        tensors = {**tensors, FIRST: F.pad(narrow, (0, 0, 0, 0, 0, lacking))}
    load_tensors(stage.network, tensors, stored.where)


def kin_of(stage: Stage, path: str | Path) -> StoredStage:
    """What `start_from` reads. **Raises**: as that does, but for shapes."""
    source = Source(path)
    kin = [stored for stored in source.stages.values() if stored.stage.kind == stage.kind]
    stored = kin[0] if len(kin) == 1 else source.stage(stage.name)
    _check_settings(stage.describe(), stored.stage.describe(), stored.where)
    trained = stored.stage.encoder
    if source.published is not None and stage.encoder is not None:
        # Published weights don't say; the parts beside them do.
        clip = source.clip()
        trained = None if clip is None else clip.fingerprint
    if stage.encoder is not None and trained is not None:
        check_same_encoder(stage.encoder, trained, stored.where)
    return stored


def _check_settings(ours: dict[str, Any], theirs: dict[str, Any], where: str) -> None:
    """Check what shapes don't show: heads, groups, scales, what is predicted."""
    pairs = [(flat(ours[part]), flat(theirs[part])) for part in ("model", "diffusion")]
    differ = [
        f"{key} = {value}, here {a.get(key)}"
        for a, b in pairs
        for key, value in b.items()
        if a.get(key) != value and key.split(".")[-1] not in FREE
    ]
    if differ:
        raise CheckpointError(f"train.init: {where} has {'; '.join(differ)}; set them equal")
