"""Everything that trains and samples, on a device that may not be mixed with the CPU."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, PartialState
from processes import together
from test_tasks import ROOT, tiny
from torch.testing import assert_close

from unclip.config import load_config
from unclip.pipeline import UnCLIP
from unclip.training import drafts, fit
from unclip.training.clip import ClipRun, train_clip
from unclip.training.decoder import train_decoder
from unclip.training.prior import train_prior
from unclip.training.upsampler import train_upsampler

STEPS = ["train.steps=2", "train.save_every=2", "train.sample_every=2", "train.log_every=1"]
TRAIN: dict[str, Callable[..., Any]] = {
    "decoder": train_decoder,
    "prior": train_prior,
    "blur": train_upsampler,
    "bsr": train_upsampler,
    "clip": train_clip,
}


def configured(what: str, clip: str, out: Path, precision: str) -> Any:
    common = [*STEPS, f"train.out={out}", f"train.precision={precision}", "data.train=shapes:val"]
    if what == "clip":
        small = ["train.batch=8", "model.vision_cfg.layers=1", "model.text_cfg.layers=1"]
        small += ["augment.shift=0.1", "augment.unknown_words=0.1", "data.val=null"]
        return load_config(ROOT / "configs/shapes/clip.yaml", [*common, *small], ClipRun)
    common += ["sampling.steps=2"]
    if what == "decoder":
        more = ["model.layout={side: 8, width: 32}", "model.unet.checkpointing=true"]
        more += ["jitter=0.1", "train.accumulate=2"]
        return tiny("decoder", clip, *common, *more)
    if what == "prior":
        return tiny("prior", clip, *common, "model.draft={width: 32}")
    return tiny("upsampler_64", clip, *common, f"degradation={what}", "degraded=1")


def train(what: str, clip: str, out: Path, precision: str, device: torch.device) -> list[float]:
    """The losses of two steps, with previews before and after."""
    drafts.LAYOUT_EPOCHS = drafts.DRAFT_EPOCHS = 1
    drafts.LAYOUT_COUNT = drafts.DRAFT_COUNT = drafts.STATISTICS_COUNT = 64
    AcceleratorState._reset_state(reset_partial_state=True)
    bf16 = precision == "bf16"
    accelerator = Accelerator(cpu=True, mixed_precision="bf16" if bf16 else "no")
    PartialState._shared_state["device"] = AcceleratorState._shared_state["device"] = device
    torch.manual_seed(0)
    TRAIN[what](configured(what, clip, out, precision), accelerator)
    return [json.loads(line)["loss"] for line in (out / "metrics.jsonl").open()]


def train_there(what: str, clip: str, out: str, precision: str) -> None:
    """In a process of its own: print losses, and where the host waited in each step."""
    import pretended_device as pretended

    device = pretended.enable()
    steps: list[dict[str, int]] = []
    plain = fit._Trainer._backward

    def backward(trainer: Any, stream: Any) -> Any:
        before = pretended.waits.copy()
        result = plain(trainer, stream)
        steps.append(dict(pretended.waits - before))
        return result

    fit._Trainer._backward = backward  # type: ignore[method-assign]
    end({"losses": train(what, clip, Path(out), precision, device), "waits": steps})


def sample_there(model: str, offload: bool) -> None:
    """In a process of its own: pictures of text and of a picture, in tiles and by all samplers."""
    import pretended_device as pretended

    device = pretended.enable()
    end({"pictures": sample(model, device, offload)})


def sample(model: str, device: torch.device, offload: bool = False) -> list[list[int]]:
    pipe = UnCLIP.from_pretrained(model, device, torch.float32, offload=offload)
    drawn = pipe.text_to_image("a red apple", n=2, tile=16, steps=2, candidates=2)
    for sampler in ("ddpm", "dpm++", "unipc"):
        drawn += pipe.text_to_image("a red apple", size=16, steps=2, sampler=sampler)
    drawn += pipe.variations(drawn[0], size=16)
    drawn.append(pipe.upscale(drawn[-1], size=32))
    return [list(picture.tobytes()) for picture in drawn]


def end(result: dict[str, Any]) -> None:
    """Print it and end at once: torch's threads don't outlive a device made in Python."""
    print(json.dumps(result))
    sys.stdout.flush()
    os._exit(0)


def found(printed: str) -> dict[str, Any]:
    return json.loads(next(line for line in printed.splitlines() if line.startswith("{")))


@pytest.mark.parametrize("what", TRAIN)
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_training_is_that_of_the_cpu_and_waits_for_nothing(
    what: str, precision: str, model_folder: Path, tmp_path: Path
) -> None:
    """BSR added the CPU's noise to pictures elsewhere; a step read the schedule ten times over, and
    asked where texts end."""
    work = (what, str(model_folder), str(tmp_path / "there"), precision)
    there = found(together(train_there, *work, processes=1))
    here = train(what, str(model_folder), tmp_path / "here", precision, torch.device("cpu"))
    exact = 1e-4 if precision == "fp32" else 0.02  # half precision reaches further on accelerators
    assert_close(there["losses"], here, rtol=exact, atol=exact / 10)
    assert there["waits"] == [{}, {}]


@pytest.mark.parametrize("offload", [False, True])
def test_pictures_are_those_of_the_cpu(offload: bool, model_folder: Path) -> None:
    there = found(together(sample_there, str(model_folder), offload, processes=1))["pictures"]
    here = sample(str(model_folder), torch.device("cpu"))
    for a, b in zip(there, here, strict=True):
        assert_close(torch.tensor(a), torch.tensor(b), rtol=0, atol=1)
