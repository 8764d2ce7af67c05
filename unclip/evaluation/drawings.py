"""The pictures that are measured, drawn stage by stage and kept, so that a run can go on.

N captions, D CLIP embedding, R the decoder's side.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from unclip.files.disk import replacing
from unclip.images import load_image, resize, to_pil
from unclip.pipeline import UnCLIP
from unclip.progress import progress_bar

CHUNK = 16  # pictures that are drawn, and kept, together

# What is measured, from the data's own pictures down to what a user gets.
ROWS = {
    "real": "real pictures",
    "shrunk": "… shrunk to half and back",
    "layout": "layout alone, from the true z",
    "true": "decoder from the true z and caption",
    "snapped": "decoder from the prior's z snapped to the nearest training z",
    "product": "the product: decoder from the prior's z",
}
Draw = Callable[[range], list[Image.Image]]


class Kept:
    """Pictures in a folder by name: made once."""

    def __init__(self, folder: Path):
        self.folder = folder

    def draw(self, name: str, count: int, draw: Draw, together: int = CHUNK) -> list[Image.Image]:
        """Pictures 0 … count - 1: those of an earlier run, and the others by `draw`."""
        paths = [self.folder / f"{name}-{k:04d}.png" for k in range(count)]
        with progress_bar(what=name, total=count, unit=" pictures") as bar:
            for start in range(0, count, together):
                rows = range(start, min(start + together, count))
                if not all(paths[k].is_file() for k in rows):
                    for k, image in zip(rows, draw(rows), strict=True):
                        with replacing(paths[k]) as beside:
                            image.save(beside, "PNG")
                bar.update(len(rows))
        return [load_image(path) for path in paths]


@dataclass(frozen=True)
class Group:
    """Captions that are drawn together, with the names and styles that they ask for.

    `real(rows)` are the real pictures of these captions, where there are any, `z` their embeddings.
    `own` are their rows among the training pictures, if they are in training. So many in a row,
    `together`, are one caption with other noise.

    **Shapes**: own (N,), z (N, D), real → (n, 3, R, R).
    """

    name: str
    captions: Sequence[str]
    names: Sequence[str]
    styles: Sequence[str] | None = None
    own: Tensor | None = None
    z: Tensor | None = None
    real: Callable[[range], Tensor] | None = None
    together: int = 1

    def __len__(self) -> int:
        return len(self.captions)


def drawers(
    pipe: UnCLIP, group: Group, z_train: Tensor, options: dict[str, Any], prior: str | None = None
) -> dict[str, Draw]:
    """How each row of the table comes to its pictures; rows that a model can't have are absent.

    `prior` says how text becomes an embedding (see `PriorName`). Picture k is drawn with seed k in
    every row. **Shapes**: z_train (M, D).
    """
    assert pipe.decoder is not None
    network, side = pipe.decoder.network, pipe.decoder.side
    rows: dict[str, Draw] = {}
    real, z = group.real, group.z
    if real is not None:
        rows["real"] = lambda k: [to_pil(x) for x in real(k)]
        rows["shrunk"] = lambda k: [to_pil(x) for x in resize(resize(real(k), side // 2), side)]
    if z is not None:
        if network.layout is not None:
            rows["layout"] = lambda k: _layout(pipe, z[k.start : k.stop])
        rows["true"] = lambda k: pipe.image_from_embedding(
            z[k.start : k.stop], _captions(group, k), seed=k.start, size=side, **options
        )
    if pipe.prior is not None or pipe.ar_prior is not None:
        told = {**options, "prior": prior}
        if z is not None and prior != "none":
            rows["snapped"] = lambda k: pipe.image_from_embedding(
                snap(pipe, _priors(pipe, group, k, told), z_train),
                _captions(group, k),
                seed=k.start,
                size=side,
                **options,
            )
        rows["product"] = lambda k: pipe.text_to_image(
            _captions(group, k), seed=k.start, size=side, **told
        )
    return rows


def _captions(group: Group, rows: range) -> list[str]:
    return list(group.captions[rows.start : rows.stop])


def _priors(pipe: UnCLIP, group: Group, rows: range, options: dict[str, Any]) -> Tensor:
    return pipe.text_to_embedding(_captions(group, rows), seed=rows.start, **options)


def snap(pipe: UnCLIP, z: Tensor, z_train: Tensor) -> Tensor:
    """The training embedding nearest to each, in the decoder's scale.

    **Shapes**: z (N, D), z_train (M, D) → (N, D).
    """
    assert pipe.decoder is not None
    scale = pipe.decoder.network.scale
    z_train = z_train.to(z.device)
    return z_train[torch.cdist(scale(z), scale(z_train)).argmin(1)]


@torch.no_grad()
def _layout(pipe: UnCLIP, z: Tensor) -> list[Image.Image]:
    assert pipe.decoder is not None
    network = pipe.decoder.network
    scaled = network.scale(z.to(pipe.device)).to(network.null_image.dtype)
    return [to_pil(x) for x in network.laid_out(scaled).float()]
