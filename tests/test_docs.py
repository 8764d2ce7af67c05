"""What the pages say is so: their code runs, their commands are understood, their keys are there.

A block says by its language what it is. `python` runs. `shell` and the `$` lines of `console` are
commands: those that make pictures run, on a stand-in model with random weights; those that train
have their configuration and overrides loaded; of others the options are parsed. `text` is neither.
"""

from __future__ import annotations

import ast
import contextlib
import glob
import re
import shlex
import shutil
import subprocess
import sys
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import karlo
import pytest
import torch
import typer
import yaml
from accelerate.commands.launch import launch_command_parser
from conftest import stage, tiny_clip, tiny_decoder, tiny_prior, unet
from PIL import Image
from torch.distributed.run import get_args_parser

import unclip
from unclip import UnCLIP
from unclip.cli import main
from unclip.cli.app import app
from unclip.config import Config, load_config
from unclip.models.decoder import Decoder
from unclip.models.upsampler import Upsampler, UpsamplerConfig
from unclip.train import STAGES
from unclip.training import new
from unclip.training.trainers import TRAINERS

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "docs"))
import messages  # noqa: E402

NAMES = ["README.md", *sorted(p.relative_to(ROOT).as_posix() for p in ROOT.glob("docs/**/*.md"))]
LANGUAGES = {"python", "shell", "console", "text"}
# Minutes, or a network, or tests of their own: their words are parsed.
PARSED = ("evaluate", "experiment", "measure", "plan", "app", "validate", "doctor", "watch", "push")
DRAWING = ("README.md", "docs/quickstart.md", "docs/editing.md", "docs/karlo.md")
AROUND = ("cd", "source", "python", "python3", "git", "docker", "ls", "head")
VERBS = typer.main.get_command(app).commands  # type: ignore[attr-defined]


def blocks(name: str) -> list[tuple[str, str]]:
    """Language and text of a page's fenced blocks, but MyST's own directives."""
    text = (ROOT / name).read_text(encoding="utf-8")
    found = re.findall(r"^```(.*)\n((?:.*\n)*?)```$", text, re.MULTILINE)
    return [(language, inner) for language, inner in found if not language.startswith("{")]


def commands(language: str, text: str) -> Iterator[list[str]]:
    """The words of each command: continued lines joined, comments and prompts left out."""
    for line in text.replace("\\\n", " ").splitlines():
        if language == "shell" or line.startswith("$ "):
            words = shlex.split(line.removeprefix("$ "), comments=True)
            while words and re.fullmatch(r"\w+=.*", words[0]):
                words = words[1:]  # what is said to the environment
            if words:
                yield words


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with what the pages speak of: models, runs, pictures, data."""
    root = tmp_path_factory.mktemp("world")
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr("conftest.WORDS", ["a cat", "a dog"])  # which a text diff is of
        clip = tiny_clip()
    upsamplers = []
    for high in (256, 1024):
        thin = unet(attends=False).model_copy(update={"patch": high // 32})
        network = Upsampler(UpsamplerConfig(low=high // 4, high=high, unet=thin))
        upsamplers.append(stage(f"upsampler_{high}", network, None, steps=1))
    small = tiny_decoder(clip).config
    thin = small.unet.model_copy(update={"patch": 8})
    decoder = Decoder(small.model_copy(update={"resolution": 64, "unet": thin}))
    model = root / "weights/emoji"
    stages = tiny_prior(clip), stage("decoder", decoder, clip, guidance=2.0)
    UnCLIP(clip, *stages, upsamplers).save_pretrained(model)
    (root / "runs").mkdir()
    for place in ("runs/mine", "runs/emoji", "runs/shapes", "mine", "flags"):
        (root / place).mkdir()
        for part in ("clip", "prior", "decoder", "upsampler_256", "upsampler_1024", "crops"):
            (root / place / part).symlink_to(model)
    karlo.pipeline(karlo.Shape(), root / "kakaobrain/karlo-v1-alpha")
    variations = root / "kakaobrain/karlo-v1-alpha-image-variations"
    karlo.pipeline(karlo.Shape(), variations, images=True)
    (root / "my_folder").mkdir()
    (root / "my_pictures").symlink_to("my_folder")
    for k, name in enumerate(("cat", "a", "b", "small", "my_folder/1", "my_folder/2", "mask")):
        mode, colour = ("L", 255) if name == "mask" else ("RGB", (40 * k, 100, 50))
        Image.new(mode, (32, 32), colour).save(root / f"{name}.png")
        (root / f"{name}.txt").write_text("a red apple\n")
    (root / "prompts.txt").write_text("a red apple\n")
    (root / "prompts.csv").write_text("prompt,seed\na red apple,1\n")
    (root / "configs").symlink_to(ROOT / "configs")
    return root


@pytest.fixture
def here(world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A page's own copy of it; what computes on GPUs computes here."""
    folder = tmp_path / "here"
    shutil.copytree(world, folder, symlinks=True)
    monkeypatch.chdir(folder)
    monkeypatch.setattr("unclip.cli.shell.shipped", lambda name: folder / name)
    monkeypatch.setattr(new, "_head", lambda *_: ("# as planned\n", ""))  # seconds for each stage
    usual = UnCLIP.from_pretrained.__func__  # type: ignore[attr-defined]

    def on_cpu(cls: Any, name: Any, device: Any = "cpu", dtype: Any = None, *more: Any, **how: Any):
        return usual(cls, name, "cpu", torch.float32, *more, **how)

    monkeypatch.setattr(UnCLIP, "from_pretrained", classmethod(on_cpu))
    return folder


def check(words: list[str]) -> None:
    """Run a command, or find that it would be understood. **Raises**: whatever is wrong with it."""
    if words[:2] == ["python", "sample.py"]:
        words = ["unclip", *words[2:]]
    if words[0] == "timeout":
        words = words[words.index("unclip") :]
    program, rest = words[0], words[1:]
    if program == "unclip":
        return check_verb(rest)
    if program in ("accelerate", "torchrun"):
        parser = launch_command_parser() if program == "accelerate" else get_args_parser()
        given = parser.parse_args(rest[1:] if program == "accelerate" else rest)
        assert given.module and given.training_script == "unclip.train"
        return check_training(given.training_script_args)
    if program == "make":
        targets = re.findall(r"^(\w[\w-]*):", (ROOT / "Makefile").read_text(), re.MULTILINE)
        assert rest[0] in targets
    elif program == "pip":
        project = (ROOT / "pyproject.toml").read_text()
        for extra in re.findall(r"\[([\w,]+)\]", " ".join(rest)):
            assert all(
                re.search(rf"^{one} = \[", project, re.MULTILINE) for one in extra.split(",")
            )
    else:
        assert program in AROUND, f"what is {program}?"


def check_verb(rest: list[str]) -> None:
    """Of `unclip`."""
    verb, arguments = rest[0], [w for word in rest[1:] for w in sorted(glob.glob(word)) or [word]]
    if verb.startswith("--"):
        assert verb in ("--help", "--version", "--install-completion")
    elif verb == "train" and "embed" not in arguments[:1]:
        check_training(arguments)
    elif verb in PARSED:
        VERBS[verb].make_context(verb, arguments)
    else:
        to = arguments.index(">") if ">" in arguments else len(arguments)
        with contextlib.ExitStack() as stack:
            if arguments[to:]:
                file = stack.enter_context(open(arguments[to + 1], "w", encoding="utf-8"))
                stack.enter_context(contextlib.redirect_stdout(file))
            with contextlib.suppress(SystemExit):  # typer's, when it is done
                main([verb, *arguments[:to]])


def check_training(arguments: list[str]) -> None:
    """`STAGE CONFIG [key=value …]`."""
    name, config, *overrides = arguments
    assert name in STAGES
    load_config(config, overrides, TRAINERS[name.replace("-", "_")].schema)


@pytest.mark.parametrize("name", NAMES)
def test_blocks_say_what_they_are(name: str) -> None:
    assert {language for language, _ in blocks(name)} <= LANGUAGES


def with_code() -> Iterator[Any]:
    """Pages that have some; those that draw much are for `make test-docs`."""
    for name in filter(blocks, NAMES):
        yield pytest.param(name, marks=pytest.mark.docs if name in DRAWING else ())


@pytest.mark.parametrize("name", with_code())
def test_code_of_the_pages_runs(name: str, here: Path) -> None:
    names: dict[str, Any] = {}
    for language, text in blocks(name):
        if language == "python":
            exec(compile(text, name, "exec"), names)
        for words in commands(language, text):
            try:
                check(words)
            except SystemExit as error:
                pytest.fail(f"{shlex.join(words)}: exit code {error.code}")


@pytest.mark.parametrize("stage", TRAINERS)
def test_every_key_of_a_configuration_is_explained(stage: str) -> None:
    said = " ".join((ROOT / name).read_text(encoding="utf-8") for name in NAMES)
    words = {word for code in re.findall(r"`([^`\n]+)`", said) for word in re.findall(r"\w+", code)}

    def keys(annotation: Any, prefix: str = "") -> Iterator[str]:
        schema = next(iter(_sections(annotation)), None)
        for name, field in schema.model_fields.items() if schema is not None else ():
            yield from keys(field.annotation, f"{prefix}{name}.")
        if schema is None:
            yield prefix[:-1]

    missing = [key for key in keys(TRAINERS[stage].schema) if key.split(".")[-1] not in words]
    assert missing == []


def _sections(annotation: Any) -> Iterator[type[Config]]:
    if isinstance(annotation, type) and issubclass(annotation, Config):
        yield annotation
    for option in typing.get_args(annotation):
        yield from _sections(option)


def test_every_message_can_be_found_and_advice_is_on_messages_that_there_are() -> None:
    """`messages()` reads them all from the source, and fails where one can't be read."""
    known = {message.text.replace("`", "'") for message in messages.messages()}
    assert "no picture at …" in known and "model.layout needs diffusion.target = x0" in known
    page = (ROOT / "docs/errors.md").read_text(encoding="utf-8")
    advised = re.findall(r"^`(.+)`\n: ", page, re.MULTILINE)
    assert len(advised) >= 30 and set(advised) <= known and "```{messages}" in page


def test_a_message_that_can_not_be_read_from_the_source_is_an_error(tmp_path: Path) -> None:
    source = tmp_path / "unclip"
    source.mkdir()
    (source / "a.py").write_text('def f(x):\n    raise ConfigError(f"no {x}: give one")\n')
    assert [m.text for m in messages.messages(source)] == ["no …: give one"]
    (source / "b.py").write_text("def g(x):\n    raise DataError(str(x))\n")
    with pytest.raises(ValueError, match=r"b\.py:2"):
        messages.messages(source)


def test_the_afternoon_is_as_long_as_the_readme_says() -> None:
    page = (ROOT / "docs/architecture.md").read_text(encoding="utf-8")
    listed = re.findall(r"^\d\. `(unclip/\S*)`: ?(.*)$", page, re.MULTILINE)
    files = [Path(folder, name) for folder, said in listed for name in re.findall(r"`(\S+)`", said)]
    files += [Path(one) for one, _ in listed if one.endswith(".py")]
    texts = [(ROOT / file).read_text(encoding="utf-8") for file in files]
    every = sum(len(text.splitlines()) for text in texts)
    written = sum(len(_without_docstrings(text)) for text in texts)
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    said = re.search(r"is (\d+) files listed.*: ([\d,]+) lines, of which ([\d,]+) are", readme)
    assert said is not None and int(said[1]) == len(set(files)) == len(files)
    for number, true in zip(said.groups()[1:], (every, written), strict=True):
        assert abs(int(number.replace(",", "")) - true) <= 100, f"{number}: there are {true}"


def _without_docstrings(text: str) -> list[str]:
    nodes = [node for node in ast.walk(ast.parse(text)) if isinstance(node, ast.Expr)]
    said = [node for node in nodes if isinstance(node.value, ast.Constant)]
    gone = {n for node in said for n in range(node.lineno, (node.end_lineno or 0) + 1)}
    return [line for n, line in enumerate(text.splitlines(), 1) if line.strip() and n not in gone]


@pytest.mark.parametrize("name", NAMES)
def test_links_lead_somewhere(name: str) -> None:
    text = re.sub(r"```.*?```", "", (ROOT / name).read_text(encoding="utf-8"), flags=re.DOTALL)
    for target in re.findall(r"\]\(([^)#\s]+)[^)]*\)", text):
        if "://" not in target:
            assert ((ROOT / name).parent / target).exists(), target


def test_the_version_is_said_once() -> None:
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert citation["version"] == unclip.__version__


@pytest.mark.docs
def test_the_site_builds_without_a_warning(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "sphinx", "-qW", "--keep-going", "docs", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    page = (tmp_path / "errors.html").read_text(encoding="utf-8")
    assert "no picture at" in re.sub(r"<[^>]+>", "", page)  # each word is an element of its own


@pytest.mark.docs
def test_plans_are_printed_as_they_are(capsys: pytest.CaptureFixture[str]) -> None:
    """What a page shows of `unclip plan`, line by line."""
    for name in NAMES:
        for _, text in (block for block in blocks(name) if block[1].startswith("$ unclip plan")):
            command, _, shown = text.partition("\n")
            with contextlib.suppress(SystemExit):
                main(shlex.split(command)[2:])
            assert capsys.readouterr().out == shown
