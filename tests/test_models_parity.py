"""With copied random weights our networks equal diffusers' (the published unCLIP architecture)."""

from __future__ import annotations

import pytest
import torch
from diffusers import PriorTransformer, UNet2DConditionModel, UNet2DModel
from diffusers.models.embeddings import get_timestep_embedding
from diffusers.pipelines.deprecated.unclip.text_proj import UnCLIPTextProjModel
from parity import copy_weights, randomise
from torch.testing import assert_close

from unclip.conditioning import Cond, TextEncoding
from unclip.interop.names import prior_names, text_proj_names, unet_names
from unclip.models.decoder import Decoder, DecoderConfig
from unclip.models.layers import ScaleConfig, timestep_embedding
from unclip.models.prior import DiffusionPrior, PriorConfig
from unclip.models.transformer import TransformerConfig
from unclip.models.unet import UNetConfig
from unclip.models.upsampler import Upsampler, UpsamplerConfig

TOLERANCE = {"rtol": 1e-5, "atol": 1e-5}


def text_encoding(batch: int, length: int, width: int, embed: int, real: list[int]) -> TextEncoding:
    mask = torch.arange(length) < torch.tensor(real)[:, None]
    return TextEncoding(torch.randn(batch, length, width), mask, torch.randn(batch, embed))


def test_timestep_embedding_is_bit_equal() -> None:
    t = torch.tensor([0, 1, 500, 999])
    for channels in (32, 320, 2048):
        theirs = get_timestep_embedding(t, channels, flip_sin_to_cos=True, downscale_freq_shift=0)
        assert torch.equal(timestep_embedding(t, channels), theirs)


@pytest.mark.parametrize(
    ("heads", "head_channels", "layers", "embed", "context", "real"),
    [
        (2, 8, 1, 12, 5, [5, 5]),
        (4, 16, 3, 24, 9, [2, 9, 5]),
        (3, 8, 2, 16, 11, [1, 7, 4]),
    ],
)
@torch.no_grad()
def test_prior_equals_prior_transformer(
    heads: int, head_channels: int, layers: int, embed: int, context: int, real: list[int]
) -> None:
    torch.manual_seed(0)
    theirs = PriorTransformer(
        num_attention_heads=heads,
        attention_head_dim=head_channels,
        num_layers=layers,
        embedding_dim=embed,
        num_embeddings=context,
    ).eval()
    randomise(theirs, seed=1)
    transformer = TransformerConfig(width=heads * head_channels, layers=layers, heads=heads)
    ours = DiffusionPrior(
        PriorConfig(
            embed=embed,
            text_width=embed,
            context=context,
            transformer=transformer,
            scale=ScaleConfig(kind="whiten"),
        )
    ).eval()
    copy_weights(ours, (prior_names(ours.config), theirs))

    batch = len(real)
    text = text_encoding(batch, context, embed, embed, real)
    x_t, t = torch.randn(batch, embed), torch.randint(1000, (batch,))
    expected = theirs(
        x_t,
        t,
        proj_embedding=text.embed,
        encoder_hidden_states=text.tokens,
        attention_mask=text.mask,
    ).predicted_image_embedding
    assert expected.std() > 0.1
    assert_close(ours(x_t, t, Cond(text=text)), expected, **TOLERANCE)
    assert_close(ours.scale.inverse(x_t), theirs.post_process_latents(x_t), **TOLERANCE)


def karlo_unet(config: UNetConfig, context_width: int) -> UNet2DConditionModel:
    down = {False: "ResnetDownsampleBlock2D", True: "SimpleCrossAttnDownBlock2D"}
    up = {False: "ResnetUpsampleBlock2D", True: "SimpleCrossAttnUpBlock2D"}
    return UNet2DConditionModel(
        sample_size=16,
        in_channels=3,
        out_channels=6,
        down_block_types=tuple(down[attends] for attends in config.attention),
        up_block_types=tuple(up[attends] for attends in reversed(config.attention)),
        mid_block_type="UNetMidBlock2DSimpleCrossAttn",
        block_out_channels=tuple(config.widths),
        layers_per_block=config.blocks,
        cross_attention_dim=context_width,
        attention_head_dim=config.head_channels,
        norm_num_groups=config.groups,
        class_embed_type="identity",
        resnet_time_scale_shift="scale_shift" if config.scale_shift else "default",
    )


@pytest.mark.parametrize(
    ("unet", "embed", "text_width", "context_width", "real"),
    [
        (
            UNetConfig(
                channels=32,
                multiple=[1, 2, 3, 4],
                blocks=3,
                attention=[False, True, True, True],
                mid_attention=True,
                head_channels=16,
                groups=8,
            ),
            12,
            12,
            24,
            [7, 7],
        ),
        (
            UNetConfig(
                channels=64,
                multiple=[1, 2],
                blocks=1,
                attention=[True, True],
                mid_attention=True,
                head_channels=32,
                groups=16,
            ),
            20,
            20,
            40,
            [3, 9, 1],
        ),
        (
            UNetConfig(
                channels=32,
                multiple=[1, 3],
                blocks=[1, 3],
                attention=[False, True],
                mid_attention=True,
                head_channels=8,
                groups=8,
                scale_shift=False,
            ),
            16,
            16,
            16,
            [5, 2],
        ),
    ],
)
@torch.no_grad()
def test_decoder_equals_unet2d_condition_model(
    unet: UNetConfig, embed: int, text_width: int, context_width: int, real: list[int]
) -> None:
    torch.manual_seed(0)
    theirs = karlo_unet(unet, context_width).eval()
    text_proj = UnCLIPTextProjModel(
        clip_embeddings_dim=embed,
        time_embed_dim=unet.embed,
        cross_attention_dim=context_width,
    ).eval()
    randomise(theirs, seed=1)
    randomise(text_proj, seed=2)
    ours = Decoder(
        DecoderConfig(
            resolution=16,
            embed=embed,
            text_width=text_width,
            text_embed=True,
            context_width=context_width,
            learned_variance=True,
            scale=ScaleConfig(kind="raw"),
            unet=unet,
        )
    ).eval()
    copy_weights(ours, (unet_names(unet), theirs), (text_proj_names(ours.config), text_proj))

    batch, length = len(real), 9
    text = text_encoding(batch, length, text_width, embed, real)
    z_image = torch.randn(batch, embed)
    x_t, t = torch.randn(batch, 3, 16, 16), torch.randint(1000, (batch,))

    def oracle(z: torch.Tensor) -> torch.Tensor:
        states, emb = text_proj(
            image_embeddings=z,
            prompt_embeds=text.embed,
            text_encoder_hidden_states=text.tokens,
            do_classifier_free_guidance=False,
        )
        mask = torch.nn.functional.pad(text.mask, (4, 0), value=True)
        return theirs(
            x_t, t, encoder_hidden_states=states, class_labels=emb, attention_mask=mask
        ).sample

    expected = oracle(z_image)
    assert expected.std() > 0.1
    assert_close(ours(x_t, t, Cond(image_embed=z_image, text=text)), expected, **TOLERANCE)

    null = text_proj.learned_classifier_free_guidance_embeddings.expand(batch, -1)
    drop = torch.ones(batch, dtype=torch.bool)
    cond = Cond(image_embed=z_image, text=text).drop(None, drop_image=drop)
    assert_close(ours(x_t, t, cond), oracle(null), **TOLERANCE)
    assert_close(ours(x_t, t, Cond(text=text)), oracle(null), **TOLERANCE)


@pytest.mark.parametrize(
    ("channels", "multiple", "blocks", "groups", "scale_shift"),
    [
        (32, [1, 2, 3, 4], 3, 8, False),
        (64, [1, 2], 1, 32, False),
        (32, [1, 1, 2], 2, 8, True),
    ],
)
@torch.no_grad()
def test_upsampler_equals_unet2d_model(
    channels: int, multiple: list[int], blocks: int, groups: int, scale_shift: bool
) -> None:
    torch.manual_seed(0)
    unet = UNetConfig(
        channels=channels,
        multiple=multiple,
        blocks=blocks,
        attention=[False] * len(multiple),
        mid_attention=False,
        groups=groups,
        scale_shift=scale_shift,
    )
    theirs = UNet2DModel(
        sample_size=16,
        in_channels=6,
        out_channels=3,
        down_block_types=("ResnetDownsampleBlock2D",) * len(multiple),
        up_block_types=("ResnetUpsampleBlock2D",) * len(multiple),
        block_out_channels=tuple(unet.widths),
        layers_per_block=blocks,
        norm_num_groups=groups,
        add_attention=False,
        resnet_time_scale_shift="scale_shift" if scale_shift else "default",
    ).eval()
    randomise(theirs, seed=1)
    ours = Upsampler(UpsamplerConfig(low=4, high=16, unet=unet)).eval()
    copy_weights(ours, (unet_names(unet), theirs))

    x_t, low_res = torch.randn(2, 2, 3, 16, 24).unbind(0)
    t = torch.tensor([0, 998])
    expected = theirs(torch.cat([x_t, low_res], dim=1), t).sample
    assert expected.std() > 0.1
    assert_close(ours(x_t, t, Cond(low_res=low_res)), expected, **TOLERANCE)


def karlo(name: str) -> tuple[torch.nn.Module, int]:
    unet = UNetConfig(
        channels=320,
        multiple=[1, 2, 3, 4],
        blocks=3,
        attention=[name == "decoder" and level > 0 for level in range(4)],
        mid_attention=name == "decoder",
        scale_shift=name == "decoder",
    )
    if name == "super_res":
        return Upsampler(UpsamplerConfig(low=64, high=256, unet=unet)), 691_579_523
    if name == "decoder":
        config = DecoderConfig(
            resolution=64,
            embed=768,
            text_width=768,
            text_embed=True,
            context_width=1536,
            learned_variance=True,
            scale=ScaleConfig(kind="raw"),
            unet=unet,
        )
        return Decoder(config), 885_439_686 + 7_878_400
    transformer = TransformerConfig(width=2048, layers=20, heads=32)
    prior = PriorConfig(
        embed=768,
        text_width=768,
        context=77,
        transformer=transformer,
        scale=ScaleConfig(kind="whiten"),
    )
    return DiffusionPrior(prior), 1_022_030_080 - 2 * 768  # our statistics are buffers


@pytest.mark.parametrize("name", ["prior", "decoder", "super_res"])
def test_karlo_sizes_have_exactly_karlos_counts(name: str) -> None:
    with torch.device("meta"):
        model, expected = karlo(name)
    assert sum(parameter.numel() for parameter in model.parameters()) == expected
