"""LoRA on disk: a stage's low-rank change, checked against its base and merged as that is read."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from unclip.errors import CheckpointError, ConfigError
from unclip.files.find import resolve_folder
from unclip.files.folder import WEIGHTS, read_index, read_stage_config
from unclip.files.tensors import TensorFile, shape_of
from unclip.models.lora import changed, is_known

LORA = "lora"  # the kind that a stage's `config.json` says


def describe(of: str, rank: int, base: str | None) -> dict[str, Any]:
    """The `config.json` of a change; `base` is the model's name, for messages."""
    return {"kind": LORA, "of": of, "rank": rank, "base": base}


@dataclass(frozen=True)
class Lora:
    """A stage's change on disk, and what it says of itself."""

    stage: str
    file: Path
    tensors: TensorFile
    base: str

    @property
    def layers(self) -> list[str]:
        """The names of the layers that it changes."""
        return [name.removesuffix(".a") for name in self.tensors if name.endswith(".a")]

    def check(self, layer: str, weight: Tensor) -> None:
        """**Raises**: `CheckpointError` if it was made for another weight."""
        if not is_known(weight, self.tensors[f"{layer}.base"]):
            raise CheckpointError(
                f"{self.file} changes another model: {layer} has other numbers here; it was made "
                f"for {self.base}"
            )


def read_loras(paths: Sequence[str | Path]) -> list[Lora]:
    """The changes in folders, runs or hub ids, one for a stage.

    **Raises**: `CheckpointError` for what is no such folder, `ConfigError` if two change one stage.
    """
    found: dict[str, Lora] = {}
    for path in paths:
        folder = resolve_folder(path)
        for name in read_index(folder)["stages"]:
            data = read_stage_config(folder, name)
            if data.get("kind") != LORA:
                raise CheckpointError(
                    f"{folder} holds a whole {name}, no LoRA: it is itself a --model"
                )
            if name in found:
                raise ConfigError(f"{found[name].file} and {folder} both change the {name}")
            file = folder / name / WEIGHTS
            found[name] = Lora(name, file, TensorFile(file), str(data.get("base")))
    return list(found.values())


class Merged(Mapping[str, Tensor]):
    """A base's tensors, those of changed layers with their change, in float32.

    **Raises**: `CheckpointError` if the change is of layers that the base doesn't have or, when a
    weight is read, was made for another.
    """

    def __init__(self, base: Mapping[str, Tensor], change: Lora):
        self.base, self.change = base, change
        self.changed = {f"{layer}.weight": layer for layer in change.layers}
        for name, layer in self.changed.items():
            sides = [change.tensors.shape(f"{layer}.{part}") for part in "ba"]
            if name not in base or shape_of(base, name) != [sides[0][0], sides[1][1]]:
                raise CheckpointError(
                    f"{change.file} does not fit this {change.stage}: {layer} is not there, or is "
                    f"of another size; it was made for {change.base}"
                )

    def shape(self, name: str) -> list[int]:
        """A tensor's shape."""
        return shape_of(self.base, name)

    def __getitem__(self, name: str) -> Tensor:
        weight, layer = self.base[name], self.changed.get(name)
        if layer is None:
            return weight
        self.change.check(layer, weight)
        a, b = (self.change.tensors[f"{layer}.{part}"] for part in "ab")
        return changed(weight.float(), a, b)

    def __contains__(self, name: object) -> bool:
        return name in self.base

    def __iter__(self) -> Iterator[str]:
        return iter(self.base)

    def __len__(self) -> int:
        return len(self.base)
