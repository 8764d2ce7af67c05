"""CLIP's two towers and their tokenizers: open_clip's and transformers' behind one interface.

B batch, D CLIP embedding, L text positions (context), W text width, R picture side.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from unclip.config import Config
from unclip.errors import CheckpointError

START, END = 49406, 49407  # CLIP's byte-pair ids of the start and the end of a text
BPE_IDS = 49408


class VisionConfig(Config):
    """open_clip's `vision_cfg`: a ViT, or with four numbers as `layers` CLIP's ResNet."""

    image_size: int
    layers: int | list[int]
    width: int
    head_width: int = 64
    patch_size: int = 16


class TextConfig(Config):
    """open_clip's `text_cfg`."""

    context_length: int = 77
    vocab_size: int = BPE_IDS
    width: int
    heads: int
    layers: int


class ClipConfig(Config):
    """open_clip's model configuration, in its own words so that open_clip can build it too."""

    embed_dim: int
    vision_cfg: VisionConfig
    text_cfg: TextConfig
    quick_gelu: bool = False


def build_clip(config: ClipConfig) -> nn.Module:
    """open_clip's CLIP with random weights, in training mode."""
    from open_clip.model import CLIP

    return CLIP(**config.model_dump())


class Lost(NamedTuple):
    """What of a text is beyond the context; which words before that are unknown, and whether any
    is known."""

    cut: str
    unknown: list[str]
    known: bool


class BpeTokenizer:
    """CLIP's byte-pair tokenizer as open_clip has it, with an optional reduced vocabulary.

    Most of a small CLIP is its 49,408-row table of token embeddings, of which a small data set
    trains a few thousand. With a vocabulary, the k-th kept id reads row k + 1 and every other id
    row 0, the unknown token, which is also the padding (training drops words into it, so it
    means "some word"). Indexing the small table by `rows` gives the equivalent full one.
    """

    def __init__(self, context: int, vocabulary: Sequence[int] | None = None) -> None:
        self.context = context
        self.vocabulary = None if vocabulary is None else list(vocabulary)
        self.rows = torch.arange(BPE_IDS)
        if vocabulary is not None:
            self.rows = torch.zeros(BPE_IDS, dtype=torch.int64)
            self.rows[torch.tensor(self.vocabulary)] = torch.arange(len(vocabulary)) + 1

    def __call__(self, texts: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Captions to ids and a mask (True = real token, the start and the end included).

        **Shapes**: B texts → ids (B, L) int64, mask (B, L) bool.
        """
        ids = self._tokenize(texts)  # (B, L)
        length = (ids == END).int().argmax(1) + 1
        mask = torch.arange(self.context) < length[:, None]
        return self.rows[ids].masked_fill(~mask, 0), mask

    def raw(self, texts: Sequence[str]) -> list[list[int]]:
        """The byte-pair ids without padding: what two tokenizers must agree on."""
        rows = self._tokenize(texts).tolist()
        return [row[: row.index(END) + 1] for row in rows]

    def lost(self, text: str) -> Lost:
        """What of a text is cut, and which of its words the vocabulary lacks a part of."""
        from open_clip.tokenizer import decode

        row = self._tokenize([text], 4 * len(text.encode()) + 16)[0]
        row = row[1 : int((row == END).int().argmax())]
        kept, cut = row[: self.context - 2], row[self.context - 2 :]
        ends = [decode(id_[None]).endswith(" ") for id_ in kept]  # whether it is a word's last part
        starts = [0, *(k + 1 for k, end in enumerate(ends) if end and k + 1 < len(ends))]
        words: dict[bool, list[str]] = {False: [], True: []}
        for first, after in zip(starts, [*starts[1:], len(kept)], strict=True):
            said = decode(kept[first:after]).strip()
            known = self.vocabulary is None or self._known.issuperset(kept[first:after].tolist())
            if any(c.isalnum() or not c.isascii() for c in said):  # punctuation says little
                words[known].append(said)
        return Lost(decode(cut).strip(" \ufffd"), words[False], bool(words[True]))

    @cached_property
    def _known(self) -> set[int]:
        return set(self.vocabulary or ())

    def _tokenize(self, texts: Sequence[str], context: int | None = None) -> Tensor:
        from open_clip.tokenizer import tokenize

        return tokenize(list(texts), context_length=context or self.context)


def vocabulary_of(captions: Iterable[str], context: int) -> list[int]:
    """The sorted byte-pair ids that occur in captions; the start and the end always do."""
    used: set[int] = {START, END}
    for ids in BpeTokenizer(context).raw(list(captions)):
        used.update(ids)
    return sorted(used)


class TransformersTokenizer:
    """A `CLIPTokenizer`, called as the other one; it pads with the end token, hence the mask."""

    def __init__(self, tokenizer: Any, context: int) -> None:
        self.tokenizer, self.context = tokenizer, context

    def __call__(self, texts: Sequence[str]) -> tuple[Tensor, Tensor]:
        """**Shapes**: B texts → ids (B, L) int64, mask (B, L) bool."""
        batch = self.tokenizer(
            list(texts),
            padding="max_length",
            truncation=True,
            max_length=self.context,
            return_tensors="pt",
        )
        return batch["input_ids"], batch["attention_mask"].bool()

    def raw(self, texts: Sequence[str]) -> list[list[int]]:
        """The byte-pair ids without padding."""
        ids, mask = self(texts)
        return [row[keep].tolist() for row, keep in zip(ids, mask, strict=True)]

    def lost(self, text: str) -> Lost:
        """What of a text is cut; no word is unknown."""
        ids = self.tokenizer.encode(text, add_special_tokens=False, truncation=False, verbose=False)
        return Lost(self.tokenizer.decode(ids[self.context - 2 :]).strip(), [], True)


Tokenizer = BpeTokenizer | TransformersTokenizer


def tokens(tokenizer: Tokenizer, texts: Sequence[str]) -> Tensor:
    """Ids and mask in one, to be sent on. **Shapes**: B texts → (2, B, L) int64."""
    ids, mask = tokenizer(texts)
    return torch.stack([ids, mask.long()])


class OpenClipTowers(nn.Module):
    """Any open_clip model with a causal text transformer and CLIP's tokenizer."""

    def __init__(
        self, model: nn.Module, tokenizer: BpeTokenizer, config: ClipConfig | None = None
    ) -> None:
        super().__init__()
        self.model, self.tokenizer, self.config = model, tokenizer, config
        text: Any = getattr(model, "text", model)  # CustomTextCLIP keeps its text tower apart
        pool = getattr(text, "text_pool_type", getattr(text, "pool_type", None))
        causal = getattr(text, "attn_mask", None) is not None
        if (
            pool not in ("argmax", "eos")
            or not causal
            or getattr(text, "cls_emb", None) is not None
        ):
            raise CheckpointError(
                f"this open_clip model's text tower ({type(text).__name__}, pooling {pool!r}) is "
                "not a causal transformer read at its end token; use one of CLIP's architecture"
            )
        self.text_width = text.ln_final.weight.shape[0]
        projection = text.text_projection
        self.width = self.text_width
        if projection is not None:
            linear = isinstance(projection, nn.Linear)
            self.width = projection.out_features if linear else projection.shape[1]

    @classmethod
    def new(cls, config: ClipConfig, tokenizer: BpeTokenizer) -> OpenClipTowers:
        """Random weights, to be trained, with a row for each id that the tokenizer knows."""
        text = config.text_cfg.model_copy(update={"vocab_size": int(tokenizer.rows.max()) + 1})
        config = config.model_copy(update={"text_cfg": text})
        model: Any = build_clip(config)
        # A ResNet is a quarter faster with channels last.
        return cls(model.to(memory_format=torch.channels_last), tokenizer, config)

    def encode_image(self, pixels: Tensor) -> Tensor:
        """**Shapes**: (B, 3, R, R) preprocessed → (B, D)."""
        return self.model.encode_image(pixels)  # type: ignore[operator]

    def features(self, pixels: Tensor) -> list[Tensor]:
        """What each stage of the image tower sees. **Shapes**: (B, 3, R, R) → (B, C, h, w) each."""
        visual: Any = self.model.visual
        return visual.forward_intermediates(pixels)["image_intermediates"]

    def encode_text(self, ids: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """Of texts, or of their first L positions if no text is longer.

        **Shapes**: ids, mask (B, L) → tokens (B, L, W) after the final norm, embed (B, D).
        """
        text: Any = getattr(self.model, "text", self.model)
        x = text.token_embedding(ids)  # (B, L, W)
        length = ids.shape[1]
        causal = text.attn_mask[:length, :length]
        x = text.transformer(x + text.positional_embedding[:length], attn_mask=causal)
        x = text.ln_final(x)
        z = x[torch.arange(len(x), device=x.device), mask.sum(1) - 1]  # (B, W) at the end token
        if isinstance(text.text_projection, nn.Linear):
            z = text.text_projection(z)
        elif text.text_projection is not None:
            z = z @ text.text_projection  # (B, D)
        return x, z


class TransformersTowers(nn.Module):
    """transformers' `CLIPTextModelWithProjection` and `CLIPVisionModelWithProjection`.

    Karlo and diffusers folders keep the two apart, CLIP folders together; both load as these.
    A text-to-image folder of Karlo has no image tower.
    """

    def __init__(self, text: nn.Module, vision: nn.Module | None, tokenizer: Tokenizer) -> None:
        super().__init__()
        self.text, self.vision, self.tokenizer = text, vision, tokenizer
        config: Any = text.config
        self.text_width, self.width = config.hidden_size, config.projection_dim

    def encode_image(self, pixels: Tensor) -> Tensor:
        """**Shapes**: (B, 3, R, R) preprocessed → (B, D). **Raises**: `CheckpointError`."""
        return self._with_vision()(pixel_values=pixels).image_embeds

    def features(self, pixels: Tensor) -> list[Tensor]:
        """What each block of the image tower sees, its patches as they lie in the picture.

        **Shapes**: (B, 3, R, R) → (B, C, h, w) each. **Raises**: `CheckpointError`.
        """
        states = self._with_vision()(pixel_values=pixels, output_hidden_states=True).hidden_states
        side = int((states[0].shape[1] - 1) ** 0.5)  # the class token stands first
        return [x[:, 1:].mT.unflatten(2, (side, side)) for x in states[1:]]

    def _with_vision(self) -> nn.Module:
        if self.vision is None:
            raise CheckpointError(
                "this CLIP has no image tower, which pictures need; Karlo's image-variation "
                "folder has one"
            )
        return self.vision

    def encode_text(self, ids: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """**Shapes**: ids, mask (B, L) → tokens (B, L, W) after the final norm, embed (B, D)."""
        # Attention is causal, so real tokens never see the padding and need no mask.
        output = self.text(input_ids=ids)
        return output.last_hidden_state, output.text_embeds


Towers = OpenClipTowers | TransformersTowers
