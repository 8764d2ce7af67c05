"""Real trainers on two processes that share weights, gradients, optimizer and averages (FSDP2)."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from processes import script, together
from test_tasks import tiny
from test_training_ar_prior import tiny as tiny_ar_prior
from test_training_launch import assert_same_lines, lines
from torch.testing import assert_close

from unclip.config import save_config
from unclip.errors import ConfigError
from unclip.files.checkpoints import newest_checkpoint
from unclip.files.tensors import TensorFile
from unclip.stages.stored import read_stage
from unclip.training import drafts, sharding
from unclip.training.ar_prior import train_ar_prior
from unclip.training.decoder import train_decoder
from unclip.training.prior import train_prior
from unclip.training.upsampler import train_upsampler

TRAINERS = {
    "decoder": train_decoder,
    "prior": train_prior,
    "ar_prior": train_ar_prior,
    "upsampler_64": train_upsampler,
}
# Previews between the steps, because averages change places with the weights there.
STEPS = ["train.steps=4", "train.save_every=2", "train.sample_every=2", "train.log_every=1"]
STEPS += [
    "train.decay=constant",
    "train.batch=4",
    "train.warmup=0",
    "train.precision=fp32",
    "sampling.steps=2",
]
MORE = {
    "decoder": [
        "model.layout={side: 8, width: 32}",
        "model.unet.checkpointing=true",
        "model.unet.attention=[true, true, true]",
        "data.train=emoji:val",
    ],
    "prior": ["model.draft={width: 32}", "data.train=emoji:val"],
    "upsampler_64": ["train.accumulate=2"],
}

FSDP2 = {sharding.ASKED: "true", sharding.VERSION: "2"}  # what the launcher says to fsdp2_8.yaml


def configured(stage: str, clip: Path, out: Path, *more: str) -> Any:
    if stage == "ar_prior":
        own = ("train.batch", "train.precision", "sampling.steps")  # it says these itself
        steps = [step for step in STEPS if not step.startswith(own)]
        return tiny_ar_prior(clip, *steps, "data.train=shapes:val", f"train.out={out}", *more)
    return tiny(stage, clip, *STEPS, *MORE[stage], f"train.out={out}", *more)


@pytest.fixture(autouse=True)
def few_captions(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(drafts, "DRAFT_COUNT", 256)
    monkeypatch.setattr(drafts, "QUANTIZER_COUNT", 128)


def trainer(stage: str, config: Path) -> None:
    drafts.DRAFT_COUNT, drafts.QUANTIZER_COUNT = 256, 128
    script(f"train/{stage.removesuffix('_64')}.py", str(config))


def alone(stage: str, clip: Path, out: Path, *more: str) -> None:
    run = configured(stage, clip, out, *more)
    torch.manual_seed(run.train.seed)  # as the scripts do
    TRAINERS[stage](run, Accelerator(cpu=True))


def spread(stage: str, clip: Path, out: Path, *more: str) -> None:
    config = out.with_suffix(".yaml")
    save_config(configured(stage, clip, out, *more), config)
    printed = together(trainer, stage, config, environment=FSDP2)
    assert "weights are shared out over 2 processes" in printed


@pytest.mark.parametrize("stage", TRAINERS)
def test_a_sharded_training_equals_one_process(
    stage: str, model_folder: Path, tmp_path: Path
) -> None:
    alone(stage, model_folder, tmp_path / "one")
    spread(stage, model_folder, tmp_path / "two")
    one, two = lines(tmp_path / "one"), lines(tmp_path / "two")
    assert [line["processes"] for line in two] == [2] * 4
    assert_same_lines(one, two)
    checkpoint = newest_checkpoint(tmp_path / "two", training=True)
    assert checkpoint is not None
    assert read_stage(checkpoint, stage).load().network is not None


def test_two_machines_hold_copies_and_share_within(tmp_path: Path) -> None:
    stage, out, clip = "upsampler_64", tmp_path / "four", tmp_path
    alone(stage, clip, tmp_path / "one", "train.steps=3")
    config = tmp_path / "four.yaml"
    save_config(configured(stage, clip, out, "train.steps=3", "train.accumulate=1"), config)
    environment = {**FSDP2, "LOCAL_WORLD_SIZE": "2"}
    printed = together(trainer, stage, config, processes=4, environment=environment)
    assert "weights are shared out over 2 processes of each of 2 machines" in printed
    assert_same_lines(lines(tmp_path / "one"), lines(out))


@pytest.mark.parametrize(
    ("world", "each", "grid"), [(8, 8, (1, 8)), (16, 8, (2, 8)), (4, 1, (1, 4)), (8, None, (1, 8))]
)
def test_weights_are_shared_within_a_machine(
    world: int, each: int | None, grid: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    if each is not None:
        monkeypatch.setenv("LOCAL_WORLD_SIZE", str(each))
    assert sharding.grid(world) == grid
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "3")
    with pytest.raises(ConfigError, match="start as many on every machine"):
        sharding.grid(world)


@pytest.mark.parametrize("stage", ["decoder", "prior"])
def test_shared_out_in_bf16_it_learns_nearly_the_same(
    stage: str, model_folder: Path, tmp_path: Path
) -> None:
    """Weights are put together in bf16, which rounds what adds up in float32 elsewhere too."""
    alone(stage, model_folder, tmp_path / "one", "train.steps=3")
    spread(stage, model_folder, tmp_path / "two", "train.steps=3", "train.precision=bf16")
    for a, b in zip(lines(tmp_path / "one"), lines(tmp_path / "two"), strict=True):
        assert b["precision"] == "bf16"
        assert_close(a["loss"], b["loss"], rtol=0.03, atol=0)
    checkpoint = newest_checkpoint(tmp_path / "two", training=True)
    assert checkpoint is not None
    for file in ("weights", "optimizer"):
        tensors = TensorFile(checkpoint / "training" / f"{file}.safetensors")
        assert {x.dtype for x in tensors.values()} == {torch.float32}


@pytest.mark.parametrize("first", ["sharded", "whole"])
def test_a_run_goes_on_with_and_without_sharding(
    first: str, model_folder: Path, tmp_path: Path
) -> None:
    stage = "upsampler_64"
    alone(stage, model_folder, tmp_path / "straight")
    begin, end = (spread, alone) if first == "sharded" else (alone, spread)
    begin(stage, model_folder, tmp_path / "run", "train.steps=2")
    end(stage, model_folder, tmp_path / "run")
    assert_same_lines(lines(tmp_path / "straight"), lines(tmp_path / "run"))


def test_the_older_kind_of_sharding_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    assert not sharding.asked()
    monkeypatch.setenv(sharding.ASKED, "true")
    monkeypatch.setenv(sharding.VERSION, "1")
    with pytest.raises(ConfigError, match="fsdp_version must be 2"):
        sharding.asked()
    monkeypatch.setenv(sharding.VERSION, "2")
    assert sharding.asked()


def test_a_critic_is_not_shared_out(
    model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is drawn needs the decoder whole, outside of the step."""
    monkeypatch.setenv(sharding.ASKED, "true")
    monkeypatch.setenv(sharding.VERSION, "2")
    run = tiny("decoder", model_folder, "adversary={share: 0.5}", f"train.out={tmp_path}")
    two = SimpleNamespace(num_processes=2)
    with pytest.raises(ConfigError, match=r"adversary can't be shared out; .*ddp_8"):
        train_decoder(run, two)  # type: ignore[arg-type]


def test_a_model_with_a_single_number_can_not_be_shared_out() -> None:
    model = torch.nn.Linear(2, 2)
    model.scale = torch.nn.Parameter(torch.tensor(1.0))  # CLIP's logit scale is one
    with pytest.raises(ConfigError, match=r"scale of this model .*ddp_8"):
        sharding.shard(Accelerator(cpu=True), model)
