"""What every network promises: shapes, gradients, conditions that count, caches that don't."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from parity import randomise
from pydantic import ValidationError
from torch import Tensor, nn
from torch.testing import assert_close

from unclip.conditioning import Cond, TextEncoding
from unclip.errors import DataError
from unclip.models.decoder import Decoder, DecoderConfig, LayoutConfig
from unclip.models.layers import MOST_KEYS, DraftConfig, EmbeddingScale, ScaleConfig, attention
from unclip.models.prior import DiffusionPrior, PriorConfig
from unclip.models.transformer import TransformerConfig
from unclip.models.unet import UNet, UNetConfig, dead_blocks, upsampled_conv
from unclip.models.upsampler import Upsampler, UpsamplerConfig

EMBED, TEXT, CONTEXT = 12, 10, 8
WHITEN = ScaleConfig(kind="whiten")


def transformer_config(**changes: Any) -> TransformerConfig:
    return TransformerConfig(**{"width": 32, "layers": 2, "heads": 4} | changes)


def unet_config(**changes: Any) -> UNetConfig:
    base = {"channels": 16, "multiple": [1, 2], "blocks": 1, "attention": [False, True]}
    return UNetConfig(**base | {"mid_attention": True, "head_channels": 8, "groups": 4} | changes)


def prior(draft: DraftConfig | None = None, **changes: Any) -> DiffusionPrior:
    base = {"embed": EMBED, "text_width": TEXT, "context": CONTEXT, "scale": WHITEN}
    transformer = transformer_config(**changes)
    return DiffusionPrior(PriorConfig(transformer=transformer, draft=draft, **base))


def decoder(unet: UNetConfig | None = None, **changes: Any) -> Decoder:
    base = {"resolution": 8, "embed": EMBED, "text_width": TEXT, "context_width": 16}
    base |= {"learned_variance": False, "scale": WHITEN, "unet": unet or unet_config()}
    return Decoder(DecoderConfig(**base | changes))


def upsampler(residual: bool = False, **changes: Any) -> Upsampler:
    unet = unet_config(attention=[False, False], mid_attention=False, **changes)
    return Upsampler(UpsamplerConfig(low=4, high=8, residual=residual, unet=unet))


DETAIL = unet_config(multiple=[1], attention=[False], mid_attention=False)
MODELS: dict[str, Callable[[], nn.Module]] = {
    "prior": prior,
    "decoder": decoder,
    "decoder as Karlo": lambda: decoder(text_embed=True, learned_variance=True),
    "decoder with text transformer": lambda: decoder(text_transformer=transformer_config()),
    "decoder without text": lambda: decoder(text_width=None),
    "decoder with patches": lambda: decoder(unet_config(patch=2, scale_shift=False)),
    "decoder with a head": lambda: decoder(unet_config(patch=2, head=6), image_tokens=7),
    "decoder that inpaints": lambda: decoder(unet_config(patch=2), inpaint=True),
    "decoder with detail": lambda: decoder(unet_config(patch=2), detail=DETAIL),
    "upsampler": upsampler,
    "upsampler with patches": lambda: upsampler(residual=True, patch=2),
}
DECODERS = [name for name in MODELS if name.startswith("decoder")]
WITH_TEXT = [n for n in MODELS if not n.startswith("upsampler") and "without text" not in n]
every_model = pytest.mark.parametrize("name", MODELS)


def make(name: str, *, fresh: bool = False) -> nn.Module:
    torch.manual_seed(0)
    model = MODELS[name]().eval()
    if not fresh:  # fresh networks begin with zero outputs
        randomise(model, seed=1)
    return model


def text_encoding(real: list[int], length: int = CONTEXT, seed: int = 0) -> TextEncoding:
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randn(len(real), length, TEXT, generator=generator)
    embed = torch.randn(len(real), EMBED, generator=generator)
    return TextEncoding(tokens, torch.arange(length) < torch.tensor(real)[:, None], embed)


NULL_TEXT = text_encoding([2], seed=9)


def inputs(model: nn.Module, batch: int = 3) -> tuple[Tensor, Tensor, Cond]:
    generator = torch.Generator().manual_seed(3)
    shape = (EMBED,) if isinstance(model, DiffusionPrior) else (3, 8, 8)
    x_t = torch.randn(batch, *shape, generator=generator)
    t = torch.randint(1000, (batch,), generator=generator)
    cond = Cond()
    if isinstance(model, Upsampler):
        cond = replace(cond, low_res=torch.randn(x_t.shape, generator=generator))
    if isinstance(model, Decoder):
        cond = replace(cond, image_embed=torch.randn(batch, EMBED, generator=generator))
    if isinstance(model, Decoder) and model.config.inpaint:
        cond = replace(cond, known=torch.randn(batch, 4, 8, 8, generator=generator))
    if isinstance(model, DiffusionPrior) or (isinstance(model, Decoder) and model.text):
        cond = replace(cond, text=text_encoding([5, 3, 6, 2][:batch]))
    return x_t, t, cond


def drops(cond: Cond) -> list[Cond]:
    everywhere = torch.ones(len(cond), dtype=torch.bool)
    some = torch.arange(len(cond)) == 0
    return [
        cond,
        cond.null(NULL_TEXT),
        cond.drop(NULL_TEXT, drop_image=everywhere),
        cond.drop(NULL_TEXT, drop_text=everywhere),
        cond.drop(NULL_TEXT, drop_image=some, drop_text=some),
    ]


def far(a: Tensor, b: Tensor) -> bool:
    """Every row differs clearly."""
    return bool(((a - b).flatten(1).abs().amax(1) > 1e-3).all())


@every_model
@torch.no_grad()
def test_output_has_the_inputs_shape_and_type(name: str) -> None:
    model = make(name)
    x_t, t, cond = inputs(model)
    out = model(x_t, t, cond)
    learned = isinstance(model, Decoder) and model.config.learned_variance
    assert out.shape == ((3, 6, 8, 8) if learned else x_t.shape)
    assert out.dtype == x_t.dtype
    assert out.isfinite().all()


@every_model
@torch.no_grad()
def test_fresh_networks_predict_zero(name: str) -> None:
    model = make(name, fresh=True)
    x_t, t, cond = inputs(model)
    out = model(x_t, t, cond)
    if isinstance(model, Upsampler) and model.config.residual:
        out = out - cond.low_res
    assert torch.equal(out, torch.zeros_like(out))


@every_model
def test_every_parameter_gets_a_finite_gradient_under_every_drop(name: str) -> None:
    """Distributed training waits for ever on a parameter without one."""
    model = make(name).train()
    x_t, t, cond = inputs(model)
    moved = set()
    for dropped in drops(cond):
        model.zero_grad()
        model(x_t, t, dropped).square().mean().backward()
        for parameter_name, parameter in model.named_parameters():
            assert parameter.grad is not None, parameter_name
            assert parameter.grad.isfinite().all(), parameter_name
            if parameter.grad.abs().sum() > 0:
                moved.add(parameter_name)
    assert moved == {parameter_name for parameter_name, _ in model.named_parameters()}


@every_model
@torch.no_grad()
def test_saved_and_loaded_weights_give_the_same_output(name: str) -> None:
    model = make(name)
    with torch.device("meta"):
        copied = MODELS[name]()
    copied.to_empty(device="cpu").load_state_dict(model.state_dict())
    x_t, t, cond = inputs(model)
    assert torch.equal(copied.eval()(x_t, t, cond), model(x_t, t, cond))


@pytest.mark.bf16
@every_model
@torch.no_grad()
def test_bfloat16_is_close(name: str) -> None:
    model = make(name)
    x_t, t, cond = inputs(model)
    full = model(x_t, t, cond)
    half = copy.deepcopy(model).bfloat16()(x_t, t, cond)
    assert half.dtype == torch.float32
    assert not torch.equal(half, full)
    assert (half - full).norm() < 0.05 * full.norm()


@pytest.mark.bf16
@every_model
@torch.no_grad()
def test_bfloat16_autocast_is_close(name: str) -> None:
    model = make(name)
    x_t, t, cond = inputs(model)
    full = model(x_t, t, cond)
    with torch.autocast("cpu", torch.bfloat16):
        half = model(x_t, t, cond)
    assert half.dtype == torch.float32
    assert (half - full).norm() < 0.05 * full.norm()


@every_model
@torch.no_grad()
def test_a_row_does_not_depend_on_its_batch(name: str) -> None:
    model = make(name)
    x_t, t, cond = inputs(model)
    rows = slice(1, 2)
    alone = Cond(
        image_embed=None if cond.image_embed is None else cond.image_embed[rows],
        text=None if cond.text is None else cond.text.rows(rows),
        low_res=None if cond.low_res is None else cond.low_res[rows],
        known=None if cond.known is None else cond.known[rows],
    )
    expected = model(x_t, t, cond)[rows]
    assert_close(model(x_t[rows], t[rows], alone), expected, rtol=1e-5, atol=1e-5)


@every_model
@torch.no_grad()
def test_time_and_noise_change_the_output(name: str) -> None:
    model = make(name)
    x_t, t, cond = inputs(model)
    out = model(x_t, t, cond)
    assert far(model(x_t, (t + 300) % 1000, cond), out)
    assert far(model(x_t.roll(1, 0), t, cond), out)


@pytest.mark.parametrize("name", DECODERS)
@torch.no_grad()
def test_image_embedding_changes_the_output(name: str) -> None:
    model = make(name)
    x_t, t, cond = inputs(model)
    out = model(x_t, t, cond)
    other = replace(cond, image_embed=torch.randn(3, EMBED))
    assert far(model(x_t, t, other), out)


@pytest.mark.parametrize("name", DECODERS)
@torch.no_grad()
def test_dropped_image_embeddings_count_for_nothing(name: str) -> None:
    model = make(name)
    x_t, t, cond = inputs(model)
    out = model(x_t, t, cond)
    keep = torch.tensor([True, False, True])
    mixed = model(x_t, t, replace(cond, keep_image=keep))
    assert_close(mixed[keep], out[keep])
    assert far(mixed[~keep], out[~keep])
    other = replace(cond, keep_image=keep, image_embed=cond.image_embed.clone())
    other.image_embed[~keep] = 7.0
    assert torch.equal(model(x_t, t, other), mixed)
    everywhere = cond.drop(None, drop_image=torch.ones(3, dtype=torch.bool))
    assert_close(model(x_t, t, everywhere)[~keep], mixed[~keep])


@pytest.mark.parametrize("name", DECODERS)
@torch.no_grad()
def test_zero_embeddings_are_not_absent(name: str) -> None:
    model = make(name)
    x_t, t, cond = inputs(model)
    zeros = replace(cond, image_embed=torch.zeros(3, EMBED))
    dropped = replace(zeros, keep_image=torch.zeros(3, dtype=torch.bool))
    assert far(model(x_t, t, zeros), model(x_t, t, dropped))


@pytest.mark.parametrize("name", WITH_TEXT)
@torch.no_grad()
def test_text_changes_the_output(name: str) -> None:
    model = make(name)
    x_t, t, cond = inputs(model)
    out = model(x_t, t, cond)
    other = text_encoding([5, 3, 6], seed=5)
    assert far(model(x_t, t, replace(cond, text=cond.text._replace(tokens=other.tokens))), out)
    assert far(model(x_t, t, cond.null(NULL_TEXT)), out)
    embed = replace(cond, text=cond.text._replace(embed=other.embed))
    reads_embed = isinstance(model, DiffusionPrior) or model.config.text_embed
    assert far(model(x_t, t, embed), out) == reads_embed


@pytest.mark.parametrize("name", WITH_TEXT)
@torch.no_grad()
def test_padding_does_not_change_the_output(name: str) -> None:
    model = make(name)
    x_t, t, cond = inputs(model)
    out = model(x_t, t, cond)
    tokens = torch.where(cond.text.mask[..., None], cond.text.tokens, torch.tensor(50.0))
    noisy = cond.text._replace(tokens=tokens)
    assert not torch.equal(noisy.tokens, cond.text.tokens)
    assert torch.equal(model(x_t, t, replace(cond, text=noisy)), out)
    longer = TextEncoding(
        torch.cat([cond.text.tokens, torch.randn(3, 4, TEXT)], dim=1),
        torch.cat([cond.text.mask, torch.zeros(3, 4, dtype=torch.bool)], dim=1),
        cond.text.embed,
    )
    assert torch.equal(model(x_t, t, replace(cond, text=longer)), out)


@pytest.mark.parametrize("name", ["upsampler", "upsampler with patches"])
@torch.no_grad()
def test_low_resolution_image_changes_the_output(name: str) -> None:
    model = make(name)
    x_t, t, cond = inputs(model)
    out = model(x_t, t, cond)
    assert far(model(x_t, t, Cond(low_res=cond.low_res + 0.5)), out)


@torch.no_grad()
def test_what_is_known_changes_what_is_drawn_and_without_it_nothing_is() -> None:
    model = make("decoder that inpaints")
    x_t, t, cond = inputs(model)
    out = model(x_t, t, cond)
    assert far(model(x_t, t, replace(cond, known=cond.known + 0.5)), out)
    nothing = replace(cond, known=torch.zeros(3, 4, 8, 8))
    assert torch.equal(model(x_t, t, nothing), model(x_t, t, replace(cond, known=None)))
    assert far(model(x_t, t, nothing), out)


@torch.no_grad()
def test_detail_corrects_what_the_same_decoder_without_it_makes_by_the_picture_itself() -> None:
    model = make("decoder with detail")
    plain = decoder(unet_config(patch=2)).eval()
    plain.load_state_dict({k: v for k, v in model.state_dict().items() if k[:6] != "detail"})
    x_t, t, cond = inputs(model)
    result, cache = plain(x_t, t, cond), plain.prepare(cond).cache
    emb = plain.time(t) + cache.emb
    seen = torch.cat([x_t, result], dim=1)
    expected = result + model.detail.unet(seen, model.detail.emb(emb), None)
    assert_close(model(x_t, t, cond), expected)
    assert far(expected, result)
    model.detail = make("decoder with detail", fresh=True).detail
    assert torch.equal(model(x_t, t, cond), result)
    with pytest.raises(ValidationError, match=r"detail\.attention"):
        decoder(unet_config(patch=2), detail=unet_config())
    with pytest.raises(ValidationError, match=r"detail\.patch"):
        decoder(detail=DETAIL.model_copy(update={"patch": 3}))


@every_model
@torch.no_grad()
def test_one_prepared_condition_serves_every_step(name: str) -> None:
    model = make(name)
    x_t, t, cond = inputs(model)
    prepared = model.prepare(cond)
    assert prepared.cache is not None
    assert model.prepare(prepared).cache is prepared.cache
    for step in (999, 500, 0):
        t = torch.full_like(t, step)
        assert torch.equal(model(x_t, t, prepared), model(x_t, t, cond))


@pytest.mark.parametrize("name", [name for name in MODELS if not name.startswith("upsampler")])
@torch.no_grad()
def test_prepared_conditions_need_no_text_or_embedding_any_more(name: str) -> None:
    """What `prepare` caches is all that a step reads, so that nothing is encoded twice."""
    model = make(name)
    x_t, t, cond = inputs(model)
    only_cache = Cond(cache=model.prepare(cond).cache)
    assert torch.equal(model(x_t, t, only_cache), model(x_t, t, cond))


@torch.no_grad()
def test_prior_text_does_not_see_what_follows_it() -> None:
    model = make("prior")
    text = text_encoding([6, 6])
    tokens = text.tokens.clone()
    tokens[:, 3] += 1
    before = model.prepare(Cond(text=text)).cache.past
    after = model.prepare(Cond(text=text._replace(tokens=tokens))).cache.past
    for (k, v), (k_changed, v_changed) in zip(before, after, strict=True):
        for kept, changed in ((k, k_changed), (v, v_changed)):
            assert_close(changed[:, :, :3], kept[:, :, :3])
            assert (changed[:, :, 3] - kept[:, :, 3]).abs().max() > 1e-3
    k, k_changed = before[-1][0], after[-1][0]
    later = (k_changed - k)[:, :, 4:].abs().amax(dim=(0, 1, 3))  # what follows does see it
    assert (later > 1e-4).all()


@pytest.mark.parametrize("draft", [None, DraftConfig(width=16, blocks=1)])
def test_several_draws_of_a_text_are_each_as_alone(draft: DraftConfig | None) -> None:
    model = prior(draft)
    randomise(model, seed=2)
    cond = Cond(text=text_encoding([6, 3]))
    x_t, t = torch.randn(6, EMBED), torch.arange(6) * 100
    together = model(x_t, t, cond)  # three draws of each text
    for k in range(3):
        assert_close(together[k::3], model(x_t[k::3], t[k::3], cond), rtol=1e-4, atol=1e-5)


def checkpointed(name: str) -> list[nn.Module]:
    models = []
    for checkpointing in (False, True):
        options = {"checkpointing": checkpointing, "dropout": 0.2}
        if name == "prior":
            model: nn.Module = prior(**options)
        else:
            model = decoder(unet_config(**options), text_transformer=transformer_config(**options))
        randomise(model, seed=1)
        models.append(model.train())
    return models


@pytest.mark.parametrize("name", ["prior", "decoder"])
def test_checkpointing_changes_no_gradient(name: str) -> None:
    gradients = []
    for model in checkpointed(name):
        x_t, t, cond = inputs(model)
        torch.manual_seed(7)  # the same dropout
        model(x_t, t, cond).square().mean().backward()
        gradients.append({n: p.grad for n, p in model.named_parameters()})
    for parameter_name, gradient in gradients[0].items():
        assert_close(gradients[1][parameter_name], gradient, msg=parameter_name)


def test_dropout_acts_in_training_only() -> None:
    for model in (checkpointed("prior")[0], checkpointed("decoder")[0]):
        x_t, t, cond = inputs(model)
        with torch.no_grad():
            assert not torch.equal(model(x_t, t, cond), model(x_t, t, cond))
            model.eval()
            assert torch.equal(model(x_t, t, cond), model(x_t, t, cond))


@torch.no_grad()
def test_unet_stays_channels_last() -> None:
    """A contiguous copy inside a block would cost more than the layout gains."""
    model = make("decoder with patches")
    layouts = []
    for module in model.unet.modules():
        if isinstance(module, nn.Conv2d):
            module.register_forward_hook(lambda _, args, out: layouts.extend([*args, out]))
    model(*inputs(model))
    assert len(layouts) > 20
    assert all(x.is_contiguous(memory_format=torch.channels_last) for x in layouts[1:])


@torch.no_grad()
def test_blocks_whose_activations_never_open_are_named_and_no_others() -> None:
    def passed(network: UNet) -> list[str]:
        with dead_blocks(network) as dead:
            for seed in range(2):
                torch.manual_seed(seed)
                network(torch.randn(2, 3, 8, 8), torch.randn(2, network.config.embed), None)
        return dead

    network = UNet(unet_config(attention=[False, False], mid_attention=False), 3, 3, None)
    assert passed(network) == []  # though at first no block adds anything
    randomise(network, 0)
    assert passed(network) == []
    block = network.mid[1]
    width = block.conv2.in_channels
    block.embed.weight.zero_()
    block.embed.bias[:width], block.embed.bias[width:] = 0, -30
    assert passed(network) == ["mid.1"]
    block.embed.bias[width : width + width // 4] = 0  # a quarter of the channels
    assert passed(network) == []
    assert not block.conv2._forward_pre_hooks


@torch.no_grad()
def test_upsampler_takes_crops_and_larger_images() -> None:
    model = make("upsampler")
    for size in ((4, 8), (16, 12)):
        x_t = torch.randn(1, 3, *size)
        assert model(x_t, torch.tensor([5]), Cond(low_res=x_t)).shape == x_t.shape


def test_missing_or_unfit_conditions_are_explained() -> None:
    t = torch.tensor([5])
    with pytest.raises(ValueError, match="encoded empty string"):
        make("prior")(torch.randn(1, EMBED), t, Cond())
    with pytest.raises(ValueError, match="9 text tokens, but context is 8"):
        make("prior")(torch.randn(1, EMBED), t, Cond(text=text_encoding([9], length=9)))
    with pytest.raises(ValueError, match="encoded empty string"):
        make("decoder")(torch.randn(1, 3, 8, 8), t, Cond(image_embed=torch.randn(1, EMBED)))
    with pytest.raises(ValueError, match="low_res must be resized to x_t"):
        make("upsampler")(torch.randn(1, 3, 8, 8), t, Cond(low_res=torch.randn(1, 3, 4, 4)))
    with pytest.raises(ValueError, match="image is 9x8; sides must be multiples of 2"):
        make("upsampler")(torch.randn(1, 3, 8, 9), t, Cond(low_res=torch.randn(1, 3, 8, 9)))


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: transformer_config(heads=5), "multiple of heads, got 32 and 5"),
        (lambda: unet_config(head_channels=24), "head_channels = 24 must divide width 32"),
        (lambda: unet_config(attention=[True]), "one entry for each of the 2 levels"),
        (lambda: unet_config(blocks=[1]), "blocks needs one entry for each of the 2 levels"),
        (lambda: unet_config(blocks=[1, 0]), "greater than 0"),
        (lambda: unet_config(channels=18), "multiple of groups = 4, got 18"),
        (lambda: unet_config(multiple=[1, 0]), "every multiple must be at least 1"),
        (lambda: decoder(resolution=9), "resolution = 9 must be a multiple of 2"),
        (lambda: decoder(text_width=None, text_embed=True), "need text_width"),
        (
            lambda: decoder(unet_config(attention=[False, False], mid_attention=False)),
            "must be true somewhere",
        ),
        (lambda: UpsamplerConfig(low=4, high=8, unet=unet_config()), "must be false"),
        (
            lambda: UpsamplerConfig(
                low=8, high=8, unet=unet_config(attention=[False] * 2, mid_attention=False)
            ),
            "high = 8 must be above low = 8",
        ),
    ],
)
def test_impossible_configurations_are_refused(build: Callable[[], Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build()


def test_unit_scale_sets_the_norm_and_inverts_to_norm_one() -> None:
    scale = EmbeddingScale(ScaleConfig(kind="unit", factor=17.2), EMBED)
    z = 5 * torch.randn(4, EMBED)
    assert_close(scale(z).norm(dim=1), torch.full((4,), 17.2))
    assert_close(scale.inverse(scale(z)), nn.functional.normalize(z, dim=1))


@pytest.mark.parametrize("normalize", [False, True])
def test_whitening_standardises_and_inverts(normalize: bool) -> None:
    scale = EmbeddingScale(ScaleConfig(kind="whiten", normalize=normalize), EMBED)
    z = 3 + 2 * torch.randn(500, EMBED)
    scale.fit(z)
    assert_close(scale(z).mean(0), torch.zeros(EMBED), rtol=0, atol=1e-5)
    assert_close(scale(z).var(0, correction=0), torch.ones(EMBED), rtol=1e-4, atol=0)
    expected = nn.functional.normalize(z, dim=1) if normalize else z
    assert_close(scale.inverse(scale(z)), expected, rtol=1e-4, atol=1e-5)


def test_whitening_refuses_dimensions_that_never_vary() -> None:
    z = torch.randn(50, EMBED)
    z[:, 3] = 1
    with pytest.raises(DataError, match=f"1 of {EMBED} embedding dimensions"):
        EmbeddingScale(WHITEN, EMBED).fit(z)


def test_statistics_stay_float32_in_a_bfloat16_model() -> None:
    """Rounded to three digits they would shift every embedding."""
    scale = EmbeddingScale(WHITEN, EMBED)
    scale.fit(3 + torch.randn(50, EMBED))
    half = copy.deepcopy(scale).bfloat16()
    assert half.mean.dtype == torch.float32
    assert torch.equal(half.mean, scale.mean)
    z = torch.randn(2, EMBED)
    assert torch.equal(half(z), scale(z))


def test_the_convolution_of_a_doubled_picture_never_makes_it() -> None:
    conv = nn.Conv2d(3, 5, 3, padding=1).double()
    x = torch.randn(2, 3, 7, 4, dtype=torch.float64)
    doubled = nn.functional.interpolate(x, scale_factor=2.0, mode="nearest")
    assert_close(upsampled_conv(x, conv), conv(doubled))


def test_a_layout_is_drawn_once_from_the_embedding_alone() -> None:
    model = decoder(layout=LayoutConfig(side=4, width=8)).eval()
    randomise(model, 1)
    z_image, text = torch.randn(2, EMBED), text_encoding([3, 5])
    both = Cond(image_embed=z_image, text=text, keep_image=torch.tensor([True, False]))
    cache = model.prepare(both).cache
    assert cache.layout.shape == (2, 3, 8, 8)
    x_t, t = torch.randn(2, 3, 8, 8), torch.tensor([10, 900])
    out = model(x_t, t, both)
    other = model(x_t, t, replace(both, image_embed=z_image + 1))
    assert not torch.allclose(out[0], other[0])
    assert_close(out[1], other[1])  # without its embedding a picture has the null one's layout
    with torch.no_grad():
        model.layout.gate.bias.fill_(1e4)
    assert_close(model(x_t, t, both), cache.layout)  # with all of the share nothing else counts
    trained = {name for name, p in model.layout.named_parameters() if p.requires_grad}
    assert trained == {"gate.weight", "gate.bias"}


def test_a_draft_is_made_once_from_the_text_embedding_alone() -> None:
    model = prior(draft=DraftConfig(width=8)).eval()
    randomise(model, 1)
    cond = Cond(text=text_encoding([3, 5]))
    cache = model.prepare(cond).cache
    assert_close(cache.draft, model.drafted(cond.text.embed))
    assert cache.draft.shape == (2, EMBED)
    louder = cond.text._replace(embed=3 * cond.text.embed)
    assert_close(model.drafted(louder.embed), cache.draft)  # only directions count
    x_t, t = torch.randn(2, EMBED), torch.tensor([10, 900])
    prepared = model.prepare(cond)
    moved = replace(prepared, cache=cache._replace(draft=cache.draft + 1))
    assert not torch.allclose(model(x_t, t, prepared), model(x_t, t, moved))
    with torch.no_grad():
        model.draft.gate.bias.fill_(1e4)
    assert_close(model(x_t, t, cond), cache.draft)  # with all of the share nothing else counts
    trained = {name for name, p in model.draft.named_parameters() if p.requires_grad}
    assert trained == {"gate.weight", "gate.bias"}


@pytest.mark.bf16
@pytest.mark.parametrize("keys", [20, MOST_KEYS + 1])
def test_low_precision_attention_is_close_and_leaves_masked_keys_out(keys: int) -> None:
    """Few keys go another way on CPUs while gradients are recorded."""
    g = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, 3, n, 8, generator=g) for n in (10, keys, keys))
    mask = (torch.rand(2, 1, 1, keys, generator=g) < 0.7).index_fill(3, torch.tensor(0), True)
    out = {}
    for dtype in (torch.float32, torch.bfloat16):
        inputs = [x.to(dtype).detach().requires_grad_() for x in (q, k, v)]
        y = attention(*inputs, mask)
        y.float().square().sum().backward()
        out[dtype] = [y.detach(), *(x.grad for x in inputs)]
        assert y.dtype == dtype
        for gradient in out[dtype][2:]:
            assert not gradient.masked_select(~mask.movedim(3, 2)).any()
    for low, whole in zip(out[torch.bfloat16], out[torch.float32], strict=True):
        assert_close(low.float(), whole, rtol=0.05, atol=0.05)


@pytest.mark.parametrize(("head", "side"), [(None, 4), (5, 5)])
@torch.no_grad()
def test_a_head_sees_across_the_borders_of_patches(head: int | None, side: int) -> None:
    """Without one a patch's pixels are channels of one position, blind to the next patch."""
    unet = decoder(unet_config(patch=4, head=head)).unet
    randomise(unet, seed=1)
    emb, x = torch.randn(1, unet.config.embed), torch.zeros(1, 3, 8, 8)
    context = unet.context_kv(torch.zeros(1, 1, 16), None)
    before = unet(x, emb, context)
    first = torch.zeros(1, 1, 2, 2)
    first[..., 0, 0] = 1
    unet.conv_out.register_forward_hook(lambda module, args, out: out + first)
    changed = (unet(x, emb, context) - before).abs().sum((0, 1)) > 1e-6
    assert bool(changed[:side, :side].all()) and int(changed.sum()) == side**2


@torch.no_grad()
def test_the_image_embedding_enters_as_so_many_tokens() -> None:
    model = make("decoder with a head")
    _, _, cond = inputs(model)
    keys, _ = model.prepare(cond).cache.context.kv[0]
    assert cond.text is not None and keys.shape[2] == 7 + cond.text.length()
