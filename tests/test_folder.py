"""The model-folder format: what goes in comes out, and damage is named."""

from __future__ import annotations

import errno
import json
import os
import signal
import stat
from pathlib import Path

import pytest
import torch
from torch import nn

from unclip.errors import CheckpointError
from unclip.files.checkpoints import newest_checkpoint, write_manifest
from unclip.files.find import resolve_folder
from unclip.files.folder import read_index, read_stage_config, update_index, write_stage
from unclip.files.tensors import TensorFile, load_tensors, write_tensors


def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(4, 2))


def checkpoint(run: Path, step: int) -> Path:
    path = run / "checkpoints" / f"step-{step}"
    write_stage(path, "prior", {"step": step}, model().state_dict())
    (path / "training").mkdir()
    write_tensors(path / "training" / "weights.safetensors", model().state_dict())
    write_manifest(path)
    return path


def damage(path: Path) -> None:
    """Flip one payload byte, which safetensors does not notice."""
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


def test_a_stage_comes_out_as_it_went_in(tmp_path: Path) -> None:
    source = model().to(memory_format=torch.channels_last)
    write_stage(tmp_path, "decoder", {"size": [1, 2]}, source.state_dict())
    assert read_stage_config(tmp_path, "decoder") == {"size": [1, 2]}
    target = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(4, 2))
    tensors = TensorFile(tmp_path / "decoder" / "model.safetensors")
    load_tensors(target, tensors, "decoder")
    for name, tensor in source.state_dict().items():
        assert torch.equal(target.state_dict()[name], tensor)


def test_stages_are_listed_in_the_order_of_the_stack(tmp_path: Path) -> None:
    names = ["clip", "prior", "ar_prior", "decoder", "upsampler_256", "upsampler_1024"]
    for name in [*reversed(names), "prior"]:
        write_stage(tmp_path, name, {}, {"x": torch.zeros(1)})
    assert read_index(tmp_path) == {"format": 1, "stages": names}


def test_other_entries_of_the_index_stay(tmp_path: Path) -> None:
    update_index(tmp_path, sampling={"steps": 5})
    write_stage(tmp_path, "clip", {}, {"x": torch.zeros(1)})
    assert read_index(tmp_path)["sampling"] == {"steps": 5}


def test_tied_and_sliced_tensors_are_written_whole(tmp_path: Path) -> None:
    base = torch.arange(6.0)
    tensors = {"a": base, "b": base, "c": base[2:4], "d": base.view(2, 3).T}
    write_tensors(tmp_path / "x.safetensors", tensors)
    back = TensorFile(tmp_path / "x.safetensors")
    assert all(torch.equal(back[name], tensor) for name, tensor in tensors.items())


def test_half_precision_export_converts_only_floating_tensors(tmp_path: Path) -> None:
    tensors = {"w": torch.randn(3), "n": torch.arange(3), "m": torch.tensor([True])}
    write_stage(tmp_path, "clip", {}, tensors, dtype=torch.float16)
    back = TensorFile(tmp_path / "clip" / "model.safetensors")
    assert {n: t.dtype for n, t in back.items()} == {
        "w": torch.float16, "n": torch.int64, "m": torch.bool
    }  # fmt: skip


def test_files_have_the_mode_that_the_umask_says(tmp_path: Path) -> None:
    """safetensors makes its files 0600, so that nobody else can read shared weights."""
    before = os.umask(0o022)
    try:
        write_stage(tmp_path, "clip", {}, {"x": torch.zeros(1)})
    finally:
        os.umask(before)
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert {path.name for path in files} == {"unclip.json", "config.json", "model.safetensors"}
    assert {stat.S_IMODE(path.stat().st_mode) for path in files} == {0o644}


def test_no_room_for_weights_is_an_error_of_the_system(tmp_path: Path) -> None:
    """It was a SafetensorError, which nobody who saves expects, and a traceback."""
    resource = pytest.importorskip("resource")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    ignored = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, before[1]))
        with pytest.raises(OSError, match=r"large.*x\.safetensors") as error:
            write_tensors(tmp_path / "x.safetensors", {"x": torch.zeros(1000)})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, ignored)
    assert error.value.errno == errno.EFBIG


def test_truncated_weights_are_named(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    write_tensors(path, model().state_dict())
    whole = path.read_bytes()
    for length in (0, 5, 100, len(whole) - 1):
        path.write_bytes(whole[:length])
        with pytest.raises(
            CheckpointError, match=rf"model.safetensors \({length} bytes\) is trunc"
        ):
            TensorFile(path)


def test_missing_weights_are_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"no weights at .*absent"):
        TensorFile(tmp_path / "absent.safetensors")


def test_tensors_that_do_not_fit_are_named() -> None:
    tensors = dict(model().state_dict())
    del tensors["0.bias"]
    tensors["2.weight"] = torch.zeros(2, 5)
    tensors["extra"] = torch.zeros(1)
    message = (
        r"here does not fit Sequential: 1 missing \(0.bias\); 1 left over \(extra\); "
        r"1 of another shape \(2.weight 2x5, expected 2x4\)"
    )
    with pytest.raises(CheckpointError, match=message):
        load_tensors(model(), tensors, "here")


@pytest.mark.parametrize("name", ["unet", "upsampler", "upsampler_0", "upsampler_x", "../clip"])
def test_unknown_stages_are_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(CheckpointError, match="unknown stage"):
        write_stage(tmp_path, name, {}, {})


def test_missing_stage_names_those_there_are(tmp_path: Path) -> None:
    write_stage(tmp_path, "clip", {}, {"x": torch.zeros(1)})
    with pytest.raises(CheckpointError, match=r"no stage 'prior' in .*, which has clip"):
        read_stage_config(tmp_path, "prior")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "not valid JSON"),
        ("[]", "must hold a JSON object"),
        ('{"format": 1}', "has no list of stages"),
        ('{"format": 2, "stages": []}', "has format 2; this version reads format 1"),
    ],
)
def test_a_damaged_or_newer_index_is_refused(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "unclip.json").write_text(text)
    with pytest.raises(CheckpointError, match=message):
        read_index(tmp_path)


def test_a_run_means_its_newest_finished_checkpoint(tmp_path: Path) -> None:
    for step in (9, 10):
        checkpoint(tmp_path, step)
    checkpoint(tmp_path, 11).rename(tmp_path / "checkpoints" / "step-11.tmp")
    newest = resolve_folder(tmp_path)
    assert newest == tmp_path / "checkpoints" / "step-10"
    assert resolve_folder(newest) == newest


@pytest.mark.parametrize("how", ["flip", "truncate", "remove", "no manifest", "bad manifest"])
def test_a_damaged_checkpoint_is_passed_over_with_a_warning(tmp_path: Path, how: str) -> None:
    sound, damaged = checkpoint(tmp_path, 1), checkpoint(tmp_path, 2)
    weights = damaged / "prior" / "model.safetensors"
    if how == "flip":
        damage(weights)
    elif how == "truncate":
        weights.write_bytes(weights.read_bytes()[:-1])
    elif how == "remove":
        weights.unlink()
    elif how == "no manifest":
        (damaged / "manifest.json").unlink()
    else:
        (damaged / "manifest.json").write_text(json.dumps({"files": {"unclip.json": 3}}))
    with pytest.warns(UserWarning, match="passing over a damaged checkpoint: .*step-2"):
        assert resolve_folder(tmp_path) == sound


def test_sampling_does_not_need_the_training_files(tmp_path: Path) -> None:
    path = checkpoint(tmp_path, 1)
    damage(path / "training" / "weights.safetensors")
    assert resolve_folder(tmp_path) == path
    with pytest.raises(CheckpointError, match="has changed since it was written"):
        newest_checkpoint(tmp_path, training=True)


def test_a_run_with_only_damaged_checkpoints_is_an_error(tmp_path: Path) -> None:
    damage(checkpoint(tmp_path, 1) / "prior" / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"every checkpoint of .* is damaged"):
        resolve_folder(tmp_path)


def test_what_is_no_model_says_what_was_expected(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="there is no such folder"):
        resolve_folder(tmp_path / "absent")
    with pytest.raises(CheckpointError, match="expected a model folder"):
        resolve_folder(tmp_path)
    write_stage(tmp_path, "clip", {}, {"x": torch.zeros(1)})
    with pytest.raises(CheckpointError, match=f"did you mean {tmp_path}"):
        resolve_folder(tmp_path / "clip")
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    with pytest.raises(CheckpointError, match="has saved no checkpoint yet"):
        resolve_folder(tmp_path / "run")
