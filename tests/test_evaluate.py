"""`unclip evaluate` on a model that has learned nothing: each row, each error, no picture twice."""

from __future__ import annotations

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import tiny_clip, tiny_decoder, tiny_prior
from PIL import Image

from unclip.cli import main
from unclip.errors import ConfigError
from unclip.evaluation import features
from unclip.evaluation.features import FeatureNetwork, Remembered, open_features
from unclip.evaluation.subjects import Wording
from unclip.models.decoder import Decoder, LayoutConfig
from unclip.pipeline import UnCLIP

ROOT = Path(__file__).resolve().parents[1]
NAMES = ["red apple", "blue square", "circle", "green circles", "square", "apple"]
STYLES = ["flat", "round", "thin"]


def write_pictures(folder: Path, names=NAMES, styles=STYLES, seed: int = 0) -> Path:
    """A picture of each name in each style: coarse noise, and what it is called beside it."""
    folder.mkdir()
    random = np.random.default_rng(seed)
    for name in names:
        for style in styles:
            pixels = random.integers(0, 256, (4, 4, 3), np.uint8)
            stem = folder / f"{name} {style}".replace(" ", "-")
            Image.fromarray(pixels).resize((16, 16)).save(stem.with_suffix(".png"))
            stem.with_suffix(".txt").write_text(f"a {name} in {style}" if style else f"a {name}")
    return folder


@pytest.fixture(scope="module")
def outsider(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A CLIP that took no part in the tiny model: network of features, and judge."""
    folder = tmp_path_factory.mktemp("outsider")
    tiny_clip(7).save(folder)
    return folder


@pytest.fixture
def run(capsys, monkeypatch, tmp_path, model_folder, outsider):
    """Run the verb: (exit code, report, stderr)."""
    monkeypatch.setenv("UNCLIP_CACHE", str(tmp_path / "cache"))

    def run(*args, model=model_folder, look=outsider):
        given = [
            "evaluate",
            model,
            "--features",
            look,
            "--device",
            "cpu",
            "--out",
            tmp_path / "out",
        ]
        with pytest.raises(SystemExit) as exit:
            main([str(x) for x in [*given, *args]])
        report = tmp_path / "out" / "report.json"
        scores = json.loads(report.read_text()) if report.is_file() else {}
        return exit.value.code or 0, scores, capsys.readouterr().err

    return run


@pytest.fixture
def pictures(tmp_path):
    """Training and held-out pictures with styles, as options."""
    train = write_pictures(tmp_path / "train")
    held = write_pictures(tmp_path / "held", NAMES[:2], seed=1)
    wording = "a {name} in {style}"
    return ["--data", train, "--held-out", held, "--captions", wording, "--limit", 6, "--seeds", 2]


def test_every_stage_is_measured_in_every_group(run, pictures, outsider, tmp_path, monkeypatch):
    code, scores, error = run(*pictures, "--upscaled", 2, "--judge", outsider)
    assert code == 0, error
    table = scores["tables"][str(outsider)]
    assert list(table) == ["trained", "held out", "name alone"]
    rows = ["real", "shrunk", "true", "snapped", "product"]  # the tiny decoder has no layout
    assert list(table["trained"]) == list(table["held out"]) == rows
    assert list(table["name alone"]) == ["product"]
    measured = {"same", "same5", "realistic", "kernel", "frechet", "density", "coverage", "copies"}
    assert set(table["held out"]["product"]) == measured | {"style"}
    assert set(table["name alone"]["product"]) == measured
    assert "copies" not in table["trained"]["real"]  # they are in training
    assert scores["captions"]["trained"] == scores["captions"]["held out"] == 6
    for judge in ("own", "judge"):
        by = scores["retrieval"][judge]
        assert by["names"] == 6
        assert by["groups"]["trained"]["real"]["nearest"] == 1
        assert 0 <= by["groups"]["name alone"]["product"]["top1"] <= 1
    assert scores["variety"][str(outsider)]["drawn"] > 0
    assert 0 <= scores["prior"]["styles that occur"] <= 1
    assert list(scores["upsamplers"]) == ["16 → 32", "32 → 64", "16 → 64"]

    page = (tmp_path / "out" / "report.html").read_text()
    sources = re.findall(r'src="([^"]{30})', page)
    assert len(sources) >= 2 * 5 * 6 + 3 * 2 * 3
    assert all(source.startswith("data:image/png;base64,") for source in sources)
    assert "http" not in page and page.count("<h2>") >= 10

    # What was drawn before is not drawn again, and the figures stay.
    for verb in ("text_to_image", "image_from_embedding", "upscale"):
        monkeypatch.setattr(UnCLIP, verb, None)
    assert run(*pictures, "--upscaled", 2, "--judge", outsider)[1] == scores


def test_a_decoders_layout_is_measured(run, pictures, model_folder, tmp_path):
    pipe = UnCLIP.from_pretrained(model_folder)
    assert pipe.decoder is not None
    config = pipe.decoder.network.config
    network = Decoder(config.model_copy(update={"layout": LayoutConfig(side=8, width=8)}))
    pipe.decoder = replace(pipe.decoder, network=network.eval())
    pipe.save_pretrained(tmp_path / "model")
    code, scores, error = run(*pictures, "--upscaled", 0, model=tmp_path / "model")
    assert code == 0, error
    (table,) = scores["tables"].values()
    assert "layout" in table["trained"] and "layout" in table["held out"]


def test_pictures_are_drawn_again_where_a_model_samples_otherwise(
    run, pictures, model_folder, tmp_path
):
    folders = []
    for steps in (2, 3):
        pipe = UnCLIP.from_pretrained(model_folder)
        assert pipe.decoder is not None
        sampling = pipe.decoder.sampling.model_copy(update={"steps": steps})
        pipe.decoder = replace(pipe.decoder, sampling=sampling)
        pipe.save_pretrained(tmp_path / f"{steps}")
        code, _, error = run(*pictures, "--upscaled", 0, model=tmp_path / f"{steps}")
        assert code == 0, error
        folders.append({file.parent for file in (tmp_path / "out").rglob("*-0000.png")})
    assert len(folders[0]) == 1 and len(folders[1]) == 2  # of the same weights


def test_pictures_are_drawn_again_where_the_data_have_changed(run, tmp_path):
    data = write_pictures(tmp_path / "data", [f"{a} {b}" for a in NAMES for b in "abc"], [""])
    asked = ("--data", data, "--limit", 4, "--seeds", 1, "--upscaled", 0)
    for folders in (1, 2):
        code, _, error = run(*asked)
        assert code == 0, error
        assert len({file.parent for file in (tmp_path / "out").rglob("*-0000.png")}) == folders
        for file in data.glob("apple-a*"):  # one more
            shutil.copy(file, file.with_stem("another"))


def test_pictures_do_not_depend_on_how_the_work_is_divided(run, pictures, tmp_path, monkeypatch):
    run(*pictures, "--upscaled", 0, "--out", tmp_path / "a")
    monkeypatch.setattr("unclip.evaluation.drawings.CHUNK", 4)
    run(*pictures, "--upscaled", 0, "--out", tmp_path / "b")
    for one in sorted((tmp_path / "a").rglob("*.png")):
        (other,) = (tmp_path / "b").rglob(one.name)
        with Image.open(one) as a, Image.open(other) as b:  # a level may round the other way
            np.testing.assert_allclose(np.asarray(a, int), np.asarray(b, int), atol=1)


def test_without_styles_and_held_out_pictures_their_columns_are_absent(run, tmp_path):
    data = write_pictures(tmp_path / "plain", [f"{a} {b}" for a in NAMES for b in "abc"], [""])
    code, scores, error = run("--data", data, "--limit", 4, "--seeds", 1, "--upscaled", 0)
    assert code == 0, error
    (table,) = scores["tables"].values()
    assert list(table) == ["trained", "name alone"]
    line = table["trained"]["product"]
    assert "style" not in line and "copies" not in line and "same" not in line  # names are unique
    assert "same" in table["name alone"]["product"]  # there no picture is left out
    assert "prior" not in scores and scores["upsamplers"] == {}


def test_options_of_sampling_reach_the_stage_they_name(run, pictures, monkeypatch):
    asked = []
    draw = UnCLIP.text_to_embedding

    def watch(self, *args, **options):
        asked.append(options)
        return draw(self, *args, **options)

    monkeypatch.setattr(UnCLIP, "text_to_embedding", watch)
    options = ["--guidance", "3", "--steps", "prior=1,decoder=2", "--prior-candidates", 1]
    assert run(*pictures, "--upscaled", 0, *options)[0] == 0
    expected = {"guidance": {"decoder": 3.0}, "steps": {"prior": 1, "decoder": 2}}
    assert all(given.items() >= (expected | {"prior_candidates": 1}).items() for given in asked)


def test_a_model_without_a_prior_has_no_product(run, pictures, tmp_path):
    clip = tiny_clip()
    UnCLIP(clip, decoder=tiny_decoder(clip)).save_pretrained(tmp_path / "model")
    code, scores, error = run(*pictures, model=tmp_path / "model")
    assert code == 0, error
    (table,) = scores["tables"].values()
    assert list(table["trained"]) == ["real", "shrunk", "true"] and table["name alone"] == {}


def test_a_model_without_an_image_tower_is_measured_by_its_product(run, pictures, monkeypatch):
    monkeypatch.setattr("unclip.clip.encoder.FrozenCLIP.has_images", False)
    code, scores, error = run(*pictures, "--upscaled", 0)
    assert code == 0, error
    (table,) = scores["tables"].values()
    assert list(table["trained"]) == ["real", "shrunk", "product"] and scores["retrieval"] == {}


def test_a_model_without_a_decoder_is_refused(run, pictures, tmp_path):
    clip = tiny_clip()
    UnCLIP(clip, tiny_prior(clip)).save_pretrained(tmp_path / "model")
    code, _, error = run(*pictures, model=tmp_path / "model")
    assert code == 4 and "no decoder" in error


@pytest.mark.parametrize("option", ["--judge", "--features"])
def test_the_stacks_own_clip_is_refused_as_judge(run, pictures, model_folder, option):
    code, _, error = run(*pictures, option, model_folder)
    assert code == 2 and "samples with" in error


def test_captions_that_do_not_read_as_said_are_refused(run, pictures):
    code, _, error = run(*pictures, "--captions", "{name} drawn {style}")
    assert code == 3 and "18 of 18 captions" in error and "--captions" in error
    code, _, error = run(*pictures, "--captions", "{style} of a {name}")
    assert code == 2 and "{name} once" in error


def test_data_with_one_name_or_few_pictures_are_refused(run, tmp_path):
    same = write_pictures(tmp_path / "same", ["apple"], [f"s{k}" for k in range(16)])
    code, _, error = run("--data", same, "--captions", "a {name} in {style}")
    assert code == 3 and "one name, 'apple'" in error
    few = write_pictures(tmp_path / "few", NAMES[:5])
    code, _, error = run("--data", few)
    assert code == 3 and "15 pictures" in error and "16 or more" in error


def test_a_missing_package_is_named(monkeypatch):
    monkeypatch.setitem(features.PACKAGES, "efficientnet-lite0", ("no_such_package", "x"))
    with pytest.raises(ConfigError, match=r"no-such-package: pip install 'unclip\[evaluate\]'"):
        open_features("efficientnet-lite0")


def test_an_unknown_network_is_refused_with_those_there_are():
    with pytest.raises(ConfigError, match="efficientnet-lite0, efficientnet-lite2"):
        open_features("inception")


# Means and largest of the pooled features, by the implementation that the weights were made for.
EXPECTED = {
    "efficientnet-lite0": (224, [0.162785, 0.093435], [71, 29], [4.20965, 4.85462]),
    "efficientnet-lite2": (260, [0.132361, 0.124707], [1100, 966], [3.75781, 5.15374]),
}


@pytest.mark.parametrize("name", list(features.PACKAGES))
def test_efficientnets_see_what_their_own_implementation_does(name, monkeypatch):
    """The packages' names of tensors differ from timm's and are matched by their order."""
    pytest.importorskip(features.PACKAGES[name][0])
    side, mean, place, largest = EXPECTED[name]
    monkeypatch.setattr(features, "SIDE", side)  # the size it was trained at
    squares = torch.linspace(-1, 1, 64).square()
    disc = torch.where(squares[:, None] + squares < 0.5, -1.0, 1.0)
    ramp = torch.linspace(-1, 1, 64).expand(64, 64)
    seen = open_features(name).look(torch.stack([disc, ramp])[:, None].expand(-1, 3, -1, -1))
    assert seen.shape == (2, 1280) and seen.argmax(1).tolist() == place
    torch.testing.assert_close(seen.mean(1), torch.tensor(mean), atol=1e-3, rtol=0)
    torch.testing.assert_close(seen.amax(1), torch.tensor(largest), atol=1e-2, rtol=0)


def test_what_was_seen_is_kept_by_the_pictures_own_bytes(tmp_path):
    looks = []

    def look(x):
        looks.append(len(x))
        return x.flatten(1)[:, :5]

    network = FeatureNetwork("a fake", "fake", look)
    x = torch.randint(0, 256, (3, 3, 4, 4), dtype=torch.uint8)
    with Remembered(network, tmp_path) as eye:
        first = eye(x)
    changed = x.clone()
    changed[1] = 255 - changed[1]
    with Remembered(network, tmp_path) as eye:
        second = eye(changed)
    assert looks == [3, 1]
    torch.testing.assert_close(second[[0, 2]], first[[0, 2]])
    torch.testing.assert_close(second[1], 2 * 127.5 / 127.5 - 2 - first[1])  # 255 - b is -x

    (file,) = tmp_path.iterdir()
    file.write_bytes(file.read_bytes()[:100])
    torch.testing.assert_close(Remembered(network, tmp_path)(x), first)
    assert looks == [3, 1, 3]


def test_wording_reads_names_and_styles():
    wording = Wording("a {name} emoji in {style}")
    assert wording.read("a dog in a hat emoji in flat style") == ("dog in a hat", "flat style")
    assert wording.read("a dog") is None
    assert wording.plain("dog (old)") == "a dog (old)"
    assert Wording().read("anything [at] all") == ("anything [at] all", None)
    for bad in ("a thing", "{name} {name}", "{style} {name}", "{name} {style} {style}"):
        with pytest.raises(ConfigError, match="captions"):
            Wording(bad)


def test_outside_networks_only_measure():
    """Nothing but the evaluation may know of them, or pictures would come to please the measure."""
    rooms = ("evaluation", "cli")
    for path in [*ROOT.glob("unclip/**/*.py"), *ROOT.glob("train/*.py")]:
        if not set(rooms) & set(path.relative_to(ROOT).parts):
            text = path.read_text(encoding="utf-8").lower()
            assert "efficientnet" not in text and "evaluation.features" not in text, path
