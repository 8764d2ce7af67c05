"""The verbs that work on trainings: train, watch, configs, new, validate, plan."""

from __future__ import annotations

import itertools
import re
import shlex
import time
from pathlib import Path
from typing import Annotated, Literal

import typer

from unclip.errors import ConfigError
from unclip.shipped import configuration, configurations

CONFIG = "A YAML file, or the name of a shipped one."
Overrides = Annotated[list[str] | None, typer.Argument(metavar="[KEY=VALUE]")]


def train(arguments: Annotated[list[str] | None, typer.Argument(metavar="STAGE …")] = None) -> None:
    """Train a stage: `unclip train STAGE CONFIG [key=value …]`; --help says more."""
    from unclip.train import main

    main(arguments or ["--help"])


def watch(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN…", help="Folders of trainings.")],
    out: Annotated[Path, typer.Option(help="The page.")] = Path("watch.html"),
    every: Annotated[
        int | None,
        typer.Option(min=1, help="Draw it anew after so many seconds, until all have ended."),
    ] = None,
) -> None:
    """Draw trainings that go on or have ended, as one HTML page: curves, samples through time."""
    from unclip.files.disk import check_writable, replacing
    from unclip.training.watch import page

    check_writable(out.parent, "--out")
    while True:
        text, going = page(runs, every)
        with replacing(out) as file:
            file.write_text(text, encoding="utf-8")
        print(out, flush=True)
        if every is None or not going:
            return
        time.sleep(every)


def configs(name: Annotated[str | None, typer.Argument(help="Print this one.")] = None) -> None:
    """List the configurations that ship, or print one, to be changed: > my.yaml."""
    if name is not None:
        path = configuration(name)
        if not path.is_file():
            raise ConfigError(f"no configuration {name}; `unclip configs` lists those that ship")
        print(path.read_text(encoding="utf-8"), end="")
        return
    shipped = configurations()
    width = max(map(len, shipped), default=0)
    for known, path in shipped.items():
        print(f"{known:<{width}}  {_first_sentence(path.read_text(encoding='utf-8'))}")


def _first_sentence(text: str) -> str:
    """Of the comment at a file's head."""
    head = itertools.takewhile(lambda line: line.startswith("#"), text.splitlines())
    said = " ".join(line[1:].strip() for line in head)
    return re.split(r"\.\s|:\s(?=\s|accelerate)", said)[0].rstrip(".")


def new(
    folder: Annotated[Path, typer.Argument(help="Where they are written, and runs will lie.")],
    data: Annotated[str, typer.Option(help="What data.train may name: a folder of pictures …")],
    machine: Annotated[
        Literal["cpu", "gpu24", "gpus8"],
        typer.Option("--for", help="A CPU, a GPU of 24 GB, eight GPUs in one machine."),
    ] = "cpu",
    start: Annotated[
        str | None,
        typer.Option("--from", help="A model whose prior and decoder go on: few pictures do then."),
    ] = None,
) -> None:
    """Write a commented configuration of each stage for your own pictures, and say what is next."""
    from unclip.training.new import assembling
    from unclip.training.new import new as write

    written = []
    for one in write(folder, data, machine, start):
        print(f"{one.file}  {one.time}".rstrip(), flush=True)
        written.append(one)
    print("next, one after the other:")
    print("\n".join(f"  {one.command}" for one in written))
    print(f"  {assembling(folder, written, start)}")
    print(f'  unclip text "a caption" --model {shlex.quote(str(folder / "model"))}')


def validate(
    configs: Annotated[
        list[str],
        typer.Argument(
            metavar="CONFIG … [KEY=VALUE …]",
            help="YAML files or names of shipped ones, of one stage or of a stack, and what "
            "differs in all of them.",
        ),
    ],
    out: Annotated[Path, typer.Option(help="A folder, for contact sheets of the data.")] = Path(
        "out"
    ),
    gpus: Annotated[int, typer.Option(min=1, help="How many there will be.")] = 1,
    memory: Annotated[
        float | None,
        typer.Option(min=1, help="Of one GPU, in GB; more is an error [default: only said]."),
    ] = None,
) -> None:
    """Check configurations before a training: keys, widths, a batch of the data, memory."""
    from unclip.training.validate import validate as check

    overrides = [word for word in configs if "=" in word]
    paths = [word for word in configs if "=" not in word]
    if not paths:
        raise ConfigError("give a configuration; `unclip configs` lists those that ship")
    for sentence in check(paths, overrides, out, gpus, memory):
        print(sentence, flush=True)


def plan(
    config: Annotated[str, typer.Argument(help=f"{CONFIG} Of a prior, a decoder or an upsampler.")],
    overrides: Overrides = None,
    gpus: Annotated[int, typer.Option(min=1, help="How many there are.")] = 1,
    shard: Annotated[
        bool, typer.Option("--shard", help="Each holds its share (FSDP2), not a copy (DDP).")
    ] = False,
    machines: Annotated[
        int, typer.Option(min=1, help="That the GPUs are in; each shares out by itself.")
    ] = 1,
    memory: Annotated[float, typer.Option(min=1, help="Of one GPU, in GB.")] = 80.0,
    tflops: Annotated[float, typer.Option(min=0.001, help="Of one GPU at its best.")] = 312.0,
    utilisation: Annotated[float, typer.Option(min=0.001, max=1, help="Share reached.")] = 0.4,
) -> None:
    """Say what a training will need, without allocating it: memory, arithmetic, days."""
    from unclip.training.plan import plan as count
    from unclip.training.plan import report

    needs = count(config, overrides or [], gpus, shard, machines)
    print(report(needs, gpus=gpus, memory=memory, tflops=tflops, utilisation=utilisation))
