"""The paper's experiments on a model that has learned nothing: what their figures must obey."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from conftest import stage, tiny_clip, tiny_pipeline
from test_edit import tiny_ar_prior
from test_evaluate import NAMES, write_pictures

from unclip.evaluation.priors import TITLES, compare_priors
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


def test_a_way_that_the_model_lacks_is_left_out_with_a_sentence(full, request_, tmp_path):
    full.ar_prior = None
    full.prior = tiny_pipeline().prior
    found = compare_priors(full, "tiny", replace(request_, held_out=None), Path(tmp_path))
    rows = [row[0] for row in found.tables[0][3]]
    assert TITLES["ar"] not in rows and TITLES["draft"] not in rows and TITLES["none"] in rows
    assert "no ar_prior" in found.notes[0] and "no draft" in found.notes[1]
    assert "seconds" in found.markdown or "s a caption" in found.markdown
