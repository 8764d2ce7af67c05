"""What every train script does around its own work: configuration, processes, exit codes."""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Protocol, TypeVar

import torch
from accelerate import Accelerator, DistributedDataParallelKwargs, InitProcessGroupKwargs

from unclip.config import Config, load_config
from unclip.errors import ConfigError, exit_on_error
from unclip.training import sharding
from unclip.training.fit import TrainConfig
from unclip.training.precision import Precision, resolve_precision


class Trains(Protocol):
    """A configuration with a train section."""

    @property
    def train(self) -> TrainConfig: ...


C = TypeVar("C", bound=Config)


def main(
    schema: type[C],
    run: Callable[[C, Accelerator], object],
    description: str,
    argv: Sequence[str] | None = None,
) -> None:
    """Parse `CONFIG.yaml [section.key=value …]`, then call `run(config, accelerator)`.

    The default generator is seeded with train.seed, so that every process builds the same model.
    Errors a person can act on become one paragraph and their exit code.
    """
    parser = argparse.ArgumentParser(
        description=description,
        epilog="Several processes: accelerate launch or torchrun instead of python. "
        "The same command again resumes. Exit codes: 2 configuration, 3 data, 4 checkpoint, "
        "5 diverged.",
    )
    parser.add_argument("config", help="a YAML file; see configs/")
    parser.add_argument(
        "overrides", nargs="*", metavar="section.key=value", help="for example train.lr=1e-4"
    )
    given = parser.parse_args(argv)
    with exit_on_error():
        config = load_config(given.config, given.overrides, schema)
        train = config.train  # type: ignore[attr-defined]
        accelerator = start_accelerator(train.precision)
        torch.manual_seed(train.seed)
        run(config, accelerator)
        accelerator.end_training()  # destroys the process group


def start_accelerator(precision: Precision) -> Accelerator:
    """This process's device and its place among the others.

    **Raises**: `ConfigError` if processes were launched that do not see each other.
    """
    device = torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
    bf16 = resolve_precision(precision, device) == "bf16"
    with sharding.hidden():
        accelerator = Accelerator(
            mixed_precision="bf16" if bf16 else "no",
            # Without it, several processes on a machine without GPU would each train alone.
            cpu=not torch.accelerator.is_available(),
            # Rank 0 writes checkpoints while the others wait.
            kwargs_handlers=[
                InitProcessGroupKwargs(timeout=timedelta(hours=3)),
                DistributedDataParallelKwargs(gradient_as_bucket_view=True),  # not a second copy
            ],
        )
    world = int(os.environ.get("WORLD_SIZE", "1"))
    if accelerator.num_processes != world:
        raise ConfigError(
            f"{world} processes were launched, but accelerate sees {accelerator.num_processes}"
        )
    return accelerator
