"""What the shell's verbs share: finding and loading the model, reading options, writing pictures.

Nothing here imports torch before a verb has work to do.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from unclip.errors import CheckpointError, ConfigError

if TYPE_CHECKING:
    import torch
    from PIL.Image import Image

    from unclip.cli.output import Writer
    from unclip.pipeline import UnCLIP

DTYPES = {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16"}


def default_model() -> Path:
    """The shipped weights: in an installed package inside it, in a clone beside it.

    **Raises**: `CheckpointError` if they are in neither place.
    """
    package = Path(__file__).resolve().parents[1]
    places = [package / "weights" / "emoji", package.parent / "weights" / "emoji"]
    for place in places:
        if (place / "unclip.json").is_file():
            return place
    raise CheckpointError(
        f"the shipped weights are not at {places[1]}; name a model folder or a run with --model"
    )


def load(
    model: Path | None,
    device: str,
    dtype: str,
    offload: bool,
    writer: Writer,
    options: dict[str, Any],
    **source: str,
) -> UnCLIP:
    """Load a model and tell the writer what makes its pictures.

    **Raises**: `ConfigError` for options that the model can't follow, `CheckpointError`.
    """
    from unclip.files.find import resolve_folder

    folder = resolve_folder(model or default_model())

    from unclip.cli.summary import model_hash
    from unclip.options import Options  # seconds of imports, so only for a model that is there
    from unclip.pipeline import UnCLIP

    pipe = UnCLIP.from_pretrained(folder, to_device(device), to_dtype(dtype), offload=offload)
    opts = Options.of(options)
    if source["verb"] == "upscale":
        opts = opts.spread(pipe.upsamplers)
    asked = {key: value for key, value in options.items() if key != "progress"}
    if "prior_candidates" in asked:
        asked["prior_candidates"] = asked["prior_candidates"] or pipe.prior_candidates
    used = {stage.name: opts.sampling(stage).model_dump() for stage in pipe.stages}
    writer.model = model_hash(folder)
    writer.settings = {**source, **asked, "dtype": dtype, "sampling": used}
    return pipe


def draw(
    pipe: UnCLIP,
    make: Callable[[slice, int], list[Image]],
    names: Sequence[str],
    prompts: Sequence[str] | None,
    seed: int,
    size: int | None,
    writer: Writer,
) -> None:
    """Draw picture k with seed + k, as many together as fit, and write them as they are ready.

    `make` gives the pictures of a slice of the rows, of which the first has the given seed.
    """
    from unclip.stages.stage import chunk_size

    together = chunk_size(size or max(pipe.sizes, default=1), pipe.device)
    for start in range(0, len(names), together):
        rows = slice(start, start + together)
        for k, image in enumerate(make(rows, seed + start), start):
            writer.save(image, names[k], seed + k, prompts[k] if prompts else "")


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
        return {name.strip(): kind(value.strip()) for name, value in pairs}
    except ValueError:
        example = {int: "50 or prior=25,decoder=50", float: "4 or prior=2,decoder=4"}
        raise ConfigError(
            f"{option} {text!r}: expected for example {example.get(kind, 'ddim or prior=ddpm')}"
        ) from None


def to_device(name: str) -> torch.device:
    """A device by name; `auto` is the accelerator if there is one. **Raises**: `ConfigError`."""
    import torch

    if name == "auto":
        found = torch.accelerator.current_accelerator(check_available=True)
        return found or torch.device("cpu")
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise ConfigError(f"--device {name!r} can't be used here: {reason}") from None
    return device


def to_dtype(name: str) -> torch.dtype:
    """fp32, fp16 or bf16 as torch has it."""
    import torch

    return getattr(torch, DTYPES[name])
