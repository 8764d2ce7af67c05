"""Configuration: what is read is what was meant, and every mistake names its key."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import pytest
import yaml
from pydantic import Field, ValidationError

from unclip.config import Config, load_config, parse_config, read_yaml, save_config
from unclip.errors import ConfigError


class Inner(Config):
    lr: float = Field(gt=0)
    steps: int = 10
    label: str = "x"
    betas: tuple[float, float] = (0.9, 0.99)
    decay: Literal["constant", "cosine"] = "cosine"
    clip: float | None = 1.0
    fast: bool = False


class Outer(Config):
    train: Inner
    second: Inner | None = None
    parts: tuple[Inner, ...] = ()


def write(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "config.yaml"
    path.write_text(text, encoding="utf-8")
    return path


def load(tmp_path: Path, text: str, *overrides: str) -> Outer:
    return load_config(write(tmp_path, text), overrides, Outer)


@pytest.mark.parametrize("text", ["1e-4", "1E-4", "1.0e-4", "0.0001", ".0001", "+1e-4"])
def test_numbers_with_exponents_are_floats(tmp_path: Path, text: str) -> None:
    assert load(tmp_path, f"train: {{lr: {text}}}").train.lr == 1e-4
    assert load(tmp_path, "train: {lr: 1}", f"train.lr={text}").train.lr == 1e-4


@pytest.mark.parametrize("text", ["NO", "yes", "on", "Off", "TRUE", "e5", "1e", "v1e-4", "."])
def test_words_stay_strings(tmp_path: Path, text: str) -> None:
    assert load(tmp_path, f"train: {{lr: 1, label: {text}}}").train.label == text


@pytest.mark.parametrize(
    "label", ["1e-4", "1e5", "NO", "true", "0.5", "12", "null", "a: b", "ü", ""]
)
def test_saved_configuration_reads_back_equal(tmp_path: Path, label: str) -> None:
    config = Outer(train=Inner(lr=1e-7, label=label, clip=None, betas=(0.5, 0.1)), second=None)
    path = tmp_path / "saved.yaml"
    save_config(config, path)
    assert load_config(path, [], Outer) == config


def test_saved_words_are_quoted_for_other_yaml_readers(tmp_path: Path) -> None:
    path = tmp_path / "saved.yaml"
    save_config(Inner(lr=1.0, label="NO"), path)
    assert yaml.safe_load(path.read_text())["label"] == "NO"


def test_dotted_overrides_replace_and_add(tmp_path: Path) -> None:
    config = load(
        tmp_path,
        "train: {lr: 1, steps: 3}",
        *("train.steps=5", "train.clip=null", "train.betas=[0.1, 0.2]"),
        *("second.lr=2", "train.fast=true"),
    )
    assert config.train == Inner(lr=1.0, steps=5, clip=None, betas=(0.1, 0.2), fast=True)
    assert config.second == Inner(lr=2.0)


def test_override_may_contain_equals_and_spaces(tmp_path: Path) -> None:
    assert load(tmp_path, "train: {lr: 1}", "train.label=a=b c").train.label == "a=b c"


@pytest.mark.parametrize(
    ("text", "overrides", "message"),
    [
        ("train: {lr: 1, stpes: 3}", [], "unknown key train.stpes = 3 .did you mean 'steps'"),
        ("train: {lr: 1}", ["train.stpes=3"], "unknown key train.stpes = 3 .did you mean 'steps'"),
        ("train: {lr: 1}", ["second.lrr=3"], "unknown key second.lrr = 3 .did you mean 'lr'"),
        ("train: {lr: 1}\nparts: [{lr: 1, stpes: 2}]", [], "unknown key parts.0.stpes.*'steps'"),
        ("train: {lr: 1}\nzzz: 1", [], "unknown key zzz = 1 .valid names: train, second, parts"),
        ("train: {steps: 1}", [], "missing key train.lr"),
        ("train: {lr: fast}", [], "train.lr = 'fast': Input should be a valid number"),
        ("train: {lr: '1'}", [], "train.lr = '1'"),
        ("train: {lr: true}", [], "train.lr = True"),
        ("train: {lr: 1, steps: 1.5}", [], "train.steps = 1.5"),
        ("train: {lr: 1, fast: NO}", [], "train.fast = 'NO'"),
        ("train: {lr: 0}", [], "train.lr = 0: Input should be greater than 0"),
        ("train: {lr: 1, decay: linear}", [], "train.decay = 'linear'.*constant.*cosine"),
        ("train: {lr: 1, betas: [1]}", [], "train.betas"),
        ("train: {lr: 1}", ["train.lr"], "must look like section.key=value"),
        ("train: {lr: 1}", [".lr=1"], "must look like section.key=value"),
        ("train: {lr: 1}", ["train.lr.x=1"], "train.lr is not a section"),
        ("train: {lr: 1}", ["train.lr=[1"], "not a YAML value"),
        ("train: [", [], "not valid YAML"),
        ("- 1", [], "must hold sections"),
        ("", [], "must hold sections"),
        ("train: {lr: 1, label: 2020-01-01}", [], "plain numbers, strings and lists"),
        ("train: !!python/object/apply:os.getcwd []", [], "not valid YAML"),
    ],
)
def test_mistakes_are_named(tmp_path: Path, text: str, overrides: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load(tmp_path, text, *overrides)


def test_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"no configuration file at .*absent\.yaml"):
        read_yaml(tmp_path / "absent.yaml")


def test_error_names_its_source() -> None:
    with pytest.raises(ConfigError, match="stage prior: missing key lr"):
        parse_config({}, Inner, source="stage prior")


def test_configuration_cannot_change_after_it_was_checked() -> None:
    with pytest.raises(ValidationError):
        Inner(lr=1.0).lr = 2.0  # type: ignore[misc]
