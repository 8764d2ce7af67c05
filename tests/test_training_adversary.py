"""The critic of a decoder's drawings: who learns from what, which rows are drawn, and how far."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from test_tasks import batch_of, first_batch, tiny
from torch.testing import assert_close

from unclip.clip.encoder import FrozenCLIP
from unclip.config import load_config
from unclip.diffusion.sampling import SamplingConfig
from unclip.errors import ConfigError
from unclip.files.tensors import TensorFile
from unclip.training.adversary import Contested, Critic, drawn_to, parted
from unclip.training.decoder import DecoderRun, DecoderTask, train_decoder
from unclip.training.task import told_of

ADVERSARY = "adversary={weight: 0.5, share: 0.5, steps: 3}"


def contested(folder, *more):
    run = tiny("decoder", folder, "train.batch=8", ADVERSARY, *more)
    torch.manual_seed(0)
    task = DecoderTask(run, FrozenCLIP.load(run.clip))
    for head in task.model.critic.heads:  # a verdict that is not nearly zero
        torch.nn.init.normal_(head.out.weight, std=0.1)
    return task, first_batch(run)


def test_any_few_samples_in_a_row_have_drawn_ones_and_others() -> None:
    ids = torch.arange(1000, 1240)
    drawn, rest = parted(ids, 0.6)
    assert len(drawn) == 144 and sorted([*drawn.tolist(), *rest.tolist()]) == [*range(240)]
    for first in range(237):
        own, others = parted(ids[first : first + 3], 0.6)
        assert len(own) and len(others)
        inside = [k - first for k in drawn.tolist() if first <= k < first + 3]
        assert own.tolist() == inside  # whatever batch or process they come in
    with pytest.raises(ConfigError, match=r"of 1 samples at a time .* raise train\.batch"):
        parted(ids[:1], 0.6)


def test_a_drawing_is_what_a_sampler_of_these_steps_draws(model_folder: Path) -> None:
    """The last guess from where `drawn_to` has got to is the sample itself."""
    task, batch = contested(model_folder)
    cond = told_of(task.clip, task.stage, batch.images, batch.captions)
    config = SamplingConfig(sampler="ddim", steps=3, eta=1.0)

    def generators():
        return [torch.Generator().manual_seed(k) for k in range(len(batch.images))]

    sample = task.stage.draw(cond, config, generators())
    with torch.no_grad():
        x_t, t = drawn_to(task.stage, cond, 3, 2, generators())
        guess = task.stage.network(x_t, t, cond)
        x0 = task.stage.diffusion.x0_from(task.stage.diffusion.split(guess)[0], x_t, t)
        start, noisiest = drawn_to(task.stage, cond, 3, 0, generators())
    assert_close(x0.clamp(-1, 1), sample, rtol=1e-4, atol=1e-4)
    assert noisiest.tolist() == [task.stage.diffusion.config.steps - 1] * len(start)
    assert_close(start[0], torch.randn(start.shape[1:], generator=generators()[0]))


def test_drawn_samples_count_by_verdict_and_error_and_the_others_as_ever(
    model_folder: Path,
) -> None:
    task, batch = contested(model_folder)
    found = task.loss(task.model, batch, 0)
    drawn, rest = parted(batch.ids, 0.5)
    for key in ("critic", "unreal"):
        assert found[key][drawn].isfinite().all() and found[key][rest].isnan().all()
    assert_close(found["loss"][drawn], found["critic"][drawn] + 0.5 * found["unreal"][drawn])
    plain = DecoderTask(tiny("decoder", model_folder, "train.batch=8"), task.clip)
    plain.stage.network.load_state_dict(task.stage.network.state_dict())
    usual = plain.loss(plain.model, batch, 0)
    assert_close(found["loss"][rest], usual["loss"][rest], rtol=1e-4, atol=1e-5)
    assert found["mse_q0"][drawn].isnan().all()


def test_halves_of_a_batch_are_drawn_as_the_whole_is(model_folder: Path) -> None:
    """As far, whatever process or micro-batch they come in."""
    task, batch = contested(model_folder)
    for step in range(3):
        whole = task.loss(task.model, batch, step)["loss"]
        halves = [batch_of(batch, rows) for rows in (slice(4), slice(4, 8))]
        parts = torch.cat([task.loss(task.model, half, step)["loss"] for half in halves])
        assert_close(parts, whole, rtol=1e-4, atol=1e-5)


def test_a_verdict_moves_the_drawing_and_an_error_does_not(model_folder: Path) -> None:
    task, batch = contested(model_folder)
    model: Contested = task.model
    cond = told_of(task.clip, task.stage, batch.images, batch.captions)
    real, z = batch.images, model.network.scale(cond.image_embed)
    corners = torch.zeros(len(real), 2, dtype=torch.long)
    t = torch.full((len(real),), 500)
    x_t = model.diffusion.q_sample(real, t, torch.randn(real.shape))
    _, error, unreal = model(x_t, t, cond, real, z, corners)
    into_network = [*model.network.parameters()][-1]
    into_critic = model.critic.heads[0].out.weight

    def moved(value, weight):
        (gradient,) = torch.autograd.grad(
            value.sum(), [weight], retain_graph=True, allow_unused=True
        )
        return gradient is not None and bool(gradient.norm() > 0)

    assert moved(unreal, into_network) and not moved(unreal, into_critic)
    assert moved(error, into_critic) and not moved(error, into_network)


def test_a_critic_sees_a_quarter_where_it_begins(model_folder: Path) -> None:
    seen = []
    critic = Critic(lambda x: seen.append(x) or [x], 32, 16)
    images = torch.rand(2, 3, 32, 32)
    critic.seen(images, torch.tensor([[0, 16], [5, 3]]))
    assert_close(seen[-2], images)
    assert_close(seen[-1][0], images[0, :, :16, 16:])
    assert_close(seen[-1][1], images[1, :, 5:21, 3:19])


def test_a_critic_learns_to_tell_real_pictures_from_noise(model_folder: Path) -> None:
    """And which picture an embedding belongs to: noise is shown with the same ones."""
    task, batch = contested(model_folder)
    critic: Critic = task.model.critic
    z = task.stage.network.scale(task.clip.encode_image(batch.images).float())
    corners = torch.zeros(len(z), 2, dtype=torch.long)
    noise = torch.randn(batch.images.shape).clamp(-1, 1)
    optimizer = torch.optim.AdamW(critic.parameters(), 1e-3)
    for _ in range(15):
        on_real = critic(critic.seen(batch.images, corners), z)
        on_noise = critic(critic.seen(noise, corners), z)
        pairs = zip(on_real, on_noise, strict=True)
        error = sum((1 - a).relu().mean() + (1 + b).relu().mean() for a, b in pairs)
        optimizer.zero_grad()
        error.backward()
        optimizer.step()
    assert float(error.detach()) / len(on_real) < 1


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_a_run_with_a_critic_resumes_exactly_and_saves_a_plain_decoder(
    model_folder: Path, tmp_path: Path, optimizer: str
) -> None:
    def train(name: str, steps: int) -> Path:
        options = [f"train.out={tmp_path / name}", f"train.steps={steps}", "train.save_every=2"]
        options += ["train.decay=constant", "train.precision=fp32", "sampling.steps=2"]
        options += [f"train.optimizer={optimizer}", "data.train=shapes:val", "train.log_every=1"]
        run = tiny("decoder", model_folder, *options, ADVERSARY)
        torch.manual_seed(run.train.seed)
        return train_decoder(run, Accelerator(cpu=True))

    straight = train("straight", 4)
    train("parts", 2)
    parts = train("parts", 4)
    for path in (straight / "training").iterdir():
        assert path.read_bytes() == (parts / "training" / path.name).read_bytes(), path
    network = DecoderTask(tiny("decoder", model_folder), FrozenCLIP.load(str(model_folder))).model
    saved = TensorFile(straight / "decoder" / "model.safetensors")
    assert {name for name, _ in saved.items()} == set(network.state_dict())
    lines = [json.loads(x) for x in (tmp_path / "straight" / "metrics.jsonl").open()]
    assert {"critic", "unreal", "mse_q3", "loss"} <= set(lines[-1])


def test_low_rank_changes_and_a_critic_are_refused_together(model_folder: Path) -> None:
    path = Path(__file__).parents[1] / "configs" / "shapes" / "decoder.yaml"
    overrides = [f"clip={model_folder}", "lora=2", f"train.init={model_folder}", ADVERSARY]
    with pytest.raises(ConfigError, match="adversary and lora"):
        load_config(path, overrides, DecoderRun)
