"""Pictures as pairs (z_image, x_T), on a tiny random model: what defines each way to change one."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import WIDTH, stage, tiny_pipeline
from karlo import Shape
from karlo import pipeline as karlo_pipeline
from parity import randomise
from PIL import Image
from torch.nn.functional import cosine_similarity

from unclip.clip.encoder import FrozenCLIP
from unclip.errors import CheckpointError, ConfigError
from unclip.images import fit_square, psnr, to_tensor
from unclip.models.ar_prior import ArPrior, ArPriorConfig
from unclip.models.decoder import Decoder
from unclip.models.layers import DraftConfig
from unclip.models.prior import DiffusionPrior
from unclip.models.transformer import TransformerConfig
from unclip.pipeline import UnCLIP
from unclip.stages.ar_prior import ArSamplingConfig, ArStage

APPLE, SQUARES = "a red apple", "a blue square and two green circles"
STEPS = 8
OFF = {"guidance": 1.0}


def picture(colour: str = "red", size: tuple[int, int] = (40, 40)) -> Image.Image:
    image = Image.new("RGB", size, "white")
    image.paste(colour, (size[0] // 4, size[1] // 4, size[0] // 2, 3 * size[1] // 4))
    return image


def half_mask(size: tuple[int, int] = (40, 40)) -> Image.Image:
    mask = Image.new("L", size, 0)
    mask.paste(255, (0, 0, size[0] // 2, size[1]))
    return mask


def same(a: Image.Image, b: Image.Image, levels: int = 0) -> None:
    assert a.size == b.size
    assert np.abs(np.asarray(a).astype(int) - np.asarray(b)).max() <= levels


def distance(a: Image.Image, b: Image.Image) -> float:
    return float((to_tensor(a) - to_tensor(b)).abs().mean())


def likeness(a: Image.Image, b: Image.Image) -> float:
    return float(psnr(to_tensor(a)[None], to_tensor(fit_square(b, a.width))[None]))


@pytest.fixture(scope="module")
def karlo(tmp_path_factory: pytest.TempPathFactory) -> UnCLIP:
    """Karlo's layout with an image tower: no prior, a decoder that learns its variance.

    Its ε is made small: what a random network guesses at random, DDIM divides by √ᾱ.
    """
    folder = tmp_path_factory.mktemp("karlo") / "model"
    karlo_pipeline(Shape(), folder, images=True)
    pipe = UnCLIP.from_pretrained(folder)
    pipe.decoder.network.unet.conv_out.weight.mul_(0.02)
    pipe.decoder.network.unet.conv_out.bias.mul_(0.02)
    return pipe


@pytest.fixture(params=["ours", "karlo"])
def either(request, pipe, karlo) -> UnCLIP:
    return pipe if request.param == "ours" else karlo


def test_a_pair_tells_the_picture(either):
    """Whatever the decoder: the noise is found from which it draws just this picture."""
    again = either.reconstruct(picture(), size=16, steps=20)
    assert likeness(again, picture()) > 25
    z = either.encode_image(picture())
    other = either.redraw(z, either.noise([0]), size=16, steps=STEPS)[0]
    assert likeness(other, picture()) < 15


def test_without_fresh_noise_seeds_change_nothing_and_with_it_they_do(pipe):
    z, how = pipe.encode_image(picture()), {"size": 16, "steps": STEPS}
    x_T = pipe.invert(picture(), z, STEPS)
    same(pipe.redraw(z, x_T, seed=1, **how)[0], pipe.redraw(z, x_T, seed=2, **how)[0])
    a, b = (pipe.redraw(z, x_T, seed=s, eta=1.0, **how)[0] for s in (1, 2))
    assert distance(a, b) > 0.02


def test_variations_without_fresh_noise_are_the_reconstruction(either):
    how = {"size": 16, "steps": STEPS}
    varied = either.variations(picture(), inverted=True, eta=0.0, **how)
    same(varied[0], either.reconstruct(picture(), **how))


def test_variations_from_a_pictures_own_noise_leave_it_as_eta_grows(pipe):
    how = {"size": 16, "steps": STEPS}
    again = pipe.reconstruct(picture(), **how)
    some, more = (
        pipe.variations(picture(), inverted=True, eta=eta, **how)[0] for eta in (0.3, 1.0)
    )
    assert 0 < distance(some, again) < distance(more, again)


def test_noise_may_be_given_wherever_pictures_are_made(pipe):
    x_T, z = pipe.noise([7, 8]), pipe.encode_image(picture())
    for make in (
        partial(pipe.text_to_image, APPLE, size=16),
        partial(pipe.image_from_embedding, z, size=16),
        partial(pipe.variations, picture(), eta=0.0, size=16),
    ):
        two = make(n=2, x_T=x_T)
        same(two[1], make(seed=1, x_T=x_T[1:])[0], levels=1)
        assert distance(two[0], make(x_T=x_T[1:])[0]) > 0.01
        same(make(n=2, x_T=x_T[1:])[0], make(x_T=x_T[1:])[0], levels=1)  # one for all


def test_the_noise_of_a_batch_in_chunks_is_that_of_each(pipe, monkeypatch):
    z = pipe.encode_image([picture()] * 3)
    x_T = pipe.noise([1, 2, 3])
    first = torch.randn(x_T.shape[1:], generator=torch.Generator().manual_seed(1))
    assert not torch.allclose(x_T[0], first)  # which fresh noise on the way begins with
    whole = pipe.image_from_embedding(z, size=32, x_T=x_T)
    monkeypatch.setattr("unclip.stages.stage.CHUNK_PIXELS", 2 * 16**2)
    for a, b in zip(whole, pipe.image_from_embedding(z, size=32, x_T=x_T), strict=True):
        same(a, b, levels=1)


@pytest.mark.parametrize("size", [16, 32])
def test_the_ends_of_an_interpolation_are_the_reconstructions(either, size):
    pictures, how = [picture(), picture("blue", (30, 50))], {"size": size, "steps": STEPS}
    between = either.interpolate(pictures, frames=3, seed=5, **how)
    assert len(between) == 3
    for end, whole in zip((between[0], between[-1]), pictures, strict=True):
        same(end, either.reconstruct(whole, seed=5, **how), levels=1)


def test_several_pictures_are_interpolated_one_after_the_other(pipe):
    three = [picture(), picture("blue"), picture("green")]
    assert len(pipe.interpolate(three, frames=3, size=16, steps=5)) == 5
    fixed = pipe.interpolate(three, frames=2, fixed_noise=True, size=16, steps=5, seed=4)
    z = pipe.encode_image(three[2])
    same(fixed[2], pipe.redraw(z, pipe.noise([4]), seed=4, size=16, steps=5)[0], levels=1)


def test_no_text_diff_is_the_reconstruction(either):
    how = {"size": 16, "steps": STEPS}
    edited = either.text_diff(picture(), "two circles", "a square", strength=0, **how)
    same(edited[0], either.reconstruct(picture(), **how), levels=1)


def test_more_of_a_text_diff_goes_further(pipe):
    how = {"size": 16, "steps": STEPS}
    none, some, more = pipe.text_diff(picture(), SQUARES, APPLE, strength=[0, 0.2, 0.5], **how)
    assert 0 < distance(some, none) < distance(more, none)


def test_one_picture_of_any_weight_is_its_variation(either):
    alone = either.mix([picture()], [0.3], n=2, seed=3, size=16)
    for a, b in zip(alone, either.variations(picture(), n=2, seed=3, size=16), strict=True):
        same(a, b)


def test_a_mix_lies_between_its_parts(pipe, tmp_path):
    picture().save(tmp_path / "red.png")
    z_text = pipe.text_to_embedding(APPLE)
    of_all = pipe.mix([tmp_path / "red.png", APPLE, z_text], [0.5, 0.25, 0.25], size=16)[0]
    same(of_all, pipe.mix([picture(), z_text], [0.5, 0.5], size=16)[0], levels=1)
    assert distance(of_all, pipe.mix([picture(), APPLE], [0.9, 0.1], size=16)[0]) > 0.001


@pytest.mark.parametrize("size", [16, 32])
@pytest.mark.parametrize("shape", [(40, 40), (32, 32), (24, 40)])
def test_what_the_mask_does_not_show_is_kept_to_the_bit(either, size, shape):
    image, mask = picture("blue", shape), half_mask(shape)
    words = None if either.prior is None else APPLE
    a, b = either.inpaint(image, mask, words, n=2, size=size, steps=3)
    square = Image.new("L", (max(shape),) * 2, 0)
    square.paste(mask, ((max(shape) - shape[0]) // 2, 0))
    kept = np.asarray(square.resize((size, size), Image.Resampling.BOX)) == 0
    expected = np.asarray(fit_square(image, size))
    assert kept.any() and (np.asarray(a)[kept] == expected[kept]).all()
    assert distance(a, b) > 0.01 and (np.asarray(a)[~kept] != expected[~kept]).any()


def test_a_decoder_that_inpaints_draws_what_goes_with_what_it_is_shown():
    pipe = tiny_pipeline()
    config = pipe.decoder.config.model_copy(update={"inpaint": True})
    pipe.decoder = stage("decoder", Decoder(config), pipe.clip, guidance=2.0)
    how = {"prompt": APPLE, "size": 16, "steps": 3}
    red, blue = (pipe.inpaint(picture(c), half_mask(), **how)[0] for c in ("red", "blue"))
    for made, colour in ((red, "red"), (blue, "blue")):
        kept = fit_square(picture(colour), 16).crop((8, 0, 16, 16))
        same(made.crop((8, 0, 16, 16)), kept)
    assert distance(red.crop((0, 0, 8, 16)), blue.crop((0, 0, 8, 16))) > 0.005
    white = np.full((40, 40), True)
    drawn = pipe.inpaint(picture(), white, **how)[0]
    same(drawn, pipe.text_to_image(APPLE, size=16, steps=3, sampler="ddim")[0])


def test_resampling_turns_keep_it_as_well_and_need_a_sampler_of_one_step(pipe):
    drawn = pipe.inpaint(picture(), half_mask(), APPLE, size=16, steps=3, repeats=3)[0]
    once = pipe.inpaint(picture(), half_mask(), APPLE, size=16, steps=3)[0]
    assert distance(drawn, once) > 0.001
    same(drawn.crop((8, 0, 16, 16)), fit_square(picture(), 16).crop((8, 0, 16, 16)))
    with pytest.raises(ConfigError, match=r"repeats = 3 with dpm\+\+"):
        pipe.inpaint(picture(), half_mask(), APPLE, repeats=3, steps=3, sampler="dpm++")


def test_the_smaller_the_strength_the_closer_to_the_picture(pipe):
    near, far = (
        pipe.inpaint(picture(), prompt=APPLE, strength=s, size=16, steps=10)[0] for s in (0.1, 0.9)
    )
    assert likeness(near, picture()) > likeness(far, picture()) + 3
    whole = pipe.inpaint(picture(), prompt=APPLE, size=16, steps=3)[0]
    same(whole, pipe.text_to_image(APPLE, size=16, steps=3, sampler="ddim")[0])


def test_a_white_mask_draws_everything_anew(pipe):
    white = np.full((40, 40), True)
    drawn = pipe.inpaint(picture(), white, APPLE, size=16, steps=3)[0]
    same(drawn, pipe.text_to_image(APPLE, size=16, steps=3, sampler="ddim")[0])


def guided_pipeline() -> UnCLIP:
    pipe = tiny_pipeline()
    sampling = pipe.prior.sampling.model_copy(update={"guidance": 3.0})
    pipe.prior = replace(pipe.prior, sampling=sampling)
    return pipe


@pytest.mark.parametrize("prompt", [APPLE, ""])
def test_a_negative_prompt_that_is_the_prompt_is_no_guidance(prompt):
    pipe = guided_pipeline()
    off = {"guidance": {"prior": 1.0, "decoder": 1.0}}
    alone = pipe.text_to_image(prompt, n=2, size=16, **off)
    for a, b in zip(
        pipe.text_to_image(prompt, n=2, size=16, negative_prompt=prompt), alone, strict=True
    ):
        same(a, b, levels=1)
    assert distance(pipe.text_to_image(prompt, n=2, size=16)[1], alone[1]) > 0.01


@pytest.mark.parametrize("prompt", [APPLE, ""])
def test_embeddings_of_the_negative_prompt_are_not_guided(prompt):
    """By an empty one they were led away from z_text, as no prior stood behind it."""
    pipe = guided_pipeline()
    z = pipe.text_to_embedding(prompt, negative_prompt=prompt)
    first, second = (
        pipe.image_from_embedding(z, prompt, size=16, **how)[0]
        for how in ({"negative_prompt": prompt}, {"guidance": 1.0})
    )
    same(first, second, levels=1)


def test_a_negative_prompt_leads_away_in_prior_and_decoder():
    pipe = guided_pipeline()
    plain, away = (
        pipe.text_to_embedding(APPLE, n=4, prior_candidates=1, negative_prompt=not_)
        for not_ in (None, SQUARES)
    )
    unwanted = pipe.text_to_embedding(SQUARES, n=4, prior_candidates=1)
    assert cosine_similarity(away, unwanted).mean() < cosine_similarity(plain, unwanted).mean()
    z = pipe.encode_image(picture())
    made = [
        pipe.image_from_embedding(z, size=16, negative_prompt=not_)[0] for not_ in (None, APPLE)
    ]
    assert distance(*made) > 0.01


def test_what_guides_the_decoder_is_asked_for_by_call(pipe):
    """The tiny decoder's guidance is 2."""
    plain = pipe.text_to_image(APPLE, size=16)[0]
    same(pipe.text_to_image(APPLE, size=16, interval=(0, 1))[0], plain, levels=1)
    assert distance(pipe.text_to_image(APPLE, size=16, interval=(0.9, 1))[0], plain) > 0.003
    with pytest.raises(ConfigError, match="no effect here"):
        pipe.upscale(picture(), interval=(0.9, 1))
    with pytest.raises(ConfigError, match="no effect here"):
        pipe.text_to_embedding(APPLE, interval=(0.9, 1))


def test_priors_are_chosen_by_name():
    pipe = tiny_pipeline()
    config = pipe.prior.config.model_copy(update={"draft": DraftConfig(width=16, blocks=1)})
    pipe.prior = replace(stage("prior", DiffusionPrior(config), pipe.clip, target="x0", clip=None))
    z_text = pipe.encode_text(APPLE)
    draft = pipe.prior.embeddings(pipe.prior.network.drafted(z_text))
    torch.testing.assert_close(pipe.text_to_embedding(APPLE, prior="draft"), draft)
    torch.testing.assert_close(pipe.text_to_embedding(APPLE, prior="text"), z_text)
    made = {
        name: pipe.text_to_image(APPLE, size=16, prior=name)[0]
        for name in ("diffusion", "draft", "text", "none")
    }
    same(made["text"], pipe.image_from_embedding(z_text, APPLE, size=16)[0])
    same(made["draft"], pipe.image_from_embedding(draft, APPLE, size=16)[0])
    same(made["diffusion"], pipe.text_to_image(APPLE, size=16)[0])
    assert distance(made["none"], made["text"]) > 0.01
    with pytest.raises(CheckpointError, match="no ar_prior"):
        pipe.text_to_image(APPLE, prior="ar")
    with pytest.raises(ConfigError, match=r"prior = 'other'.*diffusion, ar"):
        pipe.text_to_image(APPLE, prior="other")
    with pytest.raises(ConfigError, match="no embeddings"):
        pipe.text_to_embedding(APPLE, prior="none")


def tiny_ar_prior(clip: FrozenCLIP) -> ArStage:
    network = ArPrior(
        ArPriorConfig(
            embed=WIDTH,
            text_width=16,
            context=12,
            components=4,
            buckets=8,
            dot_buckets=4,
            transformer=TransformerConfig(width=16, layers=1, heads=2),
        )
    )
    randomise(network, 0)
    generator = torch.Generator().manual_seed(0)
    network.quantizer.fit(*(torch.randn(200, WIDTH, generator=generator) for _ in range(2)))
    network.eval().requires_grad_(False)
    return ArStage.of(network, ArSamplingConfig(guidance=2.0), clip.fingerprint)


def test_the_autoregressive_prior_is_a_stage_beside_the_other(tmp_path):
    pipe = tiny_pipeline()
    pipe.ar_prior = tiny_ar_prior(pipe.clip)
    pipe.save_pretrained(tmp_path)
    again = UnCLIP.from_pretrained(tmp_path)
    same(again.text_to_image(APPLE, size=16)[0], tiny_pipeline().text_to_image(APPLE, size=16)[0])
    drawn = again.text_to_image(APPLE, size=16, prior="ar")[0]
    same(drawn, pipe.text_to_image(APPLE, size=16, prior="ar")[0], levels=1)
    assert distance(drawn, again.text_to_image(APPLE, size=16)[0]) > 0.01
    away = again.text_to_embedding(APPLE, n=4, prior="ar", negative_prompt=SQUARES)
    assert not torch.equal(away, again.text_to_embedding(APPLE, n=4, prior="ar"))
    again.prior = None
    same(again.text_to_image(APPLE, size=16)[0], drawn)


def test_options_of_a_mix_reach_priors_and_pictures():
    pipe = guided_pipeline()
    plain = pipe.mix([APPLE], size=16, negative_prompt=SQUARES)[0]
    for how in ({"guidance": {"prior": 9.0}}, {"prior": "text"}, {"interval": (0.9, 1)}):
        drawn = pipe.mix([APPLE], size=16, negative_prompt=SQUARES, **how)[0]
        assert distance(drawn, plain) > 0.001
    pipe = tiny_pipeline().with_decoder_sampling(pipe.prior.sampling.model_copy(update=OFF))
    pipe.mix([APPLE], size=16, steps=2, guidance=3.0, negative_prompt=SQUARES, prior_candidates=1)


@pytest.mark.parametrize(
    ("act", "message"),
    [
        (lambda p: p.interpolate([picture()]), "1 picture: two or more"),
        (lambda p: p.interpolate([picture()] * 2, frames=1), "frames = 1"),
        (lambda p: p.interpolate([picture()] * 2, frames=2.5), "frames = 2.5: must be a whole"),
        (lambda p: p.text_diff(picture(), target=APPLE, source=APPLE), "same embedding"),
        (lambda p: p.text_diff(picture(), target=APPLE, strength=float("nan")), "finite"),
        (lambda p: p.text_diff(picture(), target=APPLE, strength=[]), "one or more"),
        (lambda p: p.mix([]), "nothing to mix"),
        (lambda p: p.mix([picture()], n=0), "n = 0: must be at least 1"),
        (lambda p: p.mix([picture()], prior="ar"), "no text becomes an embedding"),
        (lambda p: p.mix([picture()], prior_candidates=2), "no effect without a prior"),
        (lambda p: p.mix([picture()], guidance={"prior": 2.0}), "guidance for 'prior'"),
        (lambda p: p.mix([APPLE], prior="text", guidance={"prior": 2.0}), "guidance for 'prior'"),
        (lambda p: p.mix([APPLE], guidance=1.0, interval=(0.2, 0.8)), "interval.*no effect"),
        (lambda p: p.mix([APPLE], guidance=1.0, negative_prompt=SQUARES), "negative.*no effect"),
        (lambda p: p.mix([picture(), APPLE], [1, -1]), "sum to more than 0"),
        (lambda p: p.mix([picture(), APPLE], [1]), "1 weights for 2"),
        (lambda p: p.mix([picture(), torch.zeros(5)]), r"\(1, 5\).*16"),
        (lambda p: p.inpaint(picture(), Image.new("L", (40, 40), 0), APPLE), "black everywhere"),
        (lambda p: p.inpaint(picture(), half_mask((20, 40)), APPLE), "20 x 40.*40 x 40"),
        (lambda p: p.inpaint(picture(), None, APPLE, strength=0), "strength = 0"),
        (lambda p: p.inpaint(picture(), None, APPLE, strength=0.01, steps=50), "50 sampling"),
        (lambda p: p.inpaint(picture(), half_mask(), APPLE, n=0), "n = 0: must be at least 1"),
        (lambda p: p.inpaint(picture(), None, APPLE, n="2"), "n = '2': must be a whole"),
        (
            lambda p: p.inpaint(picture(), None, APPLE, repeats="2"),
            "repeats = '2': must be a whole",
        ),
        (lambda p: p.inpaint(picture(), None, APPLE, size=17), "size 17"),
        (lambda p: p.inpaint(picture(), half_mask(), APPLE, size=17), "size 17"),
        (lambda p: p.invert(picture(), steps=0), "steps = 0: must be at least 1"),
        (lambda p: p.variations(picture(), n="2", inverted=True), "n = '2': must be a whole"),
        (lambda p: p.reconstruct(picture(), steps=2, interval=(0.2, 0.8)), "interval.*no effect"),
        (lambda p: p.invert(picture(), torch.zeros(1, 5)), r"\(1, 5\).*16"),
        (lambda p: p.invert(picture(), torch.ones(2, WIDTH)), "2 embeddings for 1 pictures"),
        (lambda p: p.text_to_image(APPLE, x_T=torch.zeros(2, 3, 16, 16)), r"\(1, 3, 16, 16\)"),
        (lambda p: p.text_to_image(APPLE, x_T=torch.zeros(1, 3, 8, 8)), r"\(1, 3, 8, 8\)"),
        (lambda p: p.reconstruct([picture(), picture()]), "2 pictures"),
        (lambda p: p.reconstruct(picture(), sampler="dpm++", eta=0.5), "ddim"),
        (lambda p: p.variations(picture(), prior="text"), "no effect"),
        (lambda p: p.text_to_image(APPLE, interval=(0.5, 0.1)), "interval"),
        (lambda p: p.text_to_image(APPLE, threshold=0.9), "unknown option 'threshold'"),
        (lambda p: p.upscale(picture(), negative_prompt=APPLE), "no effect"),
    ],
)
def test_what_cannot_be_done_is_said(pipe, act, message):
    with pytest.raises(ConfigError, match=message):
        act(pipe)


def test_a_model_without_a_prior_says_what_needs_one(karlo):
    with pytest.raises(CheckpointError, match="no prior"):
        karlo.mix([picture(), APPLE])
    with pytest.raises(CheckpointError, match="no prior"):
        karlo.variations(picture(), negative_prompt=APPLE)


def test_a_model_without_a_decoder_says_so_of_a_mask_too(pipe):
    """The mask was taken to the largest of no sizes: an IndexError."""
    with pytest.raises(CheckpointError, match="no decoder"):
        UnCLIP(pipe.clip, pipe.prior).inpaint(picture(), half_mask(), APPLE)


def test_pictures_of_other_sizes_are_padded(pipe):
    between = pipe.interpolate([picture(), picture("blue", (10, 60))], 2, size=16, steps=20)
    assert likeness(between[1], picture("blue", (10, 60))) > 25


def test_files_and_arrays_are_pictures_here_too(pipe, tmp_path: Path):
    picture().save(tmp_path / "a.png")
    half_mask().save(tmp_path / "m.png")
    how = {"prompt": APPLE, "size": 16, "steps": 3}
    same(
        pipe.inpaint(tmp_path / "a.png", tmp_path / "m.png", **how)[0],
        pipe.inpaint(np.asarray(picture()), np.asarray(half_mask()), **how)[0],
    )
