"""Teaching a trained CLIP's text tower more words; its image tower stays as it is.

A phrase that no caption holds is to land on what the pictures show whose captions mean about the
same, by a teacher's judgement. B batch, D CLIP embedding, E teacher's width, L text positions,
n pictures, m sentences or phrases, k phrases for each picture.
"""

from __future__ import annotations

from dataclasses import replace

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from pydantic import Field
from torch import Tensor, nn

from unclip import randomness
from unclip.clip.contrastive import contrastive_loss
from unclip.clip.encoder import FrozenCLIP
from unclip.clip.towers import BpeTokenizer, OpenClipTowers, vocabulary_of
from unclip.config import Config, Place
from unclip.data.open import DataConfig
from unclip.data.sample import Batch, Dataset, Sample, fixed
from unclip.errors import ConfigError
from unclip.training.aids import embed_text
from unclip.training.clip import TowersTask, batched, drop_words, open_teacher, wordings
from unclip.training.fit import TrainConfig
from unclip.training.task import embeddings_of, numbers_of_draws, train
from unclip.training.teacher import TeacherConfig

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

    clip: Place
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


class ClipTextTask(TowersTask):
    """What `fit` trains: the text tower, against embeddings computed at the beginning."""

    run: ClipTextRun

    def __init__(self, run: ClipTextRun, train: Dataset, val: Dataset | None) -> None:
        clip, towers = trained_here(run.clip)
        self.data = Embedded(clip, train)
        said = [dict.fromkeys(wordings(train, row, WORDINGS)) for row in range(len(train))]
        like = [(text, row) for row, own in enumerate(said) for text in own]
        texts = [text for text, _ in like]
        self.teacher = open_teacher(run, texts)
        shown = self.data.z_image[[row for _, row in like]]  # (m, D)
        sentences = self.teacher(texts)  # (m, E)
        sharp = run.phrases.sharpness
        self.meant = torch.cat(
            [
                meaning(self.teacher(part), sentences, shown, sharp)
                for part in batched(self.teacher.phrases)
            ]
        )  # (number of phrases, D)
        towers = grown(towers, self.teacher.phrases, run.train.seed)
        super().__init__(run, val, towers, clip.preprocess, clip.name)
        self.model = self.trained = TextTower(towers)
        self.product.visual.requires_grad_(False)

    def loss(self, model: nn.Module, batch: Batch, step: int) -> dict[str, Tensor]:
        """**Shapes**: → loss, contrast, phrases_off, top1, (B,)."""
        self.step = step + 1
        self.bound_scale()
        assert batch.z_image is not None
        seed, each, device = self.run.train.seed, self.run.phrases.each, batch.z_image.device
        ids, mask = self.towers.tokenizer(batch.captions)  # (B, L)
        ids = drop_words(ids, mask, batch.ids, seed, self.run.unknown_words)
        drawn = numbers_of_draws(batch.ids, each)
        rows = randomness.integers(seed, "phrase", drawn, len(self.teacher.phrases))  # (B k,)
        phrases = self.towers.tokenizer([self.teacher.phrases[row] for row in rows.tolist()])
        parts = (ids, mask, *phrases, self.meant[rows])
        ids, *texts, meant = (part.to(device, non_blocking=True) for part in parts)
        z_text, z_phrase, scale = model(ids, *texts)
        found = contrastive_loss(batch.z_image, z_text, ids, scale)
        off = 1 - (z_phrase * meant).sum(-1)  # (B k,)
        off = off.view(-1, each).mean(1)
        loss = found["loss"] + self.run.phrases.weight * off
        return {"loss": loss, "contrast": found["loss"], "phrases_off": off, "top1": found["top1"]}


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
    state = dict(towers.model.state_dict())
    old = state["token_embedding.weight"]  # (number of words + 1, W)
    noise = torch.randn(
        len(vocabulary) + 1, old.shape[1], generator=randomness.generator(seed, "new words")
    )
    table = old[0] + 0.5 * old.std() * noise
    kept = torch.tensor([0, *longer.rows[torch.tensor(tokenizer.vocabulary)].tolist()])
    table[kept] = old
    new = OpenClipTowers.new(config, longer)
    new.model.load_state_dict({**state, "token_embedding.weight": table})
    return new


class Embedded:
    """A dataset whose samples bring the unit-norm embeddings of their pictures, made once."""

    def __init__(self, clip: FrozenCLIP, dataset: Dataset) -> None:
        self.dataset, self.name = dataset, dataset.name
        rows = batched(list(range(len(dataset))))
        batches = (Batch.of([fixed(dataset, index) for index in part]) for part in rows)
        parts = [embeddings_of(clip, batch) for batch in batches]
        self.z_image = F.normalize(torch.cat(parts), dim=-1)  # (n, D)

    def __len__(self) -> int:
        return len(self.dataset)

    def get(self, index: int, generator: torch.Generator) -> Sample:
        """Picture `index` with its embedding."""
        return replace(self.dataset.get(index, generator), z_image=self.z_image[index])


def trained_here(name: str) -> tuple[FrozenCLIP, OpenClipTowers]:
    """An encoder whose text tower can be taught, and its towers.

    **Raises**: `ConfigError` if it was not trained here.
    """
    clip = FrozenCLIP.load(name)
    if not isinstance(clip.towers, OpenClipTowers) or clip.towers.config is None:
        raise ConfigError(f"clip = {name!r} is not an encoder that was trained here")
    return clip, clip.towers


def open_clip_text(run: ClipTextRun, accelerator: Accelerator) -> tuple[Dataset, FrozenCLIP]:
    """What the text tower learns from, and the encoder to start from; see `trained_here`."""
    return run.data.open(run.data.train), trained_here(run.clip)[0]


def train_clip_text(run: ClipTextRun, accelerator: Accelerator) -> None:
    """Load the encoder, train its text tower, and leave checkpoints in `train.out`."""
    val = run.data.open(run.data.val) if run.data.val else None
    task = ClipTextTask(run, run.data.open(run.data.train), val)
    train(task, run, task.data, accelerator)
