"""The diffusion process against closed forms, and the samplers against diffusers."""

from __future__ import annotations

import math

import pytest
import torch
from diffusers import DDPMScheduler, UnCLIPScheduler
from torch.testing import assert_close

from unclip.conditioning import Cond
from unclip.diffusion.guidance import Guided
from unclip.diffusion.process import DiffusionConfig, GaussianDiffusion, betas, loss_weights
from unclip.diffusion.sampling import SamplingConfig, denoise
from unclip.diffusion.schedulers import make_scheduler
from unclip.errors import ConfigError
from unclip.randomness import noise_of

SAMPLERS = ["ddpm", "ddim", "dpm++", "unipc"]


def gaussian(target="eps", schedule="cosine", learned=False, steps=1000):
    return GaussianDiffusion(
        DiffusionConfig(schedule=schedule, target=target, learned_variance=learned, steps=steps)
    )


class PerfectDenoiser:
    """The best possible denoiser of data x_0 ~ N(mean, std²), in closed form."""

    def __init__(self, diffusion, mean=0.3, std=0.4):
        self.diffusion, self.mean, self.std = diffusion, mean, std
        self.rows = []

    def prepare(self, cond):
        return cond

    def __call__(self, x_t, t, cond):
        self.rows.append(len(x_t))
        a_bar = self.diffusion.alpha_bar[t].float().view(-1, *[1] * (x_t.ndim - 1))
        a, s2 = a_bar.sqrt(), 1 - a_bar
        x0 = self.mean + a * self.std**2 / (a_bar * self.std**2 + s2) * (x_t - a * self.mean)
        noise = (x_t - a * x0) / s2.sqrt()
        target = self.diffusion.config.target
        out = {"x0": x0, "eps": noise, "v": a * noise - s2.sqrt() * x0}[target]
        if self.diffusion.config.learned_variance:
            out = torch.cat([out, torch.zeros_like(out)], 1)
        return out


def generators(n, seed=0):
    return [torch.Generator().manual_seed(seed + k) for k in range(n)]


def test_ddim_with_all_its_noise_gives_numbers_in_any_number_of_steps():
    """Five steps of the cosine schedule were a root of less than nothing: black pictures."""
    diffusion, x = gaussian(), torch.ones(1, 4)
    for steps in range(1, 1001):
        scheduler, _ = make_scheduler(diffusion, "ddim", steps)
        for t in scheduler.timesteps[:2]:
            assert scheduler.step(0 * x, t, x, eta=1.0, variance_noise=x)[0].isfinite().all(), steps


def sample(diffusion, model, cond, shape, config, generators, **more):
    guess = Guided(diffusion, model, cond, config, **more)
    noise = noise_of(generators, shape)
    return [*denoise(guess, diffusion, config, noise, generators)][-1].x


def condition(n):
    return Cond(image_embed=torch.zeros(n, 2))


@pytest.mark.parametrize("schedule", ["cosine", "linear"])
def test_schedules_equal_those_of_diffusers(schedule):
    name = {"cosine": "squaredcos_cap_v2", "linear": "linear"}[schedule]
    oracle = DDPMScheduler(beta_schedule=name)
    assert_close(betas(schedule, 1000).float(), oracle.betas, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("target", ["x0", "eps", "v"])
@pytest.mark.parametrize("shape", [(7,), (3, 4, 4)])
def test_x0_is_recovered_from_its_own_target(target, shape):
    diffusion = gaussian(target)
    x0, noise = torch.randn(5, *shape), torch.randn(5, *shape)
    t = torch.tensor([0, 10, 300, 700, 900])
    x_t = diffusion.q_sample(x0, t, noise)
    prediction = diffusion.target(x0, t, noise)
    assert_close(diffusion.x0_from(prediction, x_t, t), x0, rtol=1e-3, atol=1e-3)
    assert_close(diffusion.eps_from_x0(x0, x_t, t), noise, rtol=1e-3, atol=1e-3)


def test_noised_data_has_the_closed_form_mean_and_variance():
    diffusion = gaussian()
    x0 = torch.full((20000, 1), 0.5)
    x_t = diffusion.q_sample(x0, torch.full((20000,), 400), torch.randn(20000, 1))
    a_bar = diffusion.alpha_bar[400]
    assert abs(x_t.mean() - 0.5 * a_bar.sqrt()) < 0.03
    assert abs(x_t.var() - (1 - a_bar)) < 0.03


def test_the_loss_is_told_by_quarters_of_time():
    process = GaussianDiffusion(DiffusionConfig(target="x0", steps=10))
    t, quarters = torch.arange(10), [(0, 3), (3, 5), (5, 8), (8, 10)]
    x0 = torch.arange(1.0, 11.0)[:, None]
    losses = process.loss(lambda x_t, t, cond: torch.zeros_like(x_t), x0, Cond(), t, x0)
    assert_close(losses["loss"], x0[:, 0] ** 2)
    for k, (first, last) in enumerate(quarters):
        entry = losses[f"mse_q{k}"]
        assert entry.isnan().logical_not().nonzero().flatten().tolist() == [*range(first, last)]
        assert_close(entry[first:last], losses["loss"][first:last])


WEIGHTS = ["x0", "v", "min-snr", "sigmoid"]


@pytest.mark.parametrize("weight", WEIGHTS)
def test_a_weighted_error_counts_the_same_whatever_the_network_predicts(weight):
    x0, noise, t = torch.randn(4, 3), torch.randn(4, 3), torch.tensor([20, 300, 600, 900])
    guess, losses = x0 + torch.tensor([0.1, -0.2, 0.3]), []
    for target in ("x0", "eps", "v"):
        process = GaussianDiffusion(DiffusionConfig(target=target, weight=weight))

        def model(x_t, t, cond, process=process, target=target):
            eps = process.eps_from_x0(guess, x_t, t)
            a, s = (f(process.alpha_bar[t]).float()[:, None] for f in (torch.sqrt, _noise))
            return {"x0": guess, "eps": eps, "v": a * eps - s * guess}[target]

        losses.append(process.loss(model, x0, Cond(), t, noise)["loss"])
    assert_close(losses[1], losses[0], rtol=2e-3, atol=1e-6)
    assert_close(losses[2], losses[0], rtol=2e-3, atol=1e-6)
    snr = process.alpha_bar[t] / (1 - process.alpha_bar[t])
    closed = {
        "x0": torch.ones(4),
        "v": (1 + snr).clamp(max=20),
        "min-snr": snr.clamp(max=5),
        # The cosine schedule's λ = -2 log tan(πu/2), but for an offset of 0.008.
        "sigmoid": math.pi * (snr.log() / 2).cosh() * snr / (1 + snr / math.e**2),
    }[weight]
    error = 0.14 / 3
    assert_close(losses[0], error * closed.float(), rtol=4e-2, atol=1e-6)


def _noise(alpha_bar):
    return (1 - alpha_bar).sqrt()


def test_weights_leave_the_entries_by_time_and_the_variational_term_alone():
    t, noise, x0 = torch.tensor([10, 400, 990]), torch.randn(3, 3, 4, 4), torch.rand(3, 3, 4, 4)
    plain, weighted = (
        GaussianDiffusion(DiffusionConfig(target="eps", learned_variance=True, weight=weight)).loss(
            lambda x_t, t, cond: torch.cat([x_t, x_t], 1), x0, Cond(), t, noise
        )
        for weight in ("target", "min-snr")
    )
    for name in ("vlb", *(f"mse_q{k}" for k in range(4))):
        assert_close(weighted[name], plain[name], equal_nan=True)
    alpha_bar = gaussian().alpha_bar
    weights = loss_weights("min-snr", "eps", alpha_bar, 0.0)[t].float()
    assert_close(weighted["mse"], plain["mse"] * weights)
    assert_close(loss_weights("target", "eps", alpha_bar, 0.0), torch.ones(1000).double())


def test_the_loss_of_a_perfect_prediction_is_zero_and_needs_no_batch_mates():
    diffusion = gaussian("v")

    class Oracle:
        def __call__(self, x_t, t, cond):
            return diffusion.target(x0, t, noise)

    x0, noise, t = torch.randn(3, 3, 4, 4), torch.randn(3, 3, 4, 4), torch.tensor([1, 500, 999])
    assert_close(diffusion.loss(Oracle(), x0, condition(3), t, noise)["loss"], torch.zeros(3))


def test_the_variational_term_is_the_gaussian_kl_in_bits():
    diffusion = gaussian("x0", learned=True)
    x0, noise, t = torch.rand(2, 3, 4, 4) - 0.5, torch.randn(2, 3, 4, 4), torch.tensor([5, 600])
    guess, v = x0 + 0.1, torch.full_like(x0, 0.3)

    def model(x_t, t, cond):
        return torch.cat([guess, v], 1)

    losses = diffusion.loss(model, x0, condition(2), t, noise)
    true = torch.distributions.Normal(0.0, diffusion.posterior_variance[t].sqrt().float())
    std = (0.5 * diffusion.log_variance(v, t)).exp()[:, 0, 0, 0]
    shift = diffusion.posterior_mean_x0[t].float() * 0.1
    kl = torch.distributions.kl_divergence(true, torch.distributions.Normal(shift, std))
    assert_close(losses["vlb"], kl / math.log(2), rtol=1e-3, atol=1e-5)
    assert_close(losses["loss"], losses["mse"] + losses["vlb"])


def test_the_variational_term_teaches_the_variance_only():
    diffusion = gaussian("eps", learned=True)
    output = torch.randn(4, 6, 4, 4, requires_grad=True)
    t = torch.tensor([0, 1, 500, 999])
    losses = diffusion.loss(
        lambda *_: output,
        torch.randn(4, 3, 4, 4).clamp(-1, 1),
        condition(4),
        t,
        torch.randn(4, 3, 4, 4),
    )
    losses["vlb"].sum().backward()
    assert torch.isfinite(output.grad).all()
    assert_close(output.grad[:, :3], torch.zeros(4, 3, 4, 4))
    assert output.grad[:, 3:].abs().sum() > 0


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("target", ["x0", "eps", "v"])
def test_every_sampler_reproduces_a_gaussian(sampler, target):
    diffusion = gaussian(target)
    model = PerfectDenoiser(diffusion)
    steps = 400 if sampler == "ddpm" else 50  # the small posterior variance needs small steps
    config = SamplingConfig(sampler=sampler, steps=steps, clip=None)
    x = sample(diffusion, model, condition(64), (3, 8, 8), config, generators(64))
    assert abs(x.mean() - 0.3) < 0.02
    assert abs(x.std() - 0.4) < 0.02


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("steps", [1, 2, 7, 27])
def test_any_number_of_steps_gives_finite_samples(sampler, steps):
    diffusion = gaussian("eps")
    config = SamplingConfig(sampler=sampler, steps=steps, clip=1.0)
    x = sample(
        diffusion, PerfectDenoiser(diffusion), condition(2), (3, 4, 4), config, generators(2)
    )
    assert torch.isfinite(x).all()
    assert x.abs().max() <= 1.0 + 1e-4


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_a_sample_does_not_depend_on_its_batch(sampler):
    diffusion = gaussian("v")
    config = SamplingConfig(sampler=sampler, steps=5, eta=0.5)
    both = sample(
        diffusion, PerfectDenoiser(diffusion), condition(2), (3, 4, 4), config, generators(2)
    )
    one = sample(
        diffusion,
        PerfectDenoiser(diffusion),
        condition(1),
        (3, 4, 4),
        config,
        generators(1, seed=1),
    )
    assert_close(both[1:], one)


def test_guidance_one_costs_one_forward_and_more_costs_two():
    diffusion = gaussian("v")
    for guidance, rows in [(1.0, 2), (3.0, 4)]:
        model = PerfectDenoiser(diffusion)
        config = SamplingConfig(steps=3, guidance=guidance)
        sample(diffusion, model, condition(2), (3, 4, 4), config, generators(2))
        assert model.rows == [rows] * 3


def test_an_upsampler_is_guided_away_from_its_input_at_the_cost_of_one_forward():
    low_res, rows = torch.rand(2, 3, 4, 4), []

    class Brighter:
        def prepare(self, cond):
            return cond

        def __call__(self, x_t, t, cond):
            rows.append(len(x_t))
            return cond.low_res + 0.1

    config = SamplingConfig(steps=4, guidance=1.5, clip=None)
    cond = Cond(low_res=low_res)
    made = sample(gaussian("x0"), Brighter(), cond, (3, 4, 4), config, generators(2))
    assert_close(made, low_res + 0.15)
    assert rows == [2] * 4


class Told:
    """Predicts the mean of the image embedding it was told, and notes how many rows at which t."""

    def __init__(self):
        self.asked = []

    def prepare(self, cond):
        return cond

    def __call__(self, x_t, t, cond):
        self.asked.append((len(x_t), int(t[0])))
        mean = cond.image_embed.mean(1).view(-1, *[1] * (x_t.ndim - 1))
        return mean.expand_as(x_t).contiguous()


def told(*values):
    return Cond(image_embed=torch.tensor(values)[:, None].expand(-1, 2))


def test_guidance_leads_away_from_a_negative_condition():
    config = SamplingConfig(steps=3, guidance=4.0, clip=None)
    made = sample(
        gaussian("x0"), Told(), told(0.5), (3, 4, 4), config, generators(1), negative=told(0.4)
    )
    assert_close(made, torch.full_like(made, 0.4 + 4 * 0.1))


def test_guidance_acts_and_costs_within_its_interval_only():
    config = SamplingConfig(steps=10, guidance=3.0, interval=(0.2, 0.5), clip=None)
    model = Told()
    sample(gaussian("x0"), model, told(1.0), (3, 4, 4), config, generators(1), negative=told(0.0))
    for rows, t in model.asked:
        assert rows == (2 if 0.2 <= t / 999 <= 0.5 else 1)
    assert {rows for rows, _ in model.asked} == {1, 2}
    guess = Guided(gaussian("x0"), Told(), told(1.0), config, negative=told(0.0))
    x_t = torch.randn(1, 3, 4, 4)
    assert_close([float(guess(x_t, t)[0].mean()) for t in (0, 400, 900)], [1.0, 3.0, 1.0])
    with pytest.raises(ValueError, match="interval"):
        SamplingConfig(steps=10, interval=(0.5, 0.2))


@pytest.mark.parametrize("target", ["x0", "eps", "v"])
def test_a_time_shift_guesses_as_of_a_noisier_timestep(target):
    """The network is told it, its answer is read by it, and nothing lies above the noisiest."""
    plain = SamplingConfig(steps=10, guidance=3.0, interval=(0.2, 0.5), clip=None)
    shifted = plain.model_copy(update={"time_shift": 0.05})
    x_t, model = torch.randn(1, 3, 4, 4), Told()
    as_of, of = (
        Guided(gaussian(target), model, told(0.3), config, negative=told(0.1))
        for config in (plain, shifted)
    )
    for t, other in ((250, 300), (0, 50), (949, 999), (990, 999)):
        assert_close(of(x_t, t)[0], as_of(x_t, other)[0])
        assert [at for _, at in model.asked[-2:]] == [other, other]
    of(x_t, 480)  # guided by where x_t stands: 480 of 999 is within the interval, 530 is not
    assert model.asked[-1] == (2, 530)


def test_another_network_takes_the_last_step():
    for sampler in SAMPLERS:
        config = SamplingConfig(sampler=sampler, steps=4, clip=None)
        first, last = Told(), Told()
        sample(gaussian("x0"), first, told(1.0), (3, 4, 4), config, generators(1), last=last)
        assert (len(first.asked), len(last.asked)) == (3, 1)


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_x_may_be_replaced_between_steps_at_the_timestep_it_stands_at(sampler):
    """Half of the picture is put back, noised to where the trajectory stands: inpainting."""
    diffusion, known = gaussian("v"), torch.rand(2, 3, 4, 8) - 0.5
    config = SamplingConfig(sampler=sampler, steps=12, clip=None)
    noise, seen = noise_of(generators(2), (3, 4, 8)), []

    def after(x, t):
        seen.append(t)
        at = torch.full((2,), 0 if t is None else t)
        there = known if t is None else diffusion.q_sample(known, at, noise)
        return torch.cat([there[..., :4], x[..., 4:]], dim=-1)

    guess = Guided(diffusion, PerfectDenoiser(diffusion), condition(2), config)
    steps = [*denoise(guess, diffusion, config, noise, generators(2, seed=9), after)]
    _, timesteps = make_scheduler(diffusion, sampler, 12)
    assert seen == [step.t for step in steps] == [*timesteps[1:], None]
    assert_close(steps[-1].x[..., :4], known[..., :4])
    assert_close(steps[-1].x[..., 4:], steps[-1].x0[..., 4:], rtol=1e-3, atol=0.02)


@pytest.mark.parametrize("steps", [2, 25])
def test_learned_variance_trajectory_equals_unclip_scheduler(steps):
    """Guidance moves the prediction and leaves the variance channels of the conditional branch."""
    diffusion = gaussian("eps", learned=True)

    class Model:
        def prepare(self, cond):
            return cond

        def __call__(self, x_t, t, cond):
            gain = torch.where(cond.keep_image, 0.9, 0.5).view(-1, 1, 1, 1)
            return torch.cat([gain * x_t, gain * torch.sin(x_t)], 1)

    config = SamplingConfig(sampler="ddpm", steps=steps, guidance=3.0)
    ours = sample(diffusion, Model(), condition(1), (3, 4, 4), config, generators(1))

    oracle = UnCLIPScheduler(variance_type="learned_range")
    oracle.set_timesteps(steps)
    g = generators(1)
    x = torch.randn(1, 3, 4, 4, generator=g[0])
    for i, t in enumerate(oracle.timesteps):
        eps = 0.5 * x + 3.0 * (0.9 * x - 0.5 * x)
        following = oracle.timesteps[i + 1] if i + 1 < steps else None
        out = torch.cat([eps, 0.9 * torch.sin(x)], 1)
        x = oracle.step(out, t, x, prev_timestep=following, generator=g[0]).prev_sample
    assert_close(ours, x, rtol=1e-3, atol=2e-3)


def test_ddim_visits_the_trailing_timesteps_and_lands_on_x0():
    _, timesteps = make_scheduler(gaussian(), "ddim", 27)
    assert timesteps[0] == 999 and len(timesteps) == 27
    assert timesteps == sorted(timesteps, reverse=True)
    diffusion = gaussian("x0")

    class Constant(PerfectDenoiser):
        def __call__(self, x_t, t, cond):
            return torch.full_like(x_t, 0.25)

    x = sample(
        diffusion,
        Constant(diffusion),
        condition(1),
        (3, 4, 4),
        SamplingConfig(steps=27),
        generators(1),
    )
    assert_close(x, torch.full_like(x, 0.25))


def test_wrong_samplers_and_step_counts_are_refused_by_name():
    with pytest.raises(ConfigError, match=r"heun.*ddpm, ddim"):
        make_scheduler(gaussian(), "heun", 10)
    with pytest.raises(ConfigError, match="between 1 and 1000"):
        make_scheduler(gaussian(), "ddim", 1001)
