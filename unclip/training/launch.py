"""What every training does around its own work: configuration, processes, exit codes."""

from __future__ import annotations

import argparse
import os
import warnings
from collections.abc import Callable, Sequence
from datetime import timedelta
from pathlib import Path
from typing import TypeVar

import psutil
import torch
from accelerate import Accelerator, DistributedDataParallelKwargs, InitProcessGroupKwargs
from accelerate.utils import GradientAccumulationPlugin

from unclip.config import Config, load_config
from unclip.errors import ConfigError, UnclipWarning, exit_on_error
from unclip.files.disk import check_writable
from unclip.precision import (
    Precision,
    allow_tf32,
    compute_deterministically,
    resolve_precision,
)
from unclip.training import sharding
from unclip.training.fit import TrainConfig
from unclip.training.trackers import check_tracker

C = TypeVar("C", bound=Config)

# What accelerate's launcher may be told by a flag or a variable, and the key that decides instead.
DECIDED = {
    "mixed_precision": "precision",
    "gradient_accumulation_steps": "accumulate",
    "gradient_clipping": "clip_grad",
    "dynamo_backend": "compile",
}
UNSAID = ("", "no", "none", "1")
PATIENCE = timedelta(hours=3)  # of processes that wait for another; NCCL's own is ten minutes


def main(
    schema: type[C],
    run: Callable[[C, Accelerator], object],
    description: str,
    argv: Sequence[str] | None = None,
    called: str | None = None,
) -> None:
    """Parse `CONFIG [section.key=value …]`, then call `run(config, accelerator)`.

    `called` is the command in its help, that of the process by default.

    The default generator is seeded with train.seed, so that every process builds the same model.
    Errors a person can act on become one paragraph and their exit code.
    """
    parser = argparse.ArgumentParser(
        prog=called,
        description=description,
        epilog="Several processes: accelerate launch -m unclip.train, or torchrun's like. "
        "The same command again resumes. Exit codes: 2 configuration, 3 data, 4 checkpoint, "
        "5 diverged.",
    )
    parser.add_argument("config", help="a YAML file, or a shipped one's name (`unclip configs`)")
    parser.add_argument(
        "overrides", nargs="*", metavar="section.key=value", help="for example train.lr=1e-4"
    )
    given = parser.parse_args(argv)
    with exit_on_error():
        config = load_config(given.config, given.overrides, schema)
        train = config.train  # type: ignore[attr-defined]
        check_writable(Path(train.out), "train.out")
        check_launcher(train)
        check_tracker(train.tracker)
        if train.deterministic:
            compute_deterministically()
        accelerator = start_accelerator(train.precision)
        allow_tf32(accelerator.device)
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
            # The trainer divides losses itself; from the environment accelerate would do it again.
            gradient_accumulation_plugin=GradientAccumulationPlugin(num_steps=1),
            # Rank 0 writes checkpoints while the others wait.
            kwargs_handlers=[
                InitProcessGroupKwargs(timeout=PATIENCE),
                DistributedDataParallelKwargs(gradient_as_bucket_view=True),  # not a second copy
            ],
        )
    world = int(os.environ.get("WORLD_SIZE", "1"))
    if accelerator.num_processes != world:
        raise ConfigError(
            f"{world} processes were launched, but accelerate sees {accelerator.num_processes}"
        )
    return accelerator


def check_launcher(train: TrainConfig) -> None:
    """Warn where accelerate's launcher was told what only the configuration decides.

    **Raises**: `ConfigError` for ways to train that aren't ours.
    """
    for way in ("deepspeed", "megatron_lm", "parallelism_config"):
        if os.environ.get(f"ACCELERATE_USE_{way.upper()}", "false").lower() in ("true", "1"):
            raise ConfigError(
                f"--use_{way}: not supported; for weights shared out over GPUs see "
                "configs/accelerate/fsdp2_8.yaml"
            )
    if os.environ.get("RANK", "0") != "0":
        return
    flags = _launcher_flags()
    for name, key in DECIDED.items():
        said = flags.get(name) or os.environ.get(f"ACCELERATE_{name.upper()}", "")
        decided = getattr(train, key)
        if said.lower() not in (*UNSAID, str(decided).lower()):
            message = f"--{name} {said} of the launcher has no effect: train.{key} = {decided} has"
            warnings.warn(message, UnclipWarning, stacklevel=2)


def _launcher_flags() -> dict[str, str]:
    """What the command line of accelerate's launcher says, where one started this process.

    Some of its flags it passes on to DeepSpeed only.
    """
    for process in psutil.Process().parents()[:2]:
        try:
            words = process.cmdline()
        except psutil.Error:
            continue
        if any("accelerate" in word for word in words[:4]):
            pairs = [(word, after) for word, after in zip(words, [*words[1:], ""], strict=True)]
            flat = [f"{word}={after}" if "=" not in word else word for word, after in pairs]
            found = [word.lstrip("-").partition("=") for word in flat if word.startswith("--")]
            return {name.replace("-", "_"): value for name, _, value in found}
    return {}
