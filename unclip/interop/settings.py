"""Configurations of diffusers' classes to ours and back, for networks that both can express.

Everything in their files is accounted for: a key is read, or must have the one value that our
networks stand for, or is refused by name.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from pydantic import ValidationError

from unclip.diffusion.process import DiffusionConfig
from unclip.errors import CheckpointError, ConfigError
from unclip.models.decoder import DecoderConfig
from unclip.models.layers import ScaleConfig
from unclip.models.prior import PriorConfig
from unclip.models.unet import UNetConfig
from unclip.models.upsampler import UpsamplerConfig

Theirs = dict[str, Any]
IGNORED = ("_class_name", "_diffusers_version", "_name_or_path")
TARGETS = {"epsilon": "eps", "sample": "x0"}

ADDED = 4  # positions behind the text in a prior: text embedding, time, image embedding, query
PRIOR_FIXED = {
    "additional_embeddings": ADDED,
    "dropout": 0.0,
    "time_embed_act_fn": "silu",
    "norm_in_type": None,
    "embedding_proj_norm_type": None,
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
    "num_class_embeds": None,
    "time_embedding_dim": None,
    "time_embedding_type": "positional",
}
DECODER_FIXED = NET_FIXED | {
    "addition_embed_type": None,
    "addition_embed_type_num_heads": 64,
    "addition_time_embed_dim": None,
    "attention_type": "default",
    "conv_in_kernel": 3,
    "conv_out_kernel": 3,
    "cross_attention_norm": None,
    "dual_cross_attention": False,
    "encoder_hid_dim": None,
    "encoder_hid_dim_type": None,
    "in_channels": 3,
    "mid_block_only_cross_attention": None,
    "num_attention_heads": None,
    "only_cross_attention": False,
    "projection_class_embeddings_input_dim": None,
    "resnet_out_scale_factor": 1.0,
    "resnet_skip_time_act": False,
    "reverse_transformer_layers_per_block": None,
    "time_cond_proj_dim": None,
    "time_embedding_act_fn": None,
    "timestep_post_act": None,
    "transformer_layers_per_block": 1,
    "upcast_attention": False,
    "use_linear_projection": False,
}
UPSAMPLER_FIXED = NET_FIXED | {
    "attention_head_dim": 8,  # of the attention that `add_attention` switches off
    "attn_norm_num_groups": None,
    "class_embed_type": None,
    "downsample_type": "conv",
    "num_train_timesteps": None,
    "upsample_type": "conv",
}
DOWN = {False: "ResnetDownsampleBlock2D", True: "SimpleCrossAttnDownBlock2D"}
UP = {False: "ResnetUpsampleBlock2D", True: "SimpleCrossAttnUpBlock2D"}
# Karlo's sampling by kind of stage, which its files don't hold: diffusers has it as defaults of its
# pipeline.
SAMPLING: dict[str, Theirs] = {
    "prior": {"sampler": "ddpm", "steps": 25, "guidance": 4.0},
    "decoder": {"sampler": "ddpm", "steps": 25, "guidance": 8.0},
    "upsampler": {"sampler": "ddpm", "steps": 7, "guidance": 1.0},
}
MID = {False: "UNetMidBlock2D", True: "UNetMidBlock2DSimpleCrossAttn"}


@dataclass
class Reader:
    """One of their configurations; `close` refuses what nobody asked for.

    `where` names the file in errors.
    """

    data: Mapping[str, Any]
    where: str
    seen: set[str] = field(default_factory=lambda: set(IGNORED))

    def get(self, key: str, default: Any = ...) -> Any:
        """A value. **Raises**: `CheckpointError` where it is missing without a default."""
        self.seen.add(key)
        value = self.data.get(key, default)
        if value is ...:
            raise CheckpointError(f"{self.where} has no {key!r}")
        return value

    def expect(self, key: str, wanted: Any, default: Any = ...) -> None:
        """Check a value that our networks have built in. **Raises**: `CheckpointError`."""
        found = self.get(key, default)
        if found != wanted:
            raise CheckpointError(
                f"{self.where}: {key} = {found!r} is not supported; the published unCLIP networks "
                f"have {wanted!r}"
            )

    def close(self, fixed: Mapping[str, Any]) -> None:
        """Check the rest against values that may also be absent, then that nothing is left over.

        **Raises**: `CheckpointError` naming the key.
        """
        for key, wanted in fixed.items():
            self.expect(key, wanted, default=wanted)
        unknown = [k for k, value in self.data.items() if k not in self.seen and value is not None]
        if unknown:
            raise CheckpointError(
                f"{self.where}: {unknown[0]} = {self.data[unknown[0]]!r} is a setting that this "
                "version doesn't know"
            )


def prior_config(data: Mapping[str, Any], where: str) -> PriorConfig:
    """`PriorTransformer` to ours. **Raises**: `CheckpointError` naming what is not supported."""
    theirs = Reader(data, where)
    heads, per_head = theirs.get("num_attention_heads", 32), theirs.get("attention_head_dim", 64)
    embed = theirs.get("embedding_dim", 768)
    for key, same in (
        ("time_embed_dim", heads * per_head),
        ("embedding_proj_dim", embed),
        ("clip_embed_dim", embed),
    ):
        if theirs.get(key, None) is not None:  # None stands for the same
            theirs.expect(key, same)
    layers, context = theirs.get("num_layers", 20), theirs.get("num_embeddings", 77)
    theirs.close(PRIOR_FIXED)
    with _readable(where):
        return PriorConfig.model_validate(
            {
                "embed": embed,
                "text_width": embed,
                "context": context,
                "transformer": {"width": heads * per_head, "layers": layers, "heads": heads},
                "scale": {"kind": "whiten"},
            }
        )


def decoder_config(
    unet: Mapping[str, Any], text_proj: Mapping[str, Any], where: str, where_text: str
) -> DecoderConfig:
    """`UNet2DConditionModel` and `UnCLIPTextProjModel` to ours.

    **Raises**: `CheckpointError` naming what is not supported, or does not fit together.
    """
    theirs, proj = Reader(unet, where), Reader(text_proj, where_text)
    out_channels = theirs.get("out_channels")
    if out_channels not in (3, 6):
        raise CheckpointError(f"{where}: out_channels = {out_channels}; expected 3 or 6")
    theirs.expect("class_embed_type", "identity", default=None)
    width = theirs.get("cross_attention_dim")
    config = _unet(theirs, theirs.get("attention_head_dim"))
    resolution = theirs.get("sample_size")
    theirs.close(DECODER_FIXED)
    image_tokens = proj.get("clip_extra_context_tokens", 4)
    proj.expect("time_embed_dim", config.embed)
    proj.expect("cross_attention_dim", width)
    embed = proj.get("clip_embeddings_dim", 768)
    proj.close({})
    with _readable(where):
        return DecoderConfig(
            resolution=resolution,
            embed=embed,
            text_width=embed,
            text_embed=True,
            context_width=width,
            image_tokens=image_tokens,
            learned_variance=out_channels == 6,
            scale=ScaleConfig.model_validate({"kind": "raw"}),
            unet=config,
        )


def upsampler_config(data: Mapping[str, Any], low: int, where: str) -> UpsamplerConfig:
    """`UNet2DModel` to ours; `low` is the size it was trained to enlarge, which it doesn't say.

    **Raises**: `CheckpointError` naming what is not supported.
    """
    theirs = Reader(data, where)
    theirs.expect("in_channels", 6)
    theirs.expect("out_channels", 3)
    theirs.expect("add_attention", False, default=True)
    config = _unet(theirs, head_channels=None)
    high = theirs.get("sample_size")
    theirs.close(UPSAMPLER_FIXED)
    with _readable(where):
        return UpsamplerConfig(low=low, high=high, unet=config)


def _unet(theirs: Reader, head_channels: int | None) -> UNetConfig:
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
    theirs.expect("mid_block_type", MID[mid_attention], default=default)
    widths = theirs.get("block_out_channels")
    if any(width % widths[0] for width in widths):
        raise CheckpointError(
            f"{theirs.where}: block_out_channels = {widths}; expected multiples of the first"
        )
    shift = theirs.get("resnet_time_scale_shift", "default")
    if shift not in ("default", "scale_shift"):
        raise CheckpointError(f"{theirs.where}: resnet_time_scale_shift = {shift!r}")
    heads: Theirs = {} if head_channels is None else {"head_channels": head_channels}
    with _readable(theirs.where):
        return UNetConfig(
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
    theirs = Reader(data, where)
    name = data.get("_class_name")
    if name != "UnCLIPScheduler":
        raise CheckpointError(f"{where}: {name} is not supported; expected UnCLIPScheduler")
    variance = theirs.get("variance_type", "fixed_small_log")
    if variance not in ("fixed_small_log", "learned_range"):
        raise CheckpointError(f"{where}: variance_type = {variance!r} is not supported")
    prediction = theirs.get("prediction_type", "epsilon")
    if prediction not in TARGETS:
        raise CheckpointError(f"{where}: prediction_type = {prediction!r} is not supported")
    largest = theirs.get("clip_sample_range", 1.0)
    bound = largest if theirs.get("clip_sample", True) else None
    steps = theirs.get("num_train_timesteps", 1000)
    theirs.close({"beta_schedule": "squaredcos_cap_v2"})
    with _readable(where):
        config = DiffusionConfig(
            schedule="cosine",
            steps=steps,
            target=TARGETS[prediction],  # type: ignore[arg-type]
            learned_variance=variance == "learned_range",
        )
    return config, bound


@contextmanager
def _readable(where: str) -> Iterator[None]:
    """Turn a schema's complaint about a value into an error about their file."""
    try:
        yield
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(str(part) for part in first["loc"]) or "configuration"
        raise CheckpointError(f"{where}: {key}: {first['msg']}") from None


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
    """`UNet2DConditionModel` and `UnCLIPTextProjModel`.

    **Raises**: `ConfigError` naming what they don't have.
    """
    unet = config.unet
    _express(
        "decoder",
        ("text_width", config.text_width, config.embed),
        ("text_embed", config.text_embed, True),
        ("text_transformer", config.text_transformer, None),
        ("learned_variance", config.learned_variance, True),
        ("layout", config.layout, None),
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
        f"upsampler_{config.high}",
        ("residual", config.residual, False),
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
    """`UnCLIPScheduler`; `bound` is that on x_0.

    **Raises**: `ConfigError` naming what it doesn't have.
    """
    predictions = {ours: theirs for theirs, ours in TARGETS.items()}
    target = config.target if config.target in predictions else "eps or x0"
    _express(
        stage,
        ("diffusion.schedule", config.schedule, "cosine"),
        ("diffusion.target", config.target, target),
    )
    return {
        "num_train_timesteps": config.steps,
        "variance_type": "learned_range" if config.learned_variance else "fixed_small_log",
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
