"""Which CLIP encoder it is: what must agree before embeddings of one serve where another's did."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from pydantic import ConfigDict
from torch import Tensor

from unclip.config import Config
from unclip.errors import CheckpointError

PROBE_TEXTS = ("", "a red apple", "two dogs playing in the snow")
SAME = 0.999  # fp16 and fp32, open_clip and transformers copies of one tower agree to this cosine


class Fingerprint(Config):
    """Which encoder made an embedding. `name` is for messages; everything else must agree.

    **Shapes**: probes (6, D) unit norm: three fixed pictures (empty without image tower), then
    three fixed sentences.
    """

    model_config = ConfigDict(allow_inf_nan=True)  # damaged weights give such, and agree with none

    name: str
    width: int
    text_width: int
    context: int
    tokenizer: str
    padding: str
    preprocessing: str
    probes: list[list[float]]


def check_same_encoder(a: Fingerprint, b: Fingerprint, what: str) -> None:
    """Check that embeddings of one encoder may be used where those of the other are expected.

    **Raises**: `CheckpointError` naming both and what differs; `what` names who asks.
    """
    keys = ("width", "text_width", "context", "tokenizer", "padding", "preprocessing")
    differs = [
        f"{key} {getattr(a, key)!r} and {getattr(b, key)!r}"
        for key in keys
        if getattr(a, key) != getattr(b, key)
    ]
    if not differs:
        pairs = [pair for pair in zip(a.probes, b.probes, strict=True) if all(pair)]
        ours, theirs = torch.tensor(pairs).unbind(1)  # (n, D) each, of the probes that both have
        cosine = F.cosine_similarity(ours, theirs, dim=-1).min()
        if not cosine >= SAME:
            differs = [f"embeddings of the probes agree only to cosine {cosine:.4f}"]
    if differs:
        raise CheckpointError(
            f"{what}: {a.name!r} and {b.name!r} are different CLIP encoders "
            f"({'; '.join(differs)}); use the encoder that the weights were trained with"
        )


def probes() -> Tensor:
    """Three fixed pictures: a ramp, a disc, stripes. **Shapes**: → (3, 3, 64, 64)."""
    line = torch.linspace(-1, 1, 64)
    y, x = torch.meshgrid(line, line, indexing="ij")  # (64, 64)
    disc = torch.where(x.square() + y.square() < 0.5, -0.8, 1.0)
    stripes = torch.where((torch.arange(64) // 8 % 2 == 0)[None].expand(64, 64), 0.6, -0.6)
    pictures = [[x, y, -x], [disc.neg(), disc, disc], [stripes, stripes.T, y]]
    return torch.stack([torch.stack(channels) for channels in pictures])


def digest(tokens: Sequence[Sequence[int]]) -> str:
    """Two tokenizers are the same if they read the probe sentences alike."""
    return hashlib.sha256(repr([list(row) for row in tokens]).encode()).hexdigest()[:16]
