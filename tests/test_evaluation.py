"""Scores have known values on cases worked out by hand; the speed benchmark accounts for time."""

from __future__ import annotations

import importlib.util
import json
import math
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
from PIL import Image

from unclip.evaluation.scores import (
    agreement,
    coinciding,
    hit_rates,
    mean_scores,
    ranks,
    upscale_again,
)
from unclip.images import resize, to_pil, to_tensor
from unclip.text import markdown_table

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


def at_angles(*degrees: float) -> torch.Tensor:
    angles = torch.tensor(degrees) * math.pi / 180
    return torch.stack([angles.cos(), angles.sin()], dim=-1)


def test_rank_counts_the_candidates_that_score_higher():
    candidates, own = at_angles(0, 10, 30, 90), torch.tensor([0, 0, 1, 1])
    # 8° is nearer to 10° than to its own 0°; 89° lies behind 90° and 30°.
    found = ranks(at_angles(1, 8, 12, 89), candidates, own)
    torch.testing.assert_close(found, torch.tensor([0, 1, 0, 2]))


def test_rank_does_not_depend_on_the_length_of_embeddings():
    candidates, samples, own = at_angles(0, 10, 30), at_angles(8, 12), torch.tensor([0, 1])
    scaled = candidates * torch.tensor([[5.0], [0.1], [3.0]])
    torch.testing.assert_close(ranks(samples, scaled, own), ranks(samples, candidates, own))


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_embeddings_that_are_not_finite_are_refused(bad):
    samples = at_angles(0, 1).clone()
    samples[0, 0] = bad
    with pytest.raises(ValueError, match="finite"):
        ranks(samples, at_angles(0, 1), torch.tensor([0, 1]))


def test_hit_rates_are_shares_of_the_first_and_the_first_five():
    rates = hit_rates(torch.tensor([0, 4, 5, 0, 9, 9, 1, 2]))
    assert rates == {"top1": pytest.approx(2 / 8), "top5": pytest.approx(5 / 8)}


def test_twins_among_candidates_are_counted():
    assert coinciding(at_angles(0, 10, 30)) == 0
    assert coinciding(torch.cat([at_angles(0, 10, 30), 3 * at_angles(10)])) == 2


def test_agreement_with_true_embeddings():
    z_true = at_angles(0, 60, 120)
    scores = agreement(at_angles(20, 100, 120), z_true)  # the second is nearer to 120°
    assert scores["nearest"] == pytest.approx(2 / 3)
    expected = (math.cos(math.radians(20)) + math.cos(math.radians(40)) + 1) / 3
    assert scores["cosine"] == pytest.approx(expected, abs=1e-6)


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
    assert mean_scores([{"a": 1.0}, {"a": math.inf}]) == {"a": 1.0, "pictures": 1}  # of one colour
    assert markdown_table(["x", "long"], [["abc", "1"]]).split("\n") == [
        "| x   | long |",
        "|-----|------|",
        "| abc | 1    |",
    ]


@pytest.fixture
def script(monkeypatch):
    """Import a script of benchmarks/ the way `python` runs it."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))

    def load(name: str) -> ModuleType:
        spec = importlib.util.spec_from_file_location(f"bench_{name}", BENCHMARKS / f"{name}.py")
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        monkeypatch.setitem(sys.modules, spec.name, module)
        spec.loader.exec_module(module)
        return module

    return load


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
