"""CLIP towers in transformers' format: what diffusers' pipelines keep beside their networks."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from torch import nn

from unclip.clip.encoder import FrozenCLIP
from unclip.clip.preprocessing import PreprocessConfig
from unclip.clip.towers import END, START, OpenClipTowers, TransformersTowers
from unclip.errors import ConfigError
from unclip.files.diffusers import PROCESSOR
from unclip.files.disk import write_json
from unclip.interop.names import Names, pairs, to_diffusers

ENDS = {START: "<|startoftext|>", END: "<|endoftext|>"}
PADDING = "!"  # Karlo's, id 0


def to_transformers(clip: FrozenCLIP) -> tuple[nn.Module, nn.Module | None]:
    """An encoder's `CLIPTextModelWithProjection` and `CLIPVisionModelWithProjection`, if any.

    **Raises**: `ConfigError` for an architecture that these don't have.
    """
    towers = clip.towers
    if isinstance(towers, TransformersTowers):
        return towers.text, towers.vision
    return _text(towers), _vision(towers)


def _text(towers: OpenClipTowers) -> nn.Module:
    from transformers import CLIPTextConfig, CLIPTextModelWithProjection

    config = _described(towers)
    text, state = config.text_cfg, towers.model.state_dict()
    model = CLIPTextModelWithProjection(
        CLIPTextConfig(
            vocab_size=len(towers.tokenizer.rows),
            hidden_size=text.width,
            intermediate_size=4 * text.width,
            num_hidden_layers=text.layers,
            num_attention_heads=text.heads,
            max_position_embeddings=text.context_length,
            projection_dim=config.embed_dim,
            hidden_act="quick_gelu" if config.quick_gelu else "gelu",
            bos_token_id=START,
            eos_token_id=END,
            pad_token_id=0,
        )
    )
    # A table of the whole vocabulary: ids that this encoder doesn't know share a row.
    state["token_embedding.weight"] = state["token_embedding.weight"][towers.tokenizer.rows]
    names: Names = {
        "token_embedding.weight": ("text_model.embeddings.token_embedding.weight",),
        "positional_embedding": ("text_model.embeddings.position_embedding.weight",),
    }
    names |= _layers("transformer", "text_model", text.layers)
    names |= pairs({"ln_final": ("text_model.final_layer_norm",)})
    projection = {"text_projection.weight": state["text_projection"].T}
    model.load_state_dict(to_diffusers(names, state) | projection)
    return model.to(state["text_projection"].dtype)


def _vision(towers: OpenClipTowers) -> nn.Module:
    from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

    config = _described(towers)
    vision, state = config.vision_cfg, towers.model.state_dict()
    if not isinstance(vision.layers, int):
        raise ConfigError("clip: Karlo's layout has no ResNet as image tower, only a ViT")
    model = CLIPVisionModelWithProjection(
        CLIPVisionConfig(
            hidden_size=vision.width,
            intermediate_size=4 * vision.width,
            num_hidden_layers=vision.layers,
            num_attention_heads=vision.width // vision.head_width,
            image_size=vision.image_size,
            patch_size=vision.patch_size,
            projection_dim=config.embed_dim,
            hidden_act="quick_gelu" if config.quick_gelu else "gelu",
        )
    )
    table = "vision_model.embeddings"
    names: Names = {
        "visual.class_embedding": (f"{table}.class_embedding",),
        "visual.conv1.weight": (f"{table}.patch_embedding.weight",),
        "visual.positional_embedding": (f"{table}.position_embedding.weight",),
    }
    names |= _layers("visual.transformer", "vision_model", vision.layers)
    names |= pairs(
        {
            "visual.ln_pre": ("vision_model.pre_layrnorm",),  # transformers' own spelling
            "visual.ln_post": ("vision_model.post_layernorm",),
        }
    )
    projection = {"visual_projection.weight": state["visual.proj"].T}
    model.load_state_dict(to_diffusers(names, state) | projection)
    return model.to(state["visual.proj"].dtype)


def _layers(ours: str, theirs: str, count: int) -> Names:
    names: Names = {}
    for i in range(count):
        a, b = f"{ours}.resblocks.{i}", f"{theirs}.encoder.layers.{i}"
        names |= pairs(
            {
                f"{a}.ln_1": (f"{b}.layer_norm1",),
                f"{a}.attn.out_proj": (f"{b}.self_attn.out_proj",),
                f"{a}.ln_2": (f"{b}.layer_norm2",),
                f"{a}.mlp.c_fc": (f"{b}.mlp.fc1",),
                f"{a}.mlp.c_proj": (f"{b}.mlp.fc2",),
            }
        )
        for kind in ("weight", "bias"):
            qkv = tuple(f"{b}.self_attn.{part}_proj.{kind}" for part in "qkv")
            names[f"{a}.attn.in_proj_{kind}"] = qkv
    return names


def _described(towers: OpenClipTowers) -> Any:
    if towers.config is None:
        raise ConfigError(
            "clip: Karlo's layout has no such architecture, only CLIP's own two towers"
        )
    return towers.config


def write_tokenizer(folder: Path, context: int) -> None:
    """CLIP's byte-pair tokenizer with Karlo's padding, in files that old transformers read too."""
    from open_clip.tokenizer import SimpleTokenizer

    bpe = SimpleTokenizer()
    folder.mkdir(parents=True)
    words = {ENDS.get(index, word): index for word, index in bpe.encoder.items()}
    merges = ["#version: 0.2", *(" ".join(pair) for pair in bpe.bpe_ranks)]
    (folder / "vocab.json").write_text(json.dumps(words, ensure_ascii=False), encoding="utf-8")
    (folder / "merges.txt").write_text("\n".join(merges) + "\n", encoding="utf-8")
    special = {
        "bos_token": ENDS[START],
        "eos_token": ENDS[END],
        "unk_token": ENDS[END],
        "pad_token": PADDING,
    }
    write_json(folder / "special_tokens_map.json", special)
    settings = {"tokenizer_class": "CLIPTokenizer", "model_max_length": context, **special}
    more = {"add_prefix_space": False, "do_lower_case": True, "errors": "replace"}
    write_json(folder / "tokenizer_config.json", settings | more)


def write_processor(folder: Path, config: PreprocessConfig) -> None:
    """The preprocessing of pictures as transformers' `CLIPImageProcessor` has it."""
    folder.mkdir(parents=True)
    square = {"height": config.size, "width": config.size}
    shortest = config.resize_mode == "shortest"
    write_json(
        folder / PROCESSOR,
        {
            "image_processor_type": "CLIPImageProcessor",
            "do_resize": True,
            "size": {"shortest_edge": config.size} if shortest else square,
            "resample": 3 if config.interpolation == "bicubic" else 2,
            "do_center_crop": True,
            "crop_size": square,
            "do_rescale": True,
            "rescale_factor": 1 / 255,
            "do_normalize": True,
            "image_mean": list(config.mean),
            "image_std": list(config.std),
            "do_convert_rgb": True,
        },
    )
