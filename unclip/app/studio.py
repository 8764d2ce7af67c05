"""What stands behind the web page: one model, one call at a time, seen while it draws."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from queue import Queue
from threading import Event, Lock, Thread
from typing import Any

import torch
from PIL.Image import Image
from torch import Tensor

from unclip.cli.output import Writer
from unclip.cli.shell import name_of, settings_of, square
from unclip.errors import CheckpointError, ConfigError, DataError, warnings_to
from unclip.files.checkpoints import list_checkpoints
from unclip.files.diffusers import PIPELINE
from unclip.files.folder import read_index
from unclip.images import grid, load_image, to_pil
from unclip.inputs import as_number, as_seeds
from unclip.options import Options
from unclip.pipeline import UnCLIP
from unclip.sources import Source

# What one call may ask for: a slip of the finger must not keep the machine for a day.
MOST = {"n": 16, "steps": 1000, "frames": 33, "repeats": 10}
UPLOAD_PIXELS, UPLOAD_BYTES = 16_000_000, 32 * 2**20
WORDS_EVERY, PICTURE_EVERY = 0.1, 0.4  # seconds from one look at a call to the next
LOOK = 512  # pixels that a look is wide at most
NO_PICTURE = "no picture yet: drop one, or send one from the gallery"


@dataclass(frozen=True)
class Look:
    """How far a call has come: a stage's steps, and what they lead to where that is a picture."""

    stage: str
    done: int
    total: int
    picture: Image | None = None


@dataclass(frozen=True)
class Made:
    """A finished picture's file, which says how it was made, and its seed."""

    path: Path
    seed: int


@dataclass(frozen=True)
class Verb:
    """One thing to do with a model.

    `draw` is called with the model, the first seed, `Options`, and by name what the form gives:
    pictures as `Path`s, and what will be seen as `caption`. `drawn_by` gives the model and the
    options that it draws with, `own` what of the form picture k is told beside its plain values;
    with `one_seed` all pictures of a call have the same.
    """

    name: str
    draw: Callable[..., Iterable[Image]]
    drawn_by: Callable[[UnCLIP, Options, Mapping[str, Any]], tuple[UnCLIP, Options]] = (
        lambda pipe, options, given: (pipe, options)
    )
    own: Callable[[Mapping[str, Any], int], Mapping[str, Any]] = lambda given, k: {}
    one_seed: bool = False
    meant_for: str = "decoder"

    def options(self, **fields: Any) -> Options:
        """What is asked of any verb, from a form: an empty field, or 0, is the model's own value.

        **Raises**: `ConfigError` for what no model can do, or more than `MOST`.
        """
        given = {name: value for name, value in fields.items() if value not in (None, "", 0)}
        if "steps" in given:
            given["steps"] = bounded("steps", given["steps"])
        return Options.of(given, meant_for=self.meant_for)


@dataclass(frozen=True)
class Model:
    """A model in memory, and the hash of its weights."""

    name: str
    pipe: UnCLIP
    hash: str


class Stopped(Exception):
    """Nobody waits for a call any more."""


class Studio:
    """Draws for a page, into a folder, with one model that is kept until another is named."""

    def __init__(self, out: Path, device: torch.device, dtype: torch.dtype, offload: bool = False):
        self.out = out
        self._how: dict[str, Any] = {"device": device, "dtype": dtype, "offload": offload}
        self._one = Lock()  # call at a time
        self.model: Model | None = None  # that is open

    def open(self, name: str) -> Model:
        """Read a model folder, a run's newest checkpoint or a hub id, and keep it.

        **Raises**: `CheckpointError`, `ConfigError`.
        """
        with self._one:
            return self._open(name)

    def _open(self, name: str) -> Model:
        if not (name := (name or "").strip()):
            raise ConfigError("no model is named: choose one, or type a folder or a hub id")
        source = Source(name)
        known = source.hash  # of files that loading lets go of
        self.model = None  # two may be too many for the memory
        self.model = Model(name, UnCLIP.from_pretrained(source, **self._how), known)
        return self.model

    def draw(
        self, verb: Verb, name: str, seed: int | None, options: Options, given: Mapping[str, Any]
    ) -> Iterator[Look | Made | str]:
        """Looks at a call, its warnings, and its pictures as they are ready.

        It runs in a thread of its own, after those that came before. When this iterator is closed
        it ends with its step. Without a seed one is drawn.

        **Raises**: what the library raises.
        """
        events: Queue[Look | Made | str | BaseException | None] = Queue()
        watch = _Watch(events.put)

        def work() -> None:
            try:
                with self._one, warnings_to(events.put):
                    watch.check()
                    # No name of ours holds the one before while another is read.
                    if self.model is None or self.model.name != name:
                        self._open(name)
                    assert self.model is not None
                    for made in self._pictures(self.model, verb, seed, options, given, watch):
                        events.put(made)
            except Stopped:
                pass
            except BaseException as error:
                events.put(error)
            finally:
                events.put(None)

        Thread(target=work, daemon=True).start()
        try:
            while (event := events.get()) is not None:
                if isinstance(event, BaseException):
                    raise event
                yield event
        finally:
            watch.closed.set()

    def _pictures(
        self,
        model: Model,
        verb: Verb,
        seed: int | None,
        options: Options,
        given: Mapping[str, Any],
        watch: _Watch,
    ) -> Iterator[Made]:
        (pipe, options), first = verb.drawn_by(model.pipe, options, given), as_seeds(seed, 1)[0]
        files = [part for part in given.values() if isinstance(part, Path)]
        caption = given.get("caption", "").strip()
        about = {
            "verb": verb.name,
            "source": ", ".join(file.name for file in files) or None,
            "dtype": name_of(pipe.dtype),
        }
        title = " ".join([*(file.stem for file in files), caption or verb.name])
        watched = replace(options, progress=watch.progress, preview=watch.preview)
        writer, settings = Writer(self.out, 1), settings_of(pipe, options, about)
        for k, picture in enumerate(verb.draw(pipe, first, watched, **given)):
            own = first if verb.one_seed else first + k
            said = {"prompt": caption, "seed": own, "model": model.hash}
            told = _plain(given) | dict(verb.own(given, k))
            said["settings"] = settings | ({"given": told} if told else {})
            yield Made(writer.save(picture, title, said), own)


class _Watch:
    """What a call tells while it runs, as often as a person can look."""

    def __init__(self, tell: Callable[[Look], object]):
        self.tell, self.closed = tell, Event()
        self.at = ("", 0, 0)
        self.told = self.shown = -PICTURE_EVERY

    def check(self) -> None:
        if self.closed.is_set():
            raise Stopped

    def progress(self, stage: str, done: int, total: int) -> None:
        self.check()
        now, new = time.monotonic(), stage != self.at[0]
        self.at = (stage, done, total)
        if new or now - self.told >= WORDS_EVERY:
            self.told = now
            self.tell(Look(*self.at))

    def preview(self, stage: str, rows: slice, x0: Tensor) -> None:
        now = time.monotonic()
        if x0.ndim == 4 and now - self.shown >= PICTURE_EVERY:
            self.shown = now
            pictures = [to_pil(x) for x in x0]
            sheet = pictures[0] if len(x0) == 1 else grid(pictures, square(len(x0)))
            sheet.thumbnail((LOOK, LOOK))
            self.tell(Look(*self.at, sheet))


def _plain(given: Mapping[str, Any]) -> dict[str, Any]:
    """What a form gives beside pictures and the caption."""
    plain = (bool, int, float, str)
    return {name: x for name, x in given.items() if name != "caption" and isinstance(x, plain)}


def bounded(name: str, value: Any) -> int:
    """A whole number from 1 to what the page gives at once. **Raises**: `ConfigError`."""
    number = as_number(name, value, 1)
    if number > MOST[name]:
        raise ConfigError(
            f"{name} = {number}: this page does at most {MOST[name]} at once; the shell "
            "(`unclip --help`) and Python have no such limit"
        )
    return number


def uploaded(path: str | Path | None) -> Image:
    """A picture that was dropped. **Raises**: `DataError` if it can't be used, or is too large."""
    if path is None:
        raise DataError(NO_PICTURE)
    return of_a_size(load_image(path, Path(path).name), Path(path).name)


def of_a_size(picture: Image, name: str) -> Image:
    """The picture. **Raises**: `DataError` if it has more pixels than this page takes."""
    if picture.width * picture.height > UPLOAD_PIXELS:
        raise DataError(
            f"{name} is {picture.width} x {picture.height}, more than the {UPLOAD_PIXELS:,} "
            "pixels that this page takes; scale it down first",
            "too large",
        )
    return picture


def models_near(root: Path) -> list[str]:
    """The model folders in `root/weights`, and the runs in `root/runs` that something can be drawn
    with: at most two folders down."""
    found = []
    for folder in sorted([*root.glob("weights/*"), *root.glob("runs/*"), *root.glob("runs/*/*")]):
        newest = next(iter(list_checkpoints(folder)), folder)
        try:
            drawn = (newest / PIPELINE).is_file() or any(
                str(stage).startswith(("decoder", "upsampler"))
                for stage in read_index(newest)["stages"]
            )
        except CheckpointError:
            continue
        if drawn:
            found.append(str(folder))
    return found
