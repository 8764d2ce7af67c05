"""The Gaussian diffusion process: schedule, q(x_t | x_0), targets and losses.

Ho et al. 2020 ("DDPM") and Nichol & Dhariwal 2021 ("improved DDPM"), as used in Appendix C of the
paper. One object serves embeddings (B, D) and images (B, C, H, W): every function takes (B, *).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Literal, Protocol

import torch
from pydantic import Field
from torch import Tensor

from unclip.conditioning import Cond
from unclip.config import Config

Target = Literal["x0", "eps", "v"]
Weight = Literal["target", "x0", "v", "min-snr", "sigmoid"]
V_CAP = 20.0  # of the weight `v` on x_0: beyond it little but rounding is left to learn
GAMMA = 5.0  # of `min-snr`, as published


class Denoiser(Protocol):
    """What a network looks like from here: it knows nothing of schedules, guidance or losses."""

    def __call__(self, x_t: Tensor, t: Tensor, cond: Cond) -> Tensor:
        """Predict the target from (x_t, t, cond)."""

    def prepare(self, cond: Cond) -> Cond:
        """The same conditions with everything that does not change between steps computed once."""


class Guess(Protocol):
    """What a sampler asks at each step, and all that it knows of networks and conditions."""

    def __call__(self, x_t: Tensor, t: int) -> tuple[Tensor, Tensor | None]:
        """x_0 and the channels of a learned variance. **Shapes**: (B, *) → (B, *), float32."""


class DiffusionConfig(Config):
    """A schedule and what the network predicts on it.

    `weight` says what the error at each timestep counts for in training (see `loss_weights`), and
    changes nothing else; `bias` is that of its `sigmoid`. In training t / steps is drawn as
    u^(1 / `time_power`), u evenly: above 1, noise is seen more often.
    """

    schedule: Literal["cosine", "linear"] = "cosine"
    steps: int = Field(1000, ge=1)
    target: Target
    learned_variance: bool = False
    weight: Weight = "target"
    bias: float = 2.0
    time_power: float = Field(default=1.0, gt=0)


class GaussianDiffusion:
    """q(x_t | x_0) = N(√ᾱ_t x_0, (1 − ᾱ_t) I), t = 0 the cleanest of `config.steps` timesteps.

    The schedule is held in float64 on the CPU, ᾱ as products of float32 numbers, which is how the
    published networks had it in training and sampling; whatever is computed from it is float32.
    `power` is what was measured of a network on it, E‖ε_θ‖²/d by timestep (see `analytic`).
    """

    def __init__(self, config: DiffusionConfig, power: Mapping[int, float] | None = None):
        self.config, self.power = config, dict(power or {})
        self.betas = betas(config.schedule, config.steps)
        alphas = 1 - self.betas
        self.alpha_bar = (1 - self.betas.float()).cumprod(0).double()
        previous = torch.cat([torch.ones(1, dtype=torch.float64), self.alpha_bar[:-1]])
        # The posterior q(x_{t-1} | x_t, x_0), DDPM equations 6 and 7.
        self.posterior_variance = self.betas * (1 - previous) / (1 - self.alpha_bar)
        self.posterior_mean_x0 = self.betas * previous.sqrt() / (1 - self.alpha_bar)
        self.posterior_mean_xt = (1 - previous) * alphas.sqrt() / (1 - self.alpha_bar)
        # β̃_0 is zero, so its logarithm is taken from β̃_1.
        small = torch.cat([self.posterior_variance[1:2], self.posterior_variance[1:]])
        values = {
            "signal": self.alpha_bar.sqrt(),
            "noise": (1 - self.alpha_bar).sqrt(),
            "mean_x0": self.posterior_mean_x0,
            "mean_xt": self.posterior_mean_xt,
            "log_small": small.log(),
            "log_large": self.betas.log(),
            "weight": loss_weights(config.weight, config.target, self.alpha_bar, config.bias),
        }
        # By device, so that looking up makes no host wait for an accelerator.
        self._tables = {torch.device("cpu"): {name: row.float() for name, row in values.items()}}

    def q_sample(self, x0: Tensor, t: Tensor, noise: Tensor) -> Tensor:
        """Noise x0 up to timestep t. **Shapes**: x0, noise (B, *); t (B,) int64 → (B, *)."""
        a, s = self._scales(t, x0)
        return a * x0 + s * noise

    def renoise(self, x: Tensor, s: int, t: int, noise: Tensor) -> Tensor:
        """From timestep s back up to a noisier t: q(x_t | x_s). **Shapes**: (B, *) → (B, *)."""
        ratio = float(self.alpha_bar[t] / self.alpha_bar[s])
        return ratio**0.5 * x + (1 - ratio) ** 0.5 * noise.to(x.device, x.dtype)

    def levels(self, signal: float) -> int:
        """How many timesteps keep at least this share √ᾱ of the signal."""
        return int((self.alpha_bar.sqrt() >= signal).sum())

    def target(self, x0: Tensor, t: Tensor, noise: Tensor) -> Tensor:
        """What the network should predict (v: Salimans & Ho 2022). **Shapes**: → (B, *)."""
        if self.config.target == "x0":
            return x0
        if self.config.target == "eps":
            return noise
        a, s = self._scales(t, x0)
        return a * noise - s * x0

    def x0_from(self, prediction: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
        """The clean sample that a prediction stands for. **Shapes**: (B, *) → (B, *)."""
        if self.config.target == "x0":
            return prediction
        a, s = self._scales(t, x_t)
        if self.config.target == "eps":
            return (x_t - s * prediction) / a
        return a * x_t - s * prediction

    def eps_from_x0(self, x0: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
        """The noise that leads from x0 to x_t. **Shapes**: (B, *) → (B, *)."""
        a, s = self._scales(t, x_t)
        return (x_t - a * x0) / s

    def split(self, output: Tensor) -> tuple[Tensor, Tensor | None]:
        """Separate a network's output into prediction and learned-variance channels."""
        if not self.config.learned_variance:
            return output, None
        prediction, variance = output.chunk(2, dim=1)
        return prediction, variance

    def loss(
        self,
        model: Callable[[Tensor, Tensor, Cond], Tensor],
        x0: Tensor,
        cond: Cond,
        t: Tensor,
        noise: Tensor,
        distance: Callable[[Tensor, Tensor], Tensor] | None = None,
    ) -> dict[str, Tensor]:
        """The training loss of each sample, in float32 whatever the network computed in.

        **Shapes**: x0, noise (B, *); t (B,) → each entry (B,). `loss` is what to minimise:
        L_simple, weighted as the configuration says, plus L_vlb on the variance channels (improved
        DDPM equation 16: 0.001 × the sum over T terms is 0.001 T times the one term sampled here).
        `mse_q0` to `mse_q3` are L_simple without weights by quarters of time, cleanest first, nan
        for the samples of other quarters. A `distance` between the guess of x0 and x0, → (B,), is
        added by the share ᾱ_t of the variance that is signal: where x0 is a matter of chance its
        guess is a mean, which looks like no sample and must not try to.
        """
        x_t = self.q_sample(x0, t, noise)
        prediction, variance = self.split(model(x_t, t, cond).float())
        mse = _mean((prediction - self.target(x0, t, noise)) ** 2)
        quarter = (t * 4 // self.config.steps).to(mse.device)
        by_time = {f"mse_q{k}": mse.where(quarter == k, torch.nan) for k in range(4)}
        mse = mse * self._at("weight", t, mse)
        if distance is not None:
            seen = distance(self.x0_from(prediction, x_t, t), x0)
            by_time["distance"] = seen
            mse = mse + self._at("signal", t, mse) ** 2 * seen
        if variance is None:
            return {"loss": mse, **by_time}
        # The mean is detached: L_vlb must teach the variance only.
        vlb = self._vlb(self.x0_from(prediction.detach(), x_t, t), variance, x0, x_t, t)
        return {"loss": mse + 0.001 * self.config.steps * vlb, "mse": mse, "vlb": vlb, **by_time}

    def log_variance(self, v: Tensor, t: Tensor) -> Tensor:
        """Interpolate between log β̃_t (v = −1) and log β_t (v = 1), improved DDPM equation 15."""
        low, high = self._at("log_small", t, v), self._at("log_large", t, v)
        share = (v + 1) / 2
        return share * high + (1 - share) * low

    def _vlb(self, x0_hat: Tensor, v: Tensor, x0: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
        """One term of the variational bound in bits per dimension. **Shapes**: (B, *) → (B,)."""
        c0, ct = self._at("mean_x0", t, x0), self._at("mean_xt", t, x0)
        true_mean, mean = c0 * x0 + ct * x_t, c0 * x0_hat.clamp(-1, 1) + ct * x_t
        true_log = self.log_variance(torch.full_like(v, -1), t)
        log_var = self.log_variance(v, t).clamp(-30, 20)
        gap = (true_mean - mean) ** 2
        kl = 0.5 * (log_var - true_log - 1 + (true_log - log_var).exp() + gap * (-log_var).exp())
        nll = -discretized_gaussian_log_likelihood(x0, mean, 0.5 * log_var)
        return torch.where(t == 0, _mean(nll), _mean(kl)) / math.log(2)

    def _scales(self, t: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
        return self._at("signal", t, like), self._at("noise", t, like)

    def _at(self, name: str, t: Tensor, like: Tensor) -> Tensor:
        """A table's values at t as float32, shaped to broadcast against `like`."""
        device = like.device
        if device not in self._tables:
            tables = self._tables[torch.device("cpu")]
            self._tables[device] = {
                key: row.to(device, non_blocking=True) for key, row in tables.items()
            }
        return self._tables[device][name][t.to(device)].view(-1, *[1] * (like.ndim - 1))


def betas(schedule: str, steps: int) -> Tensor:
    """β_t, cosine (improved DDPM, equation 17) or linear (DDPM). **Shapes**: (steps,) float64."""
    if schedule == "linear":
        scale = 1000 / steps
        return torch.linspace(1e-4 * scale, 0.02 * scale, steps, dtype=torch.float64).clamp(
            max=0.999
        )
    edges = torch.arange(steps + 1, dtype=torch.float64) / steps
    alpha_bar = ((edges + 0.008) / 1.008 * math.pi / 2).cos() ** 2
    return (1 - alpha_bar[1:] / alpha_bar[:-1]).clamp(max=0.999)


def loss_weights(weight: Weight, target: Target, alpha_bar: Tensor, bias: float) -> Tensor:
    """What the squared error of a network's target counts for at each timestep.

    With SNR = ᾱ / (1 − ᾱ) and λ its logarithm, the error on ε is SNR times that on x_0, the error
    on v 1 + SNR times (Salimans & Ho 2022, Section 4). `target` leaves the target's own error. In
    terms of x_0 the others count: `x0` 1; `v` 1 + SNR, at most 20; `min-snr` SNR, at most 5 (Hang
    et al. 2023, equation 6); `sigmoid` −½ dλ/du · sigmoid(bias − λ) · SNR with u = t / T, so that
    sigmoid(bias − λ) weighs the variational bound's error on ε whatever the schedule (Kingma & Gao
    2023, whose bias at 64 pixels is 2).

    **Shapes**: alpha_bar (T,) → (T,) float64.
    """
    snr = alpha_bar / (1 - alpha_bar)
    if weight == "target":
        return torch.ones_like(snr)
    if weight == "x0":
        on_x0 = torch.ones_like(snr)
    elif weight == "v":
        on_x0 = (1 + snr).clamp(max=V_CAP)
    elif weight == "min-snr":
        on_x0 = snr.clamp(max=GAMMA)
    else:
        slope = -len(snr) * torch.gradient(snr.log())[0]
        on_x0 = 0.5 * slope * torch.sigmoid(bias - snr.log()) * snr
    return on_x0 / {"x0": torch.ones_like(snr), "eps": snr, "v": 1 + snr}[target]


def discretized_gaussian_log_likelihood(x: Tensor, mean: Tensor, log_std: Tensor) -> Tensor:
    """log P of 8-bit pixels under a Gaussian, each pixel owning a bin of 2/255 (DDPM equation 13).

    **Units**: x in [-1, 1]; the outermost bins reach to infinity. **Shapes**: (B, *) → (B, *).
    """
    inverse = (-log_std).exp()
    upper = torch.special.ndtr((x - mean + 1 / 255) * inverse)
    lower = torch.special.ndtr((x - mean - 1 / 255) * inverse)
    upper = torch.where(x > 0.999, torch.ones_like(upper), upper)
    lower = torch.where(x < -0.999, torch.zeros_like(lower), lower)
    return (upper - lower).clamp(min=1e-12).log()


def _mean(x: Tensor) -> Tensor:
    return x.flatten(1).mean(1)
