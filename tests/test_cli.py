"""The shell: what is written where, what a PNG says, and the exit code of each mistake."""

from __future__ import annotations

import json
import os
import shutil
import struct
import subprocess
import sys
import tarfile
import zlib
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import numpy as np
import pytest
import torch
import typer
from conftest import tiny_clip, tiny_decoder
from PIL import Image
from safetensors import safe_open

from unclip.cli import main
from unclip.cli.arguments import expanded
from unclip.cli.output import read_about, slug
from unclip.cli.shell import default_model
from unclip.data.open import open_dataset
from unclip.data.sample import fixed
from unclip.files.disk import write_new
from unclip.files.find import resolve_folder
from unclip.images import fit_square, to_tensor
from unclip.pipeline import UnCLIP
from unclip.sources import Source
from unclip.stages.stage import Stage

ROOT = Path(__file__).resolve().parent.parent
EDITS = ("reconstruct", "interpolate", "edit", "mix", "inpaint", "redraw")
DRAWING = ("text", "vary", "embed", "upscale", *EDITS)  # verbs that need a model


@pytest.fixture
def run(capsys, model_folder):
    """Run a verb in this process: (exit code, stdout, stderr)."""

    def run(*args, model=model_folder):
        args = [str(arg) for arg in args]
        if args and args[0] in DRAWING and model is not None:
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


def same(a: Path | Image.Image, b: Path) -> None:
    torch.testing.assert_close(
        *(to_tensor(x if isinstance(x, Image.Image) else Image.open(x)) for x in (a, b)),
        rtol=0,
        atol=2.1 / 255,
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
    assert image.text["model"] == Source(model_folder).hash
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
    """At the largest size, where pictures go one by one through the last stage only."""
    from unclip.errors import DataError

    draw = Stage.draw

    def fails_later(self, cond, config, generators, **more):
        if self.name == "upsampler_64" and generators[0].initial_seed() > 0:
            raise DataError("the lights went out")
        return draw(self, cond, config, generators, **more)

    monkeypatch.setattr(Stage, "draw", fails_later)
    monkeypatch.setattr("unclip.stages.stage.CHUNK_PIXELS", 16**2)
    code, out, _ = run("text", "a red apple", "--n", 3, "--out", tmp_path)
    assert code == 3 and Path(out.strip()).is_file()


def test_nothing_is_overwritten(run, tmp_path):
    for expected in ("x.png", "x-1.png", "x-2.png"):
        code, out, _ = run("text", "x", "--size", 16, "--out", tmp_path / "x.png")
        assert code == 0 and out.strip() == str(tmp_path / expected)
    same(tmp_path / "x.png", tmp_path / "x-2.png")


def test_options_by_stage_are_parsed(run, tmp_path):
    code, out, err = run(
        *("text", "x", "--size", 16, "--out", tmp_path, "--steps", "prior=3,decoder=1"),
        *("--guidance", 3, "--sampler", "decoder=ddpm", "--interval", "0.2,0.8"),
    )
    assert code == 0, err
    sampling = json.loads(Image.open(out.strip()).text["settings"])["sampling"]
    assert sampling["prior"]["steps"] == 3 and sampling["decoder"]["steps"] == 1
    assert sampling["decoder"]["guidance"] == 3 and sampling["decoder"]["sampler"] == "ddpm"
    assert sampling["prior"]["sampler"] == "ddim" and sampling["prior"]["interval"] is None
    assert sampling["decoder"]["interval"] == [0.2, 0.8]


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


def test_edits_write_what_the_pipeline_gives(run, tmp_path, apple, pipe):
    out, picture = tmp_path / "o", Image.open(apple)
    how, small = ["--steps", 5, "--size", 16, "--out", out], {"steps": 5, "size": 16}
    code, said, _ = run("reconstruct", apple, *how)
    assert code == 0 and "PSNR" in said
    first = Path(said.splitlines()[0])
    same(pipe.reconstruct(picture, **small), first)
    sampling = json.loads(Image.open(first).text["settings"])["sampling"]["decoder"]
    assert (sampling["guidance"], sampling["clip"], sampling["steps"]) == (1, None, 5)
    captions = ["--from", "a red apple", "--to", "a blue square"]
    code, said, _ = run("edit", apple, *captions, "--strength", "0,0.3", *how)
    assert code == 0 and said.count("-0.png") == 2
    edited = pipe.text_diff(picture, "a blue square", "a red apple", 0.3, **small)[0]
    same(edited, Path(said.splitlines()[1]))
    code, said, _ = run("mix", "--image", f"{apple}:0.7", "--text", "a red apple:0.3", *how)
    assert code == 0
    same(pipe.mix([picture, "a red apple"], [0.7, 0.3], **small)[0], Path(said.strip()))
    code, said, _ = run("redraw", apple, "a blue square", "--strength", 0.5, *how)
    assert code == 0
    same(pipe.inpaint(picture, None, "a blue square", 0.5, **small)[0], Path(said.strip()))
    code, said, _ = run("vary", apple, "--invert", "--eta", 0, *how)
    assert code == 0
    same(pipe.reconstruct(picture, **small), Path(said.strip()))


@pytest.fixture
def record(run, tmp_path, monkeypatch):
    """What each PNG of a verb says, and what its decoder was really asked for."""
    decode, asked = Stage.draw, []

    def noted(self, cond, config, *args, **more):
        if self.kind == "decoder":
            asked.append(json.loads(json.dumps(config.model_dump())))
        return decode(self, cond, config, *args, **more)

    monkeypatch.setattr(Stage, "draw", noted)

    def record(*args):
        asked.clear()
        code, said, err = run(*args, "--size", 16, "--out", tmp_path / "o")
        assert code == 0, err
        paths = [line for line in said.splitlines() if line.endswith(".png")]
        abouts = [read_about(path) for path in paths if "-sheet" not in path]
        assert all(about["settings"]["sampling"]["decoder"] in asked for about in abouts)
        assert len(asked) == 1
        return abouts

    return record


def test_the_pngs_of_edits_say_how_they_were_made(record, tmp_path, apple):
    """Those of inpaint and redraw named the model's own sampling, and no prompt."""
    mask = tmp_path / "mask.png"
    Image.new("L", (20, 16), 255).save(mask)
    (about,) = record("inpaint", apple, mask, "a hat", "--repeats", 2, "--strength", 0.1)
    assert about["prompt"] == "a hat" and about["settings"]["source"] == "apple.png"
    given = {"mask": "mask.png", "strength": 0.1, "repeats": 2, "as_it_is": False}
    assert about["settings"]["given"] == given
    assert about["settings"]["sampling"]["decoder"]["steps"] == 5
    (about,) = record("redraw", apple, "--strength", 0.1)
    given = {"mask": None, "strength": 0.1, "repeats": 1, "as_it_is": True}
    assert about["settings"]["given"] == given and about["prompt"] == ""
    short = ("--steps", 2)
    abouts = record("edit", apple, "--to", "a pear", "--from", "x", "--strength", "0,0.3", *short)
    assert [about["prompt"] for about in abouts] == ["a pear"] * 2
    assert [about["settings"]["given"] for about in abouts] == [
        {"source": "x", "strength": strength} for strength in (0, 0.3)
    ]
    abouts = record("interpolate", apple, mask, "--frames", 3, "--fixed-noise", *short)
    assert [about["settings"]["given"] for about in abouts] == [
        {"frames": 3, "fixed_noise": True, "place": k} for k in range(3)
    ]
    abouts = record("mix", "--image", f"{apple}:0.7", "--text", "a hat:0.3", "--n", 2)
    assert [about["settings"]["given"] for about in abouts] == [
        {"images": [["apple.png", 0.7]], "texts": [["a hat", 0.3]], "place": k} for k in range(2)
    ]
    assert abouts[0]["prompt"] == "a hat" and abouts[0]["settings"]["source"] == "apple.png"
    (about,) = record("vary", apple, "--invert", "--eta", 0.5, *short)
    assert about["settings"]["given"] == {"invert": True} and about["settings"]["eta"] == 0.5
    assert record("vary", apple)[0]["settings"]["given"] == {"invert": False}


def test_pictures_of_embeddings_say_of_which(run, tmp_path, apple):
    run("embed", apple, "--out", tmp_path / "z.safetensors")
    run("vary", tmp_path / "z.safetensors", "--size", 16, "--out", tmp_path / "o.png")
    given = read_about(tmp_path / "o.png")["settings"]["given"]
    assert given == {"invert": False, "key": str(apple)}


def test_an_interpolation_is_pictures_a_sheet_and_an_animation(run, tmp_path, apple):
    other, out = tmp_path / "sky.png", tmp_path / "o"
    Image.new("RGB", (16, 20), "blue").save(other)
    how = ["--frames", 3, "--steps", 5, "--size", 16, "--out", out]
    code, said, _ = run("interpolate", apple, other, *how, "--gif", "--webp")
    assert code == 0
    assert len(list(out.glob("apple-to-sky-0*.png"))) == 3
    assert (out / "apple-to-sky-sheet.png").exists()
    for suffix in ("gif", "webp"):
        with Image.open(out / f"apple-to-sky.{suffix}") as animation:
            assert animation.n_frames == 4 and str(out / f"apple-to-sky.{suffix}") in said


def test_inpainting_keeps_what_is_black(run, tmp_path, apple):
    mask = tmp_path / "mask.png"
    Image.new("L", (20, 16), 0).save(mask)
    args = ["inpaint", apple, mask, "a blue square", "--out", tmp_path / "o.png", "--size", 16]
    code, _, err = run(*args)
    assert code == 2 and "black everywhere" in err
    white = Image.new("L", (20, 16), 0)
    white.paste(255, (0, 0, 10, 16))
    white.save(mask)
    assert run(*args, "--steps", 3, "--repeats", 2)[0] == 0
    kept = np.asarray(Image.open(tmp_path / "o.png"))[:, 8:]
    assert (kept == np.asarray(fit_square(Image.open(apple), 16))[:, 8:]).all()


def test_text_may_be_led_away_and_its_prior_chosen(run, tmp_path, pipe):
    out = tmp_path / "o.png"
    args = ["text", "a red apple", "--size", 16, "--out", out, "--prior", "text"]
    assert run(*args, "--negative", "a blue square")[0] == 0
    made = {"prior": "text", "negative_prompt": "a blue square"}
    same(pipe.text_to_image("a red apple", size=16, **made)[0], out)
    settings = json.loads(Image.open(out).text["settings"])
    assert settings.items() >= made.items()


def test_info_lists_every_stage(run, model_folder, pipe):
    code, out, _ = run("info", model_folder)
    assert code == 0
    for name in ("clip", "prior", "decoder", "upsampler_32", "upsampler_64"):
        assert any(line.startswith(name) for line in out.splitlines())
    assert "32 → 64 px" in out and "ddim, 2 steps, guidance 2" in out and "tiny 0" in out
    assert Source(model_folder).hash in out


def test_info_says_where_guidance_is_limited(run, model_folder, tmp_path):
    shutil.copytree(model_folder, tmp_path / "m")
    file = tmp_path / "m" / "decoder" / "config.json"
    config = json.loads(file.read_text())
    config["sampling"]["interval"] = [0.25, 1.0]
    file.write_text(json.dumps(config))
    assert "ddim, 2 steps, guidance 2 in 0.25 to 1" in run("info", tmp_path / "m")[1]


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
        (["text", "x", "--device", "meta"], "device = 'meta' can't be used here"),
        (["text", "x", "--interval", "0.2"], "interval = (0.2,): expected start,end with 0 <="),
        (["text", "x", "--interval", "0.8,0.2"], "error: interval = (0.8, 0.2): expected"),
        (["text", "x", "--guidance", "1", "--negative", "y"], "negative_prompt = 'y' has no"),
        (["text", "x", "--size", "16", "--tile", "8"], "tile = 8 has no effect"),
        (["text", "x", "--n", 2, "--out", "one.png"], "one file"),
        (["text", "x", "--out", "one.jpg", "--format", "png"], "one.jpg is no png"),
        (["text", "x", "--out", "one.gif"], "written as .png, .webp or .jpg, and .gif is none"),
        (["text", "x", "--n", 2, "--out", "w/one.TIFF"], ".TIFF is none of these"),
        (["text", "x", "--dtype", "fp8"], "bf16"),
        (["assemble", "--out", "built"], "nothing to assemble"),
        (["mix"], "nothing to mix"),
        (["mix", "--text", "a:0", "--text", "b:0"], "sum to more than 0"),
        (["text", "x", "--prior", "other"], "diffusion, ar, draft"),
    ],
)
def test_usage_errors_exit_2_and_say_what_is_valid(run, args, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code, _, err = run(*args)
    assert code == 2 and message in err, err
    assert "Traceback" not in err
    assert list(tmp_path.iterdir()) == []


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
    monkeypatch.setattr("unclip.shipped.PACKAGE", tmp_path / "unclip")
    code, _, err = run("text", "x", "--out", tmp_path / "o", model=None)
    assert code == 4 and "--model" in err and str(Path("weights/emoji")) in err


@pytest.mark.parametrize("place", ["unclip/share/weights/emoji", "weights/emoji"])
def test_shipped_weights_are_found_in_a_wheel_and_in_a_clone(tmp_path, monkeypatch, place):
    monkeypatch.setattr("unclip.shipped.PACKAGE", tmp_path / "unclip")
    (tmp_path / place).mkdir(parents=True)
    (tmp_path / place / "unclip.json").write_text("{}")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert default_model() == resolve_folder("weights/emoji") == tmp_path / place


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
    code, _, err = run("embed", tmp_path / "cut.png", "--out", tmp_path / "z.safetensors")
    assert code == 3 and "cut.png" in err and not list(tmp_path.glob("*.safetensors"))


def test_a_damaged_picture_among_others_is_left_out_and_named(run, tmp_path, apple):
    """It cost the embeddings of all the others."""
    (tmp_path / "cut.png").write_bytes(apple.read_bytes()[:60])
    images = (apple, tmp_path / "cut.png", tmp_path / "missing.png", apple)
    code, out, err = run("embed", *images, "--out", tmp_path / "z.safetensors")
    assert code == 0 and err.count("warning: left out") == 2
    assert "cut.png" in err and "missing.png" in err
    with safe_open(out.strip(), framework="pt") as file:
        assert len(file.get_tensor("image_embeds")) == 2
        assert json.loads(file.metadata()["keys"]) == [str(apple)] * 2


def test_an_embedding_that_is_not_finite_is_left_out_and_named(run, tmp_path):
    np.save(tmp_path / "z.npy", np.array([[1.0] * 16, [np.nan] * 16, [2.0] * 16], np.float32))
    code, out, err = run("vary", tmp_path / "z.npy", "--size", 16, "--out", tmp_path / "o")
    assert code == 0 and "z-1" in err and len(out.splitlines()) == 3  # two and their sheet
    np.save(tmp_path / "z.npy", np.full((2, 16), np.nan, np.float32))
    assert run("vary", tmp_path / "z.npy", "--size", 16, "--out", tmp_path / "o")[0] == 3


def test_names_are_made_of_letters_of_any_script():
    assert slug("A red, APPLE!") == "a-red-apple"
    assert slug("красное яблоко") == "красное-яблоко"
    assert slug("../../etc") == "etc" and slug("") == "untitled" and slug("/") == "untitled"
    assert len(slug("long " * 100).encode()) < 200


def test_a_free_name_counts_up_and_is_given_back_where_writing_fails(tmp_path):
    def fails(beside):
        raise OSError("no room")

    names = [write_new(tmp_path / "a.png", lambda beside: beside.touch()).name for _ in range(3)]
    assert names == ["a.png", "a-1.png", "a-2.png"]
    with pytest.raises(OSError, match="no room"):
        write_new(tmp_path / "a.png", fails)
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(names)


def test_two_writers_of_one_name_get_two_files(tmp_path):
    """Of 1,500 saves by two writers into one folder 37 failed with "File exists"."""
    image = Image.new("RGB", (8, 8))

    def save(_):
        return write_new(tmp_path / "a.png", lambda beside: image.save(beside, "PNG")).name

    with ThreadPoolExecutor(8) as pool:
        names = list(pool.map(save, range(200)))
    assert len(set(names)) == 200 == len(list(tmp_path.iterdir()))


def test_sample_py_ends_with_the_exit_code_of_its_error(tmp_path):
    command = [sys.executable, str(ROOT / "sample.py"), "text", "x", "--model", "nowhere"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.returncode == 4 and "[exit code 4]" in done.stderr


def test_text_and_names_are_written_whatever_the_console_can_show(tmp_path, model_folder):
    """A prompt that the console had no letters for, or a file whose name is Latin-1, was drawn,
    then ended in UnicodeEncodeError with nothing written."""
    name = os.fsdecode(tmp_path).encode() + b"/caf\xe9.png"
    Image.new("RGB", (8, 8), "red").save(tmp_path / "plain.png")
    os.rename(os.fsencode(tmp_path / "plain.png"), name)
    code = (
        "import sys; from unclip.cli import main\n"
        "for words in (['text', sys.argv[1], '--size', '16'],\n"
        "              ['embed', sys.argv[2], '--out', 'z.safetensors']):\n"
        "    try: main([*words, '--model', sys.argv[3], '--device', 'cpu'])\n"
        "    except SystemExit as exit: assert not exit.code, exit.code\n"
    )
    environment = {**os.environ, "LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    environment |= {"PYTHONIOENCODING": "ascii:strict", "PYTHONPATH": str(ROOT)}
    prompt = "zwei Äpfel 红色 🍎".encode()
    command = [sys.executable, "-c", code, prompt, name, str(model_folder)]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, env=environment, timeout=120)
    assert done.returncode == 0, done.stderr
    made = [line for line in done.stdout.splitlines() if line]
    assert len(made) == 2
    for path in made:  # what was printed names what was written
        assert os.path.exists(os.path.join(os.fsencode(tmp_path), path)), path
    picture = Image.open(os.path.join(os.fsencode(tmp_path), made[0]))
    picture.load()
    assert picture.text["prompt"] == prompt.decode()
    assert b"warning: the encoder knows no word" in done.stderr


def test_paths_begin_at_home(run, tmp_path, apple, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    code, out, err = run("upscale", "~/apple.png", "--out=~/o")
    assert code == 0, err
    assert Path(out.strip()).parent == tmp_path / "o"


def test_what_a_prompt_loses_is_said(run, tmp_path):
    """Two prompts that differed behind the encoder's last token, or in words that it does not know,
    gave the same pixels without a word."""
    long = "a blue square and two green circles " * 2 + "and a red apple"
    code, _, err = run("text", long, "--size", 16, "--out", tmp_path)
    assert code == 0 and "12 tokens" in err and "green circles and a red apple'" in err
    code, _, err = run("text", "a red zorgle", "--size", 16, "--out", tmp_path)
    assert code == 0 and "'zorgle'" in err and "no word" not in err
    code, _, err = run("text", "红色的苹果", "--size", 16, "--out", tmp_path)
    assert code == 0 and "knows no word of '红色的苹果'" in err
    code, _, err = run("text", "A red apple!", "--size", 16, "--out", tmp_path)
    assert code == 0 and err == ""


def test_eta_is_refused_where_the_sampler_has_none(run, tmp_path, apple):
    """`vary --eta 0` and `--eta 1` gave equal pixels with a decoder sampled by DPM-Solver++."""
    asked = ("vary", apple, "--size", 16, "--out", tmp_path / "o")
    code, _, err = run(*asked, "--sampler", "dpm++", "--eta", 0.5)
    assert code == 2 and "dpm++" in err and "--sampler ddim" in err
    assert run(*asked, "--sampler", "dpm++")[0] == 0
    code, out, _ = run(*asked)
    sampling = json.loads(Image.open(out.strip()).text["settings"])["sampling"]
    assert code == 0 and sampling["decoder"]["eta"] == 1 and sampling["prior"]["eta"] == 0


def test_a_run_is_hashed_once(run, tmp_path, pipe, monkeypatch):
    """`--model RUN` hashed all weights three times."""
    from unclip.files import checkpoints

    checkpoint = tmp_path / "run" / "checkpoints" / "step-10"
    pipe.save_pretrained(checkpoint)
    checkpoints.write_manifest(checkpoint)
    hashed, sha256 = [], checkpoints.sha256
    for module in ("files.checkpoints", "sources"):
        monkeypatch.setattr(f"unclip.{module}.sha256", lambda p: hashed.append(p) or sha256(p))
    args = ("text", "a red apple", "--size", 16, "--out", tmp_path)
    code, out, err = run(*args, model=tmp_path / "run")
    assert code == 0, err
    assert len(hashed) == len(set(hashed))
    monkeypatch.undo()
    pipe.save_pretrained(tmp_path / "copy")
    assert Image.open(out.strip()).text["model"] == Source(tmp_path / "copy").hash


def test_a_stage_given_twice_is_an_error(run, tmp_path):
    code, _, err = run("text", "x", "--out", tmp_path, "--steps", "prior=2,prior=3")
    assert code == 2 and "twice" in err


@pytest.mark.parametrize("verb", ["text", "vary", "embed", "convert", "assemble"])
def test_a_place_that_cannot_be_written_is_refused_before_a_model_is_sought(run, tmp_path, verb):
    (tmp_path / "file").touch()
    (tmp_path / "z.npy").touch()
    out = tmp_path / "file" / "below"
    args = {
        "text": ("x", "--out", out),
        "vary": (tmp_path / "z.npy", "--out", out),
        "embed": (tmp_path / "a.png", "--out", out / "z.safetensors"),
        "convert": (tmp_path / "source", out),
        "assemble": ("--clip", tmp_path / "source", "--out", out),
    }
    (tmp_path / "source").mkdir()
    (tmp_path / "source" / "unclip.json").write_text('{"format": 1, "stages": []}')
    code, _, err = run(verb, *args[verb], model="nowhere")
    assert code == 2 and "can't write into" in err


@dataclass(frozen=True)
class Shared:
    """What several verbs may be told."""

    size: Annotated[int, typer.Option(help="In pixels.")] = 64
    place: Annotated[Path, typer.Option()] = Path("~/x")


def say(word: Annotated[str, typer.Argument()], shared: Shared, n: int = 1) -> None:
    """Say it."""
    print(word, shared.size, shared.place, n)


def test_a_verb_may_take_options_as_one_dataclass(capsys):
    """So that a verb that makes pictures is its own options and a few lines."""

    app = typer.Typer()
    app.command()(expanded(say))
    with pytest.raises(SystemExit):
        app(["hello", "--size", "3", "--n", "2"])
    assert capsys.readouterr().out.strip() == f"hello 3 {Path.home() / 'x'} 2"


@pytest.mark.parametrize("form", ["webp", "jpg"])
def test_other_formats_say_how_they_were_made_too(run, tmp_path, form):
    small = ["--size", 16, "--out", tmp_path / "o", "--format", form]
    code, out, err = run("text", "ein Äpfel", "--n", 2, *small)
    assert code == 0, err
    assert {Path(line).suffix for line in out.splitlines()} == {f".{form}"}
    said = json.loads(Image.open(out.splitlines()[1]).getexif()[0x010E])
    assert said["prompt"] == "ein Äpfel" and said["seed"] == "1" and "settings" in said


@pytest.fixture
def drawn(monkeypatch):
    """The seeds that are drawn."""
    seeds = []
    iterate = UnCLIP.iterate

    def counted(self, *args, **kwargs):
        seeds.extend(kwargs.get("seed", ()))
        return iterate(self, *args, **kwargs)

    monkeypatch.setattr(UnCLIP, "iterate", counted)
    return seeds


@pytest.mark.parametrize("out", ["folder", "some.tar"])
def test_prompts_from_a_file_are_drawn_once_and_are_a_data_set(run, tmp_path, drawn, out):
    file, out = tmp_path / "prompts.csv", tmp_path / out
    file.write_text("prompt,seed,n,negative\na red apple,7,2,\nzwei Äpfel,,,a blue square\n")
    command = ["text", "--prompts", file, "--size", 16, "--out", out]
    code, said, err = run(*command)
    assert code == 0, err
    names = [Path(line).name for line in said.splitlines()]
    assert names == [
        "00000-a-red-apple-7.png",
        "00000-a-red-apple-8.png",
        "00001-zwei-äpfel-2.png",
    ]
    assert drawn == [7, 8, 2]
    assert run(*command)[:2] == (0, "") and drawn == [7, 8, 2]  # nothing is drawn again
    with file.open("a") as more:
        more.write("a blue square,5,,\n")
    if out.suffix:  # what a kill leaves: the last sample in part
        tar = out.read_bytes()
        start = tar.index(b"00001-zwei")
        out.write_bytes(tar[: start + 700])
    else:
        (out / names[2]).unlink()
    code, said, _ = run(*command)
    assert code == 0 and drawn[3:] == [2, 5] and len(said.splitlines()) == 2
    data = open_dataset(str(out), 16)
    assert sorted(fixed(data, k).caption for k in range(len(data))) == [
        *["a blue square", "a red apple", "a red apple", "zwei Äpfel"]
    ]
    run("text", "a red apple", "--seed", 8, "--size", 16, "--out", tmp_path / "one.png")
    apple = next(s for s in map(lambda k: fixed(data, k), range(len(data))) if "apple-8" in s.key)
    torch.testing.assert_close(apple.image, to_tensor(Image.open(tmp_path / "one.png")))
    code, _, err = run(*command, "--steps", 3)
    assert code == 2 and "other options" in err


@pytest.mark.parametrize(
    ("name", "text", "message", "code"),
    [
        (
            "p.jsonl",
            '{"prompt": "x"}\n{"promt": "x"}\n',
            "line 2: missing key prompt; unknown key promt",
            2,
        ),
        ("p.jsonl", "x\n", "line 1 is no JSON", 3),
        ("p.csv", "prompt,n\nx,none\n", "line 2: n = 'none'", 2),
        ("p.txt", "\n\n", "no prompts", 3),
        ("p.doc", "x", ".jsonl", 2),
    ],
)
def test_what_is_wrong_with_a_file_of_prompts_is_named(run, tmp_path, name, text, message, code):
    (tmp_path / name).write_text(text)
    got, _, err = run("text", "--prompts", tmp_path / name, "--out", tmp_path / "o")
    assert got == code and message in err, err


def test_what_no_line_of_prompts_can_have_is_said_before_the_first_is_drawn(run, tmp_path):
    file = tmp_path / "prompts.csv"
    file.write_text("prompt,negative\na red apple,\na square,a circle\n")
    asked = ("--size", 16, "--guidance", 1, "--out", tmp_path / "o")
    code, _, err = run("text", "--prompts", file, *asked)
    assert (
        code == 2
        and "00001-a-square-1 can't be drawn: negative_prompt = 'a circle' has no effect" in err
    )
    assert not [*(tmp_path / "o").glob("*.png")]


@pytest.mark.parametrize("name", ["batch.png", "batch.bmp"])
def test_a_file_of_prompts_makes_no_folder_named_as_a_picture(run, tmp_path, name):
    (tmp_path / "p.txt").write_text("a red apple\n")
    code, _, err = run("text", "--prompts", tmp_path / "p.txt", "--out", tmp_path / "w" / name)
    assert code == 2 and "one picture's name" in err and not (tmp_path / "w").exists()


def test_a_folder_where_a_picture_is_expected_is_said_to_be_one(run, tmp_path):
    """It was called a damaged picture."""
    (tmp_path / "in").mkdir()
    code, _, err = run("vary", tmp_path / "in", "--out", tmp_path / "o")
    assert code == 3 and "in is a folder, and a picture is expected" in err


@pytest.mark.parametrize("kind", ["txt", "csv", "jsonl"])
def test_lines_of_prompts_end_where_lines_do(run, tmp_path, drawn, kind):
    """Unicode's own separators did, too: one prompt was two, JSON was cut, a folder not resumed."""
    prompt, file = "a\u2028red\u0085apple\x0b\x0c", tmp_path / f"prompts.{kind}"
    said = json.dumps({"prompt": prompt + "!"}, ensure_ascii=False)
    text = {"txt": f"{prompt}!", "csv": f"prompt\r\n{prompt}!", "jsonl": said}[kind]
    file.write_bytes(f"{text}\r\n".encode())
    command = ["text", "--prompts", file, "--size", 16, "--out", tmp_path / "out"]
    for _ in range(2):
        code, _, err = run(*command)
        assert (code, drawn) == (0, [0]), err


def test_a_tar_or_folder_of_something_else_is_left_alone(run, tmp_path, apple):
    (tmp_path / "p.txt").write_text("a red apple\n")
    with tarfile.open(tmp_path / "mine.tar", "w") as tar:
        tar.add(apple, "apple.png")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "metadata.jsonl").write_text('{"file_name": "x.png", "text": "y"}')
    (tmp_path / "mine" / "x.png").write_bytes(apple.read_bytes())
    before = (tmp_path / "mine.tar").read_bytes()
    for out in ("mine.tar", "mine"):
        code, _, err = run("text", "--prompts", tmp_path / "p.txt", "--out", tmp_path / out)
        assert code == 2 and "--out" in err, err
    assert (tmp_path / "mine.tar").read_bytes() == before
    assert json.loads((tmp_path / "mine" / "metadata.jsonl").read_text())["text"] == "y"
