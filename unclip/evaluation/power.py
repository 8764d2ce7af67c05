"""What the sampler `analytic` has to know of a prior, measured once and kept with the stage.

B batch.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from unclip import randomness
from unclip.conditioning import Cond
from unclip.data.open import open_dataset
from unclip.data.sample import Batch, fixed
from unclip.diffusion.analytic import measure_power
from unclip.diffusion.process import Guess
from unclip.errors import ConfigError
from unclip.files.checkpoints import MANIFEST
from unclip.files.disk import write_json
from unclip.files.folder import CONFIG, read_stage_config
from unclip.progress import progress_bar
from unclip.sources import Source
from unclip.stages.stage import CHUNK_EMBEDDINGS
from unclip.training.task import embeddings_of

LEVELS = 64  # of the timesteps, as many as the paper samples in; between them lie straight lines


def measure_prior(
    model: str | Path, data: str, count: int, device: torch.device | str = "cpu"
) -> dict[int, float]:
    """E‖ε_θ‖²/d by timestep over training pairs, written into the prior's `config.json`.

    `data` is what it was trained on, pictures or a cache; `count` pairs are taken evenly from it.

    **Raises**: `ConfigError` for a folder that isn't ours to change, `CheckpointError` without
    prior or encoder, `DataError` for data that can't be used.
    """
    source = Source(model)
    if source.published is not None or (source.root / MANIFEST).is_file():
        raise ConfigError(
            f"{source.root} is sealed or in another layout; `convert` or `assemble` it first, and "
            "measure the model folder that this writes"
        )
    stage = source.stage("prior").load(device)
    clip = source.need_clip().to(device, torch.float32)
    dataset = open_dataset(data, clip.image_size, embeddings=True)
    rows = torch.linspace(0, len(dataset) - 1, min(count, len(dataset))).round().long().unique()
    plain = {"guidance": 1.0, "interval": None, "clip": None, "time_shift": 0.0}
    config = stage.sampling.model_copy(update=plain)

    def samples() -> Iterator[tuple[Tensor, Guess]]:
        for chunk in progress_bar(rows.split(CHUNK_EMBEDDINGS), "statistics"):
            batch = Batch.of([fixed(dataset, k) for k in chunk.tolist()]).to(device)
            cond = Cond(text=clip.encode_text(batch.text))
            yield stage.network.scale(embeddings_of(clip, batch)), stage.guess(cond, config)

    last = stage.diffusion.config.steps - 1
    timesteps = torch.linspace(0, last, min(LEVELS, last + 1)).round().long().tolist()
    own = randomness.generator(0, "statistics for analytic")
    power = measure_power(stage.diffusion, samples(), timesteps, own)
    found = {t: round(value, 6) for t, value in zip(timesteps, power, strict=True)}
    config_file = source.root / "prior" / CONFIG
    write_json(config_file, {**read_stage_config(source.root, "prior"), "power": found})
    return found
