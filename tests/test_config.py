"""Configuration: what is read is what was meant, and every mistake names its key."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import Field, ValidationError, model_validator

from unclip.config import Config, Place, load_config, parse_config, read_yaml, save_config
from unclip.errors import ConfigError


class Inner(Config):
    lr: float = Field(gt=0)
    steps: int = 10
    label: str = "x"
    betas: tuple[float, float] = (0.9, 0.99)
    decay: Literal["constant", "cosine"] = "cosine"
    clip: float | None = 1.0
    fast: bool = False
    place: Place | None = None
    sizes: list[int] | int = 1

    @model_validator(mode="after")
    def _check(self) -> Inner:
        if self.place is not None and self.steps == 0:
            raise ValueError("place needs steps")
        return self


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


@pytest.mark.parametrize(
    "text",
    ["a=b c", "D/exp #2", "{a..b}.tar", "*.tar", "0012", "2026-05-01", "[x", "~", "true", "'q'"],
)
def test_an_override_of_text_is_taken_to_its_end(tmp_path: Path, text: str) -> None:
    """Overrides were YAML: `train.out=runs/x #2` wrote into runs/x, beside another's files."""
    assert load(tmp_path, "train: {lr: 1}", f"train.label={text}").train.label == text


@settings(max_examples=200, deadline=None)
@given(text=st.text(st.characters(exclude_categories=["Cs"]), max_size=30))
def test_any_text_comes_through_an_override_and_a_saved_configuration(
    tmp_path_factory: pytest.TempPathFactory, text: str
) -> None:
    folder = tmp_path_factory.mktemp("any")
    config = load(folder, "train: {lr: 1}", f"train.label={text}")
    assert config.train.label == text
    save_config(config, folder / "saved.yaml")
    assert load_config(folder / "saved.yaml", [], Outer) == config


@given(text=st.text("0123456789+-.eE_ #:,[]{}'\"~nulltrue", max_size=12))
def test_an_override_of_a_number_is_that_number_or_an_error(
    tmp_path_factory: pytest.TempPathFactory, text: str
) -> None:
    try:
        steps = load(
            tmp_path_factory.getbasetemp(), "train: {lr: 1}", f"train.steps={text}"
        ).train.steps
    except ConfigError:
        return
    assert steps == int(text)


def test_an_override_of_text_that_may_be_absent_can_say_so(tmp_path: Path) -> None:
    text = "train: {lr: 1, place: here}"
    assert load(tmp_path, text).train.place == "here"
    assert load(tmp_path, text, "train.place=null").train.place is None
    assert load(tmp_path, text, "train.place=1 #2").train.place == "1 #2"


def test_a_place_begins_at_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`train.out=~/run` made a folder named `~`."""
    monkeypatch.setenv("HOME", str(tmp_path))
    config = load(tmp_path, "train: {lr: 1, place: ~/a}", "second.lr=1", "second.place=~/b")
    assert config.train.place == str(tmp_path / "a")
    assert config.second is not None and config.second.place == str(tmp_path / "b")


def test_numbers_and_dates_mean_what_they_say(tmp_path: Path) -> None:
    """YAML 1.1 reads 1:30 as ninety, 0012 as ten, and dates as no string at all."""
    assert load(tmp_path, "train: {lr: 1, label: 2020-01-01}").train.label == "2020-01-01"
    assert load(tmp_path, "train: {lr: 1, label: 0012}").train.label == "0012"
    assert load(tmp_path, "train: {lr: 1, label: =}").train.label == "="
    assert load(tmp_path, "train: {lr: 1, steps: 20_000}").train.steps == 20_000
    assert load(tmp_path, "train: {lr: 1}", "train.sizes=[1, 2]").train.sizes == [1, 2]


def test_sections_of_an_anchor_may_share_keys(tmp_path: Path) -> None:
    text = "train: &a {lr: 1, steps: 3}\nsecond: &b {<<: *a, steps: 4}\nparts: [{<<: *b, lr: 2}]"
    config = load(tmp_path, text)
    assert config.parts[0].steps == 4 and config.parts[0].lr == 2


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
        ("train: {lr: 1}", ["train.steps=5 #2"], "train.steps = '5 #2'"),
        ("train: {lr: 1}", ["train.steps=1:30"], "train.steps = '1:30'"),
        ("train: {lr: 1}", ["train.steps=0012"], "train.steps = '0012'"),
        ("train: {lr: 1}", ["train.label=a", "train.label=b"], "train.label is given twice"),
        ("train: {lr: 1}", ["train.lr=2", "train={steps: 3}"], "train.lr is given twice"),
        ("train: {lr: 1}", ["train.label=caf\udce9"], "UTF-8"),
        ("train: {lr: 1, lr: 2}", [], "'lr' is given twice"),
        ("train: [", [], "not valid YAML"),
        ("- 1", [], "must hold sections"),
        ("", [], "must hold sections"),
        ("train: {lr: 1}", ["train.lr=1e400"], "train.lr = inf: Input should be a finite number"),
        ("train: {lr: 1, place: ''}", [], "train.place = '': String should have at least 1"),
        ("train: {lr: 1}", ["train.place="], "train.place = '': String should have at least 1"),
        ("train: {lr: 1, place: x, steps: 0}", [], "^[^{]*: train: place needs steps$"),
        ("train: {lr: 1, label: !!timestamp 2020-01-01}", [], "plain numbers, strings and lists"),
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
