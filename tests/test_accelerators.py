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
from PIL import Image
from processes import together
from test_tasks import ROOT, tiny
from test_training_ar_prior import tiny as tiny_ar_prior
from torch.testing import assert_close

from unclip.config import load_config
from unclip.images import to_tensor
from unclip.pipeline import UnCLIP
from unclip.training import drafts, fit
from unclip.training.ar_prior import train_ar_prior
from unclip.training.clip import ClipRun, train_clip
from unclip.training.decoder import train_decoder
from unclip.training.prior import train_prior
from unclip.training.upsampler import train_upsampler

STEPS = ["train.steps=2", "train.save_every=2", "train.sample_every=2", "train.log_every=1"]
TRAIN: dict[str, Callable[..., Any]] = {
    "decoder": train_decoder,
    "adversary": train_decoder,
    "prior": train_prior,
    "blur": train_upsampler,
    "bsr": train_upsampler,
    "clip": train_clip,
    "restore": train_clip,
    "ar_prior": train_ar_prior,
}


def configured(what: str, clip: str, out: Path, precision: str) -> Any:
    common = [*STEPS, f"train.out={out}", f"train.precision={precision}", "data.train=shapes:val"]
    if what in ("clip", "restore"):
        small = ["train.batch=8", "model.vision_cfg.layers=1", "model.text_cfg.layers=1"]
        small += ["augment.shift=0.1", "augment.unknown_words=0.1", "data.val=null"]
        if what == "restore":
            small += ["restore={side: 8, noise: 0.1, network: {width: 32}}"]
        return load_config(ROOT / "configs/shapes/clip.yaml", [*common, *small], ClipRun)
    if what == "ar_prior":
        assert precision == "fp32"  # which it says itself
        return tiny_ar_prior(Path(clip), *(key for key in common if "precision" not in key))
    common += ["sampling.steps=2"]
    if what == "decoder":
        more = ["model.layout={side: 8, width: 32}", "model.unet.checkpointing=true"]
        more += ["jitter=0.1", "perceptual=0.1", "train.accumulate=2", "model.unet.multiple=[1, 2]"]
        more += ["model.unet.attention=[false, true]", "augment={flip: 0.5}"]
        return tiny("decoder", clip, *common, *more)
    if what == "adversary":
        return tiny("decoder", clip, *common, "train.batch=8", "adversary={share: 0.5}")
    if what == "prior":
        return tiny("prior", clip, *common, "model.draft={width: 32}")
    return tiny("upsampler_64", clip, *common, f"degradation={what}", "degraded=1")


FEW = {"LAYOUT_EPOCHS": 1, "DRAFT_EPOCHS": 1} | dict.fromkeys(
    ("LAYOUT_COUNT", "DRAFT_COUNT", "STATISTICS_COUNT", "QUANTIZER_COUNT"), 64
)


def train(what: str, clip: str, out: Path, precision: str, device: torch.device) -> list[float]:
    """The losses of two steps, with previews before and after."""
    AcceleratorState._reset_state(reset_partial_state=True)
    bf16 = precision == "bf16"
    accelerator = Accelerator(cpu=True, mixed_precision="bf16" if bf16 else "no")
    PartialState._shared_state["device"] = AcceleratorState._shared_state["device"] = device
    torch.manual_seed(0)
    with pytest.MonkeyPatch.context() as few:  # or later tests of this process had them, too
        for name, value in FEW.items():
            few.setattr(drafts, name, value)
        few.setattr("unclip.training.task.HELD_OUT", 8)
        TRAIN[what](configured(what, clip, out, precision), accelerator)
    return [json.loads(line)["loss"] for line in (out / "metrics.jsonl").open()]


def train_there(what: str, clip: str, out: str, precision: str) -> None:
    """In a process of its own: print losses, and where the host waited in each step."""
    import pretended_device as pretended

    device = pretended.enable()
    waits: dict[str, list[dict[str, int]]] = {"_backward": [], "_update": []}

    def watched(name: str) -> Callable[..., Any]:
        plain = getattr(fit._Trainer, name)

        def call(*arguments: Any) -> Any:
            before = pretended.waits.copy()
            result = plain(*arguments)
            waits[name].append(dict(pretended.waits - before))
            return result

        return call

    for name in waits:
        setattr(fit._Trainer, name, watched(name))
    end({"losses": train(what, clip, Path(out), precision, device), **waits})


def sample_there(model: str, out: str) -> None:
    """In a process of its own: what `sample` draws, with all stages there and one at a time."""
    import pretended_device as pretended

    device = pretended.enable()
    for offload in (False, True):
        for k, picture in enumerate(sample(model, device, offload)):
            picture.save(Path(out, f"{offload} {k}.png"))
    pipe = UnCLIP.from_pretrained(model, device)
    pipe.text_to_image("a red apple", size=16, steps=1)[0].save(Path(out, "default.png"))
    end({"dtype": str(pipe.dtype)})


def sample(model: str, device: torch.device, offload: bool) -> list[Image.Image]:
    """Pictures of text and of a picture, in tiles and by all samplers."""
    pipe = UnCLIP.from_pretrained(model, device, torch.float32, offload=offload)
    drawn = pipe.text_to_image("a red apple", size=32, tile=16, steps=1, candidates=2)
    if not offload:
        for sampler in ("ddpm", "dpm++", "unipc"):
            drawn += pipe.text_to_image("a red apple", size=16, steps=2, sampler=sampler)
        drawn += pipe.variations(drawn[0], size=16)
    return [*drawn, pipe.upscale(drawn[0], size=64)]


def faults_there() -> None:
    """In a process of its own: what the device says to what would stop or slow a GPU."""
    import pretended_device as pretended

    device = pretended.enable()
    x = torch.arange(4.0).to(device, non_blocking=True)
    try:
        x + torch.randn(4)  # as BSR did
        mixed = ""
    except RuntimeError as error:
        mixed = str(error)
    fine = dict(pretended.waits)
    bool((x > 0).any()), x.cpu(), x.tolist(), x.nonzero(), x[x > 1]
    x + torch.ones(4).to(device)
    end({"mixed": mixed, "before": fine, "after": sorted(pretended.waits.elements())})


def end(result: dict[str, Any]) -> None:
    """Print it and end at once: torch's threads don't outlive a device made in Python."""
    print(json.dumps(result))
    sys.stdout.flush()
    os._exit(0)


def found(printed: str) -> dict[str, Any]:
    return json.loads(next(line for line in printed.splitlines() if line.startswith("{")))


@pytest.mark.parametrize(
    ("what", "precision"),
    [
        ("decoder", "fp32"),
        ("decoder", "bf16"),
        ("adversary", "fp32"),
        ("prior", "bf16"),
        ("blur", "bf16"),
        ("bsr", "fp32"),
        ("clip", "fp32"),
        ("restore", "bf16"),
        ("ar_prior", "fp32"),
    ],
)
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
    assert there["_backward"] == [{}, {}]
    assert there["_update"] == [{"read fit.py:_update": 1}] * 2  # whether the step is finite


def test_pictures_are_those_of_the_cpu(model_folder: Path, tmp_path: Path) -> None:
    """A prior that was offloaded undid its scale with statistics of the other device."""
    told = found(together(sample_there, str(model_folder), str(tmp_path), processes=1))
    for offload in (False, True):
        for k, here in enumerate(sample(str(model_folder), torch.device("cpu"), offload)):
            there = Image.open(tmp_path / f"{offload} {k}.png")
            assert_close(to_tensor(there), to_tensor(here), rtol=0, atol=2.1 / 255)
    assert told == {"dtype": "torch.float16"}
    exact = UnCLIP.from_pretrained(model_folder).text_to_image("a red apple", size=16, steps=1)
    half = Image.open(tmp_path / "default.png")
    assert (to_tensor(half) - to_tensor(exact[0])).abs().mean() < 0.02


def test_the_pretended_device_refuses_mixtures_and_counts_waits() -> None:
    told = found(together(faults_there, processes=1))
    assert "tensors of the CPU [(4,)] with the device's" in told["mixed"]
    assert told["before"] == {}
    assert told["after"] == ["read elsewhere"] * 5 + ["upload elsewhere"]
