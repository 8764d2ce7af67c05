"""The frozen CLIP encoder (Section 2): where it comes from, what it gives, and which one it is.

B batch, D CLIP embedding, L text positions, W text width, R the tower's picture side.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from unclip.conditioning import TextEncoding
from unclip.config import Config, parse_config
from unclip.data.images import to_rgb, to_tensor
from unclip.errors import CheckpointError, ConfigError
from unclip.folder import (
    CONFIG,
    WEIGHTS,
    load_tensors,
    read_json,
    read_tensors,
    resolve_folder,
    write_stage,
)
from unclip.preprocessing import (
    PreprocessConfig,
    resize_and_crop,
    resize_pil,
    transformers_preprocess,
)
from unclip.towers import (
    BpeTokenizer,
    ClipConfig,
    OpenClipTowers,
    TransformersTokenizer,
    TransformersTowers,
    build_clip,
)

Towers = OpenClipTowers | TransformersTowers
PROBE_TEXTS = ("", "a red apple", "two dogs playing in the snow")
SAME = 0.999  # fp16 and fp32, open_clip and transformers copies of one tower agree to this cosine


class Fingerprint(Config):
    """Which encoder made an embedding. `name` is for messages; everything else must agree.

    **Shapes**: probes (6, D) unit norm: three fixed pictures, then three fixed sentences.
    """

    name: str
    width: int
    text_width: int
    context: int
    tokenizer: str
    padding: str
    preprocessing: str
    probes: list[list[float]]


def check_same_encoder(a: Fingerprint, b: Fingerprint, what: str) -> None:
    """Check that embeddings of one encoder may be used where those of the other are expected.

    **Raises**: `CheckpointError` naming both and what differs; `what` names who asks.
    """
    keys = ("width", "text_width", "context", "tokenizer", "padding", "preprocessing")
    differs = [
        f"{key} {getattr(a, key)!r} and {getattr(b, key)!r}"
        for key in keys
        if getattr(a, key) != getattr(b, key)
    ]
    if not differs:
        cosine = F.cosine_similarity(torch.tensor(a.probes), torch.tensor(b.probes), dim=-1).min()
        if not cosine >= SAME:
            differs = [f"embeddings of the probes agree only to cosine {cosine:.4f}"]
    if differs:
        raise CheckpointError(
            f"{what}: {a.name!r} and {b.name!r} are different CLIP encoders "
            f"({'; '.join(differs)}); use the encoder that the weights were trained with"
        )


class FrozenCLIP(nn.Module):
    """CLIP's towers, frozen, in evaluation mode, with their own preprocessing and tokenizer.

    `width` D, `text_width` W, `context` L, `image_size` R. Embeddings are raw (not normalised).
    The towers passed in are frozen in place.
    """

    def __init__(self, towers: Towers, preprocess: PreprocessConfig, name: str) -> None:
        super().__init__()
        self.towers = towers.eval().requires_grad_(False)
        self.preprocess, self.name = preprocess, name
        self.width, self.text_width = towers.width, towers.text_width
        self.context, self.image_size = towers.tokenizer.context, preprocess.size
        self._null: TextEncoding | None = None

    @classmethod
    def load(
        cls, source: str, device: str | torch.device = "cpu", dtype: torch.dtype = torch.float32
    ) -> FrozenCLIP:
        """Load an encoder.

        `source` is a model folder or its `clip` stage, a run of `train/clip.py`, a transformers
        CLIP folder, or an open_clip name and tag (or weights file) such as `ViT-L-14/openai`.

        **Raises**: `CheckpointError` if it can't be found or read; `ConfigError` if it is unclear.
        """
        path = Path(source)
        if not path.is_dir():
            clip = _from_open_clip(source)
        elif not (path / CONFIG).is_file():
            clip = _from_stage(resolve_folder(path) / "clip")
        elif read_json(path / CONFIG).get("model_type") == "clip":
            clip = _from_transformers(path)
        else:
            clip = _from_stage(path)
        return clip.to(device, dtype)

    def save(self, folder: str | Path, dtype: torch.dtype | None = None) -> None:
        """Write the stage `clip` of a model folder; `load` reads it back."""
        config: dict[str, Any] = {"name": self.name, "preprocess_cfg": self.preprocess.model_dump()}
        weights: nn.Module = self.towers
        if isinstance(self.towers, TransformersTowers):
            text: Any = self.towers.text
            vision: Any = self.towers.vision
            config["transformers"] = {
                "text": text.config.to_dict(),
                "vision": vision.config.to_dict(),
            }
            self._check_tokenizer()
        else:
            weights = self.towers.model  # keys as in open_clip's own files
            config["model_cfg"] = self._model_config()
            config["vocabulary"] = getattr(self.towers.tokenizer, "vocabulary", None)
        config["fingerprint"] = self.fingerprint.model_dump()
        write_stage(folder, "clip", config, weights.state_dict(), dtype)

    def train(self, mode: bool = True) -> FrozenCLIP:
        """A frozen encoder stays in evaluation mode."""
        return super().train(False)

    @property
    def device(self) -> torch.device:
        """Where the towers are."""
        return next(self.towers.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        """The towers' precision, and that of the embeddings."""
        return next(self.towers.parameters()).dtype

    @torch.no_grad()
    def encode_image(self, images: Tensor) -> Tensor:
        """Raw image embeddings `z_image`.

        **Shapes**: (B, 3, H, W) of any size → (B, D). **Units**: pixels in [-1, 1].
        """
        x = resize_and_crop(images.to(self.device, torch.float32), self.preprocess)  # (B, 3, R, R)
        mean, std = x.new_tensor(self.preprocess.mean), x.new_tensor(self.preprocess.std)
        # Bicubic overshoots; an 8-bit picture, which the towers were trained on, can't.
        x = ((x + 1) / 2).clamp(0, 1)
        x = (x - mean[:, None, None]) / std[:, None, None]
        return self.towers.encode_image(x.to(self.dtype))

    def encode_pil(self, images: Sequence[Image.Image]) -> Tensor:
        """Raw image embeddings of PIL pictures, resized by PIL. **Shapes**: B pictures → (B, D)."""
        pixels = [to_tensor(resize_pil(to_rgb(image), self.preprocess)) for image in images]
        return self.encode_image(torch.stack(pixels))

    @torch.no_grad()
    def encode_text(self, texts: Sequence[str]) -> TextEncoding:
        """The captions' token states after the final norm, their mask, and raw `z_text`."""
        ids, mask = (part.to(self.device) for part in self.towers.tokenizer(texts))  # (B, L)
        tokens, embed = self.towers.encode_text(ids, mask)  # (B, L, W), (B, D)
        return TextEncoding(tokens, mask, embed)

    @property
    def null_text(self) -> TextEncoding:
        """The encoded empty string, one row."""
        if self._null is None or self._null.embed.device != self.device:
            self._null = self.encode_text([""])
        return self._null.to(self.device, self.dtype)

    @cached_property
    def fingerprint(self) -> Fingerprint:
        """What tells this encoder from others; equal for copies in other formats or precisions."""
        z = torch.cat([self.encode_image(_probes()), self.encode_text(PROBE_TEXTS).embed])
        unit = F.normalize(z.float().cpu(), dim=-1)
        return Fingerprint(
            name=self.name,
            width=self.width,
            text_width=self.text_width,
            context=self.context,
            tokenizer=_digest(self.towers.tokenizer.raw(PROBE_TEXTS)),
            padding="on the right, masked",
            preprocessing=self.preprocess.describe(),
            probes=[[round(value, 6) for value in row] for row in unit.tolist()],
        )

    def _model_config(self) -> dict[str, Any]:
        config = self.towers.config if isinstance(self.towers, OpenClipTowers) else None
        if config is None:
            raise CheckpointError(
                f"{self.name!r} has an architecture that a model folder does not describe; "
                "name the encoder by its open_clip name and tag instead of saving it"
            )
        return config.model_dump()

    def _check_tokenizer(self) -> None:
        if self.towers.tokenizer.raw(PROBE_TEXTS) != BpeTokenizer(self.context).raw(PROBE_TEXTS):
            raise CheckpointError(
                f"{self.name!r} does not use CLIP's own byte-pair vocabulary, "
                "so a model folder can't hold it"
            )


def _from_stage(stage: Path) -> FrozenCLIP:
    where = str(stage / CONFIG)
    data = read_json(stage / CONFIG)
    try:
        return _build_stage(stage, data, where)
    except (ConfigError, KeyError, TypeError) as error:
        raise CheckpointError(f"{where} can't be used: {error}") from None


def _build_stage(stage: Path, data: dict[str, Any], where: str) -> FrozenCLIP:
    towers: Towers
    if "model_cfg" in data:
        config = parse_config(data["model_cfg"], ClipConfig, where)
        tokenizer = BpeTokenizer(config.text_cfg.context_length, data.get("vocabulary"))
        model = build_clip(config)
        towers = OpenClipTowers(model, tokenizer, config)
    elif "transformers" in data:
        from transformers import (
            CLIPTextConfig,
            CLIPTextModelWithProjection,
            CLIPVisionConfig,
            CLIPVisionModelWithProjection,
        )

        text = CLIPTextModelWithProjection(CLIPTextConfig(**data["transformers"]["text"]))
        vision = CLIPVisionModelWithProjection(CLIPVisionConfig(**data["transformers"]["vision"]))
        tokenizer = BpeTokenizer(text.config.max_position_embeddings)
        model = towers = TransformersTowers(text, vision, tokenizer)
    else:
        raise CheckpointError(f"{where} describes no CLIP encoder: it has no 'model_cfg'")
    load_tensors(model, read_tensors(stage / WEIGHTS), str(stage / WEIGHTS))
    preprocess = parse_config(data["preprocess_cfg"], PreprocessConfig, where)
    return FrozenCLIP(towers, preprocess, data["name"])


def _from_open_clip(source: str) -> FrozenCLIP:
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
    return FrozenCLIP(OpenClipTowers(model, tokenizer, config), preprocess, source)


def _from_transformers(path: Path) -> FrozenCLIP:
    from transformers import CLIPModel, CLIPTextModelWithProjection, CLIPVisionModelWithProjection

    try:
        load = {"local_files_only": True, "use_safetensors": True}  # never a pickle
        both = CLIPModel.from_pretrained(path, **load)
    except (OSError, ValueError, RuntimeError) as error:
        raise CheckpointError(
            f"{path} is not a complete transformers CLIP folder: {error}"
        ) from None
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
    return from_transformers(text, vision, path, preprocess, path.name)


def from_transformers(
    text: nn.Module, vision: nn.Module, tokenizer: Path, preprocess: PreprocessConfig, name: str
) -> FrozenCLIP:
    """An encoder of transformers' two CLIP models and the folder of their tokenizer.

    `text` is a `CLIPTextModelWithProjection`, `vision` a `CLIPVisionModelWithProjection`.
    """
    from transformers import CLIPTokenizer

    config: Any = text.config
    context = config.max_position_embeddings
    try:
        # Without model_max_length nothing is truncated.
        bpe = CLIPTokenizer.from_pretrained(tokenizer, model_max_length=context)
    except (OSError, ValueError) as error:
        raise CheckpointError(f"no CLIP tokenizer in {tokenizer}: {error}") from None
    towers = TransformersTowers(text, vision, TransformersTokenizer(bpe, context))
    return FrozenCLIP(towers, preprocess, name)


def _probes() -> Tensor:
    """Three fixed pictures: a ramp, a disc, stripes. **Shapes**: → (3, 3, 64, 64)."""
    line = torch.linspace(-1, 1, 64)
    y, x = torch.meshgrid(line, line, indexing="ij")  # (64, 64)
    disc = torch.where(x.square() + y.square() < 0.5, -0.8, 1.0)
    stripes = torch.where((torch.arange(64) // 8 % 2 == 0)[None].expand(64, 64), 0.6, -0.6)
    pictures = [[x, y, -x], [disc.neg(), disc, disc], [stripes, stripes.T, y]]
    return torch.stack([torch.stack(channels) for channels in pictures])


def _digest(tokens: Sequence[Sequence[int]]) -> str:
    """Two tokenizers are the same if they read the probe sentences alike."""
    return hashlib.sha256(repr([list(row) for row in tokens]).encode()).hexdigest()[:16]
