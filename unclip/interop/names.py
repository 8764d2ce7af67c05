"""Names of weights: our networks' and those of diffusers' classes, in which Karlo is published.

A table maps each of our tensors to the tuple of theirs that are stacked along the first axis to
make it, so that one table serves both directions.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor

from unclip.errors import CheckpointError
from unclip.files.disk import tally
from unclip.files.tensors import shape_of
from unclip.models.decoder import DecoderConfig
from unclip.models.prior import PriorConfig
from unclip.models.unet import UNetConfig

Names = dict[str, tuple[str, ...]]
LEADING = {"positional_embedding": 1, "prd_embedding": 2, "clip_mean": 1, "clip_std": 1}


def prior_names(config: PriorConfig) -> Names:
    """`DiffusionPrior` ← `PriorTransformer`."""
    modules = {
        "text_tokens": "encoder_hidden_states_proj",
        "text_embed": "embedding_proj",
        "time.fc1": "time_embedding.linear_1",
        "time.fc2": "time_embedding.linear_2",
        "image_embed": "proj_in",
        "transformer.norm": "norm_out",
        "out": "proj_to_clip_embeddings",
    }
    names: Names = {
        "position": ("positional_embedding",),
        "query": ("prd_embedding",),
        "scale.mean": ("clip_mean",),
        "scale.std": ("clip_std",),
    }
    names |= pairs({ours: (theirs,) for ours, theirs in modules.items()})
    for i in range(config.transformer.layers):
        ours, theirs = f"transformer.blocks.{i}", f"transformer_blocks.{i}"
        names |= pairs(
            {
                f"{ours}.norm1": (f"{theirs}.norm1",),
                f"{ours}.qkv": tuple(f"{theirs}.attn1.to_{part}" for part in "qkv"),
                f"{ours}.out": (f"{theirs}.attn1.to_out.0",),
                f"{ours}.norm2": (f"{theirs}.norm3",),
                f"{ours}.fc1": (f"{theirs}.ff.net.0.proj",),
                f"{ours}.fc2": (f"{theirs}.ff.net.2",),
            }
        )
    return names


def text_proj_names(config: DecoderConfig) -> Names:
    """The conditioning of a `Decoder` ← `UnCLIPTextProjModel`."""
    assert config.text_embed and config.text_transformer is None
    modules = {
        "image_to_emb": "clip_image_embeddings_project_to_time_embeddings",
        "image_to_tokens": "clip_extra_context_tokens_proj",
        "text_to_emb": "embedding_proj",
        "text.proj": "encoder_hidden_states_proj",
        "text.norm": "text_encoder_hidden_states_norm",
    }
    names: Names = {"null_image": ("learned_classifier_free_guidance_embeddings",)}
    return names | pairs({ours: (theirs,) for ours, theirs in modules.items()})


def unet_names(config: UNetConfig) -> Names:
    """`time.` and `unet.` of a `Decoder` ← `UNet2DConditionModel`, of an `Upsampler` ←
    `UNet2DModel`."""
    names = pairs(
        {
            "time.fc1": ("time_embedding.linear_1",),
            "time.fc2": ("time_embedding.linear_2",),
            "unet.conv_in": ("conv_in",),
            "unet.norm_out": ("conv_norm_out",),
            "unet.conv_out": ("conv_out",),
        }
    )
    levels = len(config.multiple)
    width, skips = config.channels, [config.channels]
    down = up = 0
    for level, out in enumerate(config.widths):
        for j in range(config.depths[level]):
            theirs = f"down_blocks.{level}"
            names |= _block(
                f"unet.down.{down}", theirs, j, width != out, attends=config.attention[level]
            )
            width, down = out, down + 1
            skips.append(width)
        if level < levels - 1:
            names |= _resnet(f"unet.down.{down}", f"down_blocks.{level}.downsamplers.0", False)
            down += 1
            skips.append(width)
    names |= _block("unet.mid.0", "mid_block", 0, False, attends=config.mid_attention)
    names |= _block("unet.mid.1", "mid_block", 1, False, attends=False)
    for level, out in reversed(list(enumerate(config.widths))):
        theirs = f"up_blocks.{levels - 1 - level}"
        for j in range(config.depths[level] + 1):
            widens = width + skips.pop() != out
            names |= _block(f"unet.up.{up}", theirs, j, widens, attends=config.attention[level])
            width, up = out, up + 1
        if level > 0:
            names |= _resnet(f"unet.up.{up}", f"{theirs}.upsamplers.0", False)
            up += 1
    return names


def _block(ours: str, theirs: str, index: int, widens: bool, *, attends: bool) -> Names:
    names = _resnet(ours, f"{theirs}.resnets.{index}", widens)
    if not attends:
        return names
    other = f"{theirs}.attentions.{index}"
    return names | pairs(
        {
            f"{ours}.attention.norm": (f"{other}.group_norm",),
            f"{ours}.attention.qkv": tuple(f"{other}.to_{part}" for part in "qkv"),
            f"{ours}.attention.context_kv": (f"{other}.add_k_proj", f"{other}.add_v_proj"),
            f"{ours}.attention.out": (f"{other}.to_out.0",),
        }
    )


def _resnet(ours: str, theirs: str, widens: bool) -> Names:
    parts = {
        "norm1": "norm1",
        "conv1": "conv1",
        "embed": "time_emb_proj",
        "norm2": "norm2",
        "conv2": "conv2",
    }
    if widens:
        parts["skip"] = "conv_shortcut"
    return pairs({f"{ours}.{a}": (f"{theirs}.{b}",) for a, b in parts.items()})


def pairs(modules: Names) -> Names:
    """Weight and bias of each module."""
    return {
        f"{ours}.{kind}": tuple(f"{name}.{kind}" for name in theirs)
        for ours, theirs in modules.items()
        for kind in ("weight", "bias")
    }


class Renamed(Mapping[str, Tensor]):
    """Their tensors under our names, in our shapes; each is read when it is asked for.

    `shapes` are those of our tensors (theirs may have axes of length one in front); `what` names
    theirs in errors.

    **Raises**: `CheckpointError` naming what is missing in `theirs`, left over, or of another
    shape; nothing has been read by then.
    """

    def __init__(
        self,
        names: Names,
        theirs: Mapping[str, Tensor],
        shapes: Mapping[str, Sequence[int]],
        what: str,
    ):
        self.names, self.theirs, self.shapes = names, theirs, shapes
        wanted = {part for parts in names.values() for part in parts}
        wrong = {
            "missing": sorted(wanted - set(theirs)),
            "left over": sorted(set(theirs) - wanted),
            "of another shape": [
                f"{part} {tuple(shape_of(theirs, part))}, expected {tuple(expected)}"
                for name, parts in names.items()
                for part, expected in zip(parts, _parts(shapes[name], len(parts)), strict=True)
                if part in theirs and _plain(shape_of(theirs, part)) != _plain(expected)
            ],
        }
        if problems := tally(wrong):
            raise CheckpointError(f"{what} can't be used: {problems}")

    def shape(self, name: str) -> list[int]:
        """A tensor's shape, without reading it."""
        return list(self.shapes[name])

    def __getitem__(self, name: str) -> Tensor:
        parts = [self.theirs[part] for part in self.names[name]]
        joined = parts[0] if len(parts) == 1 else torch.cat(parts)
        return joined.reshape(list(self.shapes[name]))

    def __iter__(self) -> Iterator[str]:
        return iter(self.names)

    def __len__(self) -> int:
        return len(self.names)


def to_diffusers(names: Names, ours: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Our tensors under their names, in their shapes."""
    return {
        part: chunk.reshape(*[1] * LEADING.get(part, 0), *chunk.shape)
        for name, parts in names.items()
        for part, chunk in zip(parts, ours[name].chunk(len(parts)), strict=True)
    }


def _parts(shape: Sequence[int], count: int) -> list[list[int]]:
    return [[shape[0] // count, *shape[1:]]] * count


def _plain(shape: Sequence[int]) -> list[int]:
    """A shape without the axes of length one in front."""
    first = next((k for k, n in enumerate(shape) if n != 1), len(shape))
    return list(shape)[first:]
