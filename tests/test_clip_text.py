"""Teaching a trained CLIP's text tower more words, with its image tower as it is."""

from __future__ import annotations

import json
import math
import shutil
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from conftest import tiny_clip
from test_clip_aids import Few, cache, sentences  # noqa: F401  (fixtures)
from torch import Tensor

from unclip.clip.encoder import FrozenCLIP
from unclip.clip.towers import OpenClipTowers
from unclip.config import load_config
from unclip.data.order import batches
from unclip.errors import ConfigError
from unclip.training.clip_text import ClipTextRun, ClipTextTask, grown, meaning
from unclip.training.fit import fit

ROOT = Path(__file__).parents[1]


def test_meaning_weighs_pictures_by_how_like_their_captions_are() -> None:
    """Two captions, of which the phrase is like the first by a cosine of 1 and the other by 0."""
    shown = torch.tensor([[1.0, 0, 0], [0, 1, 0]])
    found = meaning(torch.tensor([[1.0, 0]]), torch.eye(2), shown, math.log(3))
    torch.testing.assert_close(found, F.normalize(torch.tensor([[3.0, 1, 0]]), dim=-1))


def test_a_sharp_meaning_is_the_nearest_captions_picture() -> None:
    g = torch.Generator().manual_seed(0)
    captions, shown = (F.normalize(torch.randn(9, 6, generator=g), dim=-1) for _ in range(2))
    phrases = F.normalize(captions + 0.1 * torch.randn(9, 6, generator=g), dim=-1)
    torch.testing.assert_close(meaning(phrases, captions, shown, 1e4), shown)


def towers() -> OpenClipTowers:
    found = tiny_clip().towers
    assert isinstance(found, OpenClipTowers)
    return found


def test_grown_towers_read_known_texts_as_before_and_new_words_apart() -> None:
    old = towers()
    new = grown(old, ["a yellow house", "the red car"], 0).eval()
    assert embed(new, "two green circles").equal(embed(old, "two green circles"))
    assert embed(old, "a house").equal(embed(old, "a car"))  # both unknown
    assert not torch.allclose(embed(new, "a house"), embed(new, "a car"))
    pictures = torch.rand(2, 3, 16, 16)
    torch.testing.assert_close(new.encode_image(pictures), old.encode_image(pictures))


def embed(model: OpenClipTowers, text: str) -> Tensor:
    with torch.no_grad():
        return model.encode_text(*model.tokenizer([text]))[1]


def train(out: Path, clip: Path, folder: Path) -> None:
    overrides = [
        f"clip={clip}",
        f"train.out={out}",
        "data.train=shapes",
        "data.val=null",
        "data.resolution=16",
        "train.steps=4",
        "train.batch=4",
        "train.warmup=1",
        "train.log_every=1",
        "train.save_every=2",
        "train.sample_every=4",
        "train.precision=fp32",
        f"teacher.model={folder}",
        "teacher.words=5",
    ]
    config = load_config(ROOT / "configs/emoji/clip_text.yaml", overrides, ClipTextRun)
    torch.manual_seed(0)
    scenes = Few(16)
    task = ClipTextTask(config, scenes, Few(16, "val"))
    stream = partial(batches, task.data, batch=4, seed=2)
    fit(task, lambda step: stream(start_step=step), config.train, config, Accelerator(cpu=True))


def test_a_run_changes_the_text_tower_alone_and_goes_on_exactly(
    sentences: Path,  # noqa: F811
    tmp_path: Path,
) -> None:
    before = tiny_clip()
    before.save(tmp_path / "clip")
    train(tmp_path / "run", tmp_path / "clip", sentences)
    after = FrozenCLIP.load(str(tmp_path / "run"))
    pictures = torch.rand(2, 3, 16, 16)
    torch.testing.assert_close(after.encode_image(pictures), before.encode_image(pictures))
    assert not torch.allclose(
        after.encode_text(["a red apple"]).embed, before.encode_text(["a red apple"]).embed
    )
    step = tmp_path / "run/checkpoints/step-4"
    stage = (step / "clip/model.safetensors").read_bytes()
    straight = losses(tmp_path / "run")
    assert straight[0]["loss"] > straight[0]["contrast"] > 0
    shutil.rmtree(step)
    train(tmp_path / "run", tmp_path / "clip", sentences)
    assert losses(tmp_path / "run")[-1]["loss"] == straight[-1]["loss"]
    assert (step / "clip/model.safetensors").read_bytes() == stage


def losses(run: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def test_an_encoder_from_elsewhere_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stranger = tiny_clip()
    stranger.towers.config = None  # type: ignore[assignment]
    monkeypatch.setattr(FrozenCLIP, "load", lambda source: stranger)
    overrides = ["clip=ViT-L-14/openai"]
    config = load_config(ROOT / "configs/emoji/clip_text.yaml", overrides, ClipTextRun)
    with pytest.raises(ConfigError, match="ViT-L-14/openai"):
        ClipTextTask(config, Few(16), None)
