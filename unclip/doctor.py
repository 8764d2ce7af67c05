"""What this machine has of what the library needs, in sentences that say what to do."""

from __future__ import annotations

import importlib
import os
import platform
import shutil
import tempfile
import urllib.error
import urllib.request
from collections import defaultdict
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import Literal, NamedTuple

from packaging.requirements import Requirement

from unclip import __version__
from unclip.errors import ConfigError
from unclip.files.disk import check_writable
from unclip.files.folder import INDEX
from unclip.shipped import shipped

TIMEOUT = 3.0  # seconds that a hub may take to answer
PAIRED = 15  # torchvision 0.N goes with torch 2.(N - 15)


class Finding(NamedTuple):
    """One thing that was looked at; `broken` ones will not work, a `note` is to be known."""

    state: Literal["fine", "note", "broken"]
    sentence: str


def examine() -> Iterator[Finding]:
    """Look at everything, the quick things first."""
    yield Finding("fine", f"unclip {__version__} on Python {platform.python_version()}.")
    yield from _packages()
    yield _pair()
    yield from _devices()
    yield from _places()
    yield _hub()


def _packages() -> Iterator[Finding]:
    """What `pyproject.toml` asks for, and which extras are whole."""
    try:
        asked = [Requirement(line) for line in metadata.requires("unclip") or ()]
    except metadata.PackageNotFoundError:
        yield Finding("note", "unclip runs from its folder and is not installed: pip install -e .")
        return
    lacking: dict[str, list[str]] = defaultdict(list)
    extras = metadata.metadata("unclip").get_all("Provides-Extra") or []
    for extra in ("", *extras):
        lacking[extra] = []
        for one in asked:
            marker = one.marker
            if marker is None or marker.evaluate({"extra": extra}):
                lacking[extra] += _missing(one)
    needed = lacking.pop("")
    for one_missing in needed:
        yield Finding("broken", f"{one_missing}; pip install --upgrade unclip brings it.")
    if not needed:
        yield Finding("fine", "all packages that unclip needs are there.")
    for extra, missing in lacking.items():
        absent = [one for one in missing if one not in needed]
        if absent and extra != "dev":
            said = f"{', '.join(absent)}: pip install 'unclip[{extra}]' if you want that."
            yield Finding("note", f"the extra {extra} is not there: {said}")


def _missing(asked: Requirement) -> list[str]:
    """In words, if a package isn't there or is too old."""
    try:
        there = metadata.version(asked.name)
    except metadata.PackageNotFoundError:
        return [f"{asked.name} is not installed"]
    if asked.specifier.contains(there, prereleases=True):
        return []
    return [f"{asked.name} is {there}, not {asked.specifier}"]


def _pair() -> Finding:
    """torch and torchvision are released together; open_clip imports the second."""
    try:
        torch, torchvision = (metadata.version(name) for name in ("torch", "torchvision"))
        importlib.import_module("open_clip")
    except metadata.PackageNotFoundError as error:
        return Finding("broken", f"{error.name} is not installed.")
    except Exception as error:
        said = str(error).splitlines()[0] if str(error) else type(error).__name__
        return Finding("broken", f"open_clip can't be imported ({said}); {_match('torch')}")
    minors = [int(version.split(".")[1]) for version in (torch, torchvision)]
    if minors[0] + PAIRED != minors[1]:
        said = f"torch {torch} and torchvision {torchvision} are no pair, but both load; "
        return Finding("note", said + _match(torch))
    return Finding("fine", f"torch {torch} and torchvision {torchvision} are a pair.")


def _match(torch: str) -> str:
    minor = torch.split(".")[1:2]
    pair = f"torchvision==0.{int(minor[0]) + PAIRED}.*" if minor else "the torchvision of its day"
    return f"beside it belongs {pair}."


def _devices() -> Iterator[Finding]:
    """What computes here, how much it holds, and whether in bf16."""
    import psutil
    import torch

    from unclip.precision import computes_in_bf16

    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    memory = psutil.virtual_memory()
    yield Finding(
        "fine",
        f"CPU: {cores} cores, {memory.total / 1e9:,.1f} GB of memory, {memory.available / 1e9:,.1f}"
        f" free; {_bf16(computes_in_bf16(torch.device('cpu')))}",
    )
    found = torch.accelerator.current_accelerator(check_available=True)
    for index in range(torch.accelerator.device_count() if found else 0):
        device = torch.device(found.type, index)  # type: ignore[union-attr]
        free, total = torch.accelerator.get_memory_info(device)
        yield Finding(
            "fine",
            f"{device}: {total / 1e9:,.1f} GB, {free / 1e9:,.1f} free; "
            f"{_bf16(computes_in_bf16(device))}",
        )
    if found is None and shutil.which("nvidia-smi"):
        yield Finding(
            "note",
            f"there is an NVIDIA driver, but torch {torch.__version__} sees no GPU: install the "
            "build of torch that goes with the driver, or see that it is not hidden "
            "(CUDA_VISIBLE_DEVICES).",
        )
    elif found is None:
        yield Finding("note", "there is no GPU: everything works, large models take long.")


def _bf16(computes: bool) -> str:
    if computes:
        return "it computes in bf16, which train.precision=auto then is."
    return "it has no units for bf16, which would be several times slower: stay with fp32."


def _places() -> Iterator[Finding]:
    """What came with the library, and where it and the hub keep things."""
    from huggingface_hub.constants import HF_HUB_CACHE

    from unclip.data.kept import cache_folder

    weights = shipped("weights/emoji")
    if (weights / INDEX).is_file():
        yield Finding("fine", f"the shipped model is at {weights}.")
    else:
        yield Finding("note", f"the shipped model is not at {weights}: name one with --model.")
    places = {
        "UNCLIP_CACHE": cache_folder(""),
        "HF_HUB_CACHE": Path(HF_HUB_CACHE),
        "TMPDIR": Path(tempfile.gettempdir()),
    }
    for variable, folder in places.items():
        try:
            check_writable(folder, variable)
        except ConfigError as error:
            yield Finding("broken", f"{error}.")
            continue
        there = next(path for path in (folder, *folder.parents) if path.exists())
        free = shutil.disk_usage(there).free / 1e9
        yield Finding("fine", f"{folder} can be written to ({variable}), {free:,.1f} GB are free.")


def _hub() -> Finding:
    """Whether models and data can be fetched by their ids."""
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        return Finding(
            "note", "HF_HUB_OFFLINE is set: of the hub only what is in its cache is read."
        )
    try:
        request = urllib.request.Request(constants.ENDPOINT, method="HEAD")
        with urllib.request.urlopen(request, timeout=TIMEOUT):
            pass
    except urllib.error.HTTPError:
        pass  # it answers
    except (OSError, ValueError) as error:
        return Finding(
            "note",
            f"the hub {constants.ENDPOINT} does not answer ({error}): hub ids and data.train=hf:… "
            "need a network, HF_ENDPOINT or a proxy; with HF_HUB_OFFLINE=1 what is in the cache "
            "is read without waiting.",
        )
    return Finding("fine", f"the hub {constants.ENDPOINT} answers.")
