"""The figures that diffusers' own tests expect of unCLIP's parts, expected of ours.

Facts taken from tests/schedulers/test_scheduler_unclip.py and tests/models/unets/
test_unet_2d_blocks.py of github.com/huggingface/diffusers (Apache-2.0); its weights are drawn by
its own classes from the same seeds and copied into our networks.
"""

from __future__ import annotations

import pytest
import torch
from diffusers.models.unets import unet_2d_blocks as published
from parity import copy_weights
from torch import Tensor, nn
from torch.nn.functional import silu
from torch.testing import assert_close

from unclip.conditioning import Cond
from unclip.diffusion.guidance import Guided
from unclip.diffusion.process import DiffusionConfig, GaussianDiffusion
from unclip.diffusion.sampling import SamplingConfig, denoise
from unclip.interop.names import Names, _block, _resnet
from unclip.models.unet import Block, UNetConfig

CONFIG = UNetConfig(
    channels=32,
    multiple=[1],
    blocks=1,
    attention=[True],
    mid_attention=True,
    head_channels=1,
    scale_shift=False,
)


@pytest.mark.parametrize(("t", "deviation"), [(0, 1e-10), (487, 0.0549625), (999, 0.9994987)])
def test_the_small_variance(t: int, deviation: float) -> None:
    process = GaussianDiffusion(DiffusionConfig(target="eps"))
    assert abs(float(process.posterior_variance[t]) ** 0.5 - deviation) < 1e-5


@pytest.mark.parametrize(
    ("t", "expected"), [(1, -10.1712790), (487, -5.7998052), (999, -0.0010011)]
)
def test_the_learned_variance(t: int, expected: float) -> None:
    process = GaussianDiffusion(DiffusionConfig(target="eps", learned_variance=True))
    assert (
        abs(float(process.log_variance(torch.tensor([0.5]), torch.tensor([t]))) - expected) < 1e-4
    )


class Fading:
    """The denoiser of those tests: ε is x_t, a little less of it towards the end."""

    def prepare(self, cond: Cond) -> Cond:
        return cond

    def __call__(self, x_t: Tensor, t: Tensor, cond: Cond) -> Tensor:
        return x_t * (t / (t + 1)).view(-1, 1, 1, 1)


@pytest.mark.parametrize(
    ("steps", "total", "mean"), [(1000, 252.2682495, 0.3284743), (25, 258.2044983, 0.3362038)]
)
def test_whole_trajectories_of_the_ancestral_sampler(steps: int, total: float, mean: float) -> None:
    """Their four pictures share a generator; as one of twelve channels they do here."""
    process = GaussianDiffusion(DiffusionConfig(target="eps"))
    config = SamplingConfig(sampler="ddpm", steps=steps, clip=1.0)
    ramp = torch.arange(768.0).view(3, 8, 8, 4).permute(3, 0, 1, 2) / 768
    guess = Guided(process, Fading(), Cond(image_embed=torch.zeros(1, 1)), config)
    generators = [torch.Generator().manual_seed(0)]
    *_, last = denoise(guess, process, config, ramp.reshape(1, 12, 8, 8), generators)
    assert abs(float(last.x.abs().sum()) - total) < 1e-2
    assert abs(float(last.x.abs().mean()) - mean) < 1e-3


# The last 3 x 3 pixels of the first picture's last channel.
BLOCKS = {
    "ResnetDownsampleBlock2D": [
        *(0.0710, 0.2410, -0.7320, -1.0757, -1.1343, 0.3540, -0.0133, -0.2576, 0.0948)
    ],
    "SimpleCrossAttnDownBlock2D": [
        *(0.7921, -0.0992, -0.1962, -0.7695, -0.4242, 0.7804, 0.4737, 0.2765, 0.3338)
    ],
    "UNetMidBlock2DSimpleCrossAttn": [
        *(0.7143, 1.9974, 0.5448, 1.3977, 0.1282, -1.1237, -1.4238, 0.5530, 0.8880)
    ],
    "ResnetUpsampleBlock2D": [
        *(0.2287, 0.3549, -0.1346, 0.4797, -0.1715, -0.9649, 0.7305, -0.5864, -0.6244)
    ],
    "SimpleCrossAttnUpBlock2D": [
        *(0.2645, 0.1480, 0.0909, 0.8044, -0.9758, -0.9083, 0.0994, -1.1453, -0.7402)
    ],
}


@pytest.mark.parametrize("name", BLOCKS)
@torch.no_grad()
def test_the_blocks_of_the_u_net(name: str) -> None:
    """The context is unseeded there: among 1,024 pixels its 32 tokens weigh less than 0.005."""
    crosses, goes = "Cross" in name, next(way for way in ("Down", "Mid", "Up") if way in name)
    torch.manual_seed(0)
    x, emb = torch.randn(4, 32, 32, 32), torch.randn(4, 128)
    options = {"in_channels": 32, "temb_channels": 128}
    if goes == "Up":
        torch.manual_seed(1)
        x = torch.cat([x, torch.randn(4, 32, 32, 32)], dim=1)
        options["prev_output_channel"] = 32
    if goes != "Mid":
        options["out_channels"] = 32
    if crosses:
        options["cross_attention_dim"] = 32
    theirs = nn.ModuleDict({"b": getattr(published, name)(**options)})

    context_width = 32 if crosses else None
    blocks = [Block(x.shape[1], 32, CONFIG, context_width=context_width)]
    names: Names = _block("0", "b", 0, x.shape[1] != 32, attends=crosses)
    if goes == "Mid":
        blocks.append(Block(32, 32, CONFIG))
        names |= _block("1", "b", 1, False, attends=False)
    else:
        resample = "down" if goes == "Down" else "up"
        blocks.append(Block(32, 32, CONFIG, resample=resample))
        names |= _resnet("1", f"b.{resample}samplers.0", False)
    ours = nn.ModuleList(blocks).eval()
    copy_weights(ours, (names, theirs))

    context = torch.rand(4, 32, 32, generator=torch.Generator().manual_seed(0))
    kv = blocks[0].attention.encode(context) if blocks[0].attention is not None else ()
    out = blocks[1](blocks[0](x, silu(emb), *kv, *[None] * crosses), silu(emb))
    assert out.shape[-1] == {"Down": 16, "Mid": 32, "Up": 64}[goes]
    assert_close(out[0, -1, -3:, -3:].flatten(), torch.tensor(BLOCKS[name]), rtol=0, atol=5e-3)
