"""Scores have known values on cases worked out by hand; the benchmarks run on a tiny model."""

from __future__ import annotations

import importlib.util
import json
import math
import sys
import zlib
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from conftest import tiny_clip
from PIL import Image

from unclip.data.emoji import Emoji
from unclip.evaluation.scores import (
    agreement,
    coinciding,
    cosine_to_others,
    hit_rates,
    markdown_table,
    mean_scores,
    sample_ranks,
    shift,
    upscale_again,
)
from unclip.images import resize, to_pil, to_tensor
from unclip.pipeline import UnCLIP

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


def at_angles(*degrees: float) -> torch.Tensor:
    angles = torch.tensor(degrees) * math.pi / 180
    return torch.stack([angles.cos(), angles.sin()], dim=-1)


def test_rank_counts_the_candidates_that_score_higher():
    candidates = at_angles(0, 10, 30, 90)
    samples = torch.stack([at_angles(1, 8), at_angles(12, 89)])  # two pictures, two samples each
    # 8° is nearer to 10° than to its own 0°; 89° lies behind 90° and 30°.
    torch.testing.assert_close(sample_ranks(samples, candidates), torch.tensor([[0, 1], [0, 2]]))


def test_rank_does_not_depend_on_the_length_of_embeddings():
    candidates, samples = at_angles(0, 10, 30), at_angles(8, 12)[:, None]
    scaled = candidates * torch.tensor([[5.0], [0.1], [3.0]])
    torch.testing.assert_close(sample_ranks(samples, scaled), sample_ranks(samples, candidates))


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_embeddings_that_are_not_finite_are_refused(bad):
    samples = at_angles(0, 1)[:, None].clone()
    samples[0, 0, 0] = bad
    with pytest.raises(ValueError, match="finite"):
        sample_ranks(samples, at_angles(0, 1))


def test_more_pictures_than_candidates_are_refused():
    with pytest.raises(ValueError, match="2 pictures, but only 1"):
        sample_ranks(at_angles(0, 1)[:, None], at_angles(0))


def test_hit_rates_average_over_pictures_and_samples():
    ranks = torch.tensor([[0, 4], [5, 0], [9, 9], [1, 2]])
    rates = hit_rates(ranks)
    assert rates["top1"] == pytest.approx(2 / 8)
    assert rates["top5"] == pytest.approx(5 / 8)
    # The pictures' means are 1, 1/2, 0, 1.
    deviation = math.sqrt((0.375**2 + 0.125**2 + 0.625**2 + 0.375**2) / 4)
    assert rates["top5_error"] == pytest.approx(deviation / 2)
    kept = hit_rates(ranks, torch.tensor([True, False, False, True]))
    assert (kept["top1"], kept["top5"], kept["pictures"]) == (0.25, 1.0, 2)


def test_twins_among_candidates_are_counted():
    assert coinciding(at_angles(0, 10, 30)) == 0
    assert coinciding(torch.cat([at_angles(0, 10, 30), 3 * at_angles(10)])) == 2


def test_agreement_with_true_embeddings():
    z_true = at_angles(0, 60, 120)
    scores = agreement(at_angles(20, 100), z_true)  # the second is nearer to 120°
    assert scores["nearest"] == 0.5
    expected = (math.cos(math.radians(20)) + math.cos(math.radians(40))) / 2
    assert scores["cosine"] == pytest.approx(expected, abs=1e-6)
    # Pairs are 60°, 60° and 120° apart.
    assert cosine_to_others(z_true) == pytest.approx((0.5 + 0.5 - 0.5) / 3, abs=1e-6)


def test_shift_moves_right_by_one_pixel():
    x = torch.arange(4.0).expand(1, 3, 2, 4)
    torch.testing.assert_close(shift(x)[0, 0, 0], torch.tensor([0.0, 0.0, 1.0, 2.0]))


@pytest.fixture
def real_picture() -> Image.Image:
    x = torch.rand(1, 3, 8, 8, generator=torch.Generator().manual_seed(0)) * 2 - 1
    return to_pil(resize(x, 32)[0])


def test_a_perfect_upsampler_has_no_error_and_all_the_detail(real_picture):
    scores = upscale_again(lambda small: real_picture, real_picture, 8).scores()
    assert scores["psnr"] == math.inf
    assert scores["gradient"] == 1.0
    assert scores["psnr_bicubic"] < 60
    assert scores["gradient_bicubic"] < 1


def test_an_upsampler_starts_from_the_same_small_picture_as_bicubic(real_picture):
    def bicubic(small: Image.Image) -> Image.Image:
        assert small.size == (8, 8)
        return to_pil(resize(to_tensor(small)[None], 32)[0])

    scores = upscale_again(bicubic, real_picture, 8).scores()
    assert scores["psnr"] == scores["psnr_bicubic"]
    assert scores["gradient"] == scores["gradient_bicubic"]


def test_too_bright_by_one_level_has_the_psnr_of_one_level():
    grey = Image.new("RGB", (16, 16), (100, 100, 100))
    grey.putpixel((3, 3), (200, 0, 0))  # a flat picture has no gradient to compare with
    brighter = grey.point(lambda level: level + 1)
    scores = upscale_again(lambda small: brighter, grey, 8).scores()
    assert scores["psnr"] == pytest.approx(20 * math.log10(255), abs=1e-3)
    assert scores["gradient"] == pytest.approx(1.0, abs=1e-5)


def test_mean_scores_and_table():
    assert mean_scores([{"a": 1.0}, {"a": 3.0}]) == {"a": 2.0, "pictures": 2}
    assert markdown_table(["x", "long"], [["abc", "1"]]).split("\n") == [
        "| x   | long |",
        "|-----|------|",
        "| abc | 1    |",
    ]


def test_88_held_out_pictures_have_no_fluent_sibling():
    held = Emoji(64, "val")
    flags = [held.has_fluent_sibling(i) for i in range(len(held))]
    assert (len(flags), flags.count(False), flags.count(True)) == (155, 88, 67)


# The benchmarks, end to end, on a model that has learned nothing.


@pytest.fixture(scope="module")
def judge(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A CLIP that took no part in the tiny model."""
    folder = tmp_path_factory.mktemp("judge")
    tiny_clip(7).save(folder)
    return folder


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where rasters are kept."""
    return tmp_path_factory.mktemp("cache")


def scribble(data: bytes, resolution: int) -> np.ndarray:
    """Some picture for each drawing, without the time to draw it."""
    coarse = np.random.default_rng(zlib.crc32(data)).integers(0, 256, (4, 4, 3), np.uint8)
    return np.asarray(Image.fromarray(coarse).resize((resolution, resolution)))


@pytest.fixture
def script(monkeypatch, cache):
    """Import a script of benchmarks/ the way `python` runs it; held-out pictures are scribbles."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    monkeypatch.setenv("UNCLIP_CACHE", str(cache))
    monkeypatch.setattr("unclip.data.emoji.rasterise", scribble)
    monkeypatch.setattr("unclip.data.emoji._map", map)  # processes take longer to start

    def load(name: str) -> ModuleType:
        spec = importlib.util.spec_from_file_location(f"bench_{name}", BENCHMARKS / f"{name}.py")
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        monkeypatch.setitem(sys.modules, spec.name, module)
        spec.loader.exec_module(module)
        return module

    return load


def test_emoji_benchmark_measures_every_stage(
    script, model_folder, judge, tmp_path, monkeypatch, capsys
):
    bench, out = script("emoji"), tmp_path / "results" / "emoji.json"
    arguments = ["--model", model_folder, "--judge", judge, "--samples", "2"]
    arguments += ["--limit", "3", "--out", out, "--work", tmp_path / "work"]
    bench.main(list(map(str, arguments)))
    results = json.loads(out.read_text())
    for who in ("own", "judge"):
        scores = results["retrieval"]["by"][who]["groups"]
        assert scores["all"]["made"]["pictures"] == scores["all"]["real"]["pictures"] == 3
        alone = results["decoder"]["by"][who]
        assert set(alone) > {"embedding", "embedding and text", "a random other picture"}
    assert list(results["upsamplers"]["spans"]) == ["16 → 32", "32 → 64", "16 → 64"]
    pictures = {path.name for path in out.parent.glob("*.png")}
    assert pictures >= {"text_decoder.png", "text_full_size.png", "decoder.png"}
    printed = capsys.readouterr().out
    assert "Text to image" in printed and "Upsamplers alone" in printed

    # What was made before is not made again, and the figures stay.
    monkeypatch.setattr(UnCLIP, "text_to_image", None)
    monkeypatch.setattr(UnCLIP, "upscale", None)
    bench.main([*map(str, arguments), "--only", "retrieval"])
    bench.main([*map(str, arguments), "--only", "upsamplers"])
    again = json.loads(out.read_text())
    assert again["retrieval"]["by"] == results["retrieval"]["by"]
    assert again["upsamplers"]["spans"] == results["upsamplers"]["spans"]


def test_emoji_benchmark_pictures_do_not_depend_on_how_the_work_is_divided(
    script, model_folder, tmp_path, monkeypatch
):
    bench = script("emoji")
    files = {}
    for chunk in (2, 64):
        monkeypatch.setattr(bench, "CHUNK", chunk)
        work = tmp_path / str(chunk)
        arguments = ["--model", model_folder, "--only", "retrieval", "--samples", "2"]
        arguments += ["--limit", "3", "--out", work / "x.json", "--work", work / "progress"]
        bench.main(list(map(str, arguments)))
        pictures = sorted((work / "progress").glob("retrieval-*/*.png"))
        files[chunk] = torch.stack([to_tensor(Image.open(path)) for path in pictures])
    assert len(files[2]) == 6
    # A level of 8 bits may round the other way.
    torch.testing.assert_close(files[2], files[64], atol=1.01 / 127.5, rtol=0)
    assert (files[2][0] - files[2][1]).abs().max() > 0.05  # two seeds, two pictures


def test_the_stacks_own_clip_is_refused_as_judge(script, model_folder, tmp_path, capsys):
    arguments = ["--model", model_folder, "--judge", model_folder, "--out", tmp_path / "x"]
    with pytest.raises(SystemExit) as stopped:
        script("emoji").main(list(map(str, arguments)))
    assert stopped.value.code == 2
    assert "samples with" in capsys.readouterr().err


def test_speed_benchmark_accounts_for_all_the_time(
    script, model_folder, tmp_path, monkeypatch, capsys
):
    bench, out = script("speed"), tmp_path / "speed.json"
    peak = bench.machine_peak
    monkeypatch.setattr(bench, "machine_peak", lambda: peak(0.01))
    bench.main(["--model", str(model_folder), "--out", str(out), "--repeat", "1"])
    data = json.loads(out.read_text())
    stages = data["stages"]
    names = ["clip text", "prior", "decoder", "upsampler_32", "upsampler_64", "PNG write", "rest"]
    assert list(stages) == names
    assert sum(cost["seconds"] for cost in stages.values()) == pytest.approx(data["median_seconds"])
    assert all(stages[name]["flops"] > 0 for name in names[:5])
    assert data["machine_gflops"] > 0.1
    assert data["peak_bytes"] >= max(cost["peak"] for cost in stages.values()) > 0
    assert "upsampler_64" in capsys.readouterr().out


def test_speed_benchmark_counts_attention(script):
    watch = script("speed").Watch()
    watch.counting = True
    x = torch.randn(1, 2, 8, 4)
    with torch.no_grad(), watch.stage("attention"):
        torch.nn.functional.scaled_dot_product_attention(x, x, x)
    assert watch.costs["attention"].flops == 2 * (2 * 2 * 8 * 8 * 4)  # two products, 2 heads
