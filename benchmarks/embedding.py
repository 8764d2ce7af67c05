"""What a CLIP encoder's embedding of emoji is worth: to find by, and to draw from.

    python benchmarks/embedding.py runs/emoji/clip

n training pictures, N held-out ones, M names, D CLIP embedding.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from unclip.clip.contrastive import retrieval_rank
from unclip.clip.encoder import FrozenCLIP
from unclip.data.emoji import Emoji, read_records
from unclip.data.sample import Dataset, fixed
from unclip.errors import exit_on_error
from unclip.images import from_array, resize
from unclip.models.decoder import Decoder, DecoderConfig, LayoutConfig
from unclip.models.layers import ScaleConfig
from unclip.models.unet import UNetConfig
from unclip.training.drafts import fit_layout

WORDS = Path(__file__).parent / "unseen_words.json"
RANKS = (0, 9, 24, 49, 99, 149, 199, 255)  # of the singular deviations that are shown
SIDE = 32


def main(argv: Sequence[str] | None = None) -> None:
    """Print one JSON object, and write it if asked to."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("clip", help="a CLIP run or model folder")
    parser.add_argument("--out", type=Path, help="a file for the same JSON")
    parser.add_argument("--no-layout", action="store_true", help="leave out what takes minutes")
    given = parser.parse_args(argv)
    with exit_on_error():
        clip = FrozenCLIP.load(given.clip)
        train, val = (Emoji(clip.image_size, split) for split in ("train", "val"))
        z_train, z_val = embed(clip, train), embed(clip, val)
        scores = {
            "retrieval": retrieval(clip, val, z_val),
            "unseen_words": unseen_words(clip, train, z_train),
            "deviations": deviations(z_train),
        }
        if not given.no_layout:
            scores["layout"] = layout_error(clip, train, val, z_train, z_val)
        text = json.dumps(scores, indent=1)
        print(text)
        if given.out is not None:
            given.out.write_text(text + "\n", encoding="utf-8")


def embed(clip: FrozenCLIP, data: Emoji) -> Tensor:
    """Raw embeddings of all pictures. **Shapes**: → (n, D)."""
    chunks = torch.arange(len(data)).split(256)
    return torch.cat([clip.encode_image(pictures(data, rows.tolist())) for rows in chunks])


def pictures(data: Emoji, rows: Sequence[int]) -> Tensor:
    """**Shapes**: → (len(rows), 3, R, R)."""
    return torch.stack([from_array(data.images(row)) for row in rows])


def retrieval(clip: FrozenCLIP, val: Emoji, z_val: Tensor) -> dict[str, float]:
    """Share of held-out pictures whose own caption is the first, or among the first five."""
    z_text = clip.encode_text([val.caption(i) for i in range(len(val))]).embed
    rank = retrieval_rank(z_val, z_text)
    return {f"top{k}": round(float((rank < k).float().mean()), 4) for k in (1, 5)}


def unseen_words(clip: FrozenCLIP, train: Emoji, z_train: Tensor) -> dict[str, Any]:
    """Of words that no caption holds, the share whose concept is the first of all names.

    By `a {word} emoji` against `a {name} emoji` of every name, and against the mean of every
    name's training pictures.
    """
    words: dict[str, list[str]] = json.loads(WORDS.read_text(encoding="utf-8"))
    names = sorted({record["name"] for record in read_records(train.root)})
    z_word, z_name = (
        F.normalize(clip.encode_text([f"a {text} emoji" for text in texts]).embed, dim=-1)
        for texts in (list(words), names)
    )
    drawn = sorted({record["name"] for record in train.records})
    row = {name: k for k, name in enumerate(drawn)}
    own = torch.tensor([row[record["name"]] for record in train.records])
    sums = torch.zeros(len(drawn), z_train.shape[1])
    z_mean = F.normalize(sums.index_add(0, own, F.normalize(z_train, dim=-1)), dim=-1)  # (M, D)
    out: dict[str, Any] = {}
    for what, z, candidates in (("by_name", z_name, names), ("by_pictures", z_mean, drawn)):
        found = {
            word: [candidates[k] for k in scores.topk(3).indices.tolist()]
            for word, scores in zip(words, z_word @ z.T, strict=True)
        }
        hits = [word for word, first in found.items() if first[0] in words[word]]
        out[what] = round(len(hits) / len(words), 4)
        out[f"{what}_missed"] = {word: found[word] for word in words if word not in hits}
    return out


def deviations(z: Tensor) -> dict[str, float]:
    """Singular deviations of unit-norm embeddings about their mean, by rank."""
    unit = F.normalize(z, dim=-1)
    spread = torch.linalg.svdvals(unit - unit.mean(0)) / len(unit) ** 0.5
    return {str(k + 1): round(float(spread[k]), 4) for k in RANKS if k < len(spread)}


def layout_error(
    clip: FrozenCLIP, train: Emoji, val: Emoji, z_train: Tensor, z_val: Tensor
) -> dict[str, float]:
    """Mean squared error of a layout fitted to training pictures, and of the mean picture."""
    unet = UNetConfig(
        channels=64, multiple=[1], blocks=1, attention=[True], mid_attention=True, groups=8
    )
    decoder = Decoder(
        DecoderConfig(
            resolution=clip.image_size,
            embed=clip.width,
            context_width=64,
            learned_variance=False,
            scale=ScaleConfig(kind="whiten", normalize=True),
            layout=LayoutConfig(side=SIDE, width=1024, blocks=2),
            unet=unet,
        )
    )
    decoder.scale.fit(z_train)
    since = time.time()
    autocast = partial(torch.autocast, "cpu", torch.bfloat16)
    fit_layout(decoder, clip, train, seed=0, autocast=autocast)
    seconds = time.time() - since
    mean = torch.stack([small(train, i) for i in range(0, len(train), 4)]).mean(0)
    found = {"seconds": round(seconds)}
    for name, data, z in (("train", train, z_train), ("held_out", val, z_val)):
        chosen = range(0, len(data), max(1, len(data) // 1000))
        x = torch.stack([small(data, i) for i in chosen])
        with torch.no_grad():
            assert decoder.layout is not None
            drawn = decoder.layout(decoder.scale(z[list(chosen)]))
        found[name] = round(float((drawn - x).square().mean()), 4)
        found[f"{name}_mean_picture"] = round(float((mean - x).square().mean()), 4)
    return found


def small(data: Dataset, index: int) -> Tensor:
    """**Shapes**: → (3, SIDE, SIDE)."""
    return resize(fixed(data, index).image[None], SIDE)[0]


if __name__ == "__main__":
    main()
