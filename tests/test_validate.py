"""Checking configurations before a training, and the machine that it will run on."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from test_tasks import tiny

from unclip.cli import main


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Any:
    """Run a verb: (exit code, stdout, stderr)."""

    def run(*args: object) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as ended:
            main([str(arg) for arg in args])
        out, err = capsys.readouterr()
        return ended.value.code or 0, out, err  # type: ignore[return-value]

    return run


def written(folder: Path, stage: str, clip: Path | str, *more: str) -> Path:
    """The configuration of a tiny run as a file."""
    path = folder / f"{stage}.yaml"
    config = tiny(stage, clip, f"train.out={folder / 'runs' / stage}", *more)
    path.write_text(json.dumps(config.model_dump(mode="json")))
    return path


def test_a_stack_is_checked_and_its_pictures_are_shown(
    run: Any, model_folder: Path, tmp_path: Path
) -> None:
    prior = written(tmp_path, "prior", model_folder, "data.val=shapes:val")
    upsampler = written(tmp_path, "upsampler_64", model_folder)
    code, out, err = run("validate", prior, upsampler, "--out", tmp_path / "sheets")
    assert (code, err) == (0, "")
    assert f"{prior}: the encoder {model_folder} fits: its widths are 16 and 16." in out
    assert "samples to validate on" in out and out.count(" GB where it trains") == 2
    sheet = Image.open(tmp_path / "sheets" / "upsampler_64.png")
    assert sheet.width > 96 and len(sheet.getcolors(2**20)) > 100
    assert not (tmp_path / "runs").exists()  # nothing is begun


@pytest.mark.parametrize(
    ("stage", "change", "code", "says"),
    [
        ("prior", "model.embed=24", 2, "model.embed = 24, but the CLIP encoder"),
        ("prior", "train.lrr=1", 2, "did you mean 'lr'?"),
        ("prior", "data.train=nowhere", 3, "nowhere"),
        ("prior", "clip=nowhere", 2, "nowhere"),
        ("prior", "train.out=", 2, "train.out = ''"),
        ("prior", "train.seed=99999999999999999999999", 2, "train.seed = "),
        ("prior", "train.lr=1e400", 2, "train.lr = inf"),
        ("prior", "sampling.steps=10000", 2, "sampling: 10000 sampling steps; choose between"),
        ("decoder", "sampling.sampler=analytic", 2, "sampling: the sampler 'analytic' needs"),
        ("upsampler_64", "diffusion.steps=1", 2, "diffusion.steps = 1 must be at least 2"),
        ("upsampler_64", "data.resolution=63", 2, ".yaml: data.resolution = 63 must be model.high"),
        ("upsampler_64", "train.init=MODEL", 4, "set them equal"),
        ("upsampler_64", "train.batch=3", 2, "must be a multiple"),
    ],
)
def test_a_mistake_has_the_code_that_its_training_would_end_with(
    run: Any, model_folder: Path, tmp_path: Path, stage: str, change: str, code: int, says: str
) -> None:
    path = written(tmp_path, stage, model_folder)
    change = change.replace("MODEL", str(model_folder))
    found, _, err = run("validate", path, change, "--gpus", 2, "--out", tmp_path)
    assert found == code and says in err


def test_stages_that_do_not_meet_are_told_so(run: Any, model_folder: Path, tmp_path: Path) -> None:
    decoder = written(tmp_path, "decoder", model_folder, "model.resolution=16")
    upsampler = written(tmp_path, "upsampler_64", model_folder)
    code, _, err = run("validate", decoder, upsampler, "--out", tmp_path)
    assert code == 2 and f"model.low = 32, but {decoder} draws 16 px" in err
    prior = written(tmp_path, "prior", "another")
    code, _, err = run("validate", decoder, prior, "--out", tmp_path)
    assert code == 2 and "the stages of a stack share one encoder" in err


def test_what_is_yet_to_be_trained_is_known_by_its_configuration(run: Any, tmp_path: Path) -> None:
    changes = ["data.train=shapes", "train.batch=4", "--out", tmp_path]
    first = tmp_path / "clip.yaml"
    code, text, _ = run("configs", "shapes/clip")
    first.write_text(text.replace("runs/shapes/clip", str(tmp_path / "clip")))
    prior = written(tmp_path, "prior", tmp_path / "clip", "model.embed=16")
    code, _, err = run("validate", first, prior, *changes)
    assert code == 2 and "model.embed = 16, but the CLIP encoder" in err
    large = written(tmp_path, "upsampler_64", "", f"train.out={tmp_path / 'large'}")
    after = large.read_text().replace('"init": null', f'"init": "{tmp_path / "large"}"')
    second = tmp_path / "second.yaml"
    second.write_text(after.replace(f'"out": "{tmp_path / "large"}"', f'"out": "{tmp_path}"'))
    code, out, err = run("validate", large, second, "--out", tmp_path)
    assert (code, err) == (0, "") and "large is what another of these trains" in out


def test_a_text_tower_is_checked_against_the_encoder_that_it_belongs_to(
    run: Any, model_folder: Path, tmp_path: Path
) -> None:
    changes = ["data.train=shapes", "data.val=shapes:val", "--out", tmp_path]
    code, out, err = run("validate", "emoji/clip_text", f"clip={model_folder}", *changes)
    assert (code, err) == (0, "")
    assert f"the encoder {model_folder} fits: its widths are 16 and 16." in out
    code, _, err = run("validate", "emoji/clip_text", "clip=nowhere", *changes)
    assert code == 2 and "nowhere" in err


def test_a_whole_stack_is_checked_before_its_first_stage_is_trained(
    run: Any, tmp_path: Path
) -> None:
    """What a text tower starts from, and what a prior will be told by that, once ended in an error
    of Python."""
    names = ["clip", "clip_text", "prior"]
    paths = [tmp_path / f"{name}.yaml" for name in names]
    for name, path in zip(names, paths, strict=True):
        _, text, _ = run("configs", f"emoji/{name}")
        text = text.replace("runs/emoji", str(tmp_path / "runs"))
        path.write_text(text.replace("layers: 6", "layers: 1"))  # planned in a second
    changes = ["data.train=shapes", "data.val=shapes:val", "--out", tmp_path]
    code, out, err = run("validate", *paths, *changes)
    assert (code, err) == (0, "")
    for path in paths[1:]:
        assert f"{path}: the encoder " in out
    assert out.count(", which another of these trains, fits: its widths are 256 and 256.") == 2


def test_memory_that_is_not_enough_is_an_error(
    run: Any, model_folder: Path, tmp_path: Path
) -> None:
    wide = ("model.transformer.width=4096", "model.transformer.heads=32")
    path = written(tmp_path, "prior", model_folder, *wide)
    code, _, err = run("validate", path, "--memory", 1, "--out", tmp_path)
    assert code == 2 and "but there are 1 GB" in err
