"""A stage: a network with the process it was trained on, its sampling defaults and its encoder."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from unclip.clip import Fingerprint
from unclip.conditioning import Cond, TextEncoding
from unclip.config import Config, parse_config
from unclip.diffusion.process import DiffusionConfig, GaussianDiffusion
from unclip.diffusion.sampling import SamplingConfig, sample
from unclip.diffusion.tiling import Tiled
from unclip.errors import CheckpointError, ConfigError
from unclip.folder import (
    CONFIG,
    WEIGHTS,
    WEIGHTS_LAST,
    TensorFile,
    load_tensors,
    read_stage_config,
    stage_order,
    write_stage,
    write_tensors,
)
from unclip.models.decoder import Decoder, DecoderConfig
from unclip.models.prior import DiffusionPrior, PriorConfig
from unclip.models.upsampler import Upsampler, UpsamplerConfig

NETWORKS: dict[str, tuple[type[Config], type[nn.Module]]] = {
    "prior": (PriorConfig, DiffusionPrior),
    "decoder": (DecoderConfig, Decoder),
    "upsampler": (UpsamplerConfig, Upsampler),
}

# Pictures that go through a network together on a CPU, as many as its caches bear: 16 at 64 px, one
# from 256 px up. An accelerator takes four times as many.
CHUNK_PIXELS = 2**16
CHUNK_EMBEDDINGS = 64
BAR_AFTER = 2.0  # seconds before a progress bar appears


def chunk_size(side: int, device: torch.device) -> int:
    """How many pictures of this side go through a network together."""
    return max(1, CHUNK_PIXELS * (1 if device.type == "cpu" else 4) // side**2)


@dataclass
class Stage:
    """One diffusion stage. `encoder` is the CLIP it was trained with; upsamplers have none.

    `last` is a second network for the final sampling step, which Karlo's upsampler has.
    """

    name: str
    network: Any
    diffusion: GaussianDiffusion
    sampling: SamplingConfig
    encoder: Fingerprint | None = None
    last: Any = None

    @property
    def kind(self) -> str:
        """prior, decoder or upsampler."""
        return self.name.split("_")[0]

    def draw(
        self,
        cond: Cond,
        shape: tuple[int, ...],
        config: SamplingConfig,
        generators: Sequence[torch.Generator],
        *,
        null_text: TextEncoding | None = None,
        dtype: torch.dtype = torch.float32,
        tile: int | None = None,
        progress: bool = False,
    ) -> Tensor:
        """One sample for each generator, in chunks; a sample's chunk-mates don't change it.

        `tile` runs an upsampler on tiles of that many pixels where the picture is larger.

        **Shapes**: cond has B rows, shape is that of one sample; generators B → (B, *shape).
        """
        network, last = self.network, self.last
        if tile is not None and self.kind == "upsampler" and tile < shape[-1]:
            network = Tiled(network, tile)
            last = last and Tiled(last, tile)
        chunk = CHUNK_EMBEDDINGS if len(shape) == 1 else chunk_size(shape[-1], cond.device)
        starts = range(0, len(generators), chunk)
        total, hide = config.steps * len(starts), not progress
        parts = []
        with tqdm(total=total, desc=self.name, disable=hide, delay=BAR_AFTER, leave=False) as bar:
            for start in starts:
                rows = slice(start, start + chunk)
                part = sample(
                    self.diffusion,
                    network,
                    cond.rows(rows),
                    shape,
                    config,
                    generators[rows],
                    null_text=null_text,
                    dtype=dtype,
                    on_step=bar.update,
                    last=last,
                )
                parts.append(part)
        return torch.cat(parts)

    def describe(self) -> dict[str, Any]:
        """What its `config.json` says."""
        return {
            "kind": self.kind,
            "model": self.network.config.model_dump(mode="json"),
            "diffusion": self.diffusion.config.model_dump(mode="json"),
            "sampling": self.sampling.model_dump(mode="json"),
            "clip": self.encoder.model_dump(mode="json") if self.encoder else None,
        }

    def save(
        self,
        folder: Path,
        tensors: dict[str, Tensor] | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        """Write `folder/<name>/`; `tensors` stand in for our network's (their averages, say)."""
        tensors = self.network.state_dict() if tensors is None else tensors
        write_stage(folder, self.name, self.describe(), _as(dtype, tensors))
        if self.last is not None:
            write_tensors(folder / self.name / WEIGHTS_LAST, _as(dtype, self.last.state_dict()))


@dataclass(frozen=True)
class StoredStage:
    """A stage on disk, its files checked.

    `stage` has a network without weights; `tensors`, and `final` for the network of the last step,
    are read when asked for. `where` names them in errors.
    """

    stage: Stage
    tensors: Mapping[str, Tensor]
    final: Mapping[str, Tensor] | None
    where: str

    @property
    def last(self) -> Mapping[str, Tensor] | None:
        """The last step's network; None where it is a copy of the first. Reads to tell."""
        if self.final is None:
            return None
        copied = all(torch.equal(x, self.final[name]) for name, x in self.tensors.items())
        return None if copied else self.final

    def load(self, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32) -> Stage:
        """The stage with its weights, for inference.

        **Raises**: `CheckpointError` where they don't fit the network.
        """
        config = self.stage.network.config
        networks = [
            materialise(build(self.stage.kind, config), tensors, self.where, device, dtype)
            for tensors in (self.tensors, self.last)
            if tensors is not None
        ]
        return replace(self.stage, network=networks[0], last=networks[1] if networks[1:] else None)


def read_stage(folder: Path, name: str) -> StoredStage:
    """The stage in `folder/<name>/`.

    **Raises**: `CheckpointError` when files are missing, damaged or do not fit together.
    """
    stage_order(name)  # a name from an index must not lead out of the folder
    data = read_stage_config(folder, name)
    where = str(folder / name / CONFIG)
    kind = data.get("kind")
    if kind not in NETWORKS or kind != name.split("_")[0]:
        raise CheckpointError(
            f"{where}: kind {kind!r} in the stage {name!r}; expected one of {list(NETWORKS)}"
        )
    schema = NETWORKS[kind][0]
    try:
        config = parse_config(data["model"], schema, where)
        diffusion = parse_config(data["diffusion"], DiffusionConfig, where)
        sampling = parse_config(data["sampling"], SamplingConfig, where)
        clip = data.get("clip")
        encoder = parse_config(clip, Fingerprint, where) if clip else None
    except (ConfigError, KeyError) as error:
        raise CheckpointError(f"{where} can't be used: {error}") from None
    if getattr(config, "learned_variance", False) != diffusion.learned_variance:
        raise CheckpointError(f"{where}: learned_variance of model and diffusion must agree")
    stage = Stage(name, build(kind, config), GaussianDiffusion(diffusion), sampling, encoder)
    weights, last = folder / name / WEIGHTS, folder / name / WEIGHTS_LAST
    return StoredStage(
        stage, TensorFile(weights), TensorFile(last) if last.is_file() else None, str(weights)
    )


def build(kind: str, config: Config) -> nn.Module:
    """A network of a kind of stage, on the meta device: shapes without weights."""
    with torch.device("meta"):
        return NETWORKS[kind][1](config)


def materialise(
    network: nn.Module,
    tensors: Mapping[str, Tensor],
    what: str,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> nn.Module:
    """Give a network from the meta device its weights, for inference.

    Memory is taken once, in `dtype`; tensors are read one by one. `what` names them in errors.
    """
    network.to(dtype).to_empty(device=device)
    if not isinstance(network, DiffusionPrior):
        network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    load_tensors(network, tensors, what)
    return network.eval().requires_grad_(False)


@contextmanager
def resident(modules: Iterable[nn.Module | None], device: torch.device) -> Iterator[None]:
    """Have weights on a device inside the block; those that were elsewhere stay there as well.

    For weights that don't change: nothing is copied back.
    """
    stores: list[dict[str, Any]] = [
        store
        for module in modules
        for part in (module.modules() if module is not None else ())
        for store in (part._parameters, part._buffers)
    ]
    homes = [
        (store, name, x)
        for store in stores
        for name, x in store.items()
        if x is not None and x.device != device
    ]
    try:
        for store, name, x in homes:
            there = x.data.to(device)
            store[name] = nn.Parameter(there, False) if isinstance(x, nn.Parameter) else there
        yield
    finally:
        for store, name, x in homes:
            store[name] = x


def _as(dtype: torch.dtype | None, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """A network's tensors in `dtype`, but for the statistics of embeddings: they stay float32."""
    if dtype is None:
        return tensors
    kept = ("scale.", "text_scale.")
    return {n: x if n.startswith(kept) else x.to(dtype) for n, x in tensors.items()}
