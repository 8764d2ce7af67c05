"""Configurations of diffusers' classes to ours and back, for networks that both can express.

Everything in their files is accounted for: a key is read, or must have the one value that our
networks stand for, or be absent; else it is refused by name.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

from pydantic import ValidationError

from unclip.config import Config
from unclip.diffusion.process import DiffusionConfig
from unclip.errors import CheckpointError, ConfigError
from unclip.models.decoder import DecoderConfig
from unclip.models.prior import PriorConfig
from unclip.models.unet import UNetConfig
from unclip.models.upsampler import UpsamplerConfig
from unclip.stages.kinds import stage_name

C = TypeVar("C", bound=Config)
Theirs = dict[str, Any]
IGNORED = ("_class_name", "_diffusers_version", "_name_or_path")
TARGETS = {"epsilon": "eps", "sample": "x0"}
VARIANCES = {False: "fixed_small_log", True: "learned_range"}  # by whether it is learned

ADDED = 4  # positions behind the text in a prior: text embedding, time, image embedding, query
PRIOR_FIXED = {
    "additional_embeddings": ADDED,
    "dropout": 0.0,
    "time_embed_act_fn": "silu",
    "encoder_hid_proj_type": "linear",
    "added_emb_type": "prd",
}
NET_FIXED = {
    "act_fn": "silu",
    "center_input_sample": False,
    "class_embeddings_concat": False,
    "downsample_padding": 1,
    "dropout": 0.0,
    "flip_sin_to_cos": True,
    "freq_shift": 0,
    "mid_block_scale_factor": 1,
    "norm_eps": 1e-5,
    "time_embedding_type": "positional",
}
DECODER_FIXED = NET_FIXED | {
    "addition_embed_type_num_heads": 64,
    "attention_type": "default",
    "conv_in_kernel": 3,
    "conv_out_kernel": 3,
    "dual_cross_attention": False,
    "in_channels": 3,
    "only_cross_attention": False,
    "resnet_out_scale_factor": 1.0,
    "resnet_skip_time_act": False,
    "transformer_layers_per_block": 1,
    "upcast_attention": False,
    "use_linear_projection": False,
}
UPSAMPLER_FIXED = NET_FIXED | {
    "attention_head_dim": 8,  # of the attention that `add_attention` switches off
    "downsample_type": "conv",
    "upsample_type": "conv",
}
DOWN = {False: "ResnetDownsampleBlock2D", True: "SimpleCrossAttnDownBlock2D"}
UP = {False: "ResnetUpsampleBlock2D", True: "SimpleCrossAttnUpBlock2D"}
MID = {False: "UNetMidBlock2D", True: "UNetMidBlock2DSimpleCrossAttn"}


@dataclass
class Settings:
    """One of their configurations, in the file `where`; `close` refuses what nobody asked for."""

    data: Mapping[str, Any]
    where: str
    seen: set[str] = field(default_factory=lambda: set(IGNORED))

    def get(self, key: str, default: Any = ..., among: Sequence[Any] | None = None) -> Any:
        """A value, one of those that our networks stand for where these are given.

        **Raises**: `CheckpointError` where it is another, or missing without a default.
        """
        self.seen.add(key)
        value = self.data.get(key, default)
        if value is ...:
            raise CheckpointError(f"{self.where} has no {key!r}")
        if among is not None and value not in among:
            raise CheckpointError(
                f"{self.where}: {key} = {value} is not supported; expected "
                f"{' or '.join(map(str, among))}"
            )
        return value

    def close(self, fixed: Mapping[str, Any]) -> None:
        """Check the rest against values that may also be absent, then that nothing is left over.

        **Raises**: `CheckpointError` naming the key.
        """
        for key, wanted in fixed.items():
            self.get(key, wanted, [wanted])
        for key, value in self.data.items():
            if key not in self.seen and value is not None:
                raise CheckpointError(
                    f"{self.where}: {key} = {value} is a setting that the published unCLIP "
                    "networks don't have"
                )

    def build(self, schema: type[C], **values: Any) -> C:
        """Our configuration. **Raises**: `CheckpointError` naming the key that it can't have."""
        try:
            return schema(**values)
        except ValidationError as error:
            first = error.errors()[0]
            key = ".".join(str(part) for part in first["loc"]) or "configuration"
            raise CheckpointError(f"{self.where}: {key}: {first['msg']}") from None


def prior_config(data: Mapping[str, Any], where: str) -> PriorConfig:
    """`PriorTransformer` to ours. **Raises**: `CheckpointError` naming what is not supported."""
    theirs = Settings(data, where)
    heads, per_head = theirs.get("num_attention_heads", 32), theirs.get("attention_head_dim", 64)
    width, embed = heads * per_head, theirs.get("embedding_dim", 768)
    same = {"time_embed_dim": width, "embedding_proj_dim": embed, "clip_embed_dim": embed}
    for key, value in same.items():
        theirs.get(key, None, [value, None])  # None stands for the same
    layers, context = theirs.get("num_layers", 20), theirs.get("num_embeddings", 77)
    theirs.close(PRIOR_FIXED)
    return theirs.build(
        PriorConfig,
        embed=embed,
        text_width=embed,
        context=context,
        transformer={"width": width, "layers": layers, "heads": heads},
        scale={"kind": "whiten"},
    )


def decoder_config(
    unet: Mapping[str, Any], text_proj: Mapping[str, Any], where: str, where_text: str
) -> DecoderConfig:
    """`UNet2DConditionModel` and `UnCLIPTextProjModel` to ours.

    **Raises**: `CheckpointError` naming what is not supported, or does not fit together.
    """
    theirs, proj = Settings(unet, where), Settings(text_proj, where_text)
    out_channels = theirs.get("out_channels", among=[3, 6])
    theirs.get("class_embed_type", None, ["identity"])
    width, resolution = theirs.get("cross_attention_dim"), theirs.get("sample_size")
    config = _unet(theirs, theirs.get("attention_head_dim"))
    theirs.close(DECODER_FIXED)
    image_tokens = proj.get("clip_extra_context_tokens", 4)
    proj.get("time_embed_dim", among=[config.embed])
    proj.get("cross_attention_dim", among=[width])
    embed = proj.get("clip_embeddings_dim", 768)
    proj.close({})
    return theirs.build(
        DecoderConfig,
        resolution=resolution,
        embed=embed,
        text_width=embed,
        text_embed=True,
        context_width=width,
        image_tokens=image_tokens,
        learned_variance=out_channels == 6,
        scale={"kind": "raw"},
        unet=config,
    )


def upsampler_config(data: Mapping[str, Any], low: int, where: str) -> UpsamplerConfig:
    """`UNet2DModel`, which doesn't say `low`, to ours. **Raises**: `CheckpointError`."""
    theirs = Settings(data, where)
    theirs.get("in_channels", among=[6])
    theirs.get("out_channels", among=[3])
    theirs.get("add_attention", True, [False])
    config = _unet(theirs, head_channels=None)
    high = theirs.get("sample_size")
    theirs.close(UPSAMPLER_FIXED)
    return theirs.build(UpsamplerConfig, low=low, high=high, unet=config)


def _unet(theirs: Settings, head_channels: int | None) -> UNetConfig:
    """The part that both kinds of U-Net have; only decoders have heads."""
    down, up = theirs.get("down_block_types"), theirs.get("up_block_types")
    attends = {name: flag for flag, name in DOWN.items()}
    attention = [attends.get(name) for name in down]
    if None in attention or list(up) != [UP[bool(flag)] for flag in reversed(attention)]:
        raise CheckpointError(
            f"{theirs.where}: block types {down} and {up} are not supported; expected "
            f"{DOWN[False]} or {DOWN[True]}, mirrored going up"
        )
    mid_attention = head_channels is not None
    default = "UNetMidBlock2DCrossAttn" if mid_attention else MID[False]
    theirs.get("mid_block_type", default, [MID[mid_attention]])
    widths = theirs.get("block_out_channels")
    if any(width % widths[0] for width in widths):
        raise CheckpointError(
            f"{theirs.where}: block_out_channels = {widths}; expected multiples of the first"
        )
    shift = theirs.get("resnet_time_scale_shift", "default", ["default", "scale_shift"])
    heads: Theirs = {} if head_channels is None else {"head_channels": head_channels}
    return theirs.build(
        UNetConfig,
        channels=widths[0],
        multiple=[width // widths[0] for width in widths],
        blocks=theirs.get("layers_per_block", 2),
        attention=[bool(flag) for flag in attention],
        mid_attention=mid_attention,
        scale_shift=shift == "scale_shift",
        groups=theirs.get("norm_num_groups", 32),
        **heads,
    )


def diffusion_config(data: Mapping[str, Any], where: str) -> tuple[DiffusionConfig, float | None]:
    """`UnCLIPScheduler` to a process and the bound on x_0, None for no bound.

    The schedule is cosine although the published files don't say so.

    **Raises**: `CheckpointError` for another scheduler class or a setting it doesn't have.
    """
    theirs = Settings(data, where)
    theirs.get("_class_name", None, ["UnCLIPScheduler"])
    variance = theirs.get("variance_type", VARIANCES[False], [*VARIANCES.values()])
    prediction = theirs.get("prediction_type", "epsilon", [*TARGETS])
    largest = theirs.get("clip_sample_range", 1.0)
    bound = largest if theirs.get("clip_sample", True) else None
    steps = theirs.get("num_train_timesteps", 1000)
    theirs.close({"beta_schedule": "squaredcos_cap_v2"})
    config = theirs.build(
        DiffusionConfig,
        schedule="cosine",
        steps=steps,
        target=TARGETS[prediction],
        learned_variance=variance == VARIANCES[True],
    )
    return config, bound


def to_prior(config: PriorConfig) -> Theirs:
    """`PriorTransformer`. **Raises**: `ConfigError` naming what it doesn't have."""
    inner, scale = config.transformer, config.scale
    _express(
        "prior",
        ("text_width", config.text_width, config.embed),
        ("scale.kind", scale.kind, "whiten"),
        ("scale.normalize", scale.normalize, False),
        ("draft", config.draft, None),
    )
    return {
        "num_attention_heads": inner.heads,
        "attention_head_dim": inner.width // inner.heads,
        "num_layers": inner.layers,
        "embedding_dim": config.embed,
        "num_embeddings": config.context,
        "additional_embeddings": ADDED,
    }


def to_decoder(config: DecoderConfig) -> tuple[Theirs, Theirs]:
    """`UNet2DConditionModel`, `UnCLIPTextProjModel`. **Raises**: `ConfigError` for other things."""
    unet = config.unet
    _express(
        "decoder",
        ("text_width", config.text_width, config.embed),
        ("text_embed", config.text_embed, True),
        ("text_transformer", config.text_transformer, None),
        ("learned_variance", config.learned_variance, True),
        ("layout", config.layout, None),
        ("inpaint", config.inpaint, False),
        ("detail", config.detail, None),
        ("scale.kind", config.scale.kind, "raw"),
        ("unet.mid_attention", unet.mid_attention, True),
        ("unet.patch", unet.patch, 1),
        ("unet.head", unet.head, None),
    )
    decoder = _to_unet(unet) | {
        "sample_size": config.resolution,
        "in_channels": 3,
        "out_channels": 6,
        "mid_block_type": MID[True],
        "cross_attention_dim": config.context_width,
        "attention_head_dim": unet.head_channels,
        "class_embed_type": "identity",
    }
    text_proj = {
        "clip_extra_context_tokens": config.image_tokens,
        "clip_embeddings_dim": config.embed,
        "time_embed_dim": unet.embed,
        "cross_attention_dim": config.context_width,
    }
    return decoder, text_proj


def to_upsampler(config: UpsamplerConfig) -> Theirs:
    """`UNet2DModel`. **Raises**: `ConfigError` naming what it doesn't have."""
    _express(
        stage_name(config),
        ("residual", config.residual, False),
        ("unet.blocks", config.unet.blocks, config.unet.depths[0]),
        ("unet.patch", config.unet.patch, 1),
        ("unet.head", config.unet.head, None),
    )
    return _to_unet(config.unet) | {
        "sample_size": config.high,
        "in_channels": 6,
        "out_channels": 3,
        "add_attention": False,
    }


def to_scheduler(stage: str, config: DiffusionConfig, bound: float | None) -> Theirs:
    """`UnCLIPScheduler`, `bound` on x_0. **Raises**: `ConfigError` naming what it doesn't have."""
    predictions = {ours: theirs for theirs, ours in TARGETS.items()}
    target = config.target if config.target in predictions else "eps or x0"
    _express(
        stage,
        ("diffusion.schedule", config.schedule, "cosine"),
        ("diffusion.target", config.target, target),
    )
    return {
        "num_train_timesteps": config.steps,
        "variance_type": VARIANCES[config.learned_variance],
        "prediction_type": predictions[config.target],
        "clip_sample": bound is not None,
        "clip_sample_range": 1.0 if bound is None else bound,
    }


def _to_unet(config: UNetConfig) -> Theirs:
    return {
        "down_block_types": [DOWN[attends] for attends in config.attention],
        "up_block_types": [UP[attends] for attends in reversed(config.attention)],
        "block_out_channels": config.widths,
        "layers_per_block": config.blocks,
        "norm_num_groups": config.groups,
        "resnet_time_scale_shift": "scale_shift" if config.scale_shift else "default",
    }


def _express(stage: str, *settings: tuple[str, object, object]) -> None:
    """Check settings of ours, each a key, its value and the only one that theirs can mean."""
    wrong = [
        f"{key} = {value} (only {only} can be)" for key, value, only in settings if value != only
    ]
    if wrong:
        raise ConfigError(f"{stage}: Karlo's layout has no {', no '.join(wrong)}")
