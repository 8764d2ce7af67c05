"""Stages: the table of kinds, what a stage says of itself, one rule for embedding statistics."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import tiny_pipeline

from unclip.config import read_yaml
from unclip.errors import CheckpointError
from unclip.files.folder import ORDER, stage_kind
from unclip.pipeline import UnCLIP
from unclip.sources import Source
from unclip.stages.kinds import KINDS, build, kind_of, kind_of_keys
from unclip.stages.upsampler import route
from unclip.training.trainers import TRAINERS

TRAINED = [
    path
    for path in sorted(Path("configs").glob("*/*.yaml"))
    if path.stem.split("_")[0] in KINDS and "model" in read_yaml(path)
]


def test_the_table_of_kinds_is_in_the_order_of_the_stack_and_names_a_training_for_each() -> None:
    assert [kind for kind in ORDER if kind in KINDS] == list(KINDS)
    assert KINDS.keys() <= TRAINERS.keys()


@pytest.mark.parametrize("path", TRAINED, ids=str)
def test_a_configuration_shows_by_its_keys_what_it_trains(path: Path) -> None:
    kind = kind_of_keys(read_yaml(path)["model"])
    assert kind is not None and kind.name == path.stem.split("_")[0]


def test_a_misspelt_key_does_not_hide_the_kind_and_other_mappings_have_none() -> None:
    keys = {"resolutoin", "embed", "context_width", "learned_variance", "scale", "unet"}
    assert kind_of_keys(keys) is KINDS["decoder"]
    assert kind_of_keys({"embed_dim", "vision_cfg", "text_cfg"}) is None


def test_a_stage_knows_its_kind_and_sizes_whatever_it_is_called() -> None:
    pipe = tiny_pipeline()
    assert [stage.kind for stage in pipe.stages] == ["prior", "decoder", *["upsampler"] * 2]
    assert [stage.shape for stage in pipe.stages] == [
        (16,), (3, 16, 16), (3, 32, 32), (3, 64, 64)
    ]  # fmt: skip
    assert [stage.low for stage in pipe.upsamplers] == [16, 32]
    assert stage_kind("upsampler_1024") == "upsampler"
    for stage in pipe.stages:
        assert type(build(stage.config)) is type(stage.network) is kind_of(stage.config).network


def test_routes_lead_through_stages_that_fit_together() -> None:
    small, large = tiny_pipeline().upsamplers
    assert route([small, large], 16, 64) == [small, large]
    assert route([small, large], 32, 64) == [large]
    assert route([small, large], 64, 64) == []
    assert route([large], 16, 64) is None


def test_a_stage_saved_over_another_keeps_nothing_of_it(tmp_path: Path) -> None:
    """Its network for the last step stayed in the folder, and was used."""
    upsampler, other = tiny_pipeline().upsamplers[0], tiny_pipeline().upsamplers[0].network
    with torch.no_grad():
        next(other.parameters()).add_(1)
    replace(upsampler, last=other).save(tmp_path)
    assert Source(tmp_path).stage(upsampler.name).load().last is not None
    upsampler.save(tmp_path)
    assert Source(tmp_path).stage(upsampler.name).load().last is None


@pytest.mark.parametrize("power", [[0.5], {"one": 0.5}, {"1": None}, {"1": [0.5]}])
def test_statistics_that_are_no_numbers_by_timestep_are_refused(tmp_path: Path, power: Any) -> None:
    tiny_pipeline().save_pretrained(tmp_path)
    file = tmp_path / "prior" / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "power": power}))
    with pytest.raises(CheckpointError, match=r"prior/config\.json can't be used: power must be"):
        UnCLIP.from_pretrained(tmp_path)
