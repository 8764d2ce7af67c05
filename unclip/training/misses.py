"""What a prior draws of training captions, and how far that is from the pictures it means.

A decoder that has only been told embeddings of pictures is told something else when a prior draws.
n draws, N pictures, D CLIP embedding.
"""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import torch
from accelerate import Accelerator
from safetensors.torch import load_file, save_file
from torch import Tensor

from unclip import randomness
from unclip.clip.encoder import FrozenCLIP
from unclip.clip.fingerprint import check_same_encoder
from unclip.conditioning import Cond
from unclip.data.sample import TOGETHER, Dataset, batches_of, evenly, reworded
from unclip.errors import CheckpointError
from unclip.files.disk import replacing
from unclip.models.layers import EmbeddingScale
from unclip.progress import progress_bar
from unclip.sources import Source
from unclip.stages.stage import Stage
from unclip.training.fit import TrainConfig
from unclip.training.run import on_main
from unclip.training.task import embeddings_of

DRAWS, PICTURES = 30_000, 20_000  # at most so many pictures, which draws are compared with
COMPARED = 1000  # of them, whose distances to the others say how far is far
FILE = "misses.safetensors"


class Misses(NamedTuple):
    """Draws that mean a picture: the one whose embedding is nearest on the prior's scale, and
    nearer than embeddings of pictures usually are to one another.

    **Shapes**: z_image (n, D), drawn, raw; true (n, D), the picture's own; picture (n,), its number
    in the dataset.
    """

    z_image: Tensor
    true: Tensor
    picture: Tensor

    def offset(self, rows: Tensor, scale: EmbeddingScale) -> Tensor:
        """How far off these are on a scale. **Shapes**: rows (B,) → (B, D)."""
        z_image, true = (part[rows].to(scale.mean.device, non_blocking=True) for part in self[:2])
        return scale(z_image) - scale(true)


def open_prior(name: str, clip: FrozenCLIP) -> Stage:
    """The diffusion prior in a folder, a run or a hub id, on the encoder's device.

    **Raises**: `CheckpointError` if there is none, or it is another encoder's.
    """
    prior = Source(name).stage("prior").load(clip.device)
    if prior.encoder is not None:
        check_same_encoder(clip.fingerprint, prior.encoder, f"prior = {name}")
    return prior


def misses_of(
    prior: str,
    clip: FrozenCLIP,
    dataset: Dataset,
    train: TrainConfig,
    accelerator: Accelerator,
    newest: Path | None,
) -> Misses:
    """Those in the run's folder, if it goes on from a checkpoint; measured where a run begins.

    **Raises**: `CheckpointError` if there is no such prior or it is another encoder's, or none of
    its draws is near any picture.
    """
    file = Path(train.out) / FILE

    def measure() -> None:
        if newest is None or not file.is_file():
            found = measure_misses(open_prior(prior, clip), clip, dataset, train.seed)
            with replacing(file) as temporary:
                save_file(found._asdict(), temporary)

    on_main(accelerator, measure)
    return Misses(**load_file(file))


@torch.no_grad()
def measure_misses(prior: Stage, clip: FrozenCLIP, dataset: Dataset, seed: int) -> Misses:
    """Draw embeddings of captions, evenly over the dataset, and find the pictures they mean.

    **Raises**: `CheckpointError` if no draw is near any picture.
    """
    pictures = evenly(dataset, PICTURES)
    true = torch.cat([embeddings_of(clip, batch) for batch in batches_of(dataset, pictures)])
    scale, numbers = prior.network.scale, torch.tensor(pictures)
    there = scale(true)  # (N, D)
    far, found = usual_distance(there), []
    draws = reworded(dataset, DRAWS, seed, "missed caption")
    for rows, batch in progress_bar(draws, "misses", -(-DRAWS // TOGETHER)):
        text = Cond(text=clip.encode_text(batch.captions))
        generators = [randomness.generator(seed, "missed", j) for j in rows]
        drawn = prior.draw(text, prior.sampling, generators, null_text=clip.null_text)
        distance, nearest = torch.cdist(drawn, there).min(1)
        near, nearest = distance < far, nearest.cpu()
        parts = prior.embeddings(drawn), true[nearest.to(true.device)], numbers[nearest]
        found.append([part[near.to(part.device)].cpu() for part in parts])
    misses = Misses(*(torch.cat(part) for part in zip(*found, strict=True)))
    if not len(misses.picture):
        raise CheckpointError(
            "prior: none of its draws of training captions is near the embedding of a training "
            "picture; train it longer, or leave prior out"
        )
    return misses


def usual_distance(z: Tensor) -> Tensor:
    """The median distance of embeddings to the nearest other one. **Shapes**: (N, D) → ()."""
    some = z[:: max(1, len(z) // COMPARED)]
    return torch.cdist(some, z).topk(2, largest=False).values[:, 1].median()  # the first is itself
