"""The shipped configurations, and what each diffusion stage learns from."""

from __future__ import annotations

import json
import os
import pickle
import subprocess
import sys
import warnings
from dataclasses import fields, replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from parity import randomise
from torch.testing import assert_close

from unclip import randomness
from unclip.clip.encoder import FrozenCLIP
from unclip.conditioning import TextEncoding
from unclip.config import load_config
from unclip.data.open import open_dataset
from unclip.data.order import batches
from unclip.data.sample import Batch, Sample, fixed
from unclip.errors import ConfigError
from unclip.files.tensors import TensorFile
from unclip.images import resize
from unclip.models.layers import EmbeddingScale, ScaleConfig
from unclip.pipeline import UnCLIP
from unclip.training.ar_prior import ArPriorRun
from unclip.training.augment import PlaceConfig, masks, place
from unclip.training.clip import ClipRun
from unclip.training.clip_text import ClipTextRun
from unclip.training.decoder import DecoderRun, DecoderTask, train_decoder
from unclip.training.drafts import fit_draft, fit_layout, fit_scale, jittered
from unclip.training.prior import PriorRun, PriorTask
from unclip.training.start import start_from
from unclip.training.task import Prepared, Shown, draw, embeddings_of, told_of
from unclip.training.upsampler import Redrawn, Shrunk, UpsamplerRun, UpsamplerTask

ROOT = Path(__file__).parents[1]
SCHEMAS = {
    "clip": ClipRun,
    "clip_text": ClipTextRun,
    "judge": ClipRun,
    "prior": PriorRun,
    "ar": ArPriorRun,
    "decoder": DecoderRun,
    "upsampler": UpsamplerRun,
}
CONFIGS = sorted(
    path.relative_to(ROOT)
    for path in (ROOT / "configs").glob("*/*.yaml")
    if path.parent.name != "accelerate"  # those are accelerate's, not ours
)
BUILT_IN = ("emoji", "shapes")
TINY = {
    "decoder": [
        "model.unet.channels=16",
        "model.unet.groups=4",
        "model.unet.head_channels=16",
        "train.batch=4",
        "train.warmup=0",
    ],
    "prior": ["model.transformer.layers=1", "train.batch=4"],
    "upsampler_64": ["model.unet.channels=16", "model.unet.groups=4", "train.batch=4"],
}


def schema(path):
    return SCHEMAS.get(path.stem) or SCHEMAS[path.stem.split("_")[0]]


def tiny(stage, clip, *more):
    """The shapes configuration of a stage with a smaller network and the tests' encoder."""
    overrides = [*TINY[stage]]
    if stage != "upsampler_64":
        overrides += [f"clip={clip}", "model.embed=16", "model.text_width=16"]
    if stage == "prior":
        overrides += ["model.context=12"]
    path = ROOT / "configs" / "shapes" / f"{stage}.yaml"
    last = {override.partition("=")[0]: override for override in [*overrides, *more]}
    return load_config(path, [*last.values()], SCHEMAS[stage.split("_")[0]])


def first_batch(run, **where):
    dataset = open_dataset(run.data.train, run.data.resolution)
    options = {"batch": run.train.batch, "seed": run.train.seed, "crop": run.data.crop}
    return next(batches(dataset, **options, **where))


@pytest.mark.parametrize("path", CONFIGS, ids=str)
def test_every_shipped_configuration_loads(path):
    load_config(ROOT / path, [], schema(path))


@pytest.mark.parametrize("path", [p for p in CONFIGS if p.parent.name not in BUILT_IN], ids=str)
def test_configurations_for_photographs_neither_pad_nor_enlarge_nor_always_degrade(path):
    """Decoders learned letterboxes, and upsamplers never met a picture as sharp as those they were
    given."""
    run = load_config(ROOT / path, [], schema(path))
    assert run.data.fit == "crop"
    drawn = getattr(run.model, "high", getattr(run.model, "resolution", 0))
    assert run.data.min_side == drawn
    if isinstance(run, UpsamplerRun):
        assert run.degraded == 0.5
        assert run.degradation == "bsr" or run.blur_sigma == (0.4, 0.6)


def test_all_stacks_are_there():
    stacks = {path.parent.name for path in CONFIGS}
    assert stacks == {"dalle2", "gpu24", "karlo", "emoji", "shapes"}


def test_a_prior_learns_the_scaled_embedding_of_its_own_picture(model_folder):
    run = tiny("prior", model_folder, "drop.text=0")
    clip = FrozenCLIP.load(run.clip)
    task = PriorTask(run, clip)
    fit_scale(task.stage.network.scale, clip, open_dataset("shapes:val", run.data.resolution))
    batch = first_batch(run)
    x0 = task.stage.network.scale(clip.encode_image(batch.images))

    class Oracle(torch.nn.Module):
        def forward(self, x_t, t, cond):
            assert_close(cond.text.embed, clip.encode_text(batch.captions).embed)
            return x0

    assert_close(task.loss(Oracle(), batch, 0)["loss"], torch.zeros(4))


def test_a_layout_is_fitted_to_what_embeddings_show(model_folder, monkeypatch):
    run = tiny("decoder", model_folder, "model.layout={side: 8, width: 64}")
    clip = FrozenCLIP.load(run.clip)
    monkeypatch.setattr("unclip.training.drafts.LAYOUT_COUNT", 128)
    monkeypatch.setattr("unclip.training.drafts.LAYOUT_EPOCHS", 400)
    dataset = open_dataset("shapes:val", run.data.resolution)
    decoders = []
    for _ in range(2):
        torch.manual_seed(0)
        decoders.append(DecoderTask(run, clip).stage.network)
        fit_scale(decoders[-1].scale, clip, dataset)
        fit_layout(decoders[-1], clip, dataset, seed=0, jitter=0.1)
    assert_close(decoders[0].layout.state_dict(), decoders[1].layout.state_dict())
    seen = range(0, len(dataset), len(dataset) // 128)[:64]
    images = torch.stack([dataset.get(i, randomness.generator(0, "", i)).image for i in seen])
    small = resize(images, 8).flatten(1)
    drawn = decoders[0].layout(decoders[0].scale(clip.encode_image(images)))
    mean = small.mean(0, keepdim=True)
    assert (drawn - small).square().mean() < 0.7 * (mean - small).square().mean()


def test_a_draft_is_fitted_to_what_captions_tell(model_folder, monkeypatch):
    """Here an embedding follows from its caption's, though not along a straight line."""
    monkeypatch.setattr("unclip.training.drafts.DRAFT_COUNT", 512)
    monkeypatch.setattr("unclip.training.drafts.DRAFT_EPOCHS", 200)
    g = torch.Generator().manual_seed(0)
    told = torch.randn(256, 16, generator=g) * torch.logspace(0, -1, 16)  # correlated, uneven
    told = F.normalize(told @ torch.randn(16, 16, generator=g) + 2, dim=-1)
    turned = (told - told.mean(0)) @ torch.randn(16, 16, generator=g)
    shown = turned.abs() + 0.3 * turned

    class Rows:
        name = "rows"

        def __len__(self):
            return 256

        def get(self, index, generator):
            return Sample(None, str(index), str(index), shown[index])

    def encode_text(captions):
        embed = torch.stack([told[int(c)] if c.isdigit() else -told[0] for c in captions])
        return TextEncoding(embed[:, None], torch.ones(len(embed), 1, dtype=torch.bool), embed)

    run = tiny("prior", model_folder, "model.draft={width: 64}")
    clip = FrozenCLIP.load(run.clip)
    monkeypatch.setattr(clip, "encode_text", encode_text)
    priors = []
    for _ in range(2):
        torch.manual_seed(0)
        priors.append(PriorTask(run, clip).stage.network)
        fit_scale(priors[-1].scale, clip, Rows())
        fit_draft(priors[-1], clip, Rows(), seed=0, drop=0.2)
    assert_close(priors[0].draft.state_dict(), priors[1].draft.state_dict())
    x0 = priors[0].scale(shown)
    error = (priors[0].drafted(told) - x0).square().mean()
    with_one = torch.cat([told, torch.ones(256, 1)], dim=1)
    line = with_one @ torch.linalg.lstsq(with_one, x0).solution
    assert error < 0.5 * (line - x0).square().mean()
    null = priors[0].drafted(clip.null_text.embed)  # dropped captions tell nothing
    assert null.square().mean() < 0.1


def test_a_draft_may_be_fitted_to_fewer_captions_than_embeddings_have_dimensions(
    model_folder, monkeypatch
):
    """A singular value decomposition gives no more axes than there are captions."""
    monkeypatch.setattr("unclip.training.drafts.DRAFT_COUNT", 10)
    monkeypatch.setattr("unclip.training.drafts.DRAFT_EPOCHS", 3)
    run = tiny("prior", model_folder, "model.draft={width: 16}")
    task, dataset = PriorTask(run, FrozenCLIP.load(run.clip)), open_dataset("shapes:val", 32)
    fit_scale(task.stage.network.scale, task.clip, dataset)
    fit_draft(task.stage.network, task.clip, dataset, seed=0)
    drafted = task.stage.network.drafted(task.clip.encode_text(["a red circle"]).embed)
    assert drafted.shape == (1, 16) and bool(drafted.isfinite().all())


def test_a_decoder_draws_no_colours_beyond_black_and_white(model_folder):
    """Pictures that bicubic had made smaller were targets with 5 % of their pixels beyond 1."""
    run = tiny("decoder", model_folder, "data.resolution=48")
    batch, seen = first_batch(run), []
    assert resize(batch.images, run.model.resolution).abs().max() > 1.001

    class Spy(torch.nn.Module):
        def forward(self, x_t, t, cond):
            return torch.zeros_like(x_t)

    task = DecoderTask(run, FrozenCLIP.load(run.clip))
    task.stage.diffusion.loss = lambda model, x0, *_: seen.append(x0)
    task.loss(Spy(), batch, 0)
    assert seen[0].abs().max() <= 1


def test_a_decoder_learns_moved_pictures_from_their_own_embeddings(model_folder, tmp_path):
    augment = "augment={flip: 0.5, shift: 0.2, scale: 0.2}"
    run = tiny("decoder", model_folder, augment, "drop.image=0", "train.batch=16")
    task, seen = DecoderTask(run, FrozenCLIP.load(run.clip)), []
    batch = first_batch(run)

    def model(x_t, t, cond):
        return torch.zeros_like(x_t)

    task.stage.diffusion.loss = lambda model, x0, cond, *_: seen.append((x0, cond.image_embed))
    task.loss(model, batch, 0)
    x0, z_image = seen[0]
    moved = task.moved(batch.images, batch.ids)
    assert_close(x0, moved)
    assert_close(z_image, task.clip.encode_image(moved).float())
    assert all(not torch.equal(a, b) for a, b in zip(moved, batch.images, strict=True))
    plain = tiny("decoder", model_folder, "train.batch=16")
    assert torch.equal(DecoderTask(plain, task.clip).moved(batch.images, batch.ids), batch.images)
    with pytest.raises(ConfigError, match="augment"):
        tiny("decoder", model_folder, augment, f"embeddings={tmp_path}")


def test_an_inpainting_decoder_begins_as_the_one_it_comes_from_and_is_shown_what_is_not_masked(
    model_folder, tmp_path
):
    clip = FrozenCLIP.load(str(model_folder))
    before = DecoderTask(tiny("decoder", model_folder), clip)
    randomise(before.model, 0)
    UnCLIP(clip, decoder=before.stage).save_pretrained(tmp_path)
    task = DecoderTask(tiny("decoder", model_folder, "model.inpaint=true"), clip)
    start_from(task.stage, tmp_path)
    batch, seen = first_batch(task.run), []

    def model(x_t, t, cond):
        seen.append((x_t, cond.known))
        return task.model(x_t, t, cond)

    losses = [
        DecoderTask.loss(own, network, batch, 0)["loss"]
        for own, network in ((before, before.model), (task, model))
    ]
    assert_close(*losses)
    x0, known = resize(batch.images, 32).clamp(-1, 1), seen[0][1]
    hidden = masks(batch.ids, 32, task.run.train.seed)
    assert torch.equal(known[:, 3:] == 0, hidden)
    assert_close(known[:, :3], x0.masked_fill(hidden, 0))


def test_a_decoder_with_detail_begins_as_the_one_it_comes_from_and_may_train_that_alone(
    model_folder, tmp_path
):
    clip = FrozenCLIP.load(str(model_folder))
    plain = DecoderTask(tiny("decoder", model_folder), clip)
    randomise(plain.model, 0)
    UnCLIP(clip, decoder=plain.stage).save_pretrained(tmp_path / "plain")
    detail = "model.detail={channels: 16, multiple: [1], blocks: 1, attention: [false], "
    detail += "mid_attention: false, groups: 2}"
    changes = [f"train.init={tmp_path}/plain", "train.only=['detail.*']", "train.steps=2"]
    run = tiny("decoder", model_folder, detail, *changes, f"train.out={tmp_path}/run")
    task = DecoderTask(run, clip)
    start_from(task.stage, tmp_path / "plain")
    batch = first_batch(run)
    losses = [own.loss(own.model, batch, 0)["loss"] for own in (task, plain)]
    assert_close(*losses)
    saved = TensorFile(train_decoder(run, Accelerator(cpu=True)) / "decoder" / "model.safetensors")
    before = plain.model.state_dict()
    same = {name for name in saved if name in before and torch.equal(saved[name], before[name])}
    assert same == set(before)
    assert saved["detail.unet.conv_out.weight"].abs().max() > 0


def test_a_training_names_dead_blocks_once_and_none_that_began_anew(model_folder, tmp_path):
    clip = FrozenCLIP.load(str(model_folder))
    died = DecoderTask(tiny("decoder", model_folder), clip)
    randomise(died.model, 0)
    with torch.no_grad():
        block = died.model.unet.mid[0]
        block.embed.weight.zero_()
        block.embed.bias.fill_(-30)
        block.norm2.weight.zero_()
    UnCLIP(clip, decoder=died.stage).save_pretrained(tmp_path / "died")

    def trained(anew: str) -> list[str]:
        out = f"train.out={tmp_path}/{anew[:4]}"
        changes = [f"train.init={tmp_path}/died", f"train.anew=[{anew}]", "train.steps=1", out]
        with warnings.catch_warnings(record=True) as warned:
            warnings.simplefilter("always")
            train_decoder(tiny("decoder", model_folder, *changes), Accelerator(cpu=True))
        samples = sorted(path.name for path in (tmp_path / anew[:4] / "samples").iterdir())
        assert samples == ["step-0.png", "step-1.png"]
        return [str(one.message) for one in warned if "have died" in str(one.message)]

    (said,) = trained("null_image")
    assert "the same: unet.mid.0; a train.weight_decay" in said
    assert trained("unet.mid.0.*") == []


def test_masks_are_a_samples_own_and_hide_a_part_the_rest_a_half_or_all():
    hidden = masks(torch.arange(400), 16, 0)
    assert torch.equal(masks(torch.tensor([7]), 16, 0), hidden[7:8])
    share = hidden.float().mean((1, 2, 3))
    assert 0.15 < (share == 1).float().mean() < 0.35
    assert 0.15 < (share == 0.5).float().mean() < 0.35
    assert 0.05 < share.min() < 0.1 and ((share > 0.5) & (share < 1)).any()


def test_a_decoder_learns_what_the_encoder_sees_where_a_picture_can_be_known(model_folder):
    more = ["train.batch=16", "drop.image=0", "diffusion={target: v, schedule: cosine}"]
    runs = [tiny("decoder", model_folder, *more, f"perceptual={w}") for w in (0.0, 0.5)]
    clip = FrozenCLIP.load(runs[0].clip)
    batch = first_batch(runs[0])
    off = torch.rand(16, 3, 32, 32, generator=torch.Generator().manual_seed(0)) / 2
    off.requires_grad_(True)

    def model(x_t, t, cond):
        return off * x_t

    (plain, seeing) = (DecoderTask(run, clip).loss(model, batch, 0) for run in runs)
    assert "distance" not in plain
    assert torch.equal(plain["mse_q0"].nan_to_num(), seeing["mse_q0"].nan_to_num())
    t, noise = draw(runs[0], batch.ids, batch.images)
    process = DecoderTask(runs[0], clip).stage.diffusion
    x_t = process.q_sample(batch.images, t, noise)
    guess = process.x0_from(off * x_t, x_t, t)
    expected = 0
    for a, b in zip(clip.features(guess), clip.features(batch.images), strict=True):
        expected = expected + 2 * (1 - F.cosine_similarity(a, b, dim=1)).mean((1, 2))
    assert_close(seeing["distance"], 0.5 * expected)
    signal = process.alpha_bar[t].float()
    assert_close(seeing["loss"] - plain["loss"], signal * seeing["distance"], rtol=1e-4, atol=1e-5)
    (gradient,) = torch.autograd.grad(seeing["distance"].sum(), off)
    assert (gradient.flatten(1).norm(dim=1) > 0).all()
    assert_close(DecoderTask(runs[1], clip).perceived(batch.images, batch.images), torch.zeros(16))


def test_flipped_pictures_are_mirror_images_by_sample():
    x, ids = torch.rand(200, 3, 4, 4), torch.arange(200)
    moved = place(x, ids, 0, PlaceConfig(flip=0.3))
    mirrored = (moved == x.flip(-1)).flatten(1).all(1)
    assert torch.equal(moved[~mirrored], x[~mirrored])
    assert 0.2 < mirrored.float().mean() < 0.4
    assert torch.equal(place(x[7:8], ids[7:8], 0, PlaceConfig(flip=0.3)), moved[7:8])


@pytest.mark.parametrize("power", [1.0, 2.0, 0.5])
def test_timesteps_are_drawn_as_a_power_of_even_numbers(model_folder, power):
    run = tiny("decoder", model_folder, f"diffusion.time_power={power}")
    t, _ = draw(run, torch.arange(2000), torch.zeros(2000, 1))
    assert t.min() >= 0 and t.max() < run.diffusion.steps
    for share in (0.25, 0.5, 0.75):
        below = (t < share * run.diffusion.steps).double().mean()
        assert abs(below - share**power) < 0.04


def test_jitter_moves_training_embeddings_and_no_others(model_folder):
    run = tiny("decoder", model_folder, "jitter=0.5", "train.batch=200")
    task = DecoderTask(run, FrozenCLIP.load(run.clip))
    scale = task.stage.network.scale
    fit_scale(scale, task.clip, open_dataset("shapes:val", run.data.resolution))
    batch = first_batch(run)
    true = scale(task.clip.encode_image(batch.images))
    seen = []

    def model(x_t, t, cond):
        seen.append(cond)
        return x_t

    task.loss(model, batch, 0)
    task.loss(model, batch, 0)
    assert_close(seen[0].image_embed, seen[1].image_embed)
    off = (scale(seen[0].image_embed) - true).square().mean(1).sqrt()  # (B,), each its own sigma
    assert off.min() < 0.05 and 0.4 < off.max() < 0.7
    assert_close(off.mean(), torch.tensor(0.5 / 3), rtol=0.15, atol=0)  # most are moved little
    plain = told_of(task.clip, task.stage, batch.images, batch.captions)
    assert_close(scale(plain.image_embed), true)


def test_jitter_of_no_deviation_is_the_embedding_itself():
    scale = EmbeddingScale(ScaleConfig(kind="whiten"), 5)
    z = torch.randn(4, 5, generator=torch.Generator().manual_seed(0)) * 3 + 1
    scale.fit(z)
    noise = torch.ones(4, 5)
    assert_close(jittered(scale, z, torch.zeros(4), noise), z)
    moved = jittered(scale, z, torch.tensor([0.0, 1.0, 2.0, 3.0]), noise)
    assert_close(moved - z, torch.arange(4.0)[:, None] * scale.std)


def test_the_decoder_drops_conditions_at_the_configured_rates(model_folder):
    run = tiny("decoder", model_folder, "drop.image=0.1", "drop.text=0.5", "train.batch=400")
    clip = FrozenCLIP.load(run.clip)
    task = DecoderTask(run, clip)
    seen = {}

    class Spy(torch.nn.Module):
        def forward(self, x_t, t, cond):
            seen["image"] = ~cond.keep_image
            null = clip.null_text.embed
            seen["text"] = (cond.text.embed - null).abs().amax(1) < 1e-6
            return torch.zeros_like(x_t)

    task.loss(Spy(), first_batch(run), 0)
    image, text = seen["image"].float(), seen["text"].float()
    assert abs(image.mean() - 0.1) < 0.05
    assert abs(text.mean() - 0.5) < 0.08
    both = (image * text).mean()  # independent drops: the rate of both is the product
    assert abs(both - image.mean() * text.mean()) < 0.03


def test_what_a_sample_is_trained_on_does_not_depend_on_the_number_of_processes(model_folder):
    run = tiny("decoder", model_folder)
    task = DecoderTask(run, FrozenCLIP.load(run.clip))
    with torch.no_grad():
        whole = task.loss(task.model, first_batch(run), 0)["loss"]
        halves = [
            task.loss(task.model, first_batch(run, rank=rank, world=2), 0)["loss"]
            for rank in (0, 1)
        ]
    assert_close(torch.cat(halves), whole, rtol=1e-4, atol=1e-5)


def test_an_upsampler_sees_a_low_resolution_copy_of_its_own_crop():
    run = tiny("upsampler_64", None, "degraded=0")
    made = Shrunk(run)
    batch = made(first_batch(run))
    side = batch.images.shape[-1]
    assert batch.low_res.shape == (4, 3, side // 2, side // 2)
    assert (resize(batch.low_res, side) - batch.images).abs().mean() < 0.2
    degraded = Shrunk(tiny("upsampler_64", None, "degraded=1"))
    other = degraded(batch).low_res
    assert not torch.allclose(batch.low_res, other)
    assert_close(other, degraded(batch).low_res, rtol=0, atol=0)


def test_embeddings_of_a_cache_go_where_the_encoder_is():
    there = SimpleNamespace(device=torch.device("meta"))
    batch = Batch(["a red apple"], torch.tensor([0]), z_image=torch.zeros(1, 4))
    assert embeddings_of(there, batch).device.type == "meta"


def test_a_prior_without_places_for_its_encoders_texts_is_refused(model_folder):
    run = tiny("prior", model_folder, "model.context=8")
    clip = FrozenCLIP.load(run.clip)
    with pytest.raises(ConfigError, match=rf"model\.context = 8, .* up to {clip.context} tokens"):
        PriorTask(run, clip)


def batch_of(batch, rows):
    """Those rows of it."""
    parts = {field.name: getattr(batch, field.name) for field in fields(batch)}
    return Batch(**{name: part if part is None else part[rows] for name, part in parts.items()})


def test_an_upsampler_meets_what_the_decoder_draws_on_its_pictures(model_folder):
    accelerator = Accelerator(cpu=True)
    sizes = ["model.low=16", "model.high=32", "data.resolution=32", "data.crop=null", "degraded=0"]
    share = f"redrawn={{model: '{model_folder}', share: 0.6, level: 0.9}}"
    run = tiny("upsampler_64", None, *sizes, share, "train.batch=16")
    batch, redrawn = Shrunk(run)(first_batch(run)), Redrawn(run, accelerator)
    low = redrawn(batch, 3)
    drawn = (low != batch.low_res).flatten(1).any(1)
    share_drawn = randomness.uniform(run.train.seed, "redrawn", batch.ids) < 0.6
    assert torch.equal(drawn, share_drawn) and 0 < drawn.sum() < 16
    assert torch.equal(redrawn(batch, 3), low)
    halves = [batch_of(batch, part) for part in (slice(8), slice(8, 16))]  # as two processes have
    assert_close(torch.cat([redrawn(half, 3) for half in halves]), low, rtol=0, atol=1e-5)
    assert not torch.allclose(redrawn(batch, 4)[drawn], low[drawn])
    alone = replace(batch, captions=["green circles"] * 16)
    assert torch.equal(redrawn(alone, 3)[~drawn], low[~drawn])
    assert not torch.allclose(redrawn(alone, 3)[drawn], low[drawn])  # it is told the caption
    # A decoder that knows the answer draws the picture itself, from whatever level.
    x0 = resize(batch.images, 16).clamp(-1, 1)
    redrawn.decoder = replace(redrawn.decoder, network=Knows(x0[drawn], redrawn.decoder))
    assert_close(redrawn(batch, 3), torch.where(drawn[:, None, None, None], x0, batch.low_res))
    with pytest.raises(ConfigError, match=r"draws 16 px, but model\.low = 32"):
        Redrawn(tiny("upsampler_64", None, "data.crop=null", share), accelerator)
    with pytest.raises(ConfigError, match="whole pictures"):
        tiny("upsampler_64", None, share)


class Knows(torch.nn.Module):
    """Predicts what leads back to the given pictures, whatever the conditions."""

    def __init__(self, x0, decoder):
        super().__init__()
        self.x0, self.config, self.process = x0, decoder.config, decoder.diffusion

    def prepare(self, cond):
        return cond

    def forward(self, x_t, t, cond):
        x0 = self.x0.repeat(len(x_t) // len(self.x0), 1, 1, 1)
        return self.process.target(x0, t, self.process.eps_from_x0(x0, x_t, t))


def test_a_pair_counts_by_the_mean_of_its_draws(model_folder):
    run = tiny("prior", model_folder, "draws=3", "drop.text=0")
    clip = FrozenCLIP.load(run.clip)
    task, batch, seen = PriorTask(run, clip), first_batch(run), []

    class Zero(torch.nn.Module):
        def forward(self, x_t, t, cond):
            seen.append(torch.cat([x_t, t[:, None]], dim=1))
            return torch.zeros_like(x_t)

    losses = task.loss(Zero(), batch, 0)
    x0 = task.stage.network.scale(clip.encode_image(batch.images))
    assert_close(losses["loss"], x0.square().mean(1))  # whatever the noise, of each one's own pair
    assert len(seen[0].unique(dim=0)) == 12  # 4 pairs, no draw twice
    quarters = torch.stack([losses[f"mse_q{k}"] for k in range(4)])
    assert_close(quarters.nanmean(0), losses["loss"])


@pytest.mark.parametrize(("stage", "draws"), [("prior", 1), ("prior", 3), ("decoder", 1)])
def test_what_workers_prepare_changes_no_loss(model_folder, stage, draws):
    """Noise and tokens, made in the training's own process, held an accelerator up."""
    run = tiny(stage, model_folder, *([f"draws={draws}"] if draws > 1 else []))
    clip = FrozenCLIP.load(run.clip)
    task = (PriorTask if stage == "prior" else DecoderTask)(run, clip)
    made = Prepared(run.train.seed, task.stage.shape, clip.towers.tokenizer, draws)
    read = first_batch(run, made=pickle.loads(pickle.dumps(made)), workers=1)
    assert read.noise is not None and read.tokens.shape == (2, 4, clip.context)
    seen = []
    clip.towers.tokenizer = lambda texts: seen.append(texts) or made.tokenizer(texts)
    loss = task.loss(task.model, read, 0)["loss"]
    assert all(texts == [""] for texts in seen)  # the null text alone
    assert torch.equal(loss, task.loss(task.model, first_batch(run), 0)["loss"])


@pytest.mark.parametrize("degradation", ["blur", "bsr"])
def test_pictures_are_degraded_where_they_are_read(degradation):
    """On a GPU, BSR added CPU noise to a picture on the device, and every training crashed."""
    run = tiny("upsampler_64", None, f"degradation={degradation}", "degraded=1")
    made = Shrunk(run)
    read = first_batch(run, made=made, workers=1)
    assert_close(read.low_res, made(first_batch(run)).low_res, rtol=0, atol=0)
    moved = read.to("meta")
    assert moved.low_res.is_meta and moved.noise.is_meta and not moved.ids.is_meta


def test_a_width_that_is_not_the_encoders_is_refused_by_key(model_folder):
    run = tiny("prior", model_folder, "model.embed=48")
    with pytest.raises(ConfigError, match=r"model\.embed = 48.*has 16"):
        PriorTask(run, FrozenCLIP.load(run.clip))


def test_accelerate_launch_trains_a_decoder_on_two_processes(model_folder, tmp_path):
    """`accelerate launch --cpu` silently starts one process; this is the line that starts two."""
    run = tiny("decoder", model_folder)
    config = tmp_path / "decoder.yaml"
    from unclip.config import save_config

    save_config(run, config)
    out = tmp_path / "run"
    command = [
        *(sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu"),
        *("--num_processes", "2", "--main_process_port", "0", "train/decoder.py", str(config)),
        *("train.steps=2", f"train.out={out}", "train.log_every=1", "train.save_every=2"),
        "train.sample_every=100",
        "train.precision=fp32",
    ]
    env = {**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert lines[-1]["step"] == 2
    assert lines[-1]["processes"] == 2
    assert (out / "checkpoints" / "step-2" / "decoder" / "model.safetensors").is_file()


def test_moments_of_eight_bits_train_alike_and_resume_exactly(model_folder, tmp_path):
    def train(name, steps, *more):
        options = [f"train.out={tmp_path / name}", f"train.steps={steps}", "train.save_every=3"]
        options += ["train.log_every=1", "train.decay=constant", "train.precision=fp32"]
        options += ["sampling.steps=2", "data.train=shapes:val"]
        run = tiny("decoder", model_folder, *options, *more)
        torch.manual_seed(run.train.seed)
        return train_decoder(run, Accelerator(cpu=True))

    straight = train("straight", 6, "train.optimizer=adamw8bit")
    train("parts", 3, "train.optimizer=adamw8bit")
    parts = train("parts", 6, "train.optimizer=adamw8bit")
    for path in (straight / "training").iterdir():
        assert path.read_bytes() == (parts / "training" / path.name).read_bytes(), path
    moments = TensorFile(straight / "training" / "optimizer.safetensors")
    large = [name for name, x in moments.items() if name.startswith("state1") and x.numel() >= 4096]
    assert large
    assert all(moments[name].dtype == torch.uint8 for name in large)

    train("whole", 6)
    losses = [
        [json.loads(line)["loss"] for line in (tmp_path / name / "metrics.jsonl").open()]
        for name in ("straight", "whole")
    ]
    assert losses[0] != losses[1]
    assert_close(torch.tensor(losses[0]), torch.tensor(losses[1]), rtol=0.01, atol=0)


def test_what_held_out_data_cost_is_told_by_quarters_and_changes_no_training(
    model_folder, tmp_path, monkeypatch
):
    """Always of the same samples and noise: weights that hardly move cost the same."""
    monkeypatch.setattr("unclip.training.task.HELD_OUT", 8)
    lines = {}
    for val in ("shapes:val", "null"):
        settings = [f"data.val={val}", "train.steps=2", "train.lr=1e-12", "train.log_every=1"]
        settings += ["sampling.steps=2", "train.sample_every=1", f"train.out={tmp_path / val}"]
        AcceleratorState._reset_state(reset_partial_state=True)
        torch.manual_seed(0)
        train_decoder(tiny("decoder", model_folder, *settings), Accelerator(cpu=True))
        text = (tmp_path / val / "metrics.jsonl").read_text()
        lines[val] = [json.loads(line)["grad_norm"] for line in text.splitlines()]
    assert lines["shapes:val"] == lines["null"]
    assert not (tmp_path / "null" / "val.jsonl").exists()
    told = (tmp_path / "shapes:val" / "val.jsonl").read_text().splitlines()
    first, *others = [json.loads(line) for line in told]
    assert [line["step"] for line in others] == [1, 2] and "mse_q3" in first
    for line in others:
        assert line["loss"] == pytest.approx(first["loss"], rel=1e-5)


@pytest.mark.parametrize("count", [1, 3, 8])
def test_previews_show_as_many_pictures_as_there_are(monkeypatch, tmp_path, model_folder, count):
    """Of three validation pictures the prior's preview failed ("k out of range"), and the
    decoder's put its second row beside the first."""
    monkeypatch.setattr(Shown, "first", lambda self, most: few(self.dataset.resolution, count))
    clip = FrozenCLIP.load(str(model_folder))
    tasks = [PriorTask(tiny("prior", str(model_folder)), clip)]
    tasks += [DecoderTask(tiny("decoder", str(model_folder), "sampling.steps=2"), clip)]
    tasks += [UpsamplerTask(tiny("upsampler_64", None, "sampling.steps=2"))]
    shapes = {"prior": (count, 1 + min(4, count)), "decoder": (2, count), "upsampler": (3, count)}
    for task in tasks:
        rows, columns = shapes[task.name.split("_")[0]]
        side = task.run.data.crop or task.run.data.resolution
        side = task.run.model.resolution if task.name == "decoder" else side
        with torch.no_grad():
            image = task.preview(task.model.eval())
        assert image.size == (columns * (side + 4) + 4, rows * (side + 4) + 4)


def few(resolution, count):
    """The first pictures of the shapes' validation set."""
    data = open_dataset("shapes:val", resolution)
    samples = [fixed(data, i) for i in range(count)]
    return torch.stack([s.image for s in samples]), [s.caption for s in samples]
