"""From what was asked to pictures on disk, and what else the shell's verbs share.

Nothing here imports torch before a verb has work to do.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from unclip.cli.arguments import Asked, by_stage, numbers
from unclip.errors import CheckpointError, ConfigError
from unclip.shipped import shipped

if TYPE_CHECKING:
    import torch
    from PIL.Image import Image

    from unclip.options import Options
    from unclip.pipeline import UnCLIP

DTYPES = {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16"}


class Making:
    """A verb's way from what was asked to pictures on disk: `pipe` makes them, with `options` and
    from `seed` on; `save` writes them as they are ready.

    `count` says how many there will be (None: whoever asks writes them), `meant_for` which kind of
    stage single values of options are for; `more` are options that not every verb has, and `source`
    names what is worked on; `drawn_by` makes of the model the one that draws, and `given` are the
    verb's own arguments, as pictures will tell them.

    **Raises**: `ConfigError` where nothing can be written, before the model is loaded, or for
    options that it can't follow; `CheckpointError`.
    """

    def __init__(
        self,
        verb: str,
        asked: Asked,
        count: int | None = 1,
        *,
        meant_for: str = "decoder",
        source: str | None = None,
        drawn_by: Callable[[UnCLIP], UnCLIP] | None = None,
        given: Mapping[str, Any] | None = None,
        **more: Any,
    ):
        self.seed = asked.seed
        named = by_stage(asked.steps, asked.guidance, asked.sampler)

        from unclip.cli.output import Writer

        if count is not None:
            self.writer = Writer(asked.out, count, asked.form)

        from unclip.files.find import resolve_folder

        root = resolve_folder(asked.model or default_model())

        from unclip.options import Options  # seconds of imports, so only for a model that is there
        from unclip.pipeline import UnCLIP
        from unclip.sources import Source
        from unclip.stages.lora import read_loras

        lora = asked.lora or []
        model = Source(root, asked.variant, found=True).change(read_loras(lora))
        device = to_device(asked.device)
        dtype = precision(asked.dtype, device)
        self.hash = model.hash
        self.pipe = UnCLIP.from_pretrained(model, device, dtype, offload=asked.offload)
        if drawn_by is not None:
            self.pipe = drawn_by(self.pipe)
        named |= {name: getattr(asked, name) for name in ("size", "tile")}
        if asked.interval is not None:
            named["interval"] = tuple(numbers("--interval", asked.interval))
        self.options = Options.of(named | more, meant_for=meant_for)
        changes = [str(path) for path in lora] or None
        self.about = {"verb": verb, "source": source, "dtype": name_of(dtype), "lora": changes}
        self.given = given or {}

    @property
    def settings(self) -> dict[str, Any]:
        """See `settings_of`."""
        return settings_of(self.pipe, self.options, self.about)

    def save(
        self,
        pictures: Iterable[Image],
        names: Sequence[str],
        *,
        prompts: Sequence[str] | None = None,
        columns: int | None = None,
        title: str | None = None,
        one_seed: bool = False,
        own: Sequence[Mapping[str, Any]] | None = None,
    ) -> None:
        """Write each picture as it is ready under its name and seed, then a sheet of them all.

        Prompts that differ are the sheet's captions; `own` is what each picture was given besides.
        """
        settings = self.settings
        for k, picture in enumerate(pictures):
            given = {**self.given, **(own[k] if own else {})}
            about = {
                "prompt": prompts[k] if prompts else "",
                "seed": self.seed if one_seed else self.seed + k,
                "settings": settings | ({"given": given} if given else {}),
                "model": self.hash,
            }
            self.writer.save(picture, names[k], about)
        captions = prompts if len(set(prompts or ())) > 1 else None
        self.writer.sheet(title or names[0], columns or square(len(names)), captions)


def settings_of(pipe: UnCLIP, options: Options, about: Mapping[str, Any]) -> dict[str, Any]:
    """What reproduces pictures, besides their prompts, seeds and the model, and what their verb was
    `given`. `pipe` and `options` are those that draw."""
    asked = options.described()
    asked["prior_candidates"] = asked["prior_candidates"] or pipe.prior_candidates
    sampling = options.resolve(pipe.stages)
    used = {name: config.model_dump() for name, config in sampling.items()}
    said = {**about, **asked, "sampling": used}
    return {name: value for name, value in said.items() if value is not None}


def square(count: int) -> int:
    """The columns of a sheet that is about as wide as high."""
    return math.ceil(count**0.5)


def default_model() -> Path:
    """The shipped weights. **Raises**: `CheckpointError` if they are not there."""
    from unclip.files.folder import INDEX

    place = shipped("weights/emoji")
    if not (place / INDEX).is_file():
        raise CheckpointError(
            f"the shipped weights are not at {place}; name a model folder or a run with --model"
        )
    return place


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


def precision(name: str | None, device: torch.device) -> torch.dtype:
    """What networks compute in: as asked, or what suits the device."""
    from unclip.precision import default_dtype

    return default_dtype(device) if name is None else to_dtype(name)


def name_of(dtype: torch.dtype) -> str:
    """fp32, fp16 or bf16."""
    return next(name for name in DTYPES if to_dtype(name) == dtype)


def to_dtype(name: str) -> torch.dtype:
    """fp32, fp16 or bf16 as torch has it."""
    import torch

    return getattr(torch, DTYPES[name])
