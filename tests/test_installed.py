"""What people have who install the library: a wheel is enough, in every folder."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import get_args, get_type_hints

import pytest
import torch
from test_clip_aids import sentences  # noqa: F401  (a fixture)

from unclip.cli import evaluation
from unclip.config import load_config, read_yaml
from unclip.errors import CheckpointError, ConfigError
from unclip.evaluation.experiments import EXPERIMENTS
from unclip.evaluation.scores import ranks
from unclip.pipeline import UnCLIP
from unclip.shipped import configurations, located
from unclip.sources import Source
from unclip.stages.prior import PriorName
from unclip.train import STAGES
from unclip.training import new
from unclip.training.trainers import TRAINERS, trained_by

ROOT = Path(__file__).parents[1]
LARGEST = 100_000_000  # bytes of a wheel that package indexes take without being asked
Run = Callable[..., str]


def test_the_shell_answers_before_torch_is_loaded() -> None:
    code = "import sys, unclip, unclip.cli, unclip.train; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


def test_a_picture_that_is_not_there_is_named_before_torch_is_loaded(tmp_path: Path) -> None:
    """It took seven seconds to say so."""
    code = "import sys\nfrom unclip.cli import main\ntry:\n    main(sys.argv[1:])\n"
    code += "except SystemExit as error:\n    print(error.code, 'torch' in sys.modules)"
    for verb in ("vary", "upscale"):
        command = [sys.executable, "-c", code, verb, "absent.png"]
        done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, check=True)
        assert done.stdout.strip() == "3 False" and "no picture at absent.png" in done.stderr


def test_torchvision_can_be_imported_where_unclip_is_but_not_installed() -> None:
    """Its operators are declared when it is looked for, not when unclip is imported."""
    code = "import unclip, torchvision.transforms.v2, torch; torch.ops.torchvision.nms; print(1)"
    environment = {**os.environ, "TORCH_DEVICE_BACKEND_AUTOLOAD": "0"}
    subprocess.run([sys.executable, "-c", code], env=environment, check=True)


@pytest.mark.parametrize("prior", ["diffusion", "ar"])
def test_both_shipped_priors_answer_captions(prior: PriorName) -> None:
    names = ["red apple", "panda", "rocket", "house", "umbrella", "red heart", "pizza", "snake"]
    captions = [f"a {name} emoji in noto style" for name in names]
    pipe = UnCLIP.from_pretrained(ROOT / "weights/emoji")
    z_image = pipe.text_to_embedding(captions, seed=0, prior=prior)
    z_text = pipe.clip.encode_text(captions).embed
    assert ranks(z_image, z_text, torch.arange(len(names))).tolist() == [0] * len(names)


def test_configurations_are_named_wherever_we_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = read_yaml(ROOT / "configs/shapes/clip.yaml")
    monkeypatch.chdir(tmp_path)
    assert read_yaml("shapes/clip") == read_yaml("configs/shapes/clip.yaml") == expected
    assert located("weights/emoji") == ROOT / "weights/emoji"
    assert located("runs/emoji") == Path("runs/emoji")
    (tmp_path / "shapes").mkdir()
    (tmp_path / "shapes/clip").write_text("mine: 1")
    assert read_yaml("shapes/clip") == {"mine": 1}
    with pytest.raises(ConfigError, match="did you mean shapes/upsampler_128"):
        read_yaml("shapes/upsampler128")


def test_configurations_show_by_their_keys_which_training_they_are_of() -> None:
    for name, path in configurations().items():
        if not name.startswith("accelerate/"):
            stem = path.stem.replace("judge", "clip")
            several = ("upsampler", "decoder")  # decoders told or shown something else, too
            wanted = next((one for one in several if stem.startswith(one)), stem)
            assert trained_by(name) == wanted
    with pytest.raises(ConfigError, match="no configuration of a training"):
        trained_by("accelerate/ddp_8")


def test_the_command_at_a_configurations_head_trains_it() -> None:
    for name, path in configurations().items():
        if not name.startswith("accelerate/"):
            said = re.search(
                r"^# Command:  unclip train (\S+) (\S+)((?:[ \\#\n]+[a-z.]+=[^ \n,]+)*)",
                path.read_text(encoding="utf-8"),
                re.MULTILINE,
            )
            assert said is not None, name
            stage = said[1].replace("-", "_")
            assert (said[2], stage) == (name, trained_by(name))
            load_config(name, re.findall(r"[a-z.]+=\S+", said[3]), TRAINERS[stage].schema)


def test_the_shell_knows_every_training_and_experiment_by_name() -> None:
    """It lists them itself, so that a mistyped one answers before torch is loaded."""
    assert {name.replace("-", "_") for name in STAGES} == {*TRAINERS, "embed"}
    names = get_type_hints(evaluation.experiment)["name"]
    assert get_args(names) == tuple(EXPERIMENTS)


@pytest.mark.parametrize("machine", ["cpu", "gpu24", "gpus8"])
def test_new_writes_a_stack_whose_stages_fit_together(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, machine: new.Machine
) -> None:
    monkeypatch.setattr(new, "_head", lambda *_: ("# as planned\n", ""))  # seconds for each
    monkeypatch.chdir(tmp_path)
    runs = {}
    for file, command, _ in new.new(Path("mine"), "shapes:val", machine):
        name = trained_by(file)
        runs[file.stem] = run = load_config(file, [], TRAINERS[name].schema)
        assert command.endswith(f"{name} {file}") and file.read_text().startswith("# as planned")
        assert run.train.out == f"mine/{file.stem}"
        assert run.data.train == "shapes:val" and run.data.val is None
    assert list(runs) == [*(["clip"] if machine == "cpu" else []), *new.STACK[1:]]
    prior, decoder = runs["prior"], runs["decoder"]
    assert prior.clip == decoder.clip and prior.model.embed == decoder.model.embed
    if machine == "cpu":
        clip = runs["clip"]
        assert prior.clip == clip.train.out and prior.model.embed == clip.model.embed_dim
        assert prior.model.context == clip.model.text_cfg.context_length
        assert runs["upsampler_1024"].train.init == runs["upsampler_256"].train.out
    assert decoder.train.accumulate == (4 if machine == "gpu24" else 1)
    assert runs["upsampler_256"].model.low == decoder.model.resolution
    with pytest.raises(ConfigError, match="there already"):
        list(new.new(Path("mine"), "shapes:val", machine))


def test_new_goes_on_from_a_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, model_folder: Path
) -> None:
    """From twenty pictures alone nothing comes; a trained model learns their style in minutes."""
    monkeypatch.setattr(new, "_head", lambda *_: ("# as planned\n", "about 0.1 hours"))
    monkeypatch.chdir(tmp_path)
    start = str(model_folder)
    written = list(new.new(Path("mine"), "shapes:val", "cpu", start))
    assert [one.file.name for one in written] == ["prior.yaml", "decoder.yaml"]
    for one in written:
        run = load_config(one.file, [], TRAINERS[one.file.stem].schema)
        stage = Source(start).stages[one.file.stem].stage
        assert (run.model, run.diffusion) == (stage.config, stage.diffusion.config)
        assert run.sampling == stage.sampling
        assert run.clip == run.train.init == start and run.train.sample_every == 50
        assert (run.data.train, run.data.val) == ("shapes:val", None)
        assert run.train.out == f"mine/{one.file.stem}"
    command = new.assembling(Path("mine"), written, start)
    assert command == (
        f"unclip assemble --clip {start} --prior mine/prior --decoder mine/decoder "
        f"--upsampler {start} --out mine/model"
    )
    (tmp_path / "of mine").mkdir()
    Path("of mine/start").symlink_to(start)
    (first, *_), name = list(new.new(Path("my own"), "shapes:val", "cpu", start)), "of mine/start"
    assert shlex.split(first.command)[-1] == "my own/prior.yaml"
    words = shlex.split(new.assembling(Path("my own"), [first], name))
    assert words.count(name) == 3 and words[-1] == "my own/model" and "my own/prior" in words
    (tmp_path / "clipless").mkdir()
    with pytest.raises(CheckpointError):
        list(new.new(Path("other"), "shapes:val", "cpu", "clipless"))


def test_one_key_is_changed_and_the_rest_stays_as_it_is_written() -> None:
    text = "clip: a  # one\nmodel:\n  low: 64\n  unet:\n    low: 1\ntrain: {low: 2}\n"
    assert new.changed(text, "model.low", 8) == text.replace("low: 64", "low: 8")
    assert new.changed(text, "model.high", "a: b") == text.replace("1\n", '1\n  high: "a: b"\n')
    assert new.changed(text, "model.low", None) == text.replace("  low: 64\n", "")
    assert new.changed(text, "clip", "b") == text.replace("a  # one", '"b"')


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Run a program of an environment that has the wheel, and of ours only what it depends on."""
    built, bare = tmp_path_factory.mktemp("built"), tmp_path_factory.mktemp("bare")
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check"]
    options = ["--quiet", "--no-deps", "--no-build-isolation"]
    subprocess.run([*pip, "wheel", *options, "--wheel-dir", str(built), str(ROOT)], check=True)
    (wheel,) = built.glob("*.whl")
    assert wheel.stat().st_size < LARGEST
    subprocess.run([*pip, "install", *options, "--target", str(bare), str(wheel)], check=True)
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    environment = {**os.environ, "PYTHONPATH": str(bare), "HF_HUB_OFFLINE": "1"}
    environment |= {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}

    def run(*command: str) -> str:
        start = [str(bare / "bin" / "unclip")] if command[0] != "-m" else []
        done = subprocess.run(
            [sys.executable, *start, *command],
            cwd=elsewhere,
            env=environment,
            capture_output=True,
            text=True,
            timeout=600,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    assert str(bare) in run("-m", "site")
    return run


@pytest.mark.slow
def test_the_wheel_makes_a_picture_and_has_configurations_and_emoji(installed: Run) -> None:
    assert installed("--version").startswith("unclip ")
    assert "shapes/upsampler_128" in installed("configs")
    printed = installed("text", "a red apple", "--size", "64", "--steps", "2", "--out", "apple.png")
    assert printed.strip() == "apple.png"
    assert "M parameters" in installed("info", "weights/emoji")
    assert "usage: unclip train embed" in installed("train", "embed", "--help")


@pytest.mark.slow
def test_the_wheel_trains_every_stage(installed: Run, sentences: Path) -> None:  # noqa: F811
    two = ["train.steps=2", "train.batch=4", "train.save_every=2", "train.sample_every=9"]

    def train(stage: str, config: str, *overrides: str, launcher: tuple[str, ...] = ()) -> None:
        out = f"train.out=runs/{config}"
        begin = [*launcher, "-m", "unclip.train"] if launcher else ["train"]
        installed(*begin, stage, config, out, *two, *overrides)

    clip = "clip=runs/shapes/clip"
    thin = ["model.unet.channels=8", "model.unet.groups=4"]
    launch = ("-m", "accelerate.commands.launch")
    train("clip", "shapes/clip")
    few = [f"teacher.model={sentences}", "teacher.words=5"]
    few += ["data.train=shapes:val", "data.val=null"]
    train("clip-text", "emoji/clip_text", clip, "data.resolution=32", *few)
    printed = installed("train", "embed", "shapes:val", "cache", "--clip", "runs/shapes/clip")
    assert printed.startswith("cache: ")
    train("prior", "shapes/prior", clip, "model.transformer.layers=1", launcher=launch)
    train("ar-prior", "shapes/ar_prior", clip, "model.transformer.layers=1")
    train("decoder", "shapes/decoder", clip, *thin, "model.unet.head_channels=8")
    train("upsampler", "shapes/upsampler_64", *thin)
    runs = [f"runs/shapes/{name}" for name in ("clip", "prior", "decoder", "upsampler_64")]
    options = zip(("--clip", "--prior", "--decoder", "--upsampler"), runs, strict=True)
    installed("assemble", *(word for pair in options for word in pair), "--out", "model")
    printed = installed("text", "a red circle", "--model", "model", "--out", "x.png")
    assert printed.strip() == "x.png"
