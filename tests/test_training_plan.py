"""Plans against training steps that really run, measured by torch's profiler."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from test_tasks import tiny
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode

from unclip.cli import main
from unclip.precision import computes_in_bf16
from unclip.training import counting
from unclip.training import plan as planning
from unclip.training.counting import step_needs
from unclip.training.plan import Plan, plan, report

CONFIGS = Path(__file__).parents[1] / "configs"
SMALL = {
    "emoji/prior.yaml": [],
    "emoji/decoder.yaml": ["model.unet.channels=64", "model.detail.patch=2"],
    "emoji/upsampler_256.yaml": ["data.crop=64"],
}


@pytest.fixture
def fused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Attention as on a GPU, which a plan is for; a CPU in bf16 multiplies it out."""
    monkeypatch.setattr("unclip.models.layers.MOST_KEYS", 0)


def measured_peak(run: Any, micro: int) -> int:
    """Bytes beyond weights, gradients and inputs at the peak of one step on the CPU."""
    network = counting.network_of(run)
    inputs = counting.inputs_of(run, micro)
    for parameter in network.parameters():
        if parameter.requires_grad:
            parameter.grad = torch.zeros_like(parameter)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        mark = torch.zeros(1)  # the first allocation that is seen
        with torch.autocast("cpu", torch.bfloat16):
            out = network(*inputs)
        out.float().square().mean().backward()
    del mark
    events = profiler.profiler.kineto_results.events()  # type: ignore[union-attr]
    alive = most = 0
    for event in sorted(
        (event for event in events if event.name() == "[memory]"), key=lambda e: e.start_ns()
    ):
        alive += event.nbytes()
        most = max(most, alive)
    return most


@pytest.mark.bf16
@pytest.mark.usefixtures("fused")
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("path", SMALL)
def test_activations_are_those_of_a_real_step(path: str, checkpointing: bool) -> None:
    """Going backward through checkpoints, tensors live on in Python a little longer.

    What torch does in one operation was once counted as what that could be taken apart to: of a
    decoder with a head 2 % too much. A CPU without units for bf16 computes it in float32, with
    copies that GPUs don't make.
    """
    run = planning._load(CONFIGS / path, [*SMALL[path], "train.precision=bf16"])
    model = counting.with_checkpointing(run.model.model_dump(), checkpointing)
    run = run.model_copy(update={"model": type(run.model).model_validate(model)})
    predicted = step_needs(run, 4, checkpointing).peak
    exact = 0.003 if computes_in_bf16(torch.device("cpu")) else 0.15
    assert predicted == pytest.approx(measured_peak(run, 4), rel=0.2 if checkpointing else exact)


class Launches(TorchDispatchMode):
    """Counts the operations that write something."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += not func.is_view
        return func(*args, **(kwargs or {}))


@pytest.mark.usefixtures("fused")
@pytest.mark.parametrize("path", SMALL)
def test_operations_are_those_of_a_real_step(path: str) -> None:
    """What fake tensors ask each other was once counted with them: five times as many."""
    run = planning._load(CONFIGS / path, [*SMALL[path], "train.precision=bf16"])
    network, inputs = counting.network_of(run), counting.inputs_of(run, 2)
    for parameter in network.parameters():
        if parameter.requires_grad:
            parameter.grad = torch.zeros_like(parameter)
    with Launches() as launches, torch.autocast("cpu", torch.bfloat16):
        network(*inputs).float().square().mean().backward()
    assert step_needs(run, 2, False).operations == pytest.approx(launches.count, rel=0.05)


def test_parameters_and_state_are_those_that_a_run_saves(
    model_folder: Path, tmp_path: Path
) -> None:
    from accelerate import Accelerator

    from unclip.files.tensors import TensorFile
    from unclip.training.prior import train_prior

    run = tiny("prior", model_folder, "train.steps=1", f"train.out={tmp_path}")
    path = tmp_path / "again.yaml"
    path.write_text(json.dumps(run.model_dump(mode="json")))
    needs = plan(path, [], gpus=1)
    training = train_prior(run, Accelerator(cpu=True)) / "training"

    def size(file: str, *keys: str) -> int:
        tensors = TensorFile(training / file)
        return sum(x.nbytes for name, x in tensors.items() if name.startswith(keys or ("",)))

    assert needs.weights == size("weights.safetensors")
    assert needs.optimizer == size("optimizer.safetensors", "exp_avg")
    assert needs.gradients == needs.ema == needs.optimizer // 2
    assert needs.pictures == run.train.batch


def test_sharding_divides_what_is_kept_and_adds_what_is_put_together() -> None:
    path = CONFIGS / "emoji" / "upsampler_256.yaml"
    copied, spread = (plan(path, [], 4, shard) for shard in (False, True))
    twice = plan(path, ["train.batch=8"], 8, True, machines=2)  # shared within each
    assert twice.fixed == spread.fixed
    kept = copied.weights + copied.gradients + copied.optimizer + copied.ema
    assert spread.fixed == pytest.approx(kept / 4 + spread.gathered, rel=1e-6)
    unet = counting.network_of(planning._load(path, [])).unet
    blocks = [sum(p.numel() for p in b.parameters()) for b in (*unet.down, *unet.mid, *unet.up)]
    assert spread.gathered == 12 * max(blocks)
    assert copied.gathered == 0
    assert spread.activations == copied.activations


def test_arithmetic_is_three_times_that_of_the_forward_pass() -> None:
    """And grows with the batch; with checkpointing the forward pass is done again."""
    run = planning._load(CONFIGS / "emoji/upsampler_256.yaml", ["data.crop=64"])
    flops = {on: step_needs(run, 2, on).flops for on in (False, True)}
    network, inputs = counting.network_of(run), counting.inputs_of(run, 2)
    with counting.flop_counter() as counter, torch.no_grad():
        network(*inputs)
    forward = counter.get_total_flops()
    assert flops[False] == pytest.approx(3 * forward, rel=0.05)  # no gradient for the input
    assert flops[False] < flops[True] <= flops[False] + forward
    assert step_needs(run, 4, False).flops == pytest.approx(2 * flops[False], rel=0.01)


def needs(**changes: Any) -> Plan:
    base = {"parameters": 10**9, "micro_batch": 8, "weights": 4 * 10**9, "gradients": 4 * 10**9}
    base |= {"optimizer": 8 * 10**9, "ema": 4 * 10**9, "activations": 80 * 10**9}
    base |= {
        "gathered": 0,
        "checkpointed": 16 * 10**9,
        "checkpointing": False,
        "flops": 1e12,
        "operations": 1000,
        "accumulate": 4,
        "pictures": 10**9,
    }
    return Plan(**base | changes)


@pytest.mark.parametrize(
    ("changes", "memory", "verdict"),
    [
        ({}, 100, "fits in 100 GB"),
        ({}, 40, "a micro-batch of 2 would: raise train.accumulate, or use checkpointing"),
        ({"checkpointing": True}, 40, "36.00 GB with checkpointing, as configured: fits in 40 GB"),
        ({"checkpointing": True}, 30, "a micro-batch of 5 would: raise train.accumulate."),
        ({}, 20, "does not fit in 20 GB with any batch"),
    ],
)
def test_the_report_says_what_fits(changes: dict[str, Any], memory: float, verdict: str) -> None:
    page = report(needs(**changes), gpus=8, memory=memory, tflops=100, utilisation=0.5)
    assert verdict in page
    days = 1e9 * 1e12 / (8 * 100e12 * 0.5) / 86400
    assert f"take {days:,.1f} days on 8 GPUs at 50% of 100 TFLOP/s" in page


@pytest.mark.parametrize(
    ("changes", "advice"),
    [
        ({}, None),  # 5 ms to launch, 160 ms to compute
        ({"operations": 40_000}, "from 10 on they would not; train.accumulate=2 makes it 16."),
        ({"operations": 80_000}, "400 ms to launch and 160 ms to compute, from 20 on"),
        ({"operations": 80_000}, "train.accumulate=1 makes it 32."),
        ({"operations": 800_000}, "makes it 32, and train.batch has to grow too."),
        ({"operations": 40_000, "accumulate": 1}, "raise train.batch, or use fewer GPUs."),
    ],
)
def test_the_report_says_when_a_gpu_waits_for_its_host(
    changes: dict[str, Any], advice: str | None
) -> None:
    page = report(needs(**changes), gpus=8, memory=100, tflops=100, utilisation=0.5)
    assert advice in page if advice else "starves" not in page


def test_eight_gpus_are_starved_by_what_feeds_one() -> None:
    """gpu24's batches are cut in four for one GPU; on eight that leaves four pictures to each."""
    eight = plan(CONFIGS / "gpu24" / "upsampler_256.yaml", [], 8)
    assert (eight.micro_batch, eight.accumulate) == (4, 4)
    half = replace(eight, micro_batch=8, accumulate=2)
    pages = [
        report(needs, gpus=8, memory=80, tflops=990, utilisation=0.4) for needs in (eight, half)
    ]
    assert "train.accumulate=2 makes it 8." in pages[0]
    assert "starves" not in pages[1]


def test_the_verb_plans_a_configuration(capsys: pytest.CaptureFixture[str]) -> None:
    config = str(CONFIGS / "emoji" / "prior.yaml")
    with pytest.raises(SystemExit) as ended:
        main(["plan", config, "train.batch=32", "--gpus", "4"])
    assert ended.value.code == 0
    assert "micro-batch 8" in capsys.readouterr().out
    with pytest.raises(SystemExit) as ended:
        main(["plan", config, "--gpus", "7"])
    assert ended.value.code == 2
    assert "must be a multiple of train.accumulate x processes = 1 x 7" in capsys.readouterr().err
    with pytest.raises(SystemExit) as ended:
        main(["plan", str(CONFIGS / "emoji" / "clip.yaml")])
    assert ended.value.code == 2
    assert "no configuration of a prior, a decoder or an upsampler" in capsys.readouterr().err
