"""Write a cache of CLIP image embeddings, from which the prior trains without pictures.

    accelerate launch train/embed.py emoji runs/emoji/cache --clip runs/emoji/clip --rounds 4
    python train/prior.py configs/emoji/prior.yaml data.train=runs/emoji/cache

The same command again goes on; any number of processes share the work.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

import torch
from accelerate import PartialState

from unclip.clip.encoder import FrozenCLIP
from unclip.data.cache import CachePlan, begin_cache, finish_cache, write_cache
from unclip.data.open import open_dataset
from unclip.errors import ConfigError, exit_on_error
from unclip.progress import progress_bar


def main(argv: Sequence[str] | None = None) -> None:
    """Parse the arguments, embed this process's shards, and finish when all are there."""
    parser = argparse.ArgumentParser(
        description="Write the CLIP image embeddings of a dataset, with captions.",
        epilog="Exit codes: 2 configuration, 3 data, 4 checkpoint.",
    )
    parser.add_argument("data", help="what data.train may name, for example emoji or a folder")
    parser.add_argument("out", type=Path, help="the cache; begun ones are gone on with")
    parser.add_argument("--clip", required=True, help="the frozen encoder")
    parser.add_argument("--resolution", type=int, help="of the pictures; the encoder's by default")
    parser.add_argument("--rounds", type=int, default=1, help="passes, each with other wordings")
    parser.add_argument("--rows", type=int, default=100_000, help="embeddings in a file")
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--workers", type=int, default=0, help="processes that read, for each")
    parser.add_argument("--seed", type=int, default=0, help="of wordings and augmentation")
    given = parser.parse_args(argv)
    with exit_on_error():
        for name in ("rounds", "rows", "batch", "resolution"):
            if getattr(given, name) is not None and getattr(given, name) < 1:
                raise ConfigError(f"--{name} = {getattr(given, name)} must be at least 1")
        state = PartialState(cpu=not torch.accelerator.is_available())
        clip = FrozenCLIP.load(given.clip, state.device)
        resolution = given.resolution or clip.preprocess.size
        dataset = open_dataset(given.data, resolution)
        total = len(dataset) * given.rounds
        plan = CachePlan(given.data, resolution, given.seed, given.rounds, given.rows, total)
        with state.main_process_first():
            begin_cache(given.out, clip, plan)
        shown = state.is_main_process
        each = total // state.num_processes
        with progress_bar(what="embed", total=each, shown=shown) as bar:
            rate = write_cache(
                given.out,
                dataset,
                clip,
                plan,
                rank=state.process_index,
                world=state.num_processes,
                batch=given.batch,
                workers=given.workers,
                report=bar.update,
            )
        state.wait_for_everyone()
        if shown:
            finish_cache(given.out)
            print(f"{given.out}: {total} embeddings, {rate:.0f} a second on each process")
        state.destroy_process_group()
