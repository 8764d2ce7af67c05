"""Analytic-DPM against Gaussian data, for which every step is known in closed form."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from conftest import WORDS, tiny_pipeline
from test_evaluate import write_pictures

from unclip.cli import main
from unclip.diffusion.analytic import AnalyticDPM, interpolated, measure_power, reverse_variance
from unclip.diffusion.process import DiffusionConfig, GaussianDiffusion
from unclip.errors import ConfigError
from unclip.pipeline import UnCLIP
from unclip.sources import Source

DIFFUSION = GaussianDiffusion(DiffusionConfig(target="x0"))


def optimal(deviation: float):
    """The best x0 there is for numbers of N(0, deviation²)."""

    def guess(x: torch.Tensor, t: int) -> tuple[torch.Tensor, None]:
        alpha_bar = float(DIFFUSION.alpha_bar[t])
        gain = alpha_bar**0.5 * deviation**2 / (alpha_bar * deviation**2 + 1 - alpha_bar)
        return gain * x, None

    return guess


def true_power(deviation: float) -> torch.Tensor:
    """E ε²: the best ε of x_t is √(1 − ᾱ) x_t over the variance of x_t."""
    alpha_bar = DIFFUSION.alpha_bar
    return (1 - alpha_bar) / (alpha_bar * deviation**2 + 1 - alpha_bar)


@pytest.mark.parametrize("deviation", [0.2, 0.6, 1.0])
@pytest.mark.parametrize(("t", "s"), [(999, 900), (600, 590), (500, 100), (40, 10)])
def test_the_variance_of_gaussian_data_is_that_of_bayes(deviation: float, t: int, s: int) -> None:
    here, there = float(DIFFUSION.alpha_bar[t]), float(DIFFUSION.alpha_bar[s])
    var_s = there * deviation**2 + 1 - there
    var_t = here * deviation**2 + 1 - here
    # x_t = √(ᾱ_t/ᾱ_s) x_s + noise: the variance of x_s that x_t leaves.
    expected = var_s - (here / there) * var_s**2 / var_t
    got = reverse_variance(here, there, float(true_power(deviation)[t]))
    assert got == pytest.approx(expected, rel=1e-6)


def test_measured_statistics_are_those_of_the_data() -> None:
    g = torch.Generator().manual_seed(0)
    batches = [(0.6 * torch.randn(500, 8, generator=g), optimal(0.6)) for _ in range(4)]
    timesteps = [10, 300, 700, 999]
    power = measure_power(DIFFUSION, batches, timesteps, g)
    expected = true_power(0.6)[timesteps]
    torch.testing.assert_close(
        torch.tensor(power, dtype=torch.float64), expected, rtol=0.03, atol=0
    )


@pytest.mark.parametrize("steps", [4, 16])
def test_few_steps_draw_gaussian_data_with_its_own_variance(steps: int) -> None:
    """DDPM's own variance falls short with few steps; the best one is exact for any number."""
    timesteps = torch.linspace(999, 0, steps).round().long().tolist()
    scheduler = AnalyticDPM(DIFFUSION, timesteps, true_power(0.6))
    generators = [torch.Generator().manual_seed(k) for k in range(400)]
    x = torch.stack([torch.randn(64, generator=g) for g in generators])
    guess = optimal(0.6)
    for t in scheduler.timesteps:
        (x,) = scheduler.step(guess(x, int(t))[0], t, x, generator=generators)
    assert float(x.std()) == pytest.approx(0.6, rel=0.02)


def test_a_sample_does_not_depend_on_its_neighbours() -> None:
    scheduler = AnalyticDPM(DIFFUSION, [999, 500, 0], true_power(0.6))
    x0, x = torch.zeros(3, 4), torch.ones(3, 4)

    def step(rows: slice) -> torch.Tensor:
        generators = [torch.Generator().manual_seed(k) for k in range(3)[rows]]
        return scheduler.step(x0[rows], torch.tensor(999), x[rows], generator=generators)[0]

    assert torch.equal(step(slice(0, 3))[1:2], step(slice(1, 2)))


def test_between_measured_timesteps_statistics_are_interpolated() -> None:
    power = interpolated({10: 0.2, 20: 0.4, 999: 1.0}, 1000)
    torch.testing.assert_close(
        power[[0, 10, 15, 20, 999]], torch.tensor([0.2, 0.2, 0.3, 0.4, 1.0], dtype=torch.float64)
    )


def test_a_prior_without_statistics_is_a_clear_error() -> None:
    pipe = tiny_pipeline()
    with pytest.raises(ConfigError, match=r"sampling of prior.*'analytic' needs.*unclip measure"):
        pipe.text_to_embedding(WORDS[0], sampler="analytic")


def test_statistics_are_measured_once_and_kept_with_the_prior(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tiny_pipeline().save_pretrained(tmp_path / "model")
    before = Source(tmp_path / "model").hash
    write_pictures(tmp_path / "data")
    given = [tmp_path / "model", "--data", tmp_path / "data", "--device", "cpu"]
    with pytest.raises(SystemExit):
        main(["measure", *map(str, given)])
    assert "of 64 timesteps" in capsys.readouterr().out
    pipe = UnCLIP.from_pretrained(tmp_path / "model")
    assert pipe.prior is not None and Source(tmp_path / "model").hash == before
    power = pipe.prior.diffusion.power
    assert len(power) == 64 and all(0 <= value <= 1 for value in power.values())
    how = {"sampler": "analytic", "steps": 4, "prior_candidates": 1}
    two = pipe.text_to_embedding(WORDS, **how)
    torch.testing.assert_close(two[1:], pipe.text_to_embedding(WORDS[1], seed=1, **how))
    assert not torch.allclose(two[1:], pipe.text_to_embedding(WORDS[1], seed=2, **how))
    pipe.save_pretrained(tmp_path / "again")  # statistics travel with the stage
    assert Source(tmp_path / "again").stage("prior").stage.diffusion.power == power
