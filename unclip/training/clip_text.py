"""Teaching a trained CLIP's text tower more words; its image tower stays as it is.

A phrase that no caption holds is to land on what the pictures show whose captions mean about the
same, by a teacher's judgement. B batch, D CLIP embedding, E teacher's width, L text positions,
n pictures, m sentences or phrases, k phrases for each picture.
"""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from PIL import Image
from pydantic import Field
from torch import Tensor, nn

from unclip import randomness
from unclip.clip.contrastive import contrastive_loss
from unclip.clip.encoder import FrozenCLIP
from unclip.clip.towers import BpeTokenizer, OpenClipTowers, build_clip, vocabulary_of
from unclip.config import Config
from unclip.data.open import DataConfig
from unclip.data.sample import Batch, Dataset, Sample, fixed
from unclip.errors import ConfigError
from unclip.precision import resolve_precision
from unclip.training.aids import embed_text
from unclip.training.clip import chunks, drop_words, show_retrieval
from unclip.training.fit import TrainConfig, fit
from unclip.training.task import embeddings_of, load_weights, stream
from unclip.training.teacher import Teacher, TeacherConfig

WORDINGS = 4  # of each picture, among which like captions are looked for


class PhrasesConfig(Config):
    """How the teacher's phrases are learned next to the captions."""

    each: int = Field(default=2, ge=1)
    """Phrases for each picture of a batch."""
    weight: float = Field(default=10.0, ge=0)
    """Of a phrase's distance from its meaning, 1 - cosine."""
    sharpness: float = Field(default=80.0, gt=0)
    """A caption counts for a phrase by exp(sharpness * cosine of the teacher's embeddings)."""


class ClipTextRun(Config):
    """`configs/*/clip_text.yaml`. `clip` is the encoder to start from, one trained here."""

    clip: str
    data: DataConfig
    teacher: TeacherConfig
    phrases: PhrasesConfig = PhrasesConfig()
    unknown_words: float = Field(default=0.0, ge=0, lt=1)
    """Share of a caption's tokens read as unknown."""
    train: TrainConfig


class TextTower(nn.Module):
    """The text side of CLIP's towers as what is trained."""

    def __init__(self, towers: OpenClipTowers) -> None:
        super().__init__()
        self.towers = towers

    def forward(
        self, ids: Tensor, mask: Tensor, phrase_ids: Tensor, phrase_mask: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """**Shapes**: (B, L) twice, (B k, L) twice → (B, D), (B k, D) of unit norm, scale ()."""
        scale = self.towers.model.logit_scale.exp()  # type: ignore[operator]
        z_text = embed_text(self.towers, ids, mask)
        return z_text, embed_text(self.towers, phrase_ids, phrase_mask), scale


class ClipTextTask:
    """What `fit` trains: the text tower, against embeddings computed at the beginning."""

    name = "clip"

    def __init__(self, config: ClipTextRun, train: Dataset, val: Dataset | None) -> None:
        self.config, self.val, self.step = config, val, 0
        clip = FrozenCLIP.load(config.clip)
        if not isinstance(clip.towers, OpenClipTowers) or clip.towers.config is None:
            raise ConfigError(f"clip = {config.clip!r} is not an encoder that was trained here")
        self.preprocess, self.clip_name = clip.preprocess, clip.name
        self.data = Embedded(clip, train)
        seed = config.train.seed
        like = [(text, row) for row in range(len(train)) for text in _wordings(train, row)]
        half = resolve_precision(config.train.precision, torch.device("cpu")) == "bf16"
        dtype = torch.bfloat16 if half else torch.float32
        texts = [text for text, _ in like]
        self.teacher = Teacher(config.teacher, texts, dtype, seed)
        shown = self.data.z_image[[row for _, row in like]]  # (m, D)
        sentences = self.teacher(texts)  # (m, E)
        sharp = config.phrases.sharpness
        self.meant = torch.cat(
            [
                meaning(self.teacher(part), sentences, shown, sharp)
                for part in chunks(self.teacher.phrases)
            ]
        )  # (number of phrases, D)
        self.towers = grown(clip.towers, self.teacher.phrases, seed)
        self.product = self.towers.model
        self.model: nn.Module = TextTower(self.towers)
        self.product.visual.requires_grad_(False)

    def loss(self, model: nn.Module, batch: Batch, step: int) -> dict[str, Tensor]:
        """**Shapes**: → loss, contrast, phrases_off, top1, (B,)."""
        self.step = step + 1
        assert batch.z_image is not None
        seed, each, device = self.config.train.seed, self.config.phrases.each, batch.z_image.device
        ids, mask = self.towers.tokenizer(batch.captions)  # (B, L)
        ids = drop_words(ids, mask, batch.ids, seed, self.config.unknown_words)
        drawn = batch.ids.repeat_interleave(each) * each + torch.arange(each).repeat(len(ids))
        rows = randomness.integers(seed, "phrase", drawn, len(self.teacher.phrases))  # (B k,)
        phrases = self.towers.tokenizer([self.teacher.phrases[row] for row in rows.tolist()])
        texts = (part.to(device) for part in (ids, mask, *phrases))
        z_text, z_phrase, scale = model(*texts)
        found = contrastive_loss(batch.z_image, z_text, ids.to(device), scale)
        off = 1 - (z_phrase * self.meant[rows].to(device)).sum(-1)  # (B k,)
        off = off.view(-1, each).mean(1)
        loss = found["loss"] + self.config.phrases.weight * off
        return {"loss": loss, "contrast": found["loss"], "phrases_off": off, "top1": found["top1"]}

    def preview(self, model: nn.Module) -> Image.Image | None:
        """Similarity of validation pictures (rows) and captions; retrieval goes to val.jsonl."""
        if self.val is None:
            return None
        clip = self._frozen(copy.deepcopy(self.product))
        return show_retrieval(clip, self.val, self.step, Path(self.config.train.out))

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
        return FrozenCLIP(towers, self.preprocess, self.clip_name)


def meaning(phrases: Tensor, sentences: Tensor, shown: Tensor, sharpness: float) -> Tensor:
    """What pictures show whose captions mean about the same as phrases.

    **Shapes**: phrases (m', E) and the captions' sentences (m, E) unit norm, the embeddings of
    their pictures (m, D) → (m', D) unit norm. **Source**: Nadaraya and Watson's regression.
    """
    share = (sharpness * phrases @ sentences.T).softmax(-1)  # (m', m)
    return F.normalize(share @ shown, dim=-1)


def grown(towers: OpenClipTowers, texts: list[str], seed: int) -> OpenClipTowers:
    """Towers that know the words of more texts; a new word begins near the unknown one."""
    tokenizer, config = towers.tokenizer, towers.config
    assert config is not None
    if tokenizer.vocabulary is None:
        return towers
    more = vocabulary_of(texts, tokenizer.context)
    vocabulary = sorted({*tokenizer.vocabulary, *more})
    longer = BpeTokenizer(tokenizer.context, vocabulary)
    text = config.text_cfg.model_copy(update={"vocab_size": len(vocabulary) + 1})
    config = config.model_copy(update={"text_cfg": text})
    state = dict(towers.model.state_dict())
    old = state["token_embedding.weight"]  # (number of words + 1, W)
    noise = torch.randn(
        len(vocabulary) + 1, old.shape[1], generator=randomness.generator(seed, "new words")
    )
    table = old[0] + 0.5 * old.std() * noise
    kept = torch.tensor([0, *longer.rows[torch.tensor(tokenizer.vocabulary)].tolist()])
    table[kept] = old
    model = build_clip(config).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    model.load_state_dict({**state, "token_embedding.weight": table})
    return OpenClipTowers(model, longer, config)


class Embedded:
    """A dataset whose samples bring the unit-norm embeddings of their pictures, made once."""

    def __init__(self, clip: FrozenCLIP, dataset: Dataset) -> None:
        self.dataset, self.name = dataset, dataset.name
        rows = chunks(list(range(len(dataset))))
        batches = (Batch.of([fixed(dataset, index) for index in part]) for part in rows)
        parts = [embeddings_of(clip, batch) for batch in batches]
        self.z_image = F.normalize(torch.cat(parts), dim=-1)  # (n, D)

    def __len__(self) -> int:
        return len(self.dataset)

    def get(self, index: int, generator: torch.Generator) -> Sample:
        """Picture `index` with its embedding."""
        return replace(self.dataset.get(index, generator), z_image=self.z_image[index])


def _wordings(dataset: Dataset, index: int) -> set[str]:
    draws = (randomness.generator(0, "vocabulary", index, draw) for draw in range(WORDINGS))
    return {dataset.get(index, generator).caption for generator in draws}


def train_clip_text(config: ClipTextRun, accelerator: Accelerator) -> None:
    """Load the encoder, train its text tower, and leave checkpoints in `train.out`."""
    train = config.data.open(config.data.train)
    val = config.data.open(config.data.val) if config.data.val else None
    task = ClipTextTask(config, train, val)
    fit(task, stream(task.data, config, accelerator), config.train, config, accelerator)
