"""The verb that measures a model: evaluate."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Annotated

import typer

from unclip.cli.arguments import (
    Device,
    Guidance,
    ModelArgument,
    Precision,
    Sampler,
    Steps,
    by_stage,
)
from unclip.cli.shell import default_model, to_device, to_dtype
from unclip.errors import UnclipWarning


def evaluate(
    model: ModelArgument = None,
    data: Annotated[str, typer.Option(help="What it was trained on: as data.train.")] = "emoji",
    held_out: Annotated[
        str | None, typer.Option(help="Pictures it has not seen [default: a built-in set's val].")
    ] = None,
    captions: Annotated[
        str | None,
        typer.Option(help="How captions are worded: 'a {name} in {style}' [default: the data's]."),
    ] = None,
    judge: Annotated[
        str | None, typer.Option(help="A CLIP that took no part in sampling, to name pictures.")
    ] = None,
    features: Annotated[
        list[str] | None,
        typer.Option(
            help="A network from outside: efficientnet-lite0, efficientnet-lite2 or a CLIP; "
            "repeatable [default: both]."
        ),
    ] = None,
    limit: Annotated[int, typer.Option(min=4, help="Captions of each group.")] = 96,
    seeds: Annotated[int, typer.Option(min=1, help="Pictures of each name alone.")] = 4,
    upscaled: Annotated[int, typer.Option(min=0, help="Pictures to upsample.")] = 24,
    steps: Steps = None,
    guidance: Guidance = None,
    sampler: Sampler = None,
    prior_candidates: Annotated[
        int | None, typer.Option(min=1, help="Embeddings drawn for each one that is kept.")
    ] = None,
    out: Annotated[Path, typer.Option(help="The folder of the report.")] = Path("evaluation"),
    device: Device = "auto",
    dtype: Precision = "fp32",
) -> None:
    """Measure a model stage by stage against its data; writes report.json and report.html.

    Pictures are kept under the report's folder, so that an interrupted run goes on.
    """
    from unclip.files.disk import check_writable
    from unclip.sources import Source

    check_writable(out, "--out")
    source = Source(model or default_model())

    from unclip.evaluation.evaluate import Request
    from unclip.evaluation.evaluate import evaluate as measure
    from unclip.evaluation.report import markdown, page
    from unclip.files.disk import write_json
    from unclip.pipeline import UnCLIP

    # One value is the decoder's in all calls: drawing an embedding would take it for the prior's.
    options = {
        key: value if isinstance(value, dict) or value is None else {"decoder": value}
        for key, value in by_stage(steps, guidance, sampler).items()
        if key != "progress"
    }
    asked = {"features": tuple(features)} if features else {}
    request = Request(
        data,
        held_out,
        captions,
        judge,
        limit=limit,
        seeds=seeds,
        upscaled=upscaled,
        options=options | {"prior_candidates": prior_candidates},
        **asked,
    )
    weights = source.hash
    pipe = UnCLIP.from_pretrained(source, to_device(device), to_dtype(dtype))
    with warnings.catch_warnings():  # captions of data with words that it lacks are measured
        warnings.filterwarnings("ignore", "the encoder|.* not read whole", UnclipWarning)
        evaluation = measure(pipe, weights, request, out / "pictures")
    out.mkdir(parents=True, exist_ok=True)
    write_json(out / "report.json", evaluation.scores)
    (out / "report.html").write_text(page(evaluation, f"{source.root} on {data}"), encoding="utf-8")
    print(markdown(evaluation.scores))
    print(f"\n{out / 'report.json'}\n{out / 'report.html'}")
