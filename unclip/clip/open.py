"""Where encoders come from: model folders, transformers, open_clip, and folders like Karlo's.

What is opened is given in parts, of which `FrozenCLIP` is made; `describe` puts them into the words
of a model folder.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from unclip.clip.fingerprint import PROBE_TEXTS
from unclip.clip.preprocessing import PreprocessConfig, transformers_preprocess
from unclip.clip.towers import (
    BpeTokenizer,
    ClipConfig,
    OpenClipTowers,
    Towers,
    TransformersTokenizer,
    TransformersTowers,
    build_clip,
)
from unclip.config import parse_config
from unclip.errors import CheckpointError, ConfigError
from unclip.files.diffusers import (
    IMAGE_ENCODER,
    PIPELINE,
    PROCESSING,
    PROCESSOR,
    TEXT_ENCODER,
    TOKENIZER,
    Folder,
)
from unclip.files.disk import read_json, tally
from unclip.files.find import resolve_folder
from unclip.files.folder import CONFIG, WEIGHTS
from unclip.files.tensors import TensorFile, load_tensors
from unclip.progress import without_bars
from unclip.shipped import located

CLIP_SIZE = 224  # side of the pictures that CLIP's own preprocessing makes
KEYS = ("missing", "unexpected", "mismatched")


class Parts(NamedTuple):
    """What makes a `FrozenCLIP`: its towers, what it does to pictures, what it is called."""

    towers: Towers
    preprocess: PreprocessConfig
    name: str


def open_encoder(source: str, dtype: torch.dtype = torch.float32) -> Parts:
    """An encoder's parts on the CPU; what can be read in `dtype` is.

    `source` is a model folder or its `clip` stage, a run of `unclip train clip`, a folder in
    Karlo's layout, a transformers CLIP folder, or an open_clip name and tag (or weights file) such
    as `ViT-L-14/openai`.

    **Raises**: `CheckpointError` if it can't be found or read; `ConfigError` if it is unclear.
    """
    path = located(source)
    if not path.is_dir():
        return _from_open_clip(source)
    if (path / PIPELINE).is_file():
        clip = from_folder(Folder(path), dtype)
        if clip is None:
            raise CheckpointError(f"{path} has no {TEXT_ENCODER}, which a CLIP encoder needs")
        return clip
    if not (path / CONFIG).is_file():
        return _from_stage(resolve_folder(path) / "clip")
    if read_json(path / CONFIG).get("model_type") == "clip":
        return _from_transformers(path)
    return _from_stage(path)


def _from_stage(stage: Path) -> Parts:
    where = str(stage / CONFIG)
    data = read_json(stage / CONFIG)
    try:
        return _build_stage(stage, data, where)
    except (ConfigError, KeyError, TypeError) as error:
        raise CheckpointError(f"{where} can't be used: {error}") from None


def _build_stage(stage: Path, data: dict[str, Any], where: str) -> Parts:
    towers: Towers
    if "model_cfg" in data:
        config = parse_config(data["model_cfg"], ClipConfig, where)
        tokenizer = BpeTokenizer(config.text_cfg.context_length, data.get("vocabulary"))
        model = build_clip(config)
        towers = OpenClipTowers(model, tokenizer, config)
    elif "transformers" in data:
        import transformers as hf

        said, vision = data["transformers"], None
        text = hf.CLIPTextModelWithProjection(hf.CLIPTextConfig(**said["text"]))
        if said["vision"] is not None:
            vision = hf.CLIPVisionModelWithProjection(hf.CLIPVisionConfig(**said["vision"]))
        tokenizer = BpeTokenizer(text.config.max_position_embeddings)
        model = towers = TransformersTowers(text, vision, tokenizer)
    else:
        raise CheckpointError(f"{where} describes no CLIP encoder: it has no 'model_cfg'")
    load_tensors(model, TensorFile(stage / WEIGHTS), str(stage / WEIGHTS))
    preprocess = parse_config(data["preprocess_cfg"], PreprocessConfig, where)
    return Parts(towers, preprocess, data["name"])


def describe(parts: Parts) -> dict[str, Any]:
    """What the `config.json` of a model folder's stage says of an encoder, but its fingerprint.

    **Raises**: `CheckpointError` for what a model folder can't describe.
    """
    towers, preprocess, name = parts
    said: dict[str, Any] = {"name": name, "preprocess_cfg": preprocess.model_dump()}
    if isinstance(towers, OpenClipTowers):
        if towers.config is None:
            raise CheckpointError(
                f"{name!r} has an architecture that a model folder does not describe; "
                "name the encoder by its open_clip name and tag instead of saving it"
            )
        model_cfg, vocabulary = towers.config.model_dump(), towers.tokenizer.vocabulary
        return {**said, "model_cfg": model_cfg, "vocabulary": vocabulary}
    own = BpeTokenizer(towers.tokenizer.context)
    if towers.tokenizer.raw(PROBE_TEXTS) != own.raw(PROBE_TEXTS):
        raise CheckpointError(
            f"{name!r} does not use CLIP's own byte-pair vocabulary, "
            "so a model folder can't hold it"
        )
    models: dict[str, Any] = {"text": towers.text, "vision": towers.vision}
    configs = {key: model and model.config.to_dict() for key, model in models.items()}
    return {**said, "transformers": configs}


def _from_open_clip(source: str) -> Parts:
    import open_clip

    name, _, tag = source.partition("/")
    if name not in open_clip.list_models() or not tag:
        raise ConfigError(
            f"clip = {source!r} is neither a folder nor an open_clip name and tag; expected for "
            "example weights/emoji, runs/emoji/clip or ViT-L-14/openai"
        )
    if Path(tag).suffix and Path(tag).suffix != ".safetensors" and Path(tag).is_file():
        raise CheckpointError(f"{tag}: only .safetensors weights are loaded from a file")
    trained = open_clip.pretrained.get_pretrained_cfg(name, tag)
    if not trained and not Path(tag).is_file():
        tags = ", ".join(open_clip.list_pretrained_tags_by_model(name))
        raise ConfigError(f"open_clip has no weights {tag!r} for {name}; it has: {tags}")
    # Weights trained with QuickGELU lose accuracy without a word under the plain name.
    quick = bool(trained.get("quick_gelu", False))
    try:
        model = open_clip.create_model(name, pretrained=tag, force_quick_gelu=quick)
    except (RuntimeError, OSError) as error:
        raise CheckpointError(f"open_clip could not load {source!r}: {error}") from None
    found = open_clip.get_model_preprocess_cfg(model)
    size = found["size"] if isinstance(found["size"], int) else found["size"][0]
    kept = {key: found[key] for key in PreprocessConfig.model_fields if key in found}
    preprocess = PreprocessConfig(**{**kept, "size": size})
    described: Any = open_clip.get_model_config(name)
    if quick:
        described["quick_gelu"] = True
    try:
        config = parse_config(described, ClipConfig, name)
    except ConfigError:
        config = None  # usable, but beyond what a model folder describes
    if described["text_cfg"].get("hf_tokenizer_name"):
        raise CheckpointError(f"{name} does not use CLIP's own byte-pair tokenizer")
    tokenizer = BpeTokenizer(described["text_cfg"].get("context_length", 77))
    return Parts(OpenClipTowers(model, tokenizer, config), preprocess, source)


def _from_transformers(path: Path) -> Parts:
    from transformers import CLIPModel, CLIPTextModelWithProjection, CLIPVisionModelWithProjection

    if (path / WEIGHTS).is_file():
        TensorFile(path / WEIGHTS)  # says so where it is cut short
    both = _whole(CLIPModel, path, use_safetensors=True)  # never a pickle
    for config in (both.config.text_config, both.config.vision_config):
        config.projection_dim = both.config.projection_dim
    with torch.device("meta"):  # shells: their parts come from the loaded model
        text = CLIPTextModelWithProjection(both.config.text_config)
        vision = CLIPVisionModelWithProjection(both.config.vision_config)
    text.text_model, text.text_projection = both.text_model, both.text_projection
    vision.vision_model, vision.visual_projection = both.vision_model, both.visual_projection
    processor = path / "preprocessor_config.json"
    data = read_json(processor) if processor.is_file() else {}
    preprocess = transformers_preprocess(data, vision.config.image_size)
    return _encoder(text, vision, path, preprocess, path.name)


def from_folder(folder: Folder, dtype: torch.dtype) -> Parts | None:
    """The encoder of a folder in Karlo's layout, with an image tower where it has one.

    **Raises**: `CheckpointError` if parts are missing, damaged or do not fit.
    """
    if not folder.has(TEXT_ENCODER, TOKENIZER):
        return None
    from transformers import CLIPTextModelWithProjection, CLIPVisionModelWithProjection

    text = _tower(CLIPTextModelWithProjection, folder, TEXT_ENCODER, dtype)
    vision, size = None, CLIP_SIZE
    processor: dict[str, Any] = {}
    if folder.has(IMAGE_ENCODER, PROCESSING):
        vision = _tower(CLIPVisionModelWithProjection, folder, IMAGE_ENCODER, dtype)
        size = vision.config.image_size
        processor = folder.config(PROCESSING, PROCESSOR)[0]
    preprocess = transformers_preprocess(processor, size)
    name = f"the CLIP of {folder.root.name}"
    return _encoder(text, vision, folder.parts[TOKENIZER], preprocess, name)


def _tower(kind: Any, folder: Folder, part: str, dtype: torch.dtype) -> Any:
    folder.tensors(part)  # refuses pickles and files that are cut short
    return _whole(
        kind,
        folder.parts[part],
        dtype=dtype,
        variant=folder.variant,
        use_safetensors=None if folder.allow_pickle else True,
        weights_only=True,
    )


def _whole(kind: Any, path: Path, **options: Any) -> Any:
    """A model of transformers, none of whose weights are left at random."""
    from transformers.utils import logging

    try:
        with without_bars(logging):
            model, report = kind.from_pretrained(
                path,
                local_files_only=True,
                ignore_mismatched_sizes=True,  # they are in the report
                output_loading_info=True,
                **options,
            )
    except Exception as error:  # whatever a damaged config.json provokes
        raise CheckpointError(
            f"{path} can't be used as transformers' {kind.__name__}: {_told(error)}"
        ) from None
    wrong = {how: sorted(report[f"{how}_keys"]) for how in KEYS}
    wrong["mismatched"] = [name for name, *_ in wrong["mismatched"]]  # and both shapes
    # Constants that older versions of transformers saved.
    wrong["unexpected"] = [n for n in wrong["unexpected"] if not n.endswith("position_ids")]
    if problems := tally(wrong):
        raise CheckpointError(f"{path} does not fit {kind.__name__}: {problems}")
    return model


def _told(error: Exception) -> str:
    """An error on one line, with its type, which says more than a key alone."""
    return " ".join(f"{type(error).__name__}: {error}".split())


def _encoder(
    text: nn.Module,
    vision: nn.Module | None,
    tokenizer: Path,
    preprocess: PreprocessConfig,
    name: str,
) -> Parts:
    """An encoder of transformers' two CLIP models and the folder of their tokenizer."""
    from transformers import CLIPTokenizer

    config: Any = text.config
    context = config.max_position_embeddings
    try:
        # Without model_max_length nothing is truncated.
        bpe = CLIPTokenizer.from_pretrained(tokenizer, model_max_length=context)
    except Exception as error:  # a vocabulary that is cut short is a bare one
        raise CheckpointError(f"no CLIP tokenizer in {tokenizer}: {_told(error)}") from None
    if 2 * len(bpe) < config.vocab_size:  # empty where files are missing; tables may be padded
        raise CheckpointError(
            f"no CLIP tokenizer in {tokenizer}: it has {len(bpe)} tokens, the encoder "
            f"{config.vocab_size}; expected the encoder's vocab.json and merges.txt, or its "
            "tokenizer.json"
        )
    towers = TransformersTowers(text, vision, TransformersTokenizer(bpe, context))
    return Parts(towers, preprocess, name)
