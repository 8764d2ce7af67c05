"""A complete model with random weights that loads in milliseconds, for tests of everything."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from accelerate.state import AcceleratorState
from parity import randomise

from unclip.clip.encoder import FrozenCLIP
from unclip.clip.preprocessing import PreprocessConfig
from unclip.clip.towers import (
    BpeTokenizer,
    ClipConfig,
    OpenClipTowers,
    TextConfig,
    VisionConfig,
    build_clip,
    vocabulary_of,
)
from unclip.diffusion.process import DiffusionConfig, GaussianDiffusion
from unclip.diffusion.sampling import SamplingConfig
from unclip.models.decoder import Decoder, DecoderConfig
from unclip.models.layers import ScaleConfig
from unclip.models.prior import DiffusionPrior, PriorConfig
from unclip.models.transformer import TransformerConfig
from unclip.models.unet import UNetConfig
from unclip.models.upsampler import Upsampler, UpsamplerConfig
from unclip.pipeline import UnCLIP
from unclip.stages.stage import Stage

WIDTH, CONTEXT = 16, 12
WORDS = ["a red apple", "a blue square and two green circles"]


def tiny_clip(seed: int = 0) -> FrozenCLIP:
    """A CLIP of one layer a tower, with a vocabulary of a few words."""
    return FrozenCLIP(tiny_towers(WORDS, seed), PreprocessConfig(size=16), f"tiny {seed}")


def tiny_towers(texts: list[str], seed: int = 0) -> OpenClipTowers:
    """Its towers with random weights, which know the words of these texts."""
    vocabulary = vocabulary_of(texts, CONTEXT)
    config = ClipConfig(
        embed_dim=WIDTH,
        vision_cfg=VisionConfig(image_size=16, layers=1, width=16, head_width=8, patch_size=8),
        text_cfg=TextConfig(
            context_length=CONTEXT, vocab_size=len(vocabulary) + 1, width=16, heads=2, layers=1
        ),
    )
    model = build_clip(config)
    randomise(model, seed)
    return OpenClipTowers(model, BpeTokenizer(CONTEXT, vocabulary), config)


def stage(name: str, network, encoder: FrozenCLIP | None, target: str = "v", **sampling) -> Stage:
    """A stage with random weights; the last layers too, so that conditions matter."""
    randomise(network, 1)
    network.eval().requires_grad_(False)
    config = SamplingConfig(**{"sampler": "ddim", "steps": 2} | sampling)
    trained = encoder.fingerprint if encoder else None
    learned = getattr(network.config, "learned_variance", False)
    diffusion = DiffusionConfig(target=target, learned_variance=learned)
    return Stage(name, network, GaussianDiffusion(diffusion), config, trained)


def unet(attends: bool) -> UNetConfig:
    return UNetConfig(
        channels=8,
        multiple=[1, 2],
        blocks=1,
        attention=[False, attends],
        mid_attention=attends,
        head_channels=8,
        groups=2,
    )


def tiny_prior(clip: FrozenCLIP) -> Stage:
    transformer = TransformerConfig(width=16, layers=1, heads=2)
    network = DiffusionPrior(
        PriorConfig(
            embed=WIDTH,
            text_width=16,
            context=CONTEXT,
            transformer=transformer,
            scale=ScaleConfig(kind="whiten"),
        )
    )
    return stage("prior", network, clip, target="x0", clip=None)


def tiny_decoder(clip: FrozenCLIP) -> Stage:
    network = Decoder(
        DecoderConfig(
            resolution=16,
            embed=WIDTH,
            text_width=16,
            context_width=16,
            learned_variance=False,
            scale=ScaleConfig(kind="unit", factor=4.0),
            unet=unet(attends=True),
        )
    )
    return stage("decoder", network, clip, guidance=2.0)


def tiny_upsampler(high: int) -> Stage:
    network = Upsampler(UpsamplerConfig(low=high // 2, high=high, unet=unet(attends=False)))
    return stage(f"upsampler_{high}", network, None)


def tiny_pipeline(seed: int = 0) -> UnCLIP:
    clip = tiny_clip(seed)
    upsamplers = [tiny_upsampler(32), tiny_upsampler(64)]
    return UnCLIP(clip, tiny_prior(clip), tiny_decoder(clip), upsamplers)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers(config: pytest.Config) -> int:
    """As many processes as cores that we may use; pytest-xdist itself asks for physical ones."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@pytest.fixture(autouse=True, scope="session")
def one_thread() -> None:
    """Tiny networks run faster on one thread, and the same everywhere."""
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def own_accelerator() -> Iterator[None]:
    """accelerate keeps the precision of a process's first Accelerator for all that follow."""
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model folder with clip, prior, decoder (16 px), upsampler_32 and upsampler_64; read-only.

    Tests that damage it work on a copy.
    """
    folder = tmp_path_factory.mktemp("model") / "tiny"
    tiny_pipeline().save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def pipe(model_folder: Path) -> UnCLIP:
    """The pipeline of `model_folder`, in float32 on the CPU."""
    return UnCLIP.from_pretrained(model_folder)
