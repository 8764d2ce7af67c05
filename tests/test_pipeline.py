"""The pipeline on a tiny random model: seeds, order, choices, sizes, files, and what is refused."""

from __future__ import annotations

import json
import shutil
from contextlib import contextmanager
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import tiny_clip, tiny_decoder, tiny_pipeline, tiny_prior, tiny_upsampler
from PIL import Image
from safetensors.torch import load_file
from test_edit import tiny_ar_prior
from torch.nn.functional import cosine_similarity
from torch.testing import assert_close

from unclip.clip.encoder import FrozenCLIP
from unclip.diffusion import sampling
from unclip.diffusion.schedulers import check_sampler, make_scheduler
from unclip.errors import CheckpointError, ConfigError, DataError
from unclip.images import to_tensor
from unclip.models.layers import EmbeddingScale, ScaleConfig
from unclip.options import Options
from unclip.pipeline import UnCLIP
from unclip.stages.resident import resident
from unclip.stages.stage import Stage, chunks

APPLE, SQUARES = "a red apple", "a blue square and two green circles"
LEVEL = 2 / 255  # one of 256 levels: what rounding to 8 bits may cost


def same(a: Image.Image, b: Image.Image, levels: int = 1) -> None:
    assert a.size == b.size
    assert_close(to_tensor(a), to_tensor(b), rtol=0, atol=1.01 * levels * LEVEL)


def distance(a: Image.Image, b: Image.Image) -> float:
    return float((to_tensor(a) - to_tensor(b)).abs().mean())


def picture(size=(40, 40), colour="red") -> Image.Image:
    image = Image.new("RGB", size, "white")
    image.paste(colour, (size[0] // 4, size[1] // 4, size[0] // 2, size[1] // 2))
    return image


def test_picture_k_uses_seed_plus_k(pipe):
    three = pipe.text_to_image(APPLE, n=3, seed=5, size=32)
    same(three[2], pipe.text_to_image(APPLE, seed=7, size=32)[0])
    assert distance(three[0], three[2]) > 0.02


def test_prompts_come_prompt_major_and_equal_separate_calls(pipe):
    four = pipe.text_to_image([APPLE, SQUARES], n=2, size=16)
    same(four[1], pipe.text_to_image(APPLE, seed=1, size=16)[0])
    same(four[2], pipe.text_to_image(SQUARES, seed=2, size=16)[0])
    same(four[3], pipe.text_to_image(SQUARES, seed=3, size=16)[0])


def test_chunks_do_not_change_pictures(pipe, monkeypatch):
    whole = pipe.text_to_image(APPLE, n=3, size=16)
    monkeypatch.setattr("unclip.stages.stage.CHUNK_PIXELS", 2 * 16**2)
    monkeypatch.setattr("unclip.stages.stage.CHUNK_EMBEDDINGS", 1)
    for a, b in zip(whole, pipe.text_to_image(APPLE, n=3, size=16), strict=True):
        same(a, b)


def test_the_prompt_changes_the_picture(pipe):
    a, b = pipe.text_to_image(APPLE, size=16)[0], pipe.text_to_image(SQUARES, size=16)[0]
    assert distance(a, b) > 0.02


def test_an_empty_prompt_is_a_prompt(pipe):
    assert pipe.text_to_image("", size=16)[0].size == (16, 16)


@pytest.mark.parametrize("option", ["guidance", "steps", "sampler"])
def test_options_by_stage_reach_their_stage(pipe, option):
    value = {"guidance": 5.0, "steps": 3, "sampler": "ddpm"}[option]
    z = pipe.encode_text(APPLE)
    plain = pipe.image_from_embedding(z, size=32)[0]
    assert distance(plain, pipe.image_from_embedding(z, size=32, **{option: value})[0]) > 0.01
    by_stage = pipe.image_from_embedding(z, size=32, **{option: {"decoder": value}})[0]
    same(by_stage, pipe.image_from_embedding(z, size=32, **{option: value})[0])
    later = pipe.image_from_embedding(z, size=32, **{option: {"upsampler_32": value}})[0]
    assert distance(plain, later) > 0.01


def test_guidance_one_is_the_conditional_model_alone(pipe):
    calls = []
    network = pipe.decoder.network
    hook = network.register_forward_pre_hook(lambda module, args: calls.append(len(args[0])))
    z = pipe.encode_text(APPLE)
    pipe.image_from_embedding(z, size=16, guidance=1.0, steps=1)
    pipe.image_from_embedding(z, size=16, guidance=3.0, steps=1)
    hook.remove()
    assert calls == [1, 2]


def test_prior_candidates_keep_the_closest_to_the_text(pipe):
    z_text = pipe.encode_text([APPLE, SQUARES])
    one = pipe.text_to_embedding([APPLE, SQUARES], prior_candidates=1)
    best = pipe.text_to_embedding([APPLE, SQUARES], prior_candidates=8)
    before = cosine_similarity(one, z_text)
    after = cosine_similarity(best, z_text)
    assert (after >= before - 1e-5).all() and (after > before + 1e-3).any()


def test_candidates_keep_the_best_by_clip_score(pipe):
    z_text = pipe.encode_text(APPLE)

    def score(images):
        return cosine_similarity(pipe.encode_image(images), z_text)

    one = pipe.text_to_image(APPLE, n=4, size=16)
    best = pipe.text_to_image(APPLE, n=4, size=16, candidates=4)
    assert (score(best) >= score(one) - 1e-4).all()
    assert (score(best) > score(one) + 1e-4).any()


def test_candidates_without_a_caption_are_refused(pipe):
    with pytest.raises(ConfigError, match="caption"):
        pipe.image_from_embedding(pipe.encode_text(APPLE), candidates=2)


@pytest.mark.parametrize(("size", "side"), [(16, 16), (32, 32), (64, 64), (None, 64)])
def test_size_selects_the_stages(pipe, size, side):
    assert pipe.sizes == [16, 32, 64]
    assert pipe.text_to_image(APPLE, size=size)[0].size == (side, side)


def test_a_gap_between_stages_ends_the_sizes():
    clip = tiny_clip()
    pipe = UnCLIP(clip, None, tiny_decoder(clip), [tiny_upsampler(64)])
    assert pipe.sizes == [16]
    with pytest.raises(ConfigError, match=r"\[16\]"):
        pipe.variations(picture(), size=64)
    assert pipe.upscale(picture((40, 40))).size == (64, 64)


@pytest.mark.parametrize(
    ("side", "size", "expected"), [(16, None, 64), (16, 32, 32), (40, None, 64), (10, None, 64)]
)
def test_upscale_sizes(pipe, side, size, expected):
    assert pipe.upscale(picture((side, side // 2)), size=size).size == (expected, expected)


def test_upscale_takes_single_values_for_the_upsamplers(pipe):
    image = picture((32, 32))
    plain = pipe.upscale(image)
    assert distance(plain, pipe.upscale(image, steps=3)) > 0.005
    same(pipe.upscale(image, steps=3), pipe.upscale(image, steps={"upsampler_64": 3}))


def test_upscale_refuses_to_shrink(pipe):
    with pytest.raises(ConfigError, match="too large"):
        pipe.upscale(picture((64, 64)))
    with pytest.raises(ConfigError, match=r"\[64\]"):
        pipe.upscale(picture((40, 40)), size=32)


def test_embeddings_make_pictures_with_and_without_a_caption(pipe):
    z = pipe.encode_image([picture(), picture(colour="blue")])
    assert z.shape == (2, 16)
    plain = pipe.image_from_embedding(z, n=2, size=16)
    assert len(plain) == 4
    same(plain[2], pipe.image_from_embedding(z[1:], seed=2, size=16)[0])
    same(plain[0], pipe.image_from_embedding(z[:1], text="", size=16)[0])
    captioned = pipe.image_from_embedding(z, text=[SQUARES, APPLE], n=2, size=16)
    assert distance(plain[0], captioned[0]) > 0.005
    same(captioned[3], pipe.image_from_embedding(z[1:], text=APPLE, seed=3, size=16)[0])


def test_variations_depend_on_the_picture_and_on_eta(pipe):
    a = pipe.variations(picture(), size=16)[0]
    assert distance(a, pipe.variations(picture(colour="blue"), size=16)[0]) > 0.005
    assert distance(a, pipe.variations(picture(), size=16, eta=0.0)[0]) > 0.005


def test_pictures_are_padded_to_squares_on_white(pipe):
    wide = Image.new("RGBA", (40, 20), (0, 0, 0, 0))
    white = Image.new("RGB", (40, 40), "white")
    assert_close(pipe.encode_image(wide), pipe.encode_image(white))


def test_a_sliver_is_refused_before_it_becomes_a_huge_square(pipe):
    with pytest.raises(DataError, match="square"):
        pipe.encode_image(Image.new("L", (30000, 2)))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"size": 512}, r"\[16, 32, 64\]"),
        ({"sampler": "euler"}, "ddpm.*ddim.*unipc"),
        ({"steps": 0}, "decoder: steps = 0"),
        ({"steps": 5000}, "decoder: 5000"),
        ({"steps": {"upsampler_256": 5}}, "upsampler_256.*prior, decoder, upsampler_32"),
        ({"guidance": float("nan")}, "finite"),
        ({"tile": 10}, "multiple of 4"),
        ({"n": 0}, "n = 0"),
        ({"prior_candidates": 0}, "at least 1"),
        ({"prior_candidates": 1.5}, "prior_candidates = 1.5: must be a whole number"),
        ({"candidates": "2"}, "candidates = '2': must be a whole number"),
        ({"size": "16"}, "size = '16': must be a whole number"),
        ({"tile": 64.0}, "tile = 64.0: must be a whole number"),
        ({"negative_prompt": ["b"]}, "prompt must be text, not list"),
        ({"interval": (0.2,)}, r"interval = \(0.2,\): expected start,end with 0 <= start <= end"),
        ({"interval": (0.8, 0.2)}, r"^interval = \(0.8, 0.2\): expected start,end.*end <= 1$"),
        ({"interval": 0.2}, "interval = 0.2: expected start,end"),
        ({"interval": (0.2, float("nan"))}, "nan.*expected start,end"),
        ({"candidate": 2}, "unknown option 'candidate'.*candidates"),
    ],
)
def test_wrong_options_are_named(pipe, options, message):
    with pytest.raises(ConfigError, match=message):
        pipe.text_to_image(APPLE, **options)


def test_no_prompt_at_all_is_an_error(pipe):
    with pytest.raises(ConfigError, match="no prompts"):
        pipe.text_to_image([])


def test_wrong_embeddings_are_refused(pipe):
    with pytest.raises(ConfigError, match=r"\(N, 16\)"):
        pipe.image_from_embedding(torch.zeros(1, 8))
    with pytest.raises(DataError, match="finite"):
        pipe.image_from_embedding(torch.full((1, 16), torch.nan))
    with pytest.raises(ConfigError, match="3 captions for 2"):
        pipe.image_from_embedding(torch.ones(2, 16), text=["a", "b", "c"])


def test_unit_vectors_are_not_taken_for_raw_embeddings(pipe, monkeypatch):
    """LAION's are normalised. A Karlo, which does not normalise, drew noise from them."""
    unit = F.normalize(torch.randn(2, pipe.decoder.width), dim=-1)
    pipe.image_from_embedding(unit, size=16, steps=1)  # here only the direction counts
    monkeypatch.setattr(ScaleConfig, "normalizes", False)
    with pytest.raises(DataError, match=r"norms are 1, .* about 4\.0; multiply"):  # the prior's
        pipe.image_from_embedding(unit, size=16, steps=1)
    monkeypatch.setattr(EmbeddingScale, "norm", None)
    monkeypatch.setattr(FrozenCLIP, "norm", 10.3)
    with pytest.raises(DataError, match=r"about 10\.3; multiply"):
        pipe.image_from_embedding(unit, size=16, steps=1)
    pipe.image_from_embedding(10 * unit, size=16, steps=1)


def test_missing_stages_are_named():
    clip = tiny_clip()
    decoder = tiny_decoder(clip)
    with pytest.raises(CheckpointError, match="no prior"):
        UnCLIP(clip, None, decoder).text_to_image(APPLE)
    with pytest.raises(CheckpointError, match="no decoder"):
        UnCLIP(clip, tiny_prior(clip)).text_to_image(APPLE)
    with pytest.raises(CheckpointError, match="no CLIP encoder"):
        UnCLIP(decoder=decoder).image_from_embedding(torch.ones(1, 16))
    with pytest.raises(CheckpointError, match="no upsampler"):
        UnCLIP(clip, None, decoder).upscale(picture())


def test_stages_of_different_encoders_do_not_mix():
    ours, other = tiny_clip(), tiny_clip(seed=1)
    with pytest.raises(CheckpointError, match=r"tiny 0.*tiny 1"):
        UnCLIP(ours, tiny_prior(ours), tiny_decoder(other))
    with pytest.raises(CheckpointError, match=r"tiny 0.*tiny 1"):
        UnCLIP(None, tiny_prior(ours), tiny_decoder(other))


def test_save_and_load_give_the_same_pictures(pipe, tmp_path):
    pipe.save_pretrained(tmp_path / "copy")
    copy = UnCLIP.from_pretrained(tmp_path / "copy")
    same(copy.text_to_image(APPLE)[0], pipe.text_to_image(APPLE)[0], levels=0)


def test_a_folder_that_can_not_be_written_is_said(pipe, tmp_path):
    """It was an OSError."""
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match=r"can't write into .*model: .*; choose another folder"):
        pipe.save_pretrained(tmp_path / "file/model")


@pytest.mark.parametrize("device", ["foo", "meta", "cuda:99", "", 1.5])
def test_a_device_that_can_not_be_used_is_said(model_folder, device):
    """It was torch's error, and for `meta`, which holds no numbers, a later one."""
    with pytest.raises(ConfigError, match=f"device = '{device}' can't be used here: ."):
        UnCLIP.from_pretrained(model_folder, device=device)


def test_half_precision_weights_load_as_float32_and_keep_statistics(pipe, tmp_path):
    scale = pipe.prior.network.scale
    pipe.save_pretrained(tmp_path / "half", torch.float16)
    stored = load_file(tmp_path / "half" / "prior" / "model.safetensors")
    assert stored["out.weight"].dtype == torch.float16
    assert stored["scale.mean"].dtype == torch.float32
    copy = UnCLIP.from_pretrained(tmp_path / "half")
    assert {p.dtype for s in copy.stages for p in s.network.parameters()} == {torch.float32}
    assert_close(copy.prior.network.scale.mean, scale.mean, rtol=0, atol=0)
    assert distance(copy.text_to_image(APPLE)[0], pipe.text_to_image(APPLE)[0]) < 0.05


@pytest.mark.bf16
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_low_precision_runs_on_the_cpu_and_stays_close(pipe, model_folder, dtype):
    low = UnCLIP.from_pretrained(model_folder, dtype=dtype)
    assert low.clip.dtype == low.decoder.network.unet.conv_in.weight.dtype == dtype
    assert distance(low.text_to_image(APPLE)[0], pipe.text_to_image(APPLE)[0]) < 0.1


def test_tiles_equal_the_whole_where_one_tile_covers_it(pipe):
    image = picture((32, 32))
    same(pipe.upscale(image, tile=64), pipe.upscale(image), levels=0)


def test_tiles_come_close_to_the_whole(pipe):
    image = picture((32, 32))
    whole, tiled = pipe.upscale(image), pipe.upscale(image, tile=32)
    other = pipe.upscale(image, seed=1)
    assert 0 < distance(whole, tiled) < 0.5 * distance(whole, other)


def test_a_run_of_one_stage_loads(tmp_path):
    clip = tiny_clip()
    tiny_decoder(clip).save(tmp_path)
    pipe = UnCLIP.from_pretrained(tmp_path)
    assert [stage.name for stage in pipe.stages] == ["decoder"] and pipe.clip is None
    assert pipe.encoder == clip.fingerprint


def test_damaged_folders_are_checkpoint_errors(model_folder, tmp_path):
    def damaged(name, change):
        folder = tmp_path / name
        shutil.copytree(model_folder, folder)
        change(folder)
        with pytest.raises(CheckpointError) as caught:
            UnCLIP.from_pretrained(folder)
        return str(caught.value)

    def truncate(folder):
        path = folder / "decoder" / "model.safetensors"
        path.write_bytes(path.read_bytes()[:-100])

    def rename(folder):
        path = folder / "prior" / "config.json"
        path.write_text(path.read_text().replace('"embed"', '"embedding"'))

    def swap(folder):
        shutil.copy(folder / "decoder" / "config.json", folder / "prior" / "config.json")

    def escape(folder):
        index = json.loads((folder / "unclip.json").read_text())
        (folder / "unclip.json").write_text(json.dumps(index | {"stages": ["../other"]}))

    assert "truncated" in damaged("truncated", truncate)
    assert "embedding" in damaged("renamed", rename)
    assert "kind 'decoder' in the stage 'prior'" in damaged("swapped", swap)
    assert "../other" in damaged("escaped", escape)
    missing = damaged("missing", lambda folder: (folder / "decoder" / "config.json").unlink())
    assert "decoder" in missing


def test_a_chunk_is_64_small_pictures_and_never_none():
    cpu, other = torch.device("cpu"), torch.device("meta")
    for device, sizes in ((cpu, [16, 1, 1]), (other, [64, 4, 1])):
        for side, size in zip((64, 256, 1024), sizes, strict=True):
            rows = chunks(65, (3, side, side), device)
            assert [x for part in rows for x in range(65)[part]] == list(range(65))
            assert {len(range(65)[part]) for part in rows[:-1]} == {size}


def test_models_are_equal_for_equal_seeds():
    a, b = tiny_pipeline(), tiny_pipeline()
    same(a.text_to_image(APPLE, size=16)[0], b.text_to_image(APPLE, size=16)[0], levels=0)
    assert np.asarray(a.text_to_image(APPLE, size=16)[0]).std() > 5


def test_weights_visit_a_device_and_stay_where_they_live():
    layer = torch.nn.Linear(2, 2)
    layer.register_buffer("constant", torch.ones(1))
    home = layer.weight.data_ptr()
    with pytest.raises(KeyboardInterrupt), resident([layer, None], torch.device("meta")):
        assert {x.device.type for x in layer.state_dict().values()} == {"meta"}
        raise KeyboardInterrupt
    assert layer.weight.data_ptr() == home and layer.constant.device.type == "cpu"


def test_offloading_has_one_stage_at_a_time_on_the_device(model_folder, pipe, monkeypatch):
    expected = pipe.text_to_image(APPLE, seed=4, size=32)[0]
    offloaded = UnCLIP.from_pretrained(model_folder, offload=True)
    names = {id(stage.network): stage.name for stage in offloaded.stages}
    names[id(offloaded.clip)] = "clip"
    visits, present = [], []

    @contextmanager
    def spy(modules, device):
        assert not present, "two at once"
        present.append(names[id(modules[0])])
        visits.append(present[0])
        yield
        present.clear()

    monkeypatch.setattr("unclip.reader.resident", spy)
    monkeypatch.setattr("unclip.stages.stage.resident", spy)
    images = offloaded.text_to_image(APPLE, seed=4, size=32)
    same(images[0], expected, levels=0)
    assert [name for name in visits if name != "clip"] == ["prior", "decoder", "upsampler_32"]
    assert visits[0] == "clip"


def test_pictures_come_one_by_one_and_are_those_of_the_list(pipe, monkeypatch):
    """All of a list went through a stage at once: 53 MB for each picture of 1024 pixels."""
    monkeypatch.setattr("unclip.stages.stage.CHUNK_PIXELS", 2 * 16**2)
    drawn = []
    draw = Stage.draw

    def spy(self, cond, config, generators, **more):
        drawn.append((self.name, len(generators)))
        return draw(self, cond, config, generators, **more)

    monkeypatch.setattr(Stage, "draw", spy)
    pictures = pipe.iterate([APPLE, SQUARES], n=3, seed=4, size=32, prior_candidates=1)
    assert not drawn
    first = next(pictures)
    assert drawn == [("prior", 2), ("decoder", 2), ("upsampler_32", 1)]
    rest = list(pictures)
    assert max(count for _, count in drawn) == 2 and len(rest) == 5
    for a, b in zip(
        [first, *rest], pipe.text_to_image([APPLE, SQUARES], n=3, seed=4, size=32), strict=True
    ):
        same(a, b)


def test_what_cannot_be_drawn_is_said_before_the_first_is_asked_for(pipe):
    with pytest.raises(ConfigError, match="size 5"):
        pipe.iterate(APPLE, size=5)
    with pytest.raises(ConfigError, match="no prompts"):
        pipe.iterate()


def test_candidates_of_several_groups_equal_those_of_one(pipe, monkeypatch):
    whole = pipe.text_to_image(APPLE, n=3, size=16, candidates=2)
    monkeypatch.setattr("unclip.stages.stage.CHUNK_PIXELS", 2 * 16**2)
    for a, b in zip(whole, pipe.text_to_image(APPLE, n=3, size=16, candidates=2), strict=True):
        same(a, b)


def test_pictures_may_be_paths_or_arrays(pipe, tmp_path, monkeypatch):
    """Each was a traceback."""
    picture().save(tmp_path / "cat.png")
    monkeypatch.setenv("HOME", str(tmp_path))
    expected = pipe.encode_image(picture())
    pixels = np.asarray(picture())
    for given in (tmp_path / "cat.png", str(tmp_path / "cat.png"), "~/cat.png", pixels):
        assert_close(pipe.encode_image(given), expected)
    assert pipe.encode_image(np.stack([pixels, pixels])).shape == (2, 16)
    assert pipe.encode_image([pixels[..., 0], "~/cat.png"]).shape == (2, 16)
    same(pipe.variations("~/cat.png", size=16)[0], pipe.variations(picture(), size=16)[0], levels=0)
    same(pipe.upscale("~/cat.png"), pipe.upscale(picture()), levels=0)
    with pytest.raises(DataError, match="nowhere"):
        pipe.variations("nowhere.png")


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (np.zeros((4, 4, 3)), "uint8"),
        (np.zeros((4, 4, 2), np.uint8), r"\(4, 4, 2\)"),
        (torch.zeros(3, 4, 4), "Tensor"),
        (None, "NoneType"),
        ([], "no pictures"),
        ([3], "int"),
    ],
)
def test_what_is_no_picture_is_said(pipe, given, message):
    with pytest.raises(ConfigError, match=message):
        pipe.encode_image(given)


def test_embeddings_may_be_numpys_or_lists(pipe):
    z = pipe.encode_text(APPLE)
    expected = pipe.image_from_embedding(z, size=16)[0]
    for given in (z.numpy(), z.numpy().astype(np.float64), z.tolist()):
        same(pipe.image_from_embedding(given, size=16)[0], expected, levels=0)
    for wrong in ("apple", np.array([["a"]]), np.zeros((1, 16), int), z.numpy()[0], None):
        with pytest.raises(ConfigError):
            pipe.image_from_embedding(wrong, size=16)


def test_no_seed_is_another_one_each_time_and_numbers_of_numpy_are_numbers(pipe):
    a, b = (pipe.text_to_image(APPLE, seed=None, size=16)[0] for _ in range(2))
    assert distance(a, b) > 0.005
    expected = pipe.text_to_image(APPLE, n=2, seed=3, size=16)
    made = pipe.text_to_image(APPLE, n=np.int64(2), seed=np.int64(3), size=16)
    same(made[1], expected[1], levels=0)
    assert len(pipe.text_to_image(APPLE, seed=2**63 - 1, size=16)) == 1
    for wrong in ({"seed": 1.5}, {"seed": "1"}, {"seed": 2**64}, {"n": 1.5}, {"n": "2"}):
        with pytest.raises(ConfigError, match=next(iter(wrong))):
            pipe.text_to_image(APPLE, size=16, **wrong)


@pytest.mark.parametrize("prompt", [3, [APPLE, 3], [APPLE.encode()], None])
def test_what_is_no_prompt_is_said(pipe, prompt):
    with pytest.raises(ConfigError, match="prompt"):
        pipe.text_to_image(prompt)


def test_half_a_character_in_a_prompt_is_replaced(pipe):
    """The tokenizer failed with UnicodeEncodeError."""
    assert pipe.text_to_image(f"{APPLE} \ud83d", size=16)[0].size == (16, 16)


def test_progress_may_be_a_function(pipe):
    seen = []
    pipe.text_to_image(APPLE, size=32, steps=3, progress=lambda *step: seen.append(step))
    assert seen[:2] == [("prior", 1, 2), ("prior", 2, 2)]
    assert seen[-2:] == [("upsampler_32", 1, 2), ("upsampler_32", 2, 2)]
    assert ("decoder", 3, 3) in seen


def test_eta_is_an_error_where_the_decoder_has_no_use_for_it(pipe):
    z = pipe.encode_text(APPLE)
    with pytest.raises(ConfigError, match=r"eta = 0.5.*decoder is sampled by dpm\+\+.*ddim"):
        pipe.image_from_embedding(z, size=16, sampler="dpm++", eta=0.5)
    other = {"prior": "dpm++"}
    assert pipe.text_to_image(APPLE, size=16, sampler=other, eta=0.5)
    with pytest.raises(ConfigError, match="ddpm"):
        pipe.variations(picture(), size=16, sampler="ddpm", eta=1.0)
    same(
        pipe.variations(picture(), size=16, sampler="ddpm")[0],
        pipe.image_from_embedding(pipe.encode_image(picture()), size=16, sampler="ddpm")[0],
        levels=0,
    )


def test_an_eta_of_the_stage_goes_with_its_own_sampler(pipe):
    stage = replace(pipe.decoder, sampling=pipe.decoder.sampling.model_copy(update={"eta": 0.7}))
    assert Options().sampling(stage).eta == 0.7
    assert Options(sampler="dpm++").sampling(stage).eta == 0


def test_options_that_would_change_nothing_are_refused(pipe):
    with pytest.raises(ConfigError, match="candidates = 2 has no effect"):
        pipe.upscale(picture((32, 32)), candidates=2)
    with pytest.raises(ConfigError, match="eta = 1 has no effect"):
        pipe.upscale(picture((32, 32)), eta=1)
    with pytest.raises(ConfigError, match="size = 16 has no effect"):
        pipe.text_to_embedding(APPLE, size=16)


OFF = {"prior": 1.0, "decoder": 1.0}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"guidance": OFF, "negative_prompt": SQUARES}, "negative_prompt = .*guidance is 1"),
        ({"guidance": 1.0, "interval": (0.2, 0.8)}, "interval = .*guidance is 1"),
        ({"prior": "text", "prior_candidates": 4}, "prior_candidates = 4 .*: decoder, upsampler"),
        ({"prior": "text", "guidance": {"prior": 3.0}}, "guidance for 'prior'"),
        ({"prior": "text", "steps": {"prior": 3}}, "steps for 'prior'.*here: decoder, upsampler"),
        ({"prior": "ar", "steps": {"prior": 5}}, "steps for 'prior'.*: ar_prior, decoder"),
        ({"prior": "ar", "sampler": {"prior": "ddim"}}, "sampler for 'prior'"),
        ({"guidance": {"ar_prior": 2.0}}, "guidance for 'ar_prior'.*: prior, decoder"),
        ({"size": 16, "tile": 8}, "tile = 8 .*: prior, decoder$"),
        ({"size": 32, "steps": {"upsampler_64": 5}}, "steps for 'upsampler_64'.*upsampler_32$"),
    ],
)
def test_what_no_stage_at_work_has_a_use_for_is_refused(options, message):
    """Each drew the same picture as without it."""
    pipe = tiny_pipeline()
    pipe.ar_prior = tiny_ar_prior(pipe.clip)
    with pytest.raises(ConfigError, match=message) as error:
        pipe.iterate(APPLE, **options)
    assert "has no effect" in str(error.value)


def test_calls_without_text_or_pictures_refuse_what_is_of_those(pipe):
    z = pipe.encode_image(picture())
    how = {"guidance": {"prior": 5.0}}
    for call in (
        partial(pipe.variations, picture(), **how),
        partial(pipe.image_from_embedding, z, steps={"prior": 3}),
        partial(pipe.image_from_embedding, z, prior_candidates=2),
        partial(pipe.text_to_embedding, APPLE, guidance={"decoder": 2.0}),
        partial(pipe.text_to_embedding, APPLE, prior="text", steps=3),
        partial(pipe.text_to_embedding, APPLE, negative_prompt=SQUARES),  # its guidance is 1
        partial(pipe.upscale, picture((40, 40)), steps={"upsampler_32": 3}),
    ):
        with pytest.raises(ConfigError, match="has no effect"):
            call()


def test_a_prior_beside_embeddings_is_asked_for_what_they_are_led_away_from(pipe):
    how = {"z_image": pipe.encode_image(picture()), "negative_prompt": SQUARES}
    for options in ({"steps": {"prior": 3}}, {"prior_candidates": 1}):
        pipe.iterate(**how, **options)
        with pytest.raises(ConfigError, match="has no effect"):
            pipe.iterate(**how, **options, guidance=1.0)


def test_options_that_a_stage_has_of_its_own_are_no_error(pipe):
    sampling = pipe.decoder.sampling.model_copy(update={"guidance": 1.0, "interval": (0.2, 0.8)})
    pipe.with_decoder_sampling(sampling).iterate(APPLE)


def test_options_for_several_calls_may_be_of_use_in_others_only(pipe):
    ready = Options(steps={"prior": 3, "decoder": 2}, elsewhere=("prior", "decoder"))
    pipe.text_to_embedding(APPLE, options=ready)
    pipe.image_from_embedding(pipe.encode_text(APPLE), size=16, options=ready)


def test_one_draw_makes_one_scheduler(pipe, monkeypatch):
    """Options were checked by making the schedulers of all stages, four times for one draw."""
    made = []
    make = sampling.make_scheduler
    monkeypatch.setattr(sampling, "make_scheduler", lambda *a: made.append(a[1:]) or make(*a))
    pipe.text_to_image(APPLE, size=16)
    assert len(made) == 2  # prior and decoder


@pytest.mark.parametrize("sampler", ["ddpm", "ddim", "dpm++", "unipc"])
def test_a_sampler_is_checked_by_the_rule_that_makes_it(pipe, sampler):
    diffusion = pipe.decoder.diffusion
    for steps in (0, 1, 2, 900, 1000, 1001):
        try:
            check_sampler(diffusion, sampler, steps)
        except ConfigError:
            with pytest.raises(ConfigError):
                make_scheduler(diffusion, sampler, steps)
        else:
            assert len(make_scheduler(diffusion, sampler, steps)[1]) == steps


def test_a_model_is_loaded_from_home(model_folder, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(model_folder.parent))
    assert UnCLIP.from_pretrained(f"~/{model_folder.name}").sizes == [16, 32, 64]


def test_models_that_name_settings_which_are_gone_still_load(model_folder, tmp_path):
    shutil.copytree(model_folder, tmp_path / "old")
    path = tmp_path / "old/decoder/config.json"
    config = json.loads(path.read_text())
    config["sampling"] |= {"text_guidance": None, "threshold": None, "interval": [0, 1]}
    path.write_text(json.dumps(config))
    assert UnCLIP.from_pretrained(tmp_path / "old").decoder.sampling.interval == (0, 1)
    config["sampling"]["threshold"] = 0.9
    path.write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match="threshold"):
        UnCLIP.from_pretrained(tmp_path / "old")


def test_what_is_no_number_is_an_error_and_no_black_picture():
    pipe = tiny_pipeline()
    for parameter in pipe.decoder.network.parameters():
        parameter.data.fill_(torch.nan)
    with pytest.raises(CheckpointError, match=r"decoder drew numbers that are not finite.*fp32"):
        pipe.text_to_image("a red apple", size=16)
