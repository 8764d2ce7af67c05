"""Training the autoregressive prior: what it learns from, and that its runs are like others'."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState

from unclip.clip.encoder import FrozenCLIP
from unclip.conditioning import Cond
from unclip.config import load_config
from unclip.data.open import open_dataset
from unclip.data.order import batches
from unclip.errors import CheckpointError, ConfigError
from unclip.files.checkpoints import newest_checkpoint
from unclip.interop.convert import convert
from unclip.sources import Source
from unclip.stages.ar_prior import ArStage
from unclip.training.ar_prior import ArPriorRun, ArPriorTask, train_ar_prior
from unclip.training.drafts import fit_quantizer
from unclip.training.plan import plan

ROOT = Path(__file__).parents[1]
SHAPES = ROOT / "configs" / "shapes" / "ar_prior.yaml"
TINY = [
    *("model.embed=16", "model.text_width=16", "model.context=12", "model.components=6"),
    *("model.buckets=8", "model.dot_buckets=4", "model.transformer.layers=1"),
    *("model.transformer.width=24", "train.batch=4", "train.precision=fp32"),
]

DEEPER = [key.replace("layers=1", "layers=2") for key in TINY]


def tiny(clip: Path, *more: str) -> ArPriorRun:
    return load_config(SHAPES, [*TINY, f"clip={clip}", *more], ArPriorRun)


@pytest.fixture
def few(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("unclip.training.drafts.QUANTIZER_COUNT", 128)


def test_the_loss_is_the_cross_entropy_of_its_pictures_buckets(
    model_folder: Path, few: None
) -> None:
    run = tiny(model_folder, "drop.text=0")
    clip = FrozenCLIP.load(run.clip)
    task = ArPriorTask(run, clip)
    data = open_dataset("shapes:val", 32)
    quantizer = task.stage.network.quantizer
    fit_quantizer(quantizer, clip, data, 0)
    batch = next(batches(data, batch=4, seed=0))
    z_image, text = clip.encode_image(batch.images), clip.encode_text(batch.captions)

    def knowing(numbers: torch.Tensor, dot: torch.Tensor, cond: Cond) -> torch.Tensor:
        assert torch.equal(numbers, quantizer.quantize(z_image))
        assert torch.equal(dot, quantizer.dot(z_image, text.embed))
        return 30.0 * torch.nn.functional.one_hot(numbers, 8).float()

    losses = task.loss(knowing, batch, 0)
    torch.testing.assert_close(losses["loss"], torch.zeros(4), rtol=0, atol=1e-5)
    assert losses["right"].tolist() == [1, 1, 1, 1]
    fresh = task.loss(task.model, batch, 0)["loss"]  # every bucket is as likely as another
    torch.testing.assert_close(fresh, torch.full((4,), math.log(8)))


def run_to(steps: int, folder: Path, out: Path) -> Path:
    AcceleratorState._reset_state(reset_partial_state=True)
    torch.manual_seed(0)
    settings = [f"train.out={out}", f"train.steps={steps}", "train.save_every=2"]
    run = tiny(folder, *settings, "train.sample_every=4", "data.val=shapes:val")
    train_ar_prior(run, Accelerator(cpu=True))
    newest = newest_checkpoint(out, training=True)
    assert newest is not None
    return newest


def test_a_run_learns_resumes_exactly_and_loads_as_a_stage(
    model_folder: Path, tmp_path: Path, few: None
) -> None:
    whole = run_to(4, model_folder, tmp_path / "whole")
    run_to(2, model_folder, tmp_path / "parts")
    parts = run_to(4, model_folder, tmp_path / "parts")
    for name in ("ar_prior/model.safetensors", "training/optimizer.safetensors"):
        assert (whole / name).read_bytes() == (parts / name).read_bytes()
    assert (tmp_path / "whole" / "samples" / "step-4.png").is_file()
    told = [json.loads(x) for x in (tmp_path / "whole" / "val.jsonl").read_text().splitlines()]
    assert [x["step"] for x in told] == [0, 4] and told[1]["loss"] < told[0]["loss"]
    assert set(told[0]) == {"step", "images", "loss", "right"}
    stored = Source(tmp_path / "whole").stage("ar_prior")
    stage = stored.load(dtype=torch.bfloat16)
    assert isinstance(stage, ArStage) and stage.kind == "ar_prior"
    assert stage.network.quantizer.axes.dtype == torch.float32
    clip = FrozenCLIP.load(str(model_folder))
    generators = [torch.Generator().manual_seed(k) for k in range(2)]
    cond = Cond(text=clip.encode_text(["a red square", "a blue circle"]))
    z = stage.draw(cond, stage.sampling, generators, null_text=clip.null_text)
    torch.testing.assert_close(stage.embeddings(z).norm(dim=1), torch.ones(2))


def test_karlos_layout_has_no_place_for_it(model_folder: Path, tmp_path: Path, few: None) -> None:
    newest = run_to(2, model_folder, tmp_path / "run")
    with pytest.raises(ConfigError, match="ar_prior"):
        convert(newest, tmp_path / "karlo", None)


def test_what_it_needs_is_planned(model_folder: Path) -> None:
    small = plan(SHAPES, [*TINY, f"clip={model_folder}"], gpus=1)
    network = ArPriorTask(tiny(model_folder), FrozenCLIP.load(str(model_folder))).model
    assert small.parameters == sum(x.numel() for x in network.state_dict().values())
    twice = plan(SHAPES, [*DEEPER, f"clip={model_folder}"], gpus=1)
    assert twice.flops > 1.5 * small.flops and twice.activations > small.activations


def test_more_components_than_dimensions_are_refused(model_folder: Path) -> None:
    with pytest.raises(ConfigError, match="components = 129 of an embedding of 128"):
        load_config(SHAPES, ["model.components=129"], ArPriorRun)


def test_another_stages_weights_are_refused(model_folder: Path) -> None:
    task = ArPriorTask(tiny(model_folder), FrozenCLIP.load(str(model_folder)))
    with pytest.raises(CheckpointError, match="ar_prior"):
        task.start_from(str(model_folder))
