"""Weight names between our networks and diffusers' (the oracles of the parity tests).

A table maps each of our parameter names to the tuple of theirs that are stacked along the first
axis to make it, so one table serves both directions.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from unclip.models.decoder import DecoderConfig
from unclip.models.prior import PriorConfig
from unclip.models.unet import UNetConfig

Names = dict[str, tuple[str, ...]]


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
    names = {
        "position": ("positional_embedding",),
        "query": ("prd_embedding",),
        "scale.mean": ("clip_mean",),
        "scale.std": ("clip_std",),
    }
    names |= _pairs({ours: (theirs,) for ours, theirs in modules.items()})
    for i in range(config.transformer.layers):
        ours, theirs = f"transformer.blocks.{i}", f"transformer_blocks.{i}"
        names |= _pairs(
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
    names = {"null_image": ("learned_classifier_free_guidance_embeddings",)}
    return names | _pairs({ours: (theirs,) for ours, theirs in modules.items()})


def unet_names(config: UNetConfig) -> Names:
    """`time.` and `unet.` of a `Decoder` ← `UNet2DConditionModel`, of an `Upsampler` ←
    `UNet2DModel`."""
    names = _pairs(
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
        for j in range(config.blocks):
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
        for j in range(config.blocks + 1):
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
    return names | _pairs(
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
    return _pairs({f"{ours}.{a}": (f"{theirs}.{b}",) for a, b in parts.items()})


def _pairs(modules: Names) -> Names:
    """Weight and bias of each module."""
    return {
        f"{ours}.{kind}": tuple(f"{name}.{kind}" for name in theirs)
        for ours, theirs in modules.items()
        for kind in ("weight", "bias")
    }


def from_diffusers(names: Names, theirs: dict[str, Tensor], ours: nn.Module) -> dict[str, Tensor]:
    """Their tensors under our names, in our shapes (theirs have axes of length one in front)."""
    shapes = {name: tensor.shape for name, tensor in ours.state_dict().items()}
    return {
        name: torch.cat([theirs[part] for part in parts]).reshape(shapes[name])
        for name, parts in names.items()
    }


def to_diffusers(names: Names, ours: dict[str, Tensor]) -> dict[str, Tensor]:
    """Our tensors under their names, without their leading axes of length one."""
    return {
        part: chunk
        for name, parts in names.items()
        for part, chunk in zip(parts, ours[name].chunk(len(parts)), strict=True)
    }


def randomise(model: nn.Module, seed: int) -> None:
    """Give every parameter its own random values, so that a swapped or unused one shows."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            fan_in = max(1, parameter[0].numel()) if parameter.ndim > 1 else 1
            is_norm = parameter.ndim == 1 and "norm" in name and name.endswith("weight")
            if parameter.ndim == 1:
                parameter.copy_(is_norm + 0.2 * noise)
            else:
                parameter.copy_(noise / fan_in**0.5)
