"""The shell: what is written where, what a PNG says, and the exit code of each mistake."""

from __future__ import annotations

import json
import struct
import subprocess
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import tiny_clip, tiny_decoder
from PIL import Image
from safetensors import safe_open

from unclip.cli import main
from unclip.cli.output import free_path, slug
from unclip.cli.shell import default_model
from unclip.cli.summary import model_hash
from unclip.images import to_tensor

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture
def run(capsys, model_folder):
    """Run a verb in this process: (exit code, stdout, stderr)."""

    def run(*args, model=model_folder):
        args = [str(arg) for arg in args]
        if args and args[0] in ("text", "vary", "embed", "upscale") and model is not None:
            args = [*args, "--model", str(model)]
            args += [] if "--device" in args else ["--device", "cpu"]
        with pytest.raises(SystemExit) as exit:
            main(args)
        captured = capsys.readouterr()
        return exit.value.code or 0, captured.out, captured.err

    return run


@pytest.fixture
def apple(tmp_path):
    path = tmp_path / "apple.png"
    Image.new("RGB", (20, 16), "red").save(path)
    return path


def same(a: Path, b: Path) -> None:
    torch.testing.assert_close(
        to_tensor(Image.open(a)), to_tensor(Image.open(b)), rtol=0, atol=2.1 / 255
    )


def test_text_writes_pictures_a_sheet_and_how_they_were_made(
    run, tmp_path, pipe, model_folder, monkeypatch
):
    monkeypatch.setattr("unclip.progress.BAR_AFTER", 0.0)
    code, out, err = run("text", "a red apple", "--n", 2, "--seed", 3, "--out", tmp_path / "o")
    names = [Path(line).name for line in out.splitlines()]
    assert code == 0 and err == ""  # no bars where there is no terminal
    assert names == ["a-red-apple-3.png", "a-red-apple-4.png", "a-red-apple-sheet.png"]
    image = Image.open(tmp_path / "o" / names[1])
    image.load()
    assert image.size == (64, 64)
    assert image.text["prompt"] == "a red apple" and image.text["seed"] == "4"
    assert image.text["model"] == model_hash(model_folder)
    settings = json.loads(image.text["settings"])
    assert settings["verb"] == "text" and settings["prior_candidates"] == 2
    assert settings["sampling"]["decoder"]["steps"] == 2
    expected = pipe.text_to_image("a red apple", seed=4)[0]
    torch.testing.assert_close(to_tensor(image), to_tensor(expected), rtol=0, atol=2.1 / 255)


def test_several_prompts_are_prompt_major_and_drawn_in_batches(run, tmp_path, monkeypatch):
    monkeypatch.setattr("unclip.stages.stage.CHUNK_PIXELS", 3 * 16**2)
    prompts = ["a red apple", "zwei Äpfel"]
    code, out, _ = run("text", *prompts, "--n", 2, "--size", 16, "--out", tmp_path)
    names = [Path(line).name for line in out.splitlines()]
    assert code == 0
    assert names[:4] == [
        "a-red-apple-0.png",
        "a-red-apple-1.png",
        "zwei-äpfel-2.png",
        "zwei-äpfel-3.png",
    ]
    run("text", prompts[1], "--seed", 2, "--size", 16, "--out", tmp_path / "one")
    same(tmp_path / names[2], tmp_path / "one" / names[2])


def test_what_is_ready_stays_when_a_later_batch_fails(run, tmp_path, monkeypatch):
    from unclip.errors import DataError
    from unclip.pipeline import UnCLIP

    draw = UnCLIP.text_to_image

    def fails_later(self, prompt, seed=0, **options):
        if seed > 0:
            raise DataError("the lights went out")
        return draw(self, prompt, seed=seed, **options)

    monkeypatch.setattr(UnCLIP, "text_to_image", fails_later)
    monkeypatch.setattr("unclip.stages.stage.CHUNK_PIXELS", 1)
    code, out, _ = run("text", "a red apple", "--n", 3, "--size", 16, "--out", tmp_path)
    assert code == 3 and Path(out.strip()).is_file()


def test_nothing_is_overwritten(run, tmp_path):
    for expected in ("x.png", "x-1.png", "x-2.png"):
        code, out, _ = run("text", "x", "--size", 16, "--out", tmp_path / "x.png")
        assert code == 0 and out.strip() == str(tmp_path / expected)
    same(tmp_path / "x.png", tmp_path / "x-2.png")


def test_options_by_stage_are_parsed(run, tmp_path):
    code, out, err = run(
        *("text", "x", "--size", 16, "--out", tmp_path, "--steps", "prior=3,decoder=1"),
        *("--guidance", 3, "--sampler", "decoder=ddpm"),
    )
    assert code == 0, err
    sampling = json.loads(Image.open(out.strip()).text["settings"])["sampling"]
    assert sampling["prior"]["steps"] == 3 and sampling["decoder"]["steps"] == 1
    assert sampling["decoder"]["guidance"] == 3 and sampling["decoder"]["sampler"] == "ddpm"
    assert sampling["prior"]["sampler"] == "ddim"


def test_embed_then_vary_equals_vary_of_the_picture(run, tmp_path, apple):
    code, out, _ = run("embed", apple, apple, "--out", tmp_path / "z.safetensors")
    assert code == 0 and out.strip() == str(tmp_path / "z.safetensors")
    with safe_open(tmp_path / "z.safetensors", framework="pt") as file:
        z = file.get_tensor("image_embeds")
        assert z.shape == (2, 16) and json.loads(file.metadata()["keys"]) == [str(apple)] * 2
        assert json.loads(file.metadata()["clip"])["name"] == "tiny 0"
    np.save(tmp_path / "z.npy", z.numpy()[:1])
    paths = []
    for source in (apple, tmp_path / "z.safetensors", tmp_path / "z.npy"):
        code, out, err = run("vary", source, "--size", 16, "--out", tmp_path / source.suffix)
        assert code == 0, err
        paths.append(out.splitlines()[0])
    same(paths[0], paths[1])
    same(paths[0], paths[2])


def test_embeddings_of_another_encoder_are_refused(run, tmp_path, apple):
    tiny_clip(seed=1).save(tmp_path / "other")
    file = tmp_path / "z.safetensors"
    assert run("embed", apple, "--out", file, model=tmp_path / "other")[0] == 0
    code, _, err = run("vary", file, "--out", tmp_path)
    assert code == 4 and "tiny 0" in err and "tiny 1" in err


@pytest.mark.parametrize("name", ["z.npy", "z.safetensors"])
def test_damaged_embeddings_are_a_data_error(run, tmp_path, name):
    (tmp_path / name).write_bytes(b"\x93NUMPY nonsense")
    code, _, err = run("vary", tmp_path / name, "--out", tmp_path)
    assert code == 3 and name in err


def test_pickled_arrays_are_refused(run, tmp_path):
    np.save(tmp_path / "z.npy", np.array([{"a": 1}], dtype=object))
    assert run("vary", tmp_path / "z.npy", "--out", tmp_path)[0] == 3


def test_upscale_writes_a_larger_picture(run, tmp_path, apple):
    code, out, _ = run("upscale", apple, "--out", tmp_path / "o", "--tile", 32)
    assert code == 0 and Image.open(out.strip()).size == (64, 64)
    assert Path(out.strip()).name == "apple-64px-0.png"


def test_info_lists_every_stage(run, model_folder, pipe):
    code, out, _ = run("info", model_folder)
    assert code == 0
    for name in ("clip", "prior", "decoder", "upsampler_32", "upsampler_64"):
        assert any(line.startswith(name) for line in out.splitlines())
    assert "32 → 64 px" in out and "ddim, 2 steps, guidance 2" in out and "tiny 0" in out
    assert model_hash(model_folder) in out


def test_assemble_collects_runs_into_a_model(run, tmp_path, pipe, model_folder):
    checkpoint = tmp_path / "run" / "checkpoints" / "step-10"
    checkpoint.mkdir(parents=True)
    pipe.decoder.save(checkpoint)
    from unclip.files.checkpoints import write_manifest

    write_manifest(checkpoint)
    out = tmp_path / "built"
    args = ["assemble", "--clip", model_folder, "--prior", model_folder, "--out", out]
    args += ["--decoder", tmp_path / "run", "--upsampler", model_folder, "--dtype", "fp16"]
    code, _, err = run(*args)
    assert code == 0, err
    assert json.loads((out / "unclip.json").read_text())["stages"][-1] == "upsampler_64"
    code, _, err = run(*args)
    assert code == 2 and "holds a model already" in err
    assert run("text", "x", "--size", 16, "--out", tmp_path, model=out)[0] == 0


def test_assemble_refuses_another_encoder(run, tmp_path, model_folder):
    tiny_decoder(tiny_clip(seed=1)).save(tmp_path / "decoder")
    code, _, err = run(
        *("assemble", "--clip", model_folder, "--decoder", tmp_path / "decoder"),
        *("--out", tmp_path / "built"),
    )
    assert code == 4 and "tiny 1" in err and not (tmp_path / "built").exists()


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["paint", "x"], "paint"),
        (["text"], "PROMPT"),
        (["text", "x", "--n", 0], "--n"),
        (["text", "x", "--seed", -1], "--seed"),
        (["text", "x", "--size", 512], "[16, 32, 64]"),
        (["text", "x", "--sampler", "euler"], "'unipc'"),
        (["text", "x", "--steps", "many"], "--steps 'many'"),
        (["text", "x", "--steps", "prior=2=3"], "--steps"),
        (["text", "x", "--steps", "first=2"], "prior, decoder"),
        (["text", "x", "--device", "abacus"], "abacus"),
        (["text", "x", "--n", 2, "--out", "one.png"], "one file"),
        (["text", "x", "--out", "one.jpg"], ".png"),
        (["text", "x", "--dtype", "fp8"], "bf16"),
        (["assemble", "--out", "built"], "nothing to assemble"),
    ],
)
def test_usage_errors_exit_2_and_say_what_is_valid(run, args, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code, _, err = run(*args)
    assert code == 2 and message in err, err
    assert "Traceback" not in err
    assert list(tmp_path.glob("**/*.png")) == []


def test_an_unwritable_out_is_refused_before_the_model_is_loaded(run, tmp_path):
    (tmp_path / "file").write_text("in the way")
    code, _, err = run("text", "x", "--out", tmp_path / "file" / "o", model="nowhere")
    assert code == 2 and "can't write" in err


def test_a_missing_model_exits_4(run, tmp_path):
    code, _, err = run("text", "x", "--out", tmp_path, model=tmp_path / "nowhere")
    assert code == 4 and "nowhere" in err
    code, _, err = run("info", tmp_path / "nowhere")
    assert code == 4


def test_missing_shipped_weights_are_named(run, tmp_path, monkeypatch):
    monkeypatch.setattr("unclip.cli.shell.__file__", str(tmp_path / "unclip" / "cli" / "shell.py"))
    code, _, err = run("text", "x", "--out", tmp_path / "o", model=None)
    assert code == 4 and "--model" in err and str(Path("weights/emoji")) in err


@pytest.mark.parametrize("place", ["unclip/weights/emoji", "weights/emoji"])
def test_shipped_weights_are_found_in_a_wheel_and_in_a_clone(tmp_path, monkeypatch, place):
    monkeypatch.setattr("unclip.cli.shell.__file__", str(tmp_path / "unclip" / "cli" / "shell.py"))
    (tmp_path / place).mkdir(parents=True)
    (tmp_path / place / "unclip.json").write_text("{}")
    assert default_model() == tmp_path / place


def test_truncated_weights_exit_4(run, tmp_path, pipe):
    pipe.decoder.save(tmp_path / "m")
    path = tmp_path / "m" / "decoder" / "model.safetensors"
    path.write_bytes(path.read_bytes()[:1000])
    np.save(tmp_path / "z.npy", np.ones((1, 16), np.float32))
    code, _, err = run("vary", tmp_path / "z.npy", "--out", tmp_path, model=tmp_path / "m")
    assert code == 4 and "truncated" in err
    assert run("info", tmp_path / "m")[0] == 4


def test_damaged_and_huge_pictures_exit_3(run, tmp_path, apple):
    whole = apple.read_bytes()
    (tmp_path / "cut.png").write_bytes(whole[: len(whole) // 2])
    header = b"IHDR" + struct.pack(">IIBBBBB", 30000, 30000, 8, 2, 0, 0, 0)
    png = b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + header
    (tmp_path / "huge.png").write_bytes(png + struct.pack(">I", zlib.crc32(header)) + whole[33:])
    (tmp_path / "text.png").write_text("not a picture")
    for name in ("cut.png", "huge.png", "text.png", "missing.png"):
        for verb in ("vary", "upscale"):
            code, _, err = run(verb, tmp_path / name, "--out", tmp_path / "o")
            assert code == 3 and name in err
    code, _, err = run("embed", apple, tmp_path / "cut.png", "--out", tmp_path / "z.safetensors")
    assert code == 3 and "cut.png" in err


def test_names_are_made_of_letters_of_any_script():
    assert slug("A red, APPLE!") == "a-red-apple"
    assert slug("красное яблоко") == "красное-яблоко"
    assert slug("../../etc") == "etc" and slug("") == "untitled" and slug("/") == "untitled"
    assert len(slug("long " * 100).encode()) < 200


def test_a_free_path_counts_up(tmp_path):
    assert free_path(tmp_path / "a.png").name == "a.png"
    for name in ("a.png", "a-1.png"):
        (tmp_path / name).touch()
    assert free_path(tmp_path / "a.png").name == "a-2.png"


def test_sample_py_ends_with_the_exit_code_of_its_error(tmp_path):
    command = [sys.executable, str(ROOT / "sample.py"), "text", "x", "--model", "nowhere"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.returncode == 4 and "[exit code 4]" in done.stderr
