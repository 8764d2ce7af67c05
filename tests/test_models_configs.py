"""The large configurations load, and their networks have the published sizes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import PriorTransformer, UNet2DConditionModel, UNet2DModel
from diffusers.pipelines.deprecated.unclip.text_proj import UnCLIPTextProjModel
from torch import nn

from unclip.config import Config, load_config
from unclip.interop.names import Renamed, prior_names, text_proj_names, unet_names
from unclip.interop.settings import decoder_config, prior_config, upsampler_config
from unclip.models.decoder import Decoder
from unclip.models.prior import DiffusionPrior
from unclip.models.upsampler import Upsampler
from unclip.training.decoder import DecoderRun
from unclip.training.prior import PriorRun
from unclip.training.upsampler import UpsamplerRun

CONFIGS = Path(__file__).parent.parent / "configs"
STAGES: dict[str, tuple[type[Config], type[nn.Module]]] = {
    "prior": (PriorRun, DiffusionPrior),
    "decoder": (DecoderRun, Decoder),
    "upsampler": (UpsamplerRun, Upsampler),
}


def build(path: str) -> tuple[Any, Any]:
    schema, network = STAGES[Path(path).stem.split("_")[0]]
    run: Any = load_config(CONFIGS / path, [], schema)
    with torch.device("meta"):
        return run, network(run.model)


def parameters(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


@pytest.mark.parametrize(
    ("path", "part", "low", "high"),
    [
        ("dalle2/prior.yaml", "", 1.23e9, 1.23e9),
        ("dalle2/decoder.yaml", "unet", 2.24e9, 2.24e9),
        ("dalle2/decoder.yaml", "", 3.5e9, 3.5e9),
        ("dalle2/upsampler_256.yaml", "", 700e6, 730e6),
        ("dalle2/upsampler_1024.yaml", "", 282e6, 300e6),
    ],
)
def test_paper_sizes_are_reached_within_two_percent(
    path: str, part: str, low: float, high: float
) -> None:
    _, model = build(path)
    assert 0.98 * low <= parameters(model.get_submodule(part)) <= 1.02 * high


@pytest.mark.parametrize(
    ("name", "batch", "steps", "lr", "betas", "eps", "decay", "dropout"),
    [
        ("prior", 4096, 600_000, 1.1e-4, (0.9, 0.96), 1e-6, 6e-2, None),
        ("decoder", 2048, 800_000, 1.2e-4, (0.9, 0.999), 1e-8, 0.0, 0.1),
        ("upsampler_256", 1024, 1_000_000, 1.2e-4, (0.9, 0.999), 1e-8, 0.0, 0.1),
        ("upsampler_1024", 512, 1_000_000, 1e-4, (0.9, 0.999), 1e-8, 0.0, 0.0),
    ],
)
def test_paper_training_is_table_3(
    name: str,
    batch: int,
    steps: int,
    lr: float,
    betas: tuple[float, float],
    eps: float,
    decay: float,
    dropout: float | None,
) -> None:
    run, _ = build(f"dalle2/{name}.yaml")
    train = run.train
    assert (train.batch, train.steps, train.lr) == (batch, steps, lr)
    assert (tuple(train.betas), train.eps, train.weight_decay) == (betas, eps, decay)
    assert train.ema == 0.9999
    assert run.diffusion.steps == 1000
    assert run.diffusion.schedule == ("linear" if name == "upsampler_1024" else "cosine")
    if dropout is not None:
        assert run.model.unet.dropout == dropout


def test_the_papers_networks_are_told_what_glides_and_adms_are() -> None:
    """The decoder's time embedding had no pooled text, the upsamplers' did not scale."""
    assert build("dalle2/decoder.yaml")[0].model.text_embed
    for name in ("decoder", "upsampler_256", "upsampler_1024"):
        assert build(f"dalle2/{name}.yaml")[0].model.unet.scale_shift


@pytest.mark.parametrize("name", ["prior", "decoder", "upsampler_256", "upsampler_1024"])
def test_gpu24_headers_state_the_real_size(name: str) -> None:
    """The memory arithmetic starts from the parameter count, and stays below 24 GB."""
    path = f"gpu24/{name}.yaml"
    run, model = build(path)
    header = (CONFIGS / path).read_text(encoding="utf-8")
    millions = parameters(model) / 1e6
    assert f"{millions:.0f} M parameters x 20 bytes" in header
    assert f"= {20 * millions / 1e3:.1f} GB" in header
    assert f"micro-batches of {run.train.batch // run.train.accumulate} x" in header
    total = float(header.split("float32 bound) = ")[1].split(": ")[1].split(" GB")[0])
    assert 20 * millions / 1e3 < total < 22


# As published: PAPER's counts, learned statistics of the prior included.
PUBLISHED = {
    "prior": (
        {"num_attention_heads": 32, "attention_head_dim": 64},
        PriorTransformer,
        1_022_030_080,
    ),
    "decoder": (
        {
            "sample_size": 64,
            "in_channels": 3,
            "out_channels": 6,
            "down_block_types": ["ResnetDownsampleBlock2D"] + ["SimpleCrossAttnDownBlock2D"] * 3,
            "up_block_types": ["SimpleCrossAttnUpBlock2D"] * 3 + ["ResnetUpsampleBlock2D"],
            "mid_block_type": "UNetMidBlock2DSimpleCrossAttn",
            "block_out_channels": [320, 640, 960, 1280],
            "layers_per_block": 3,
            "cross_attention_dim": 1536,
            "attention_head_dim": 64,
            "class_embed_type": "identity",
            "resnet_time_scale_shift": "scale_shift",
        },
        UNet2DConditionModel,
        885_439_686,
    ),
    "upsampler": (
        {
            "sample_size": 256,
            "in_channels": 6,
            "out_channels": 3,
            "down_block_types": ["ResnetDownsampleBlock2D"] * 4,
            "up_block_types": ["ResnetUpsampleBlock2D"] * 4,
            "block_out_channels": [320, 640, 960, 1280],
            "layers_per_block": 3,
            "add_attention": False,
        },
        UNet2DModel,
        691_579_523,
    ),
}
TEXT_PROJ = {"clip_embeddings_dim": 768, "time_embed_dim": 1280, "cross_attention_dim": 1536}


@pytest.mark.parametrize("stage", PUBLISHED)
def test_karlos_published_sizes_are_ours_tensor_by_tensor(stage: str) -> None:
    settings, kind, count = PUBLISHED[stage]
    with torch.device("meta"):
        theirs, proj = kind(**settings), UnCLIPTextProjModel(**TEXT_PROJ)
    assert parameters(theirs) == count
    run, ours = build(f"karlo/{'upsampler_256' if stage == 'upsampler' else stage}.yaml")
    shapes = {name: x.shape for name, x in ours.state_dict().items()}
    if stage == "prior":
        assert prior_config(settings, "prior") == unchecked(run.model)
        Renamed(prior_names(run.model), theirs.state_dict(), shapes, "prior")
    elif stage == "decoder":
        assert decoder_config(settings, TEXT_PROJ, "decoder", "proj") == unchecked(run.model)
        assert parameters(proj) == 7_878_400
        Renamed(unet_names(run.model.unet), theirs.state_dict(), shapes, "decoder")
        Renamed(text_proj_names(run.model), proj.state_dict(), shapes, "text_proj")
    else:
        assert upsampler_config(settings, 64, "upsampler") == unchecked(run.model)
        Renamed(unet_names(run.model.unet), theirs.state_dict(), shapes, "upsampler")


def unchecked(model: Any) -> Any:
    """A network's configuration without gradient checkpointing, which files don't know."""
    data = model.model_dump()
    for part in ("transformer", "unet"):
        if part in data:
            data[part]["checkpointing"] = False
    return type(model).model_validate(data)


@pytest.mark.parametrize("name", ["prior", "decoder", "upsampler_256"])
def test_karlo_headers_state_the_real_size(name: str) -> None:
    _, model = build(f"karlo/{name}.yaml")
    header = (CONFIGS / f"karlo/{name}.yaml").read_text(encoding="utf-8")
    millions = parameters(model) / 1e6
    assert f"{millions:,.0f} M parameters x 20 bytes" in header
    assert f"= {20 * millions / 1e3:.1f} GB" in header
