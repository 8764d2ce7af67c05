"""train.compile, without a compiler: torch's tracing, and its graphs run one by one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from test_tasks import first_batch, tiny
from torch._dynamo.backends.debugging import aot_eager
from torch._dynamo.utils import counters
from torch.testing import assert_close

from unclip.clip.encoder import FrozenCLIP
from unclip.training.decoder import DecoderTask
from unclip.training.prior import PriorTask
from unclip.training.upsampler import Shrunk, UpsamplerTask

MORE = {
    "decoder": [
        "model.layout={side: 8, width: 32}",
        "model.unet.checkpointing=true",
        "model.unet.multiple=[1, 2]",
        "model.unet.attention=[false, true]",
    ],
    "prior": ["model.draft={width: 32}", "model.transformer.checkpointing=true"],
    "upsampler_64": [],
}


def task(stage: str, clip: Path) -> Any:
    run = tiny(stage, clip, *MORE[stage])
    torch.manual_seed(0)
    if stage == "upsampler_64":
        return UpsamplerTask(run)
    kind = {"decoder": DecoderTask, "prior": PriorTask}[stage]
    return kind(run, FrozenCLIP.load(run.clip))


def step(task: Any, wrapped: Any) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    batch = first_batch(task.run)
    batch = Shrunk(task.run)(batch) if task.name == "upsampler_64" else batch
    loss = task.loss(wrapped, batch, 0)["loss"]
    loss.mean().backward()
    grads = {n: p.grad for n, p in task.model.named_parameters() if p.grad is not None}
    return loss.detach(), grads


@pytest.mark.parametrize("stage", MORE)
def test_a_compiled_network_is_one_graph_and_learns_the_same(
    stage: str, model_folder: Path
) -> None:
    """It broke into twelve: the host asked where the text ends, and again going backward."""
    graphs: list[Any] = []

    def backend(graph: Any, inputs: Any) -> Any:
        graphs.append(graph)
        return aot_eager(graph, inputs)

    AcceleratorState._reset_state(reset_partial_state=True)
    accelerator = Accelerator(cpu=True)
    plain = task(stage, model_folder)
    expected = step(plain, accelerator.prepare_model(plain.model))
    torch._dynamo.reset()
    counters.clear()
    compiled = task(stage, model_folder)
    compiled.model.compile(backend=backend)  # as `fit` does, and then wraps it
    found = step(compiled, accelerator.prepare_model(compiled.model))
    torch._dynamo.reset()
    assert len(graphs) == 1 and not counters["graph_break"]
    assert_close(found, expected, rtol=1e-4, atol=1e-5)
