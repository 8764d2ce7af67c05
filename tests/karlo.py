"""Small folders in Karlo's layout, written by diffusers' own classes with random weights."""

from __future__ import annotations

import json
import os
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    KandinskyV22PriorPipeline,
    PriorTransformer,
    UnCLIPScheduler,
    UNet2DConditionModel,
    UNet2DModel,
)
from diffusers.pipelines.deprecated.unclip import UnCLIPImageVariationPipeline, UnCLIPPipeline
from diffusers.pipelines.deprecated.unclip.text_proj import UnCLIPTextProjModel
from open_clip.tokenizer import SimpleTokenizer
from parity import randomise
from transformers import (
    CLIPImageProcessor,
    CLIPTextConfig,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    CLIPVisionConfig,
    CLIPVisionModelWithProjection,
)


@dataclass(frozen=True)
class Shape:
    """Widths of a small Karlo."""

    embed: int = 16
    heads: int = 2
    head_channels: int = 8
    layers: int = 2
    length: int = 12
    widths: tuple[int, ...] = (16, 32)
    blocks: int = 1
    context: int = 24
    groups: int = 8
    small: int = 16
    large: int = 32


def tokenizer(folder: Path, length: int) -> CLIPTokenizer:
    """CLIP's tokenizer, with Karlo's padding token "!"."""
    bpe = SimpleTokenizer()
    folder.mkdir(parents=True, exist_ok=True)
    ends = {"<start_of_text>": "<|startoftext|>", "<end_of_text>": "<|endoftext|>"}
    words = {ends.get(word, word): index for word, index in bpe.encoder.items()}
    (folder / "vocab.json").write_text(json.dumps(words))
    merges = [" ".join(pair) for pair in bpe.bpe_ranks]
    (folder / "merges.txt").write_text("#version: 0.2\n" + "\n".join(merges) + "\n")
    return CLIPTokenizer(
        str(folder / "vocab.json"),
        str(folder / "merges.txt"),
        pad_token="!",
        model_max_length=length,
    )


def components(shape: Shape, folder: Path, *, images: bool) -> dict[str, Any]:
    """The parts of a text-to-image pipeline, or of one for image variations."""
    bpe = tokenizer(folder, shape.length)
    text = CLIPTextConfig(
        vocab_size=len(bpe),
        hidden_size=shape.embed,
        intermediate_size=2 * shape.embed,
        projection_dim=shape.embed,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=shape.length,
        eos_token_id=bpe.eos_token_id,
        bos_token_id=bpe.bos_token_id,
        pad_token_id=0,
    )
    n = len(shape.widths)
    unet = {
        "block_out_channels": shape.widths,
        "layers_per_block": shape.blocks,
        "norm_num_groups": shape.groups,
    }
    decoder = UNet2DConditionModel(
        sample_size=shape.small,
        in_channels=3,
        out_channels=6,
        down_block_types=("ResnetDownsampleBlock2D", *["SimpleCrossAttnDownBlock2D"] * (n - 1)),
        up_block_types=(*["SimpleCrossAttnUpBlock2D"] * (n - 1), "ResnetUpsampleBlock2D"),
        mid_block_type="UNetMidBlock2DSimpleCrossAttn",
        cross_attention_dim=shape.context,
        attention_head_dim=shape.head_channels,
        class_embed_type="identity",
        resnet_time_scale_shift="scale_shift",
        **unet,
    )
    parts: dict[str, Any] = {
        "decoder": decoder,
        "text_encoder": CLIPTextModelWithProjection(text),
        "tokenizer": bpe,
        "text_proj": UnCLIPTextProjModel(
            clip_embeddings_dim=shape.embed,
            time_embed_dim=4 * shape.widths[0],
            cross_attention_dim=shape.context,
        ),
        "decoder_scheduler": UnCLIPScheduler(
            variance_type="learned_range", prediction_type="epsilon", num_train_timesteps=1000
        ),
        "super_res_scheduler": UnCLIPScheduler(
            variance_type="fixed_small_log", prediction_type="epsilon", num_train_timesteps=1000
        ),
    }
    for name in ("super_res_first", "super_res_last"):
        parts[name] = UNet2DModel(
            sample_size=shape.large,
            in_channels=6,
            out_channels=3,
            down_block_types=("ResnetDownsampleBlock2D",) * n,
            up_block_types=("ResnetUpsampleBlock2D",) * n,
            add_attention=False,
            resnet_time_scale_shift="default",
            **unet,
        )
    if images:
        parts |= image_tower(shape)
    else:
        parts["prior"] = prior(shape)
        parts["prior_scheduler"] = UnCLIPScheduler(
            variance_type="fixed_small_log",
            prediction_type="sample",
            clip_sample_range=5.0,
            num_train_timesteps=1000,
        )
    for seed, part in enumerate(parts.values()):
        if isinstance(part, torch.nn.Module):
            randomise(part.eval(), seed, gain=0.7)
    return parts


def prior(shape: Shape) -> PriorTransformer:
    """A prior of that width."""
    return PriorTransformer(
        num_attention_heads=shape.heads,
        attention_head_dim=shape.head_channels,
        num_layers=shape.layers,
        embedding_dim=shape.embed,
        num_embeddings=shape.length,
    )


def image_tower(shape: Shape) -> dict[str, Any]:
    """CLIP's image tower and its preprocessing."""
    vision = CLIPVisionConfig(
        hidden_size=16,
        intermediate_size=32,
        projection_dim=shape.embed,
        num_hidden_layers=1,
        num_attention_heads=2,
        image_size=32,
        patch_size=8,
    )
    return {
        "image_encoder": CLIPVisionModelWithProjection(vision),
        "feature_extractor": CLIPImageProcessor(
            size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}
        ),
    }


def pipeline(shape: Shape, folder: Path, *, images: bool = False) -> Any:
    """Their pipeline, saved to `folder` with the index that the published files have."""
    parts = components(shape, folder.parent / f"{folder.name}-tokenizer", images=images)
    kind = UnCLIPImageVariationPipeline if images else UnCLIPPipeline
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        made = kind(**parts)
        made.save_pretrained(folder)
    made.set_progress_bar_config(disable=True)
    index = json.loads((folder / "model_index.json").read_text())
    index["text_proj"] = ["unclip", "UnCLIPTextProjModel"]
    (folder / "model_index.json").write_text(json.dumps(index, indent=2) + os.linesep)
    return made


def kandinsky_prior(shape: Shape, folder: Path) -> KandinskyV22PriorPipeline:
    """A prior in Kandinsky 2.2's layout, saved to `folder`."""
    parts = components(shape, folder.parent / f"{folder.name}-tokenizer", images=False)
    tower = image_tower(shape)
    randomise(tower["image_encoder"].eval(), 20)
    made = KandinskyV22PriorPipeline(
        prior=parts["prior"],
        text_encoder=parts["text_encoder"],
        tokenizer=parts["tokenizer"],
        scheduler=UnCLIPScheduler(
            variance_type="fixed_small_log",
            prediction_type="sample",
            clip_sample_range=10.0,
            num_train_timesteps=1000,
        ),
        image_encoder=tower["image_encoder"],
        image_processor=tower["feature_extractor"],
    )
    made.save_pretrained(folder)
    made.set_progress_bar_config(disable=True)
    return made
