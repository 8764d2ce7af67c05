"""What a decoder learns of the prior whose draws it will be told."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from test_tasks import first_batch, tiny
from torch import Tensor
from torch.testing import assert_close

from unclip import randomness
from unclip.clip.encoder import FrozenCLIP
from unclip.data.open import open_dataset
from unclip.data.sample import fixed
from unclip.errors import CheckpointError, ConfigError
from unclip.files.checkpoints import newest_checkpoint
from unclip.images import resize
from unclip.models.layers import EmbeddingScale, ScaleConfig
from unclip.training import misses as module
from unclip.training.decoder import FARTHEST, DecoderRun, DecoderTask, train_decoder
from unclip.training.drafts import fit_layout, fit_scale
from unclip.training.misses import Misses, measure_misses, misses_of

WIDTH = 16


@pytest.fixture
def run(model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> DecoderRun:
    monkeypatch.setattr(module, "DRAWS", 96)
    monkeypatch.setattr(module, "PICTURES", 48)
    more = [f"prior={model_folder}", "train.steps=2", f"train.out={tmp_path / 'run'}"]
    more += ["model.scale={kind: whiten}"]
    return tiny("decoder", model_folder, *more)


@pytest.fixture
def clip(run: DecoderRun) -> FrozenCLIP:
    return FrozenCLIP.load(run.clip)


class Remembers:
    """A prior that draws embeddings of pictures in turn, each `off` by so much."""

    def __init__(self, z_image: Tensor, off: Tensor):
        self.drawn, self.sampling = z_image + off, None
        self.network = SimpleNamespace(scale=EmbeddingScale(ScaleConfig(kind="raw"), WIDTH))
        self.done = 0

    def draw(self, cond: Any, sampling: Any, generators: Any, null_text: Any) -> Tensor:
        first, self.done = self.done, self.done + len(generators)
        return self.drawn[first : self.done]

    def embeddings(self, drawn: Tensor) -> Tensor:
        return drawn


def numbers(dataset: Any) -> list[int]:
    """Of the pictures that draws are compared with."""
    return list(range(0, len(dataset), len(dataset) // 48))[:48]


def test_a_draw_means_the_picture_nearest_to_it_and_far_ones_mean_none(
    run: DecoderRun, clip: FrozenCLIP
) -> None:
    dataset = open_dataset("shapes:val", run.data.resolution)
    pictures = torch.stack([fixed(dataset, i).image for i in numbers(dataset)])
    z_image = clip.encode_image(pictures)
    off = 1e-4 * torch.randn(96, WIDTH, generator=torch.Generator().manual_seed(0))
    off[1::2] += 100
    prior: Any = Remembers(z_image.repeat(2, 1), off)
    found = measure_misses(prior, clip, dataset, seed=0)
    near = torch.arange(96)[::2] % 48
    assert found.picture.tolist() == [numbers(dataset)[i] for i in near.tolist()]
    assert_close(found.true, z_image[near])
    assert_close(found.z_image, z_image[near] + off[::2])
    scale = EmbeddingScale(ScaleConfig(kind="unit"), WIDTH)
    rows = torch.tensor([3, 5])
    assert_close(found.offset(rows, scale), scale(found.z_image[rows]) - scale(found.true[rows]))
    lost: Any = Remembers(z_image.repeat(2, 1), off + 100)
    with pytest.raises(CheckpointError, match="none of its draws"):
        measure_misses(lost, clip, dataset, seed=0)


def test_half_of_a_batch_is_off_as_a_prior_is(run: DecoderRun, clip: FrozenCLIP) -> None:
    run = run.model_copy(update={"train": run.train.model_copy(update={"batch": 64})})
    task = DecoderTask(run, clip)
    scale = task.stage.network.scale
    fit_scale(scale, clip, open_dataset("shapes:val", run.data.resolution))
    g = torch.Generator().manual_seed(0)
    true = clip.encode_image(first_batch(run).images)[:8]
    one_way = torch.zeros(8, WIDTH)
    one_way[:, 0] = torch.rand(8, generator=g) + 1
    drawn = scale.inverse(scale(true) + one_way)
    task.misses = Misses(drawn, true, torch.arange(8))
    seen = []

    def model(x_t: Tensor, t: Tensor, cond: Any) -> Tensor:
        seen.append(scale(cond.image_embed))
        return x_t

    batch = first_batch(run)
    task.loss(model, batch, 0)
    off = seen[0] - scale(clip.encode_image(batch.images))
    assert_close(off[:, 1:], torch.zeros(64, WIDTH - 1), rtol=0, atol=1e-4)  # jitter is 0
    share = randomness.uniform(run.train.seed, "jitter", batch.ids)
    missed = off[:, 0] > 1e-4
    assert 20 < missed.sum() < 44
    assert (off[missed, 0] < FARTHEST * share[missed] * one_way.max() + 1e-4).all()
    assert (off[missed, 0] > FARTHEST * share[missed] * one_way[:, 0].min() - 1e-4).all()


def test_a_layout_learns_what_draws_mean(
    run: DecoderRun, clip: FrozenCLIP, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Draws here say the opposite of the embedding, which no jitter would tell."""
    monkeypatch.setattr("unclip.training.drafts.LAYOUT_COUNT", 48)
    monkeypatch.setattr("unclip.training.drafts.LAYOUT_EPOCHS", 800)
    layout = {**run.model.model_dump(), "layout": {"side": 4, "width": 64}}
    run = run.model_copy(update={"model": type(run.model)(**layout)})
    dataset = open_dataset("shapes:val", run.data.resolution)
    pictures = torch.stack([fixed(dataset, i).image for i in numbers(dataset)])
    true = clip.encode_image(pictures)
    shown = resize(pictures, 4).clamp(-1, 1).flatten(1)
    error = []
    for told in (False, True):
        torch.manual_seed(0)
        network = DecoderTask(run, clip).stage.network
        fit_scale(network.scale, clip, dataset)
        drawn = network.scale.inverse(-network.scale(true))
        misses = Misses(drawn, true, torch.tensor(numbers(dataset))) if told else None
        fit_layout(network, clip, dataset, seed=0, misses=misses)
        with torch.no_grad():
            error.append(float((network.layout(network.scale(drawn)) - shown).square().mean()))
    assert error[1] < 0.5 * error[0]


def test_a_run_goes_on_with_the_misses_it_began_with(
    run: DecoderRun, clip: FrozenCLIP, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An untrained prior's draws are near no picture, so all of them are let in here."""
    monkeypatch.setattr(module, "usual_distance", lambda z: torch.tensor(torch.inf))
    accelerator = Accelerator(cpu=True)
    dataset = run.data.open(run.data.train)
    assert run.prior is not None
    train_decoder(run, accelerator)
    folder = Path(run.train.out)
    began = misses_of(run.prior, clip, dataset, run.train, accelerator, folder / "step-2")
    assert len(began.picture) == 96
    monkeypatch.setattr(module, "measure_misses", None)  # not again
    longer = run.train.model_copy(update={"steps": 3})
    train_decoder(run.model_copy(update={"train": longer}), accelerator)
    newest = newest_checkpoint(folder, training=True)
    assert newest is not None
    assert newest.name == "step-3"


def test_a_run_without_a_prior_is_not_given_one_later(
    run: DecoderRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is refused before anything is measured, which takes minutes."""
    accelerator = Accelerator(cpu=True)
    train_decoder(run.model_copy(update={"prior": None}), accelerator)
    monkeypatch.setattr(module, "measure_misses", None)
    with pytest.raises(ConfigError, match=r"a run with prior = None, not"):
        train_decoder(run, accelerator)


def test_a_prior_of_another_encoder_is_refused(run: DecoderRun, clip: FrozenCLIP) -> None:
    other = clip.fingerprint.model_copy(update={"name": "another", "context": 99})
    clip.__dict__["fingerprint"] = other
    dataset = run.data.open(run.data.train)
    assert run.prior is not None
    with pytest.raises(CheckpointError, match=r"prior = .*different CLIP encoders"):
        misses_of(run.prior, clip, dataset, run.train, Accelerator(cpu=True), None)
