"""A critic of what a decoder draws by itself in few steps (Goodfellow et al. 2014).

Squared error asks for the mean of what a picture may be, and knows only real pictures under noise;
a sampler goes on from its own mistakes. So a share of each batch is drawn by the decoder as a
sampler does, and its last guess is to pass for real: a critic looks at it through the frozen
encoder, as in adversarial diffusion distillation (Sauer et al. 2023), here with no teacher but the
loss on the rest of the batch.

B rows of which n are drawn, D CLIP embedding, R picture side, P places where something is seen.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import islice

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn
from torch.func import functional_call

from unclip.conditioning import Cond
from unclip.config import Config
from unclip.diffusion.process import GaussianDiffusion
from unclip.diffusion.sampling import SamplingConfig, denoise
from unclip.diffusion.schedulers import make_scheduler
from unclip.errors import ConfigError
from unclip.randomness import noise_of
from unclip.stages.stage import Stage

RATE = 8  # how much faster than the network a critic learns, or it would not keep up
Look = Callable[[Tensor], list[Tensor]]  # see `FrozenCLIP.features`


class AdversaryConfig(Config):
    """The share `share` of a batch is drawn in `steps` steps of DDIM with all its noise and without
    guidance, each batch up to another of them; `weight` is what the critic's verdict counts for."""

    weight: float = Field(0.03, gt=0)
    share: float = Field(0.6, gt=0, lt=1)
    steps: int = Field(4, ge=1)


class Head(nn.Module):
    """Whether features at each place are those of a real picture with this embedding; the embedding
    enters as a projection (Miyato & Koyama 2018)."""

    def __init__(self, channels: int, embed: int, width: int = 128) -> None:
        super().__init__()
        self.into = nn.Conv2d(channels, width, 1)
        self.around = nn.Conv2d(width, width, 3, padding=1)
        self.out = nn.Conv2d(width, 1, 1)
        self.told = nn.Linear(embed, width)
        with torch.no_grad():  # small weights on large inputs: the same steps go further
            for part in (self.into, self.around, self.out, self.told):
                part.weight.div_(RATE)

    def forward(self, seen: Tensor, z: Tensor) -> Tensor:
        """Logits. **Shapes**: (n, C, h, w), (n, D) → (n, P)."""
        x = F.normalize(seen.float(), dim=1) * seen.shape[1] ** 0.5
        x = F.leaky_relu(self.into(RATE * x), 0.2)
        x = F.leaky_relu(self.around(RATE * x), 0.2)  # (n, W, h, w)
        fits = (x * self.told(RATE * z)[..., None, None]).sum(1, keepdim=True) / x.shape[1] ** 0.5
        return (self.out(RATE * x) + fits).flatten(1).float()


class Critic(nn.Module):
    """Judges whole pictures and a quarter of each, enlarged, by every stage of a frozen encoder."""

    def __init__(self, look: Look, side: int, embed: int) -> None:
        super().__init__()
        self.look, self.side = look, side
        with torch.no_grad():
            stages = look(torch.zeros(1, 3, side, side))
        self.heads = nn.ModuleList(Head(x.shape[1], embed) for x in stages * 2)

    def seen(self, images: Tensor, corners: Tensor) -> list[Tensor]:
        """What the encoder sees of the pictures, then of the quarters that begin at these corners.

        **Shapes**: (n, 3, R, R), (n, 2) row and column → (n, C, h, w) each.
        """
        along = corners[..., None] + torch.arange(self.side // 2, device=images.device)
        rows, columns = along[:, 0, :, None], along[:, 1, None]  # (n, R/2, 1), (n, 1, R/2)
        each = torch.arange(len(images), device=images.device)[:, None, None]
        quarters = images.movedim(1, -1)[each, rows, columns].movedim(-1, 1)
        return self.look(images) + self.look(quarters)

    def forward(self, seen: Sequence[Tensor], z: Tensor) -> list[Tensor]:
        """Logits of each head. **Shapes**: (n, C, h, w) each, (n, D) → (n, P) each."""
        return [head(x, z) for head, x in zip(self.heads, seen, strict=True)]


class Contested(nn.Module):
    """A network and its critic, which learn from the same pass, each its own part."""

    def __init__(self, network: nn.Module, critic: Critic, diffusion: GaussianDiffusion) -> None:
        super().__init__()
        self.network, self.critic, self.diffusion = network, critic, diffusion

    def forward(
        self,
        x_t: Tensor,
        t: Tensor,
        cond: Cond,
        real: Tensor,
        z: Tensor,
        corners: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The network's prediction, and of the last n rows how wrong the critic is (the hinge loss
        of Lim & Ye 2017) and how unreal their guesses of x_0 look to it.

        **Shapes**: x_t (B, 3, R, R), t (B,), cond B rows; real (n, 3, R, R), z (n, D), corners
        (n, 2) → (B, 3 or 6, R, R), (n,), (n,).
        """
        out = self.network(x_t, t, cond)
        drawn = slice(len(x_t) - len(real), None)
        prediction, _ = self.diffusion.split(out[drawn].float())
        guess = self.diffusion.x0_from(prediction, x_t[drawn], t[drawn])
        seen = self.critic.seen(guess, corners)
        on_real = self.critic(self.critic.seen(real, corners), z)
        on_guess = self.critic([x.detach() for x in seen], z)
        errors = [
            F.relu(1 - a).mean(1) + F.relu(1 + b).mean(1)
            for a, b in zip(on_real, on_guess, strict=True)
        ]
        as_it_is = {name: value.detach() for name, value in self.critic.named_parameters()}
        verdict = functional_call(self.critic, as_it_is, (seen, z))
        unreal = [-logits.mean(1) for logits in verdict]
        return out, torch.stack(errors).mean(0), torch.stack(unreal).mean(0)


@dataclass(frozen=True)
class Drawn:
    """n pictures that a decoder has drawn up to a step, and the real ones of these embeddings.

    **Shapes**: x_t, real (n, 3, R, R); t (n,); cond n rows; z (n, D) as the network scales them;
    corners (n, 2) of the quarters that the critic sees enlarged.
    """

    x_t: Tensor
    t: Tensor
    cond: Cond
    real: Tensor
    z: Tensor
    corners: Tensor


class Together:
    """A contested model as the denoiser of other rows, which takes drawn ones along: one pass."""

    def __init__(self, model: nn.Module, drawn: Drawn) -> None:
        self.model, self.drawn = model, drawn

    def __call__(self, x_t: Tensor, t: Tensor, cond: Cond) -> Tensor:
        """The prediction for these rows. **Shapes**: see `Denoiser`."""
        own = self.drawn
        x_t, cond = torch.cat([x_t, own.x_t]), Cond.cat([cond, own.cond])
        told = own.real, own.z, own.corners
        out, self.error, self.unreal = self.model(x_t, torch.cat([t, own.t]), cond, *told)
        return out[: len(t)]

    def losses(
        self, found: dict[str, Tensor], own: Tensor, rest: Tensor, weight: float
    ) -> dict[str, Tensor]:
        """What `GaussianDiffusion.loss` found of the rest, and the critic of the drawn rows.

        **Shapes**: entries (B - n,), own (n,) and rest (B - n,) row numbers → entries (B,).
        """
        n = len(own) + len(rest)
        critic = {"critic": self.error.detach(), "unreal": self.unreal.detach()}
        critic["loss"] = weight * self.unreal + self.error
        missing = self.unreal.new_full((n,), torch.nan)
        return {
            key: missing.index_copy(0, rest, found.get(key, missing[rest])).index_copy(
                0, own, critic.get(key, missing[own])
            )
            for key in {**found, **critic}
        }


def parted(ids: Tensor, share: float) -> tuple[Tensor, Tensor]:
    """Which rows are drawn and which are not: evenly among ids, so that any few in a row have some
    of both.

    **Shapes**: (B,) → (n,), (B - n,) row numbers, both on the CPU. **Raises**: `ConfigError` if
    there are too few rows for that.
    """
    drawn = ((ids + 1) * share).floor() > (ids * share).floor()
    parts = drawn.nonzero().flatten(), (~drawn).nonzero().flatten()
    if not all(map(len, parts)):
        raise ConfigError(
            f"adversary.share = {share}: of {len(ids)} samples at a time {len(parts[0])} are "
            "drawn, but some must be and some not; raise train.batch, or bring share nearer to 0.5"
        )
    return parts


def drawn_to(
    stage: Stage, cond: Cond, steps: int, level: int, generators: Sequence[torch.Generator]
) -> tuple[Tensor, Tensor]:
    """What a sampler of so many steps, DDIM with all its noise, has got to after `level` of them.

    **Shapes**: n rows, n generators → x_t (n, 3, R, R) float32, t (n,).
    """
    config = SamplingConfig(sampler="ddim", steps=steps, eta=1.0, clip=stage.sampling.clip)
    x = noise_of(generators, stage.shape).to(cond.device, non_blocking=True)
    t = make_scheduler(stage.diffusion, config.sampler, steps)[1][level]
    guess = stage.guess(cond, config)
    for step in islice(denoise(guess, stage.diffusion, config, x, generators), level):
        x = step.x
    return x, torch.full((len(x),), t, device=x.device)
