"""What CLIP learns from beside captions: restored pictures, and a language model's sentences."""

from __future__ import annotations

import json
import shutil
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from conftest import tiny_towers
from torch import Tensor
from transformers import AutoModel, BertConfig, BertModel, BertTokenizer

from unclip.clip.contrastive import contrastive_loss
from unclip.clip.encoder import FrozenCLIP
from unclip.config import load_config
from unclip.data.order import batches
from unclip.data.shapes import Shapes
from unclip.errors import ConfigError
from unclip.files.tensors import TensorFile
from unclip.models.layers import DraftConfig
from unclip.training.aids import AidedCLIP, Lesson, RestoreConfig
from unclip.training.clip import ClipRun, ClipTask
from unclip.training.fit import fit
from unclip.training.teacher import TaughtConfig, Teacher, TeacherConfig, common_words

ROOT = Path(__file__).parents[1]
WORDS = ["the", "red", "circle", "square", "green", "blue", "with", "house", "##s", "a"]
TEXTS = ["a red circle", "the house", "blue squares with a green house"]


@pytest.fixture(scope="module")
def sentences(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A sentence encoder of one layer with random weights."""
    folder = tmp_path_factory.mktemp("sentences")
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    (folder / "vocab.txt").write_text("\n".join([*special, *WORDS]))
    BertTokenizer(str(folder / "vocab.txt")).save_pretrained(folder)
    config = BertConfig(
        vocab_size=len(special) + len(WORDS),
        hidden_size=8,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=16,
    )
    torch.manual_seed(0)
    BertModel(config).save_pretrained(folder)
    return folder


def teacher(folder: Path, captions: list[str], **given: object) -> Teacher:
    config = TeacherConfig(model=str(folder), **given)  # type: ignore[arg-type]
    return Teacher(config, captions, torch.float32, 0)


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("UNCLIP_CACHE", str(tmp_path / "cache"))


def test_a_sentence_is_the_mean_of_its_tokens_with_unit_norm(sentences: Path) -> None:
    """However long the texts are beside it, and whether it was asked for at first or later."""
    model, tokenizer = (
        AutoModel.from_pretrained(sentences),
        BertTokenizer.from_pretrained(sentences),
    )
    expected = []
    for text in TEXTS:
        ids = torch.tensor([tokenizer(text)["input_ids"]])
        expected.append(F.normalize(model(input_ids=ids).last_hidden_state[0].mean(0), dim=0))
    found = teacher(sentences, TEXTS[1:])(TEXTS)
    torch.testing.assert_close(found, torch.stack(expected), atol=2e-3, rtol=0)  # kept as float16


def test_sentences_are_embedded_once(sentences: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = teacher(sentences, TEXTS)
    monkeypatch.setattr(Teacher, "_embed", lambda self, texts: pytest.fail("embedded again"))
    again = teacher(sentences, TEXTS)
    assert torch.equal(again(TEXTS), first(TEXTS))
    assert again.phrases == first.phrases


def test_listed_words_are_whole_in_both_vocabularies() -> None:
    """CLIP's own order first, then whatever else the teacher knows whole."""
    known = ["[CLS]", "qwfpg", "house", "the", "##s", "7"]
    assert common_words(known, 10) == ["the", "house", "qwfpg"]
    assert common_words(known, 1) == ["the"]


def test_phrases_hold_every_word_and_depend_on_the_sample_alone(sentences: Path) -> None:
    found = teacher(sentences, [], words=3, phrases=("{}", "a {} with a {}"))
    words = common_words(WORDS, 3)
    assert set(words) < set(found.phrases)
    assert all(any(p.startswith(f"a {word} with a ") for p in found.phrases) for word in words)
    one = teacher(sentences, [], words=3, phrases=("{}", "a {}", "the {}"), wordings=1)
    assert len(one.phrases) == 3 and all(any(w in p for p in one.phrases) for w in words)
    ids = torch.arange(40)
    drawn = found.draw(5, ids)
    assert found.draw(5, ids[3:4]) == drawn[3:4] and len(set(drawn)) > 3


def test_errors_say_what_to_do(sentences: Path) -> None:
    with pytest.raises(ConfigError, match=r"no-such-model.*pip install 'unclip\[teacher\]'"):
        teacher(Path("no-such-model"), [])
    for bad in ("no place", "{} {} {}", "{} {x}"):
        with pytest.raises(ValueError, match="for a word"):
            TeacherConfig(model="m", phrases=(bad,))


def aided(teaches: bool = True, restores: bool = True, **restore: float) -> AidedCLIP:
    network = DraftConfig(width=32, blocks=1)
    head = RestoreConfig(side=8, network=network, **restore) if restores else None
    return AidedCLIP(tiny_towers(TEXTS), head, TaughtConfig(model="m") if teaches else None, 8)


def inputs(model: AidedCLIP) -> tuple[Tensor, Tensor, Tensor, Lesson]:
    g = torch.Generator().manual_seed(1)
    images = torch.rand(3, 3, 16, 16, generator=g) * 2 - 1
    ids, mask = model.towers.tokenizer(TEXTS)
    sentences, phrases = torch.randn(2, 3, 8, generator=g)
    return images, ids, mask, Lesson(None, sentences, phrases, ids.flip(0), mask.flip(0))


def test_a_text_cut_to_its_length_embeds_as_the_whole_one() -> None:
    model = aided().eval()
    images, ids, mask, lesson = inputs(model)
    out = model(images, ids, mask, lesson)
    z_image, z_text, _ = model.towers.model(images, ids)
    torch.testing.assert_close(out["text"], z_text)
    torch.testing.assert_close(out["image"], z_image)
    torch.testing.assert_close(out["phrase_text"], z_text.flip(0))


def test_loss_is_the_weighted_sum_of_its_parts() -> None:
    model = aided(weight=3.0)
    images, ids, mask, lesson = inputs(model)
    out = model(images, ids, mask, lesson)
    found = model.losses(out, images, ids)
    contrast = contrastive_loss(out["image"], out["text"], ids, out["scale"])["loss"]
    taught = contrastive_loss(out["image"], out["sentence"], ids, out["scale"])["loss"]
    small = F.interpolate(images, (8, 8), mode="bicubic", antialias=True, align_corners=False)
    error = (out["restored"] - small).square().mean((1, 2, 3))
    off = 2 - F.cosine_similarity(out["text"], out["sentence"])
    off = off - F.cosine_similarity(out["phrase_text"], out["phrase"])
    torch.testing.assert_close(found["loss"], contrast + 3 * error + taught + 5 * off)
    torch.testing.assert_close(model.error(7 * out["image"], images), error)  # of any length


def test_every_parameter_learns() -> None:
    model = aided()
    images, ids, mask, lesson = inputs(model)
    model.losses(model(images, ids, mask, lesson), images, ids)["loss"].mean().backward()
    dead = [n for n, p in model.named_parameters() if p.requires_grad and not p.grad.any()]  # type: ignore[union-attr]
    assert dead == []


def test_the_teachers_map_follows_pictures_and_no_text_tower() -> None:
    model = aided(restores=False)
    images, ids, mask, lesson = inputs(model)
    found = model.losses(model(images, ids, mask, lesson), images, ids)
    (found["captions_off"] + found["phrases_off"]).sum().backward()
    assert model.map is not None and model.map.weight.grad is None
    assert model.towers.model.token_embedding.weight.grad.any()


def test_noise_hides_what_lies_close_together() -> None:
    """The head sees the noisy embedding; captions are compared with the clean one."""
    model = aided(teaches=False).eval()
    images, ids, mask, _ = inputs(model)
    clean = model(images, ids, mask, Lesson())
    noisy = model(images, ids, mask, Lesson(torch.full((3, 16), 0.1)))
    assert torch.equal(clean["image"], noisy["image"])
    assert not torch.equal(clean["restored"], noisy["restored"])


class Few(Shapes):
    """Eight scenes."""

    def __len__(self) -> int:
        return 8


def train(out: Path, folder: Path) -> None:
    overrides = [
        f"train.out={out}",
        "train.steps=4",
        "train.batch=4",
        "train.warmup=2",
        "train.log_every=1",
        "train.save_every=2",
        "train.sample_every=4",
        "restore.side=8",
        "restore.noise=0.1",
        "restore.network.width=16",
        "restore.network.blocks=1",
        f"teacher.model={folder}",
        "teacher.words=5",
    ]
    config = load_config(ROOT / "configs/shapes/clip.yaml", overrides, ClipRun)
    torch.manual_seed(0)
    scenes = Few(32)
    task = ClipTask(config, scenes, Few(32, "val"))
    stream = partial(batches, scenes, batch=4, seed=0)
    fit(task, lambda step: stream(start_step=step), config.train, config, Accelerator(cpu=True))


def test_a_run_goes_on_exactly_and_saves_the_encoder_alone(sentences: Path, tmp_path: Path) -> None:
    train(tmp_path / "run", sentences)
    straight = losses(tmp_path / "run")
    assert straight[0]["loss"] > straight[0]["contrast"] > 0
    step = tmp_path / "run/checkpoints/step-4"
    saved = TensorFile(step / "clip/model.safetensors")
    live = TensorFile(step / "training/weights.safetensors")
    assert {name for name in live if name.startswith("towers.")} == {
        f"towers.model.{name}" for name in saved
    }
    assert {name.split(".")[0] for name in live} == {"towers", "head", "map"}
    scores = json.loads((tmp_path / "run/val.jsonl").read_text().splitlines()[-1])
    assert 0 < scores["restored"] < 4
    assert FrozenCLIP.load(str(tmp_path / "run")).encode_text(["a red circle"]).embed.any()
    # From the checkpoint in the middle, as if the run had been cut off there.
    before = (step / "clip/model.safetensors").read_bytes()
    shutil.rmtree(step)
    train(tmp_path / "run", sentences)
    assert losses(tmp_path / "run")[-1]["loss"] == straight[-1]["loss"]
    assert (step / "clip/model.safetensors").read_bytes() == before


def losses(run: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
