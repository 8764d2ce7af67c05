"""The paper's experiments on a model that has learned nothing: what their figures must obey."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import stage, tiny_clip, tiny_pipeline
from PIL import Image
from test_edit import tiny_ar_prior
from test_evaluate import NAMES, write_pictures

from unclip.cli import main
from unclip.data.shapes import PALETTE, Object, Scene
from unclip.errors import ConfigError
from unclip.evaluation.experiments import EXPERIMENTS
from unclip.evaluation.guidance import ALONE, EMBEDDED, compare_guidance
from unclip.evaluation.priors import TITLES, compare_priors
from unclip.evaluation.probes import principal, swapped, with_word
from unclip.evaluation.reranking import curve_at
from unclip.evaluation.samplers import compare_samplers
from unclip.evaluation.setting import Request
from unclip.models.layers import DraftConfig
from unclip.models.prior import DiffusionPrior
from unclip.pipeline import UnCLIP

pytestmark = pytest.mark.filterwarnings("ignore::unclip.errors.UnclipWarning")


@pytest.fixture
def full(monkeypatch, tmp_path) -> UnCLIP:
    """A tiny model with every way from text to an embedding."""
    monkeypatch.setenv("UNCLIP_CACHE", str(tmp_path / "cache"))
    pipe = tiny_pipeline()
    assert pipe.prior is not None and pipe.clip is not None
    config = pipe.prior.config.model_copy(update={"draft": DraftConfig(width=16, blocks=1)})
    pipe.prior = replace(stage("prior", DiffusionPrior(config), pipe.clip, target="x0", clip=None))
    pipe.ar_prior = tiny_ar_prior(pipe.clip)
    return pipe


@pytest.fixture
def request_(tmp_path) -> Request:
    """Six held-out captions in two seeds, measured by a CLIP from elsewhere."""
    outsider = tmp_path / "outsider"
    tiny_clip(7).save(outsider)
    return Request(
        data=str(write_pictures(tmp_path / "train")),
        held_out=str(write_pictures(tmp_path / "held", NAMES[:2], seed=1)),
        captions="a {name} in {style}",
        judge=str(outsider),
        features=(str(outsider),),
        limit=6,
        seeds=2,
    )


def test_every_way_to_an_embedding_is_compared(full, request_, tmp_path):
    found = compare_priors(full, "tiny", request_, tmp_path)
    ((title, about, _, rows),) = found.tables
    assert [row[0] for row in rows] == list(TITLES.values()) and not found.notes
    by = found.scores[request_.judge]
    assert by[TITLES["true"]]["cosine"] == pytest.approx(1)
    drawn = {"diffusion", "ar", "draft", "text"}
    assert {way for way in TITLES if "seconds" in by[TITLES[way]]} == drawn
    assert {way for way in TITLES if "variety" in by[TITLES[way]]} == {*drawn, "true", "none"}
    assert all(0 <= line["recall"] <= 1 and line["top5"] <= 1 for line in by.values())
    assert found.figure is not None and "captions, 2 seeds" in title and "6 names" in about


def test_few_pictures_are_half_measured_and_half_what_they_are_measured_against(
    full, request_, tmp_path
):
    few = replace(request_, held_out=None, limit=96)
    by = compare_priors(full, "tiny", few, tmp_path).scores[request_.judge]
    assert all(math.isfinite(line["frechet"]) for line in by.values())
    assert compare_guidance(full, "tiny", few, tmp_path).tables


def test_a_way_that_the_model_lacks_is_left_out_with_a_sentence(full, request_, tmp_path):
    full.ar_prior = None
    full.prior = tiny_pipeline().prior
    found = compare_priors(full, "tiny", replace(request_, held_out=None), Path(tmp_path))
    rows = [row[0] for row in found.tables[0][3]]
    assert TITLES["ar"] not in rows and TITLES["draft"] not in rows and TITLES["none"] in rows
    assert "no ar_prior" in found.notes[0] and "no draft" in found.notes[1]
    assert "seconds" in found.markdown or "s a caption" in found.markdown


def test_ways_to_guide_are_compared_on_the_same_noise(full, request_, tmp_path):
    found = compare_guidance(full, "tiny", request_, tmp_path)
    by = found.scores[request_.judge]
    assert set(by) == {*EMBEDDED, *ALONE, TITLES["real"]}
    assert [row[0] for row in found.tables[0][3]] == list(by)
    assert by["8"] != by["1 (off)"] != by["caption alone, 1"]
    assert found.figure is not None


def test_samplers_are_compared_by_steps_and_one_without_statistics_left_out(
    request_, tmp_path, monkeypatch, full
):
    monkeypatch.setattr("unclip.evaluation.samplers.STEPS", (2, 3))
    found = compare_samplers(full, "tiny", request_, tmp_path)
    assert [line[0] for line in found.tables[0][3]] == ["ddpm", "ddim", "dpm++", "unipc"]
    assert "analytic" in found.notes[0] and "unclip measure" in found.notes[0]
    full.prior.diffusion.power.update({0: 0.1, 999: 1.0})
    found = compare_samplers(full, "tiny", request_, tmp_path)
    assert set(found.scores["analytic"]) == {2, 3} and not found.notes
    assert all(path.is_file() for path in found.write(tmp_path / "out", "samplers"))


def test_the_best_of_more_candidates_is_never_worse_by_the_score_that_ranks():
    own, judge = torch.rand(2, 5, 8, generator=torch.Generator().manual_seed(0))
    rows = [curve_at(own, judge, judge > 0.5, n) for n in (1, 2, 4, 8)]
    assert rows[0]["own"] == pytest.approx(float(own.mean()))
    assert rows[-1]["own"] == pytest.approx(float(own.amax(1).mean()))
    for key in ("own", "best"):
        assert [row[key] for row in rows] == sorted(row[key] for row in rows)
    same = curve_at(judge, judge, judge > 0.5, 4)
    assert same["judge"] == same["best"] == same["own"]
    assert curve_at(own, judge, judge > 0.5, 3)["own"] <= rows[-1]["own"]  # two parts of three


def test_reranking_needs_a_judge_and_something_to_choose_from(full, request_, tmp_path):
    with pytest.raises(ConfigError, match="--judge"):
        EXPERIMENTS["reranking"](full, "tiny", replace(request_, judge=None), tmp_path)
    with pytest.raises(ConfigError, match="1 candidates"):
        EXPERIMENTS["reranking"](full, "tiny", replace(request_, seeds=1), tmp_path)
    found = EXPERIMENTS["reranking"](full, "tiny", request_, tmp_path)
    assert list(found.scores) == ["any", "best of 2"]
    assert found.scores["best of 2"]["own"] >= found.scores["any"]["own"]


def test_all_principal_components_are_the_whole_embedding():
    z = torch.randn(40, 6, generator=torch.Generator().manual_seed(0)) * torch.arange(1.0, 7)
    mean = z.mean(0)
    axes = torch.linalg.svd(z - mean, full_matrices=False)[2]
    torch.testing.assert_close(principal(z, 6, mean, axes), z)
    errors = [float((principal(z, k, mean, axes) - z).square().sum()) for k in range(7)]
    assert errors == sorted(errors, reverse=True)
    torch.testing.assert_close(principal(z, 0, mean, axes), mean.expand_as(z))


def test_swapped_scenes_have_the_same_words_in_other_places():
    a = Object("red", "circle", "on the left", "small")
    b = Object("blue", "square", "on the right", "large")
    other = swapped(Scene((a, b)))
    assert other.caption == ("a small blue circle on the left and a large red square on the right")
    assert swapped(other).caption == Scene((a, b)).caption and {"red", "blue"} <= set(PALETTE)


def test_binding_is_read_from_the_pixels_of_shapes_only(full, request_, tmp_path):
    with pytest.raises(ConfigError, match="--data shapes"):
        EXPERIMENTS["binding"](full, "tiny", request_, tmp_path)
    shapes = replace(request_, data="shapes", held_out=None)
    found = EXPERIMENTS["binding"](full, "tiny", shapes, tmp_path)
    rows = [line[0] for line in found.tables[0][3]]
    assert rows[0] == "the scenes themselves" and len(rows) == 5
    assert 0 <= found.scores["told apart"] <= 1
    assert found.scores["the scenes themselves"]["swapped"] <= 0.5


def test_a_word_is_written_where_it_can_be_read():
    plain = Image.new("RGB", (64, 64), "green")
    changed = np.asarray(with_word(plain, "whale")) != np.asarray(plain)
    rows = np.flatnonzero(changed.any((1, 2)))
    assert 15 < rows[0] < 32 < rows[-1] < 50 and not np.array_equal(
        np.asarray(with_word(plain, "whale")), np.asarray(with_word(plain, "horse"))
    )


@pytest.mark.parametrize("name", ["pca", "typography"])
def test_probes_of_the_space_draw_a_figure(full, request_, tmp_path, name):
    found = EXPERIMENTS[name](full, "tiny", request_, tmp_path)
    assert found.figure is not None and all(
        0 <= x <= 1.001 for r in found.scores.values() for x in r.values()
    )


def test_linear_probes_need_labels(full, request_, tmp_path, monkeypatch):
    with pytest.raises(ConfigError, match="--data emoji or shapes"):
        EXPERIMENTS["linear"](full, "tiny", request_, tmp_path)
    monkeypatch.setattr("unclip.evaluation.probes.LEARNED", 64)
    shapes = replace(request_, data="shapes", held_out=None)
    found = EXPERIMENTS["linear"](full, "tiny", shapes, tmp_path)
    assert set(found.scores) == {"colour", "shape", "position", "size"}


def test_the_verb_writes_what_an_experiment_found(full, request_, tmp_path, capsys):
    full.save_pretrained(tmp_path / "model")
    given = ["experiment", "pca", tmp_path / "model", "--data", request_.data, "--device", "cpu"]
    with pytest.raises(SystemExit) as exit:
        main([str(x) for x in (*given, "--limit", 4, "--out", tmp_path / "out")])
    assert not exit.value.code and "Principal components" in capsys.readouterr().out
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert names == {"pca.json", "pca.md", "pca.png"}
