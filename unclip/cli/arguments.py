"""What verbs may be told: arguments and options that several share, each with its help."""

from __future__ import annotations

import inspect
import typing
from collections.abc import Callable
from dataclasses import dataclass, fields, is_dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from unclip.errors import ConfigError, DataError
from unclip.text import meant

SEEDS = 2**63 - 1


def there(path: Path) -> Path:
    """A file that is there, which is said before seconds of imports. **Raises**: `DataError`."""
    if not path.expanduser().exists():
        kind = "embeddings" if path.suffix in (".safetensors", ".npy") else "picture"
        raise DataError(f"no {kind} at {path}")
    return path


Dtype = Literal["fp32", "fp16", "bf16"]
Prompt = Annotated[str, typer.Argument(metavar="PROMPT", parser=meant, help="In quotes.")]
Prompts = Annotated[
    list[str] | None, typer.Argument(metavar="PROMPT", parser=meant, help="In quotes.")
]
Picture = Annotated[
    Path, typer.Argument(metavar="IMAGE", help="JPEG, PNG or WebP.", callback=there)
]
Pictures = Annotated[list[Path], typer.Argument(metavar="IMAGE", help="JPEG, PNG or WebP.")]
N = Annotated[int, typer.Option("--n", min=1, help="Pictures for each prompt, or each input.")]
Seed = Annotated[int, typer.Option(min=0, max=SEEDS, help="Picture k uses seed + k.")]
Size = Annotated[int | None, typer.Option(min=1, help="Side in pixels [default: the largest].")]
BY_STAGE = "One value for the decoder, or by stage: prior=…,decoder=…,upsampler_256=…"
Steps = Annotated[str | None, typer.Option(help=f"Sampling steps. {BY_STAGE}")]
Guidance = Annotated[str | None, typer.Option(help=f"Guidance scale, 1 is off. {BY_STAGE}")]
Sampler = Annotated[
    str | None, typer.Option(help=f"ddpm, ddim, dpm++, unipc or analytic. {BY_STAGE}")
]
Interval = Annotated[
    str | None,
    typer.Option(help="Guide the decoder in a part of time only, as 0.2,0.8; 1 is pure noise."),
]
Negative = Annotated[
    str | None,
    typer.Option("--negative", parser=meant, help="A prompt to be guided away from."),
]
Prior = Annotated[
    str | None,
    typer.Option(
        "--prior",
        help="How text becomes an embedding: diffusion, ar, draft (no drawing), text (the text's "
        "own) or none (the caption alone) [default: the model's prior].",
    ),
]
Tile = Annotated[int | None, typer.Option(help="Upsample in tiles of this side: less memory.")]
Out = Annotated[Path, typer.Option(help="A folder, or a file for a single picture.")]
Format = Annotated[
    Literal["png", "webp", "jpg"] | None,
    typer.Option("--format", help="Of the files [default: png, or as --out ends]."),
]
MODEL = "A model folder, a run or a hub id [default: the shipped weights]."
Model = Annotated[Path | None, typer.Option(help=MODEL)]
ModelArgument = Annotated[Path | None, typer.Argument(help=MODEL)]
Variant = Annotated[
    str | None, typer.Option(help="Of a folder like Karlo's with several copies of weights: fp16 …")
]
Lora = Annotated[
    list[Path] | None,
    typer.Option(help="A LoRA of one of its stages: a folder, a run or a hub id; repeatable."),
]
Device = Annotated[str, typer.Option(help="cpu, cuda, cuda:1, mps …, or auto.")]
Offload = Annotated[
    bool, typer.Option("--offload", help="Keep one stage at a time on the device: less memory.")
]
Precision = Annotated[
    Dtype | None,
    typer.Option(
        "--dtype", help="Precision of the networks [default: fp16 on accelerators, fp32 on CPUs]."
    ),
]


@dataclass(frozen=True)
class Asked:
    """What every verb that makes pictures may be told."""

    seed: Seed = 0
    size: Size = None
    steps: Steps = None
    guidance: Guidance = None
    sampler: Sampler = None
    interval: Interval = None
    tile: Tile = None
    out: Out = Path("out")
    form: Format = None
    model: Model = None
    lora: Lora = None
    variant: Variant = None
    device: Device = "auto"
    dtype: Precision = None
    offload: Offload = False


def expanded(verb: Callable[..., None]) -> Callable[..., None]:
    """A verb as typer takes it: for a parameter that is a dataclass, its fields.

    Paths begin at home where they say `~`, which shells leave alone behind a `=`.
    """
    hints = typing.get_type_hints(verb, include_extras=True)
    groups: dict[str, Any] = {name: kind for name, kind in hints.items() if is_dataclass(kind)}
    parameters: list[inspect.Parameter] = []
    for parameter in inspect.signature(verb).parameters.values():
        group = groups.get(parameter.name)
        one = {parameter.name: hints[parameter.name]}
        names = one if group is None else typing.get_type_hints(group, include_extras=True)
        for name, kind in names.items():
            default = parameter.default if group is None else getattr(group, name)
            parameters.append(
                inspect.Parameter(name, parameter.KEYWORD_ONLY, default=default, annotation=kind)
            )

    def run(**given: Any) -> None:
        given = {name: _from_home(value) for name, value in given.items()}
        for name, kind in groups.items():
            given[name] = kind(**{field.name: given.pop(field.name) for field in fields(kind)})
        verb(**given)

    run.__name__, run.__doc__ = verb.__name__, verb.__doc__
    run.__annotations__ = {p.name: p.annotation for p in parameters}
    run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    return run


def _from_home(value: Any) -> Any:
    if isinstance(value, list):
        return [_from_home(item) for item in value]
    return value.expanduser() if isinstance(value, Path) else value


def by_stage(steps: str | None, guidance: str | None, sampler: str | None) -> dict[str, Any]:
    """The options that may differ by stage; with progress, for a person is watching."""
    return {
        "steps": _parse("--steps", steps, int),
        "guidance": _parse("--guidance", guidance, float),
        "sampler": _parse("--sampler", sampler, str),
        "progress": True,
    }


def _parse(option: str, text: str | None, kind: type) -> Any:
    """`50`, or `prior=25,decoder=50` as a dict."""
    if text is None:
        return None
    try:
        if "=" not in text:
            return kind(text)
        pairs = [part.split("=") for part in text.split(",")]
        values = {name.strip(): kind(value.strip()) for name, value in pairs}
    except ValueError:
        example = {int: "50 or prior=25,decoder=50", float: "4 or prior=2,decoder=4"}
        raise ConfigError(
            f"{option} {text!r}: expected for example {example.get(kind, 'ddim or prior=ddpm')}"
        ) from None
    if len(values) < len(pairs):
        raise ConfigError(f"{option} {text!r}: a stage is given twice")
    return values


def numbers(option: str, text: str) -> list[float]:
    """`0.1,0.2`."""
    try:
        return [float(part) for part in text.split(",")]
    except ValueError:
        raise ConfigError(f"{option} {text!r}: expected numbers, as 0.35 or 0.1,0.2") from None


def weighed(text: str) -> tuple[str, float]:
    """`cat.png:0.7`; without a number the weight is 1."""
    name, colon, weight = text.rpartition(":")
    try:
        return (name, float(weight)) if colon else (text, 1.0)
    except ValueError:
        return text, 1.0
