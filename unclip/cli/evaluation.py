"""The verbs that measure a model: evaluate, experiment."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from unclip.cli.arguments import (
    Device,
    Guidance,
    ModelArgument,
    Precision,
    Prior,
    Sampler,
    Steps,
    by_stage,
)
from unclip.cli.shell import default_model, precision, to_device
from unclip.errors import UnclipWarning

if TYPE_CHECKING:
    from unclip.evaluation.setting import Request
    from unclip.pipeline import UnCLIP
    from unclip.sources import Source


@dataclass(frozen=True)
class Measuring:
    """What both verbs may be told."""

    data: Annotated[str, typer.Option(help="What it was trained on: as data.train.")] = "emoji"
    held_out: Annotated[
        str | None, typer.Option(help="Pictures it has not seen [default: a built-in set's val].")
    ] = None
    captions: Annotated[
        str | None,
        typer.Option(help="How captions are worded: 'a {name} in {style}' [default: the data's]."),
    ] = None
    judge: Annotated[
        str | None, typer.Option(help="A CLIP that took no part in sampling, to name pictures.")
    ] = None
    features: Annotated[
        list[str] | None,
        typer.Option(
            help="A network from outside: efficientnet-lite0, efficientnet-lite2 or a CLIP; "
            "repeatable [default: both]."
        ),
    ] = None
    limit: Annotated[int, typer.Option(min=4, help="Captions of each group.")] = 96
    seeds: Annotated[int, typer.Option(min=1, help="Pictures of each name alone.")] = 4
    steps: Steps = None
    guidance: Guidance = None
    sampler: Sampler = None
    prior_candidates: Annotated[
        int | None, typer.Option(min=1, help="Embeddings drawn for each one that is kept.")
    ] = None
    out: Annotated[Path, typer.Option(help="The folder of the report.")] = Path("evaluation")
    device: Device = "auto"
    dtype: Precision = None

    def source(self, model: Path | None) -> Source:
        """The model, its files checked. **Raises**: `ConfigError` if no report can be written."""
        from unclip.files.disk import check_writable
        from unclip.sources import Source

        check_writable(self.out, "--out")
        return Source(model or default_model())

    def request(self, upscaled: int = 0, prior: str | None = None) -> Request:
        """What to measure."""
        from unclip.evaluation.setting import Request

        # One value is the decoder's in all calls: drawing an embedding would take it for the
        # prior's.
        options: dict[str, Any] = {
            key: value if isinstance(value, dict) or value is None else {"decoder": value}
            for key, value in by_stage(self.steps, self.guidance, self.sampler).items()
            if key != "progress"
        }
        options |= {"prior_candidates": self.prior_candidates}
        options |= {} if prior is None else {"prior": prior}
        asked = {"features": tuple(self.features)} if self.features else {}
        return Request(
            self.data,
            self.held_out,
            self.captions,
            self.judge,
            limit=self.limit,
            seeds=self.seeds,
            upscaled=upscaled,
            options=options,
            **asked,
        )

    def load(self, source: Source) -> UnCLIP:
        """The model with its weights."""
        from unclip.pipeline import UnCLIP

        where = to_device(self.device)
        return UnCLIP.from_pretrained(source, where, precision(self.dtype, where))


@contextmanager
def _as_they_are() -> Iterator[None]:
    """No warnings of captions with words that the encoder lacks: those are measured too."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "the encoder|.* not read whole", UnclipWarning)
        yield


def evaluate(
    model: ModelArgument = None,
    *,
    measuring: Measuring,
    upscaled: Annotated[int, typer.Option(min=0, help="Pictures to upsample.")] = 24,
    prior: Prior = None,
) -> None:
    """Measure a model stage by stage against its data; writes report.json and report.html.

    Pictures are kept under the report's folder, so that an interrupted run goes on.
    """
    source = measuring.source(model)

    from unclip.evaluation.evaluate import evaluate as measure
    from unclip.evaluation.report import markdown, page, tables
    from unclip.files.disk import write_json

    request, out, weights = measuring.request(upscaled, prior), measuring.out, source.hash
    pipe, title = measuring.load(source), f"{source.root} on {measuring.data}"
    with _as_they_are():
        evaluation = measure(pipe, weights, request, out / "pictures")
    out.mkdir(parents=True, exist_ok=True)
    write_json(out / "report.json", evaluation.scores)
    (out / "report.html").write_text(page(evaluation, title), encoding="utf-8")
    print(markdown(tables(evaluation.scores)))
    print(f"\n{out / 'report.json'}\n{out / 'report.html'}")


def experiment(
    name: Annotated[
        Literal[
            "priors", "guidance", "samplers", "reranking", "pca", "binding", "typography", "linear"
        ],
        typer.Argument(help="See docs/evaluation.md."),
    ],
    model: ModelArgument = None,
    *,
    measuring: Measuring,
) -> None:
    """Make one of the paper's experiments with a model: a table, and a figure of it.

    Writes NAME.json, NAME.md and NAME.png. Pictures are kept, so that an interrupted one goes on.
    """
    source = measuring.source(model)

    from unclip.evaluation.experiments import EXPERIMENTS

    request, weights, out = measuring.request(), source.hash, measuring.out
    pipe = measuring.load(source)
    with _as_they_are():
        found = EXPERIMENTS[name](pipe, weights, request, out / "pictures")
    print(found.markdown)
    print("\n" + "\n".join(map(str, found.write(out, name))))
