"""`make learn`: its table, its scores, and that the stages of configs/shapes fit together."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from train import learn
from unclip.config import load_config
from unclip.data.shapes import render
from unclip.images import to_pil
from unclip.training.clip import ClipRun
from unclip.training.decoder import DecoderRun
from unclip.training.prior import PriorRun
from unclip.training.upsampler import UpsamplerRun, UpsamplerTask

CONFIGS = Path(__file__).parents[1] / "configs" / "shapes"


@pytest.mark.parametrize("objects", [1, 2])
def test_true_pictures_score_one_hundred(objects: int) -> None:
    scenes = learn.held_out(20, objects)
    assert len(scenes) == 20 and all(len(scene.objects) == objects for scene in scenes)
    assert all(scene.held_out for scene in scenes)
    row = learn.score_pictures([to_pil(render(scene, 32)) for scene in scenes], scenes)
    names = [name for name in learn.FIGURES if objects == 2 or name != "binding"]
    assert row == dict.fromkeys(names, 100.0)


def test_pictures_of_other_captions_score_low() -> None:
    scenes = learn.held_out(24, 2)
    others = scenes[1:] + scenes[:1]
    row = learn.score_pictures([to_pil(render(scene, 32)) for scene in others], scenes)
    assert row["colour"] < 60 and row["binding"] < 20


def test_shapes_configurations_fit_together() -> None:
    clip = load_config(CONFIGS / "clip.yaml", [], ClipRun)
    prior = load_config(CONFIGS / "prior.yaml", [], PriorRun)
    decoder = load_config(CONFIGS / "decoder.yaml", [], DecoderRun)
    first = load_config(CONFIGS / "upsampler_64.yaml", [], UpsamplerRun)
    second = load_config(CONFIGS / "upsampler_128.yaml", [], UpsamplerRun)
    assert clip.model.embed_dim == prior.model.embed == decoder.model.embed
    assert clip.model.text_cfg.width == prior.model.text_width == decoder.model.text_width
    assert clip.model.text_cfg.context_length <= prior.model.context
    assert decoder.model.resolution == first.model.low
    assert first.model.high == second.model.low
    for run in (clip, prior, decoder, first, second):
        assert run.data.train == "shapes" and run.data.val == "shapes:val"
    for run in (prior, decoder):
        assert run.clip == clip.train.out


def test_every_step_runs_a_shipped_script_and_configuration() -> None:
    root = CONFIGS.parents[1]
    for step in learn.STEPS:
        script, config, *overrides = step.command(Path("out"))
        assert (root / script).is_file() and (root / config).is_file()
        assert overrides[0] == f"train.out=out/{step.name}"
    others = {"ar_prior.yaml", "decoder_inpaint.yaml", "decoder_text.yaml"}  # in the place of one
    shipped = {path.name for path in CONFIGS.iterdir()}
    assert {step.config.name for step in learn.STEPS} == shipped - others


def test_the_table_shows_every_figure() -> None:
    row = {name: 50.0 + k for k, name in enumerate(learn.FIGURES) if name != "binding"}
    results = {
        "pictures": {"one object, 32 px": row},
        "upsamplers": {
            "upsampler_64": {"bicubic": 20.0, "upsampler": 25.5, "gradient energy": 0.9}
        },
        "seconds": {"clip": 90.0, "scoring": 30.0},
    }
    text = learn.table(results)
    assert "50.0" in text and "–" in text and "25.50" in text and "in all 2.0 minutes" in text


def test_results_survive_an_interruption(tmp_path: Path) -> None:
    learn.write(tmp_path, seconds={"clip": 1.0})
    learn.write(tmp_path, pictures={})
    saved = json.loads((tmp_path / "results.json").read_text())
    assert saved == {"seconds": {"clip": 1.0}, "pictures": {}}


def test_restoring_needs_no_training_to_equal_bicubic(tmp_path: Path) -> None:
    run = load_config(CONFIGS / "upsampler_64.yaml", [], UpsamplerRun)
    figures = learn.restore(UpsamplerTask(run).stage, tmp_path, count=4)
    assert figures["upsampler"] == pytest.approx(figures["bicubic"], abs=0.01)
    assert (tmp_path / "upsampler_64.png").is_file()
