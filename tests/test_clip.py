"""FrozenCLIP against open_clip and transformers, its files, and its identity."""

from __future__ import annotations

import copy
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor

from unclip.clip.encoder import FrozenCLIP
from unclip.clip.fingerprint import PROBE_TEXTS, check_same_encoder
from unclip.clip.preprocessing import PreprocessConfig
from unclip.clip.towers import (
    BPE_IDS,
    END,
    START,
    BpeTokenizer,
    ClipConfig,
    OpenClipTowers,
    TextConfig,
    VisionConfig,
    build_clip,
    vocabulary_of,
)
from unclip.errors import CheckpointError, ConfigError
from unclip.images import to_pil

CAPTIONS = ["a red apple", "", "Two dogs, playing in the SNOW!", "word " * 60]
EXACT = {"atol": 1e-5, "rtol": 1e-5}


def small_config(context: int = 16, vocab_size: int = BPE_IDS) -> ClipConfig:
    return ClipConfig(
        embed_dim=16,
        vision_cfg=VisionConfig(image_size=32, patch_size=8, layers=2, width=32, head_width=16),
        text_cfg=TextConfig(
            context_length=context, vocab_size=vocab_size, width=24, heads=2, layers=2
        ),
    )


def small_clip(
    seed: int = 0, vocabulary: list[int] | None = None, name: str = "tiny"
) -> FrozenCLIP:
    torch.manual_seed(seed)
    rows = BPE_IDS if vocabulary is None else len(vocabulary) + 1
    config = small_config(vocab_size=rows)
    model = build_clip(config)
    with torch.no_grad():  # open_clip starts near zero; make the captions matter
        model.token_embedding.weight.mul_(50)
    towers = OpenClipTowers(model, BpeTokenizer(16, vocabulary), config)
    return FrozenCLIP(towers, PreprocessConfig(size=32), name)


def pictures(n: int = 2, size: int = 32) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.rand(n, 3, size, size, generator=generator) * 2 - 1


@pytest.fixture(scope="module")
def transformers_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small random CLIP with CLIP's own byte-pair vocabulary, as transformers writes it."""
    from open_clip.tokenizer import _tokenizer
    from transformers import CLIPConfig, CLIPModel, CLIPTokenizer

    folder = tmp_path_factory.mktemp("clip")
    shared = {"intermediate_size": 64, "num_attention_heads": 2, "num_hidden_layers": 2}
    torch.manual_seed(0)
    config = CLIPConfig(
        projection_dim=16,
        text_config={
            **shared,
            "hidden_size": 24,
            "intermediate_size": 96,
            "max_position_embeddings": 16,
            "vocab_size": BPE_IDS,
            "bos_token_id": START,
            "eos_token_id": END,
            "hidden_act": "gelu",
        },
        vision_config={
            **shared,
            "hidden_size": 32,
            "intermediate_size": 128,
            "image_size": 32,
            "patch_size": 8,
            "hidden_act": "gelu",
        },
    )
    CLIPModel(config).save_pretrained(folder)
    names = {"<start_of_text>": "<|startoftext|>", "<end_of_text>": "<|endoftext|>"}
    vocab = {names.get(token, token): i for token, i in _tokenizer.encoder.items()}
    tokenizer = CLIPTokenizer(vocab=vocab, merges=list(_tokenizer.bpe_ranks))
    tokenizer.save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text(
        json.dumps({"size": {"shortest_edge": 32}, "crop_size": 32, "resample": 3})
    )
    return folder


@pytest.fixture(scope="module")
def theirs(transformers_folder: Path) -> FrozenCLIP:
    return FrozenCLIP.load(str(transformers_folder))


def test_loading_fills_no_log(transformers_folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """transformers draws "Loading weights" wherever stderr goes."""
    FrozenCLIP.load(str(transformers_folder))
    assert "Loading" not in capfd.readouterr().err


@pytest.fixture
def damaged(transformers_folder: Path, tmp_path: Path) -> Path:
    """A copy of the folder, to be damaged."""
    return Path(shutil.copytree(transformers_folder, tmp_path / "clip"))


def refused(folder: Path, message: str) -> None:
    with pytest.raises(CheckpointError, match=message) as error:
        FrozenCLIP.load(str(folder))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("widen", "message"),
    [(False, r"does not fit CLIPModel: 1 missing \(visual_projection"), (True, "1 mismatched")],
)
def test_transformers_weights_that_do_not_fit_are_refused(
    damaged: Path, widen: bool, message: str
) -> None:
    """What was missing was drawn at random, without an error."""
    tensors = load_file(damaged / "model.safetensors")
    name = "visual_projection.weight"
    projection = tensors.pop(name)
    more = {name: torch.cat([projection, projection])} if widen else {}
    save_file(tensors | more, damaged / "model.safetensors", {"format": "pt"})
    refused(damaged, message)


def test_transformers_weights_that_are_something_else_are_named(damaged: Path) -> None:
    """They were a SafetensorError."""
    weights = damaged / "model.safetensors"
    whole = weights.read_bytes()
    pointer = b"version https://git-lfs.github.com/spec/v1\noid sha256:ab\nsize 123\n"
    for content in (whole[: len(whole) // 2], b"<html>" * 50, pointer):
        weights.write_bytes(content)
        refused(damaged, rf"model\.safetensors \({len(content)} bytes\) is truncated or not a")


@pytest.mark.parametrize(
    ("key", "value"), [("hidden_size", "24"), ("num_attention_heads", 5), ("hidden_act", "nope")]
)
def test_an_odd_transformers_configuration_is_a_checkpoint_error(
    damaged: Path, key: str, value: Any
) -> None:
    """They were errors of transformers' own, or a KeyError."""
    config = json.loads((damaged / "config.json").read_text())
    config["text_config"][key] = value
    (damaged / "config.json").write_text(json.dumps(config))
    refused(damaged, f"can't be used as transformers' CLIPModel: .*{value}")


def test_a_transformers_folder_without_a_whole_tokenizer_is_refused(damaged: Path) -> None:
    """transformers made an empty one, for which all texts are equal; a cut vocabulary was a bare
    Exception."""
    for path in damaged.glob("tokenizer*.json"):
        path.unlink()
    refused(damaged, rf"no CLIP tokenizer in .*: it has \d tokens, the encoder {BPE_IDS}; expected")
    (damaged / "vocab.json").write_text('{"a": 1')
    (damaged / "merges.txt").write_text("#version: 0.2\n")
    refused(damaged, "no CLIP tokenizer in .*BPE")


def as_open_clip(folder: Path) -> FrozenCLIP:
    """The same tower with its weights carried over to open_clip's names."""
    theirs = load_file(folder / "model.safetensors")
    model = build_clip(small_config())
    state = {
        "visual.class_embedding": theirs["vision_model.embeddings.class_embedding"],
        "visual.positional_embedding": theirs["vision_model.embeddings.position_embedding.weight"],
        "visual.conv1.weight": theirs["vision_model.embeddings.patch_embedding.weight"],
        "visual.proj": theirs["visual_projection.weight"].T,
        "positional_embedding": theirs["text_model.embeddings.position_embedding.weight"],
        "token_embedding.weight": theirs["text_model.embeddings.token_embedding.weight"],
        "text_projection": theirs["text_projection.weight"].T,
        "logit_scale": theirs["logit_scale"],
    }
    norms = {
        "visual.ln_pre": "vision_model.pre_layrnorm",
        "visual.ln_post": "vision_model.post_layernorm",
        "ln_final": "text_model.final_layer_norm",
    }
    for tower, prefix in (("visual.transformer", "vision_model"), ("transformer", "text_model")):
        for i in range(2):
            block, layer = f"{tower}.resblocks.{i}", f"{prefix}.encoder.layers.{i}"
            norms |= {f"{block}.ln_{k}": f"{layer}.layer_norm{k}" for k in (1, 2)}
            norms |= {f"{block}.mlp.c_fc": f"{layer}.mlp.fc1"}
            norms |= {f"{block}.mlp.c_proj": f"{layer}.mlp.fc2"}
            norms |= {f"{block}.attn.out_proj": f"{layer}.self_attn.out_proj"}
            for part in ("weight", "bias"):
                qkv = [theirs[f"{layer}.self_attn.{x}_proj.{part}"] for x in "qkv"]
                state[f"{block}.attn.in_proj_{part}"] = torch.cat(qkv)
    for ours, other in norms.items():
        for part in ("weight", "bias"):
            state[f"{ours}.{part}"] = theirs[f"{other}.{part}"]
    model.load_state_dict(state)
    config = small_config()
    return FrozenCLIP(
        OpenClipTowers(model, BpeTokenizer(16), config), PreprocessConfig(size=32), "copy"
    )


def test_embeddings_are_open_clips() -> None:
    """Both towers equal a direct call of open_clip on its own preprocessing and tokens."""
    from open_clip.tokenizer import tokenize
    from open_clip.transform import PreprocessCfg, image_transform_v2

    clip = small_clip()
    model = clip.towers.model
    image = to_pil(pictures(1, 50)[0]).crop((0, 0, 50, 40))
    pixels = image_transform_v2(PreprocessCfg(size=32), is_train=False)(image)[None]
    torch.testing.assert_close(clip.encode_pil([image]), model.encode_image(pixels), **EXACT)
    ids = tokenize(CAPTIONS, context_length=16)
    torch.testing.assert_close(clip.encode_text(CAPTIONS).embed, model.encode_text(ids), **EXACT)


def test_embeddings_are_transformers(transformers_folder: Path, theirs: FrozenCLIP) -> None:
    """A transformers folder gives what transformers' own model gives."""
    from transformers import CLIPModel

    clip = theirs
    model = CLIPModel.from_pretrained(transformers_folder).eval()
    ids, mask = clip.towers.tokenizer(CAPTIONS)
    text = model.get_text_features(input_ids=ids, attention_mask=mask.long())
    encoding = clip.encode_text(CAPTIONS)
    torch.testing.assert_close(encoding.embed, text.pooler_output, **EXACT)
    torch.testing.assert_close(encoding.tokens[mask], text.last_hidden_state[mask], **EXACT)
    mean, std = (
        torch.tensor(v)[:, None, None] for v in (clip.preprocess.mean, clip.preprocess.std)
    )
    pixels = ((pictures() + 1) / 2 - mean) / std
    image = model.get_image_features(pixel_values=pixels).pooler_output
    torch.testing.assert_close(clip.encode_image(pictures()), image, **EXACT)


def test_one_tower_in_two_formats_is_one_encoder(
    transformers_folder: Path, theirs: FrozenCLIP
) -> None:
    ours = as_open_clip(transformers_folder)
    check_same_encoder(theirs.fingerprint, ours.fingerprint, "test")
    a, b = theirs.encode_text(CAPTIONS), ours.encode_text(CAPTIONS)
    assert torch.equal(a.mask, b.mask)
    torch.testing.assert_close(a.tokens[a.mask], b.tokens[b.mask], **EXACT)
    torch.testing.assert_close(a.embed, b.embed, **EXACT)
    # A patch's features lie where the patch does.
    for seen in (theirs.features(pictures()), ours.features(pictures())):
        assert {x.shape[2:] for x in seen} == {(4, 4)}
    for x, y in zip(theirs.features(pictures()), ours.features(pictures()), strict=True):
        torch.testing.assert_close(x, y, **EXACT)


def test_a_gradient_comes_through_half_precision_however_small(theirs: FrozenCLIP) -> None:
    """A sample's share of the mean of a large batch is less than float16 can say."""
    gradients = []
    for clip in (theirs, copy.deepcopy(theirs).to(torch.float16)):
        x = pictures().requires_grad_()
        error = sum(seen.float().square().mean() for seen in clip.features(x)) / 2**24
        gradients += torch.autograd.grad(error, [x])
    exact, half = (x.flatten().double() for x in gradients)
    assert 0 < exact.abs().max() < 2**-24
    assert 0.99 < half.norm() / exact.norm() < 1.01
    assert torch.cosine_similarity(exact, half, dim=0) > 0.99


def test_stage_of_a_transformers_encoder_loads_equal(theirs: FrozenCLIP, tmp_path: Path) -> None:
    clip = theirs
    clip.save(tmp_path)
    same = FrozenCLIP.load(str(tmp_path))
    check_same_encoder(clip.fingerprint, same.fingerprint, "test")
    assert torch.equal(same.encode_text(CAPTIONS).embed, clip.encode_text(CAPTIONS).embed)
    assert torch.equal(same.encode_image(pictures()), clip.encode_image(pictures()))


@pytest.mark.parametrize("vocabulary", [None, vocabulary_of(["a red apple"], 16)])
@pytest.mark.parametrize("inside", ["", "clip"])
def test_saved_encoder_loads_equal(
    tmp_path: Path, vocabulary: list[int] | None, inside: str
) -> None:
    clip = small_clip(vocabulary=vocabulary)
    clip.save(tmp_path)
    same = FrozenCLIP.load(str(tmp_path / inside))
    assert torch.equal(same.encode_text(CAPTIONS).embed, clip.encode_text(CAPTIONS).embed)
    assert torch.equal(same.encode_image(pictures()), clip.encode_image(pictures()))
    assert same.fingerprint == clip.fingerprint
    assert (same.width, same.text_width, same.context, same.image_size) == (16, 24, 16, 32)


def test_open_clip_name_with_a_weights_file(tmp_path: Path) -> None:
    """The name gives the architecture and the preprocessing; pickles are refused."""
    import open_clip
    from safetensors.torch import save_file

    config = small_config().model_dump()
    (tmp_path / "tiny-for-test.json").write_text(json.dumps(config))
    open_clip.add_model_config(tmp_path / "tiny-for-test.json")
    model = small_clip().towers.model
    file = tmp_path / "weights.safetensors"
    save_file({k: v.contiguous() for k, v in model.state_dict().items()}, file)
    clip = FrozenCLIP.load(f"tiny-for-test/{file}")
    assert (clip.width, clip.context, clip.image_size) == (16, 16, 32)
    assert not clip.towers.model.training  # open_clip hands models out in training mode
    check_same_encoder(clip.fingerprint, small_clip().fingerprint, "test")
    clip.save(tmp_path / "folder")
    same = FrozenCLIP.load(str(tmp_path / "folder"))
    check_same_encoder(clip.fingerprint, same.fingerprint, "test")
    pickle = tmp_path / "weights.pt"
    torch.save({}, pickle)
    with pytest.raises(CheckpointError, match=r"only \.safetensors"):
        FrozenCLIP.load(f"tiny-for-test/{pickle}")


@pytest.mark.parametrize("source", ["no/such/folder", "ViT-B-32", "ViT-B-32/no_such_tag"])
def test_unknown_sources_are_refused_by_name(source: str) -> None:
    with pytest.raises(ConfigError, match=source.split("/")[-1]):
        FrozenCLIP.load(source)


def test_half_precision_is_the_same_encoder(tmp_path: Path) -> None:
    clip = small_clip()
    clip.save(tmp_path)
    half = FrozenCLIP.load(str(tmp_path), dtype=torch.float16)
    assert half.encode_text(["a"]).embed.dtype == half.encode_image(pictures()).dtype == half.dtype
    assert half.dtype == torch.float16
    assert half.fingerprint == clip.fingerprint  # taken before


def test_an_encoder_keeps_its_precision_where_a_network_around_it_has_another() -> None:
    clip, texts = small_clip(), ["a red apple"]
    outside = clip.encode_image(pictures()), *clip.encode_text(texts)
    with torch.autocast("cpu", torch.bfloat16):
        inside = clip.encode_image(pictures()), *clip.encode_text(texts)
    torch.testing.assert_close(inside, outside, rtol=0, atol=0)


def test_another_encoder_is_refused_with_both_names() -> None:
    a, b = small_clip(0, name="first").fingerprint, small_clip(1, name="second").fingerprint
    with pytest.raises(CheckpointError, match=r"the prior: 'first' and 'second'.*cosine"):
        check_same_encoder(a, b, "the prior")
    other = a.model_copy(update={"preprocessing": "shortest 48", "name": "resized"})
    with pytest.raises(CheckpointError, match=r"preprocessing"):
        check_same_encoder(a, other, "the prior")


def test_null_text_is_the_encoded_empty_string() -> None:
    clip = small_clip()
    null, empty = clip.null_text, clip.encode_text([""])
    assert all(torch.equal(a, b) for a, b in zip(null, empty, strict=True))
    assert null.mask.sum() == 2  # the start and the end


def test_mask_is_true_for_real_tokens() -> None:
    mask = small_clip().encode_text(CAPTIONS).mask
    assert mask.sum(1).tolist() == [5, 2, 10, 16]
    assert torch.equal(mask, mask.cummin(1).values)  # real tokens come first


def test_padding_does_not_change_embeddings() -> None:
    """Other ids in the padding leave embeddings and real token states as they are."""
    clip = small_clip()
    ids, mask = clip.towers.tokenizer(CAPTIONS)
    tokens, embed = clip.towers.encode_text(ids, mask)
    other_tokens, other_embed = clip.towers.encode_text(ids.masked_fill(~mask, 7), mask)
    torch.testing.assert_close(other_embed, embed, **EXACT)
    torch.testing.assert_close(other_tokens[mask], tokens[mask], **EXACT)


def test_reduced_vocabulary_equals_the_full_table() -> None:
    """Spreading the small table by `rows` gives an ordinary CLIP with the same embeddings."""
    vocabulary = vocabulary_of(["a red apple", "two dogs playing"], 16)
    clip = small_clip(vocabulary=vocabulary)
    small = clip.towers.tokenizer
    full = build_clip(small_config())
    state = dict(clip.towers.model.state_dict())
    state["token_embedding.weight"] = state["token_embedding.weight"][small.rows]
    full.load_state_dict(state)
    same = FrozenCLIP(OpenClipTowers(full, BpeTokenizer(16)), clip.preprocess, "full")
    torch.testing.assert_close(
        same.encode_text(CAPTIONS).embed, clip.encode_text(CAPTIONS).embed, **EXACT
    )
    check_same_encoder(clip.fingerprint, same.fingerprint, "test")


def test_captions_and_pictures_change_their_embeddings() -> None:
    clip = small_clip()
    embed = F.normalize(clip.encode_text(list(PROBE_TEXTS)).embed, dim=-1)
    assert (embed @ embed.T).fill_diagonal_(0).max() < 0.99
    x = pictures()
    assert not torch.allclose(clip.encode_image(x), clip.encode_image(-x))


def test_tensor_and_pil_preprocessing_agree() -> None:
    """Resizing tensors and resizing with PIL differ by the 8-bit rounding only."""
    clip = small_clip()
    image = Image.effect_mandelbrot((60, 90), (-2, -1.5, 1, 1.5), 50).convert("RGB")
    from unclip.images import to_tensor

    a, b = clip.encode_pil([image]), clip.encode_image(to_tensor(image)[None])
    assert F.cosine_similarity(a, b).item() > 0.999


def test_encoder_stays_frozen() -> None:
    clip = small_clip().train()
    assert not clip.training and not any(module.training for module in clip.modules())
    assert not any(p.requires_grad for p in clip.parameters())
    assert not clip.encode_image(pictures()).requires_grad


def test_damaged_stage_is_refused(tmp_path: Path) -> None:
    small_clip().save(tmp_path)
    weights = tmp_path / "clip" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(CheckpointError, match="truncated"):
        FrozenCLIP.load(str(tmp_path))


def test_a_damaged_encoder_configuration_is_a_checkpoint_error(model_folder, tmp_path):
    """A missing key was once a KeyError, and a wrong one a configuration error (exit code 2)."""
    stage = tmp_path / "clip"
    shutil.copytree(model_folder / "clip", stage)
    whole = json.loads((stage / "config.json").read_text())
    for damage in ({"preprocess_cfg": None}, {"model_cfg": {"embed_dim": "wide"}}):
        (stage / "config.json").write_text(json.dumps(whole | damage))
        with pytest.raises(CheckpointError, match=r"config\.json can't be used"):
            FrozenCLIP.load(str(stage))
    del whole["preprocess_cfg"]
    (stage / "config.json").write_text(json.dumps(whole))
    with pytest.raises(CheckpointError, match="preprocess_cfg"):
        FrozenCLIP.load(str(stage))
