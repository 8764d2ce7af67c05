"""Training a CLIP encoder from scratch: two towers and the contrastive loss (Section 2).

B local batch, R picture side, L text positions, N validation pictures, D CLIP embedding.
"""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from accelerate import Accelerator, PartialState
from PIL import Image
from pydantic import Field
from torch import Tensor, nn

from unclip import randomness
from unclip.clip.contrastive import MAX_SCALE, contrastive_loss, retrieval_rank
from unclip.clip.encoder import FrozenCLIP
from unclip.clip.preprocessing import PreprocessConfig
from unclip.clip.towers import BpeTokenizer, ClipConfig, OpenClipTowers, vocabulary_of
from unclip.config import Config
from unclip.data.open import DataConfig
from unclip.data.sample import Batch, Dataset, fixed
from unclip.errors import ConfigError
from unclip.precision import resolve_precision
from unclip.training.aids import AidedCLIP, Lesson, RestoreConfig
from unclip.training.augment import PlaceConfig, place
from unclip.training.fit import TrainConfig, running_statistics
from unclip.training.start import load_weights
from unclip.training.task import embeddings_of, train
from unclip.training.teacher import TaughtConfig, Teacher

# For the vocabulary, this many wordings of each picture are drawn, or one each of a part of a
# larger dataset; for a teacher to have read, a few more.
DRAWS, TAUGHT_DRAWS, MANY = 8, 16, 16_384
MOST_SHOWN = 1024  # validation pairs, drawn evenly: each with each, as picture and as numbers
HALF = (0.5, 0.5, 0.5)  # the mean and the deviation that leave pixels in [-1, 1]


class AugmentConfig(PlaceConfig):
    """Random placement, and words dropped into the unknown token."""

    unknown_words: float = Field(default=0.0, ge=0, lt=1)
    """Share of tokens read as unknown, so that unknown words do no harm later."""


class ClipRun(Config):
    """`configs/*/clip.yaml`. `name` identifies the encoder in error messages."""

    name: str
    data: DataConfig
    model: ClipConfig
    vocabulary: Literal["full", "data"]
    """Token embeddings for CLIP's whole vocabulary, or only for what the captions use."""
    augment: AugmentConfig
    restore: RestoreConfig | None = None
    teacher: TaughtConfig | None = None
    train: TrainConfig


class TowersTask:
    """What trainings of CLIP's towers share: all of `fit`'s `Task` but the loss.

    `restored` gives the error (N,) of embeddings (N, D) for pictures (N, 3, R, R), if something is
    restored.
    """

    name = "clip"
    restored: Callable[[Tensor, Tensor], Tensor] | None = None

    def __init__(
        self,
        run: Any,
        val: Dataset | None,
        towers: OpenClipTowers,
        preprocess: PreprocessConfig,
        encoder: str,
    ) -> None:
        self.run, self.val, self.step = run, val, 0
        self.towers, self.preprocess, self.encoder = towers, preprocess, encoder
        self.product = self.model = self.trained = towers.model

    @torch.no_grad()
    def bound_scale(self) -> None:
        """Take the logit scale back to its bound, where its gradient can still lower it."""
        self.towers.model.logit_scale.clamp_(max=math.log(MAX_SCALE))  # type: ignore[operator]

    @torch.no_grad()
    def preview(self, model: nn.Module) -> Image.Image | None:
        """Similarity of validation pictures (rows) and captions; scores go to val.jsonl."""
        if self.val is None:
            return None
        clip = self._frozen(copy.deepcopy(self.product))
        chosen = range(0, len(self.val), -(-len(self.val) // MOST_SHOWN))
        samples = [fixed(self.val, i, randomness.generator(0, "val", i)) for i in chosen]
        batches = [Batch.of(part) for part in batched(samples)]
        z_image = torch.cat([embeddings_of(clip, batch) for batch in batches])  # (N, D)
        z_text = torch.cat([clip.encode_text(batch.captions).embed for batch in batches])  # (N, D)
        rank = retrieval_rank(z_image, z_text)
        scores = {f"top{k}": round((rank < k).float().mean().item(), 4) for k in (1, 5)}
        if self.restored is not None:
            x = torch.cat([batch.images for batch in batches]).to(z_image.device)
            scores["restored"] = round(self.restored(z_image, x).mean().item(), 4)
        line = json.dumps({"step": self.step, **scores, "n": len(rank)})
        if PartialState().is_main_process:
            print(f"retrieval of validation captions: {line}", flush=True)
            with Path(self.run.train.out, "val.jsonl").open("a", encoding="utf-8") as file:
                file.write(line + "\n")
        cosine = F.normalize(z_image, dim=-1) @ F.normalize(z_text, dim=-1).T  # (N, N)
        grey = (cosine.clamp(0, 1) * 255).byte().cpu().numpy()
        return Image.fromarray(grey).resize((3 * len(rank),) * 2, Image.Resampling.NEAREST)

    def describe(self, tensors: dict[str, Tensor]) -> dict[str, Any]:
        """The `config.json` of the stage `clip`, which `FrozenCLIP.load` reads."""
        model = copy.deepcopy(self.product)
        model.load_state_dict(tensors)
        return self._frozen(model).describe()

    def start_from(self, path: str) -> None:
        """Take over the weights of the stage `clip` in a folder or a run."""
        load_weights(self.product, self.name, path)

    def _frozen(self, model: nn.Module) -> FrozenCLIP:
        towers = OpenClipTowers(model, self.towers.tokenizer, self.towers.config)
        return FrozenCLIP(towers, self.preprocess, self.encoder)


class ClipTask(TowersTask):
    """What `fit` trains: open_clip's CLIP on captioned pictures."""

    run: ClipRun

    def __init__(self, run: ClipRun, train: Dataset, val: Dataset | None) -> None:
        size = run.model.vision_cfg.image_size
        if (run.data.crop or run.data.resolution) != size:
            raise ConfigError(
                f"data.resolution = {run.data.resolution} (or data.crop) must be "
                f"model.vision_cfg.image_size = {size}"
            )
        context, vocabulary = run.model.text_cfg.context_length, None
        self.teacher = None
        if run.teacher is not None:
            self.teacher = open_teacher(run, captions_of(train, TAUGHT_DRAWS))
        if run.vocabulary == "data":
            phrases = self.teacher.phrases if self.teacher is not None else []
            vocabulary = vocabulary_of([*captions_of(train), *phrases], context)
        tokenizer = BpeTokenizer(context, vocabulary)
        towers = OpenClipTowers.new(run.model, tokenizer)
        preprocess = PreprocessConfig(size=size, mean=HALF, std=HALF)
        super().__init__(run, val, towers, preprocess, run.name)
        if run.restore is not None or run.teacher is not None:
            width = self.teacher.width if self.teacher is not None else 0
            self.model = self.trained = AidedCLIP(towers, run.restore, run.teacher, width)
            self.restored = self.model.error if run.restore is not None else None

    def loss(self, model: nn.Module, batch: Batch, step: int) -> dict[str, Tensor]:
        """**Shapes**: → loss, top1 and parts of the loss, (B,)."""
        self.step = step + 1
        self.bound_scale()
        seed, augment = self.run.train.seed, self.run.augment
        images = place(batch.images, batch.ids, seed, augment)  # (B, 3, R, R)
        ids, mask = self.towers.tokenizer(batch.captions)  # (B, L)
        ids = drop_words(ids, mask, batch.ids, seed, augment.unknown_words)
        ids, mask = (part.to(images.device, non_blocking=True) for part in (ids, mask))
        if isinstance(self.model, AidedCLIP):
            out = model(images, ids, mask, self._lesson(batch))
            return self.model.losses(out, images, ids)
        z_image, z_text, scale = model(images, ids)  # (B, D) unit norm, (B, D) unit norm, ()
        return contrastive_loss(z_image, z_text, ids, scale)

    def _lesson(self, batch: Batch) -> Lesson:
        seed, device, restore = self.run.train.seed, batch.images.device, self.run.restore
        noise: Tensor | None = None
        if restore is not None and restore.noise > 0:
            width = self.towers.width
            noise = randomness.normal(seed, "restore", batch.ids, (width,))  # (B, D)
            noise = (restore.noise * width**-0.5 * noise).to(device, non_blocking=True)
        if self.teacher is None:
            return Lesson(noise)
        phrases = self.teacher.draw(seed, batch.ids)
        ids, mask = self.towers.tokenizer(phrases)  # (B, L)
        sentences, meant = self.teacher(batch.captions), self.teacher(phrases)  # (B, E)
        taught = (part.to(device, non_blocking=True) for part in (sentences, meant, ids, mask))
        return Lesson(noise, *taught)


def drop_words(ids: Tensor, mask: Tensor, sample_ids: Tensor, seed: int, share: float) -> Tensor:
    """Read a share of the tokens between start and end as unknown (row 0). **Shapes**: (B, L)."""
    if share == 0:
        return ids
    draws = randomness.uniform(seed, "words", sample_ids, ids.shape[1:])  # (B, L)
    position = torch.arange(ids.shape[1])
    inside = (position > 0) & (position < mask.sum(1, keepdim=True) - 1)
    return ids.masked_fill((draws < share) & inside, 0)


def captions_of(dataset: Dataset, draws: int = DRAWS) -> Iterator[str]:
    """Some wordings of every picture, or one each of as many as `MANY`."""
    stride = -(-len(dataset) // MANY)
    for index in range(0, len(dataset), stride):
        yield from wordings(dataset, index, draws if stride == 1 else 1)


def wordings(dataset: Dataset, index: int, draws: int) -> Iterator[str]:
    """Of one picture."""
    for draw in range(draws):
        yield dataset.get(index, randomness.generator(0, "vocabulary", index, draw)).caption


def open_teacher(run: Any, texts: Iterable[str]) -> Teacher:
    """A run's teacher, which stays on the CPU, in what that computes in."""
    half = resolve_precision(run.train.precision, torch.device("cpu")) == "bf16"
    dtype = torch.bfloat16 if half else torch.float32
    return Teacher(run.teacher, texts, dtype, run.train.seed)


def batched(items: list[Any], size: int = 256) -> Iterator[list[Any]]:
    """At most `size` items at a time."""
    for first in range(0, len(items), size):
        yield items[first : first + size]


def train_clip(run: ClipRun, accelerator: Accelerator) -> None:
    """Build, train, and leave checkpoints in `train.out`."""
    dataset = run.data.open(run.data.train)
    val = run.data.open(run.data.val) if run.data.val else None
    task = ClipTask(run, dataset, val)
    if accelerator.num_processes > 1 and running_statistics(task.model):
        if accelerator.device.type == "cpu":
            raise ConfigError(
                "the batch norms of model.vision_cfg's ResNet can't be computed over several "
                "processes on CPUs, and each by itself would see another batch: start one process"
            )
        nn.SyncBatchNorm.convert_sync_batchnorm(task.model)  # in place
    train(task, run, dataset, accelerator)
