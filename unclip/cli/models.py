"""The verbs that work on models: info, assemble, convert, push, measure."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from unclip.cli.arguments import Device, Dtype, ModelArgument, Variant
from unclip.cli.shell import default_model, to_device, to_dtype
from unclip.errors import ConfigError


def info(folder: ModelArgument = None, variant: Variant = None) -> None:
    """List the stages of a model: parameters, sizes, samplers, encoder, megabytes on disk."""
    from unclip.sources import Source
    from unclip.summary import summarise

    source = Source(folder or default_model(), variant)
    stages = summarise(source)
    print(f"{source.root}  (model hash {source.hash})")
    for stage in stages:
        print(
            f"{stage.name:<16} {stage.parameters / 1e6:9.2f} M parameters {stage.bytes / 1e6:9.1f} "
            f"MB  {stage.size:<20} {stage.sampling}".rstrip()
        )
    total = sum(stage.bytes for stage in stages) / 1e6
    count = sum(stage.parameters for stage in stages) / 1e6
    print(f"{'total':<16} {count:9.2f} M parameters {total:9.1f} MB")
    encoders = sorted({stage.encoder for stage in stages if stage.encoder})
    print(f"CLIP encoder: {', '.join(encoders) or 'none named'}")


def assemble(
    out: Annotated[Path, typer.Option(help="The model folder to write.")],
    clip: Annotated[
        Path | None, typer.Option(help="Run or model folder of the encoder, or open_clip's name.")
    ] = None,
    prior: Annotated[Path | None, typer.Option(help="Run or model folder of the prior.")] = None,
    ar_prior: Annotated[
        Path | None, typer.Option(help="Run or model folder of the autoregressive prior.")
    ] = None,
    decoder: Annotated[
        Path | None, typer.Option(help="Run or model folder of the decoder.")
    ] = None,
    upsampler: Annotated[
        list[Path] | None, typer.Option(help="Run or model folder of upsamplers; repeatable.")
    ] = None,
    lora: Annotated[
        list[Path] | None,
        typer.Option(help="Run or folder of a LoRA, merged into its stage; repeatable."),
    ] = None,
    dtype: Annotated[Dtype, typer.Option(help="Precision of the stored weights.")] = "fp32",
) -> None:
    """Collect stages from runs (their newest averaged weights) into one model folder."""
    from unclip.assemble import assemble as collect

    collect(out, clip, prior, decoder, upsampler or [], to_dtype(dtype), ar_prior, lora or [])
    print(out)


def convert(
    source: Annotated[
        str, typer.Argument(help="A model folder, a folder like Karlo's, or a hub id.")
    ],
    out: Annotated[Path, typer.Argument(help="The folder to write.")],
    dtype: Annotated[
        Dtype | None, typer.Option(help="Precision of the stored weights [default: as they are].")
    ] = None,
    variant: Variant = None,
    allow_pickle: Annotated[
        bool, typer.Option("--allow-pickle", help="Read .bin weights too, tensors only.")
    ] = False,
) -> None:
    """Carry a model from Karlo's (diffusers') layout to ours, or from ours to Karlo's."""
    from unclip.files.find import resolve_folder
    from unclip.interop.convert import convert as carry

    root = resolve_folder(source, allow_pickle=allow_pickle)
    wanted = to_dtype(dtype) if dtype else None
    for note in carry(root, out, wanted, variant=variant, allow_pickle=allow_pickle):
        print(f"note: {note}", file=sys.stderr)
    print(out)


def push(
    folder: Annotated[Path, typer.Argument(help="A model folder, a run, or a LoRA of one.")],
    repo: Annotated[str, typer.Argument(metavar="OWNER/NAME", help="Made if it is not there.")],
    private: Annotated[bool, typer.Option("--private", help="If it is made.")] = False,
    revision: Annotated[
        str | None, typer.Option(help="A branch, made if it is not there [default: main].")
    ] = None,
    licence: Annotated[
        str | None, typer.Option("--license", help="For its card: apache-2.0, mit, cc-by-4.0 …")
    ] = None,
    notes: Annotated[
        Path | None, typer.Option(help="Markdown for its card: data, figures, what it can't do.")
    ] = None,
) -> None:
    """Send a model to the Hugging Face hub, with a card; HF_TOKEN is who you are there.

    A README.md in the folder is its card; otherwise one is written from the stages.
    """
    from unclip.hub import push as send

    try:
        said = notes.read_text(encoding="utf-8") if notes else ""
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"--notes {notes} can't be read: {error}") from None
    print(send(folder, repo, private=private, revision=revision, licence=licence, notes=said))


def measure(
    model: ModelArgument = None,
    data: Annotated[str, typer.Option(help="What it was trained on: as data.train.")] = "emoji",
    limit: Annotated[int, typer.Option(min=16, help="Pairs to measure on.")] = 10_000,
    device: Device = "auto",
) -> None:
    """Measure what the sampler `analytic` needs to know of a prior, and keep it with the stage."""
    from unclip.evaluation.power import measure_prior

    found = measure_prior(model or default_model(), data, limit, to_device(device))
    least = min(found, key=lambda t: found[t])
    bound = sum(value == 1 for value in found.values())
    print(f"mean square of the prior's ε: {found[least]:.3f} at t = {least}, where it is least")
    print(f"at {bound} of {len(found)} timesteps it is 1 or more: there analytic is as ddpm")
