"""Karlo's layout in and out: equal bytes, equal pictures, and what can't be carried over."""

from __future__ import annotations

import json
import logging
import shutil
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from conftest import CONTEXT, WIDTH, stage, tiny_clip, tiny_decoder
from diffusers import PriorTransformer, UnCLIPScheduler, UNet2DConditionModel, UNet2DModel
from diffusers.pipelines.deprecated.unclip import UnCLIPPipeline
from diffusers.pipelines.deprecated.unclip.text_proj import UnCLIPTextProjModel
from karlo import Shape, pipeline
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import CLIPTextModelWithProjection, CLIPTokenizer

from unclip.assemble import assemble
from unclip.cli import main
from unclip.config import parse_config
from unclip.diffusion.sampling import SamplingConfig
from unclip.errors import CheckpointError, ConfigError
from unclip.files.folder import read_index
from unclip.interop.convert import _forgotten, convert
from unclip.models.decoder import Decoder, DecoderConfig
from unclip.models.layers import ScaleConfig
from unclip.models.prior import DiffusionPrior, PriorConfig
from unclip.models.transformer import TransformerConfig
from unclip.models.unet import UNetConfig
from unclip.models.upsampler import Upsampler, UpsamplerConfig
from unclip.pipeline import UnCLIP
from unclip.training.decoder import DecoderRun, train_decoder
from unclip.training.prior import PriorRun, train_prior
from unclip.training.upsampler import UpsamplerRun, train_upsampler

WEIGHTS = "diffusion_pytorch_model.safetensors"
NETWORKS = ("prior", "decoder", "text_proj", "super_res_first", "super_res_last")
STEPS = {"prior": 4, "decoder": 4, "upsampler_32": 3}


@pytest.fixture(scope="module")
def karlo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A text-to-image folder as diffusers writes it; read-only."""
    folder = tmp_path_factory.mktemp("published") / "karlo"
    pipeline(Shape(), folder)
    return folder


@pytest.fixture
def copy(karlo: Path, tmp_path: Path) -> Path:
    """The same to damage."""
    return Path(shutil.copytree(karlo, tmp_path / "karlo"))


def karlo_like() -> UnCLIP:
    """A model of ours, encoder and all, that Karlo's layout can hold."""
    clip = tiny_clip()
    width = {"channels": 16, "multiple": [1, 2], "blocks": 1, "groups": 4}
    deep = UNetConfig(**width, attention=[False, True], mid_attention=True, head_channels=8)
    flat = UNetConfig(**width, attention=[False, False], mid_attention=False, scale_shift=False)
    prior = PriorConfig(
        embed=WIDTH,
        text_width=WIDTH,
        context=CONTEXT,
        transformer=TransformerConfig(width=16, layers=2, heads=2),
        scale=ScaleConfig(kind="whiten"),
    )
    decoder = DecoderConfig(
        resolution=16,
        embed=WIDTH,
        text_width=WIDTH,
        text_embed=True,
        context_width=24,
        learned_variance=True,
        scale=ScaleConfig(kind="raw"),
        unet=deep,
    )
    ddpm: dict[str, Any] = {"sampler": "ddpm", "steps": 3}
    return UnCLIP(
        clip,
        stage("prior", DiffusionPrior(prior), clip, target="x0", clip=5.0, **ddpm),
        stage("decoder", Decoder(decoder), clip, target="eps", guidance=2.0, **ddpm),
        [
            stage(
                f"upsampler_{high}",
                Upsampler(UpsamplerConfig(low=high // 2, high=high, unet=flat)),
                None,
                target="eps",
                **ddpm,
            )
            for high in (32, 64)
        ],
        prior_candidates=1,
    )


def same_networks(a: Path, b: Path) -> None:
    """The files of all networks are equal, byte by byte."""
    for part in NETWORKS:
        assert (a / part / WEIGHTS).read_bytes() == (b / part / WEIGHTS).read_bytes(), part


def pictures(pipe: UnCLIP) -> np.ndarray:
    return np.stack([np.asarray(x) for x in pipe.text_to_image("two dogs", seed=7, steps=STEPS)])


def test_karlo_in_our_layout_makes_the_same_pictures_with_the_same_defaults(
    karlo: Path, tmp_path: Path
) -> None:
    assert convert(karlo, tmp_path / "ours") == []
    assert read_index(tmp_path / "ours")["stages"] == ["clip", "prior", "decoder", "upsampler_32"]
    before, after = UnCLIP.from_pretrained(karlo), UnCLIP.from_pretrained(tmp_path / "ours")
    assert (pictures(before) == pictures(after)).all()
    assert [s.sampling for s in after.stages] == [s.sampling for s in before.stages]
    assert after.prior_candidates == before.prior_candidates == 1
    assert after.decoder is not None and after.decoder.encoder == after.encoder


def test_a_round_trip_of_karlo_gives_every_weight_back_byte_by_byte(
    karlo: Path, tmp_path: Path
) -> None:
    convert(karlo, tmp_path / "ours")
    convert(tmp_path / "ours", tmp_path / "back")
    same_networks(tmp_path / "back", karlo)
    text = "text_encoder/model.safetensors"
    assert (tmp_path / "back" / text).read_bytes() == (karlo / text).read_bytes()
    index = [json.loads((f / "model_index.json").read_text()) for f in (karlo, tmp_path / "back")]
    assert index[0] == index[1]


def test_a_round_trip_of_ours_gives_every_file_back_byte_by_byte(tmp_path: Path) -> None:
    karlo_like().save_pretrained(tmp_path / "ours")
    first = convert(tmp_path / "ours", tmp_path / "karlo")
    assert any("upsampler_64 is left out" in note for note in first)
    assert any("decoder is to be sampled with steps 3, guidance 2.0" in note for note in first)
    convert(tmp_path / "karlo", tmp_path / "again")
    for name in ("prior", "decoder", "upsampler_32"):
        files = [tmp_path / where / name / "model.safetensors" for where in ("ours", "again")]
        assert files[0].read_bytes() == files[1].read_bytes()
        assert not (tmp_path / "again" / name / "model_last.safetensors").exists()
    convert(tmp_path / "again", tmp_path / "karlo again")
    for file in sorted((tmp_path / "karlo").rglob("*")):
        if file.is_file():
            same = tmp_path / "karlo again" / file.relative_to(tmp_path / "karlo")
            assert same.read_bytes() == file.read_bytes(), file


def test_precision_is_kept_unless_another_is_asked_for(karlo: Path, tmp_path: Path) -> None:
    half = Path(shutil.copytree(karlo, tmp_path / "half"))
    for path in half.glob("*/*.safetensors"):
        tensors = {name: x.half() for name, x in load_file(path).items()}
        save_file(tensors, path, metadata={"format": "pt"})
    convert(half, tmp_path / "ours")
    convert(tmp_path / "ours", tmp_path / "back")
    same_networks(tmp_path / "back", half)
    convert(karlo, tmp_path / "asked", torch.float16)
    assert load_file(tmp_path / "asked" / "prior" / "model.safetensors")["out.bias"].dtype == (
        torch.float16
    )


def test_converted_and_assembled_half_precision_agree_on_every_byte(tmp_path: Path) -> None:
    """`convert --dtype fp16` rounded the statistics of embeddings, which `assemble` kept."""
    ours = karlo_like()
    assert ours.prior is not None
    scale = ours.prior.network.scale
    scale.mean.copy_(torch.rand(WIDTH) / 3)
    ours.save_pretrained(tmp_path / "ours")
    karlo = tmp_path / "karlo"
    convert(tmp_path / "ours", karlo)
    convert(karlo, tmp_path / "converted", torch.float16)
    assemble(tmp_path / "assembled", karlo, karlo, karlo, [karlo], torch.float16)
    for name in ("prior", "decoder", "upsampler_32"):
        a, b = (tmp_path / how / name / "model.safetensors" for how in ("converted", "assembled"))
        assert a.read_bytes() == b.read_bytes(), name
    stored = load_file(tmp_path / "converted" / "prior" / "model.safetensors")
    assert torch.equal(stored["scale.mean"], scale.mean)
    assert stored["out.bias"].dtype == torch.float16


def test_diffusers_loads_what_we_write_without_a_warning_and_makes_the_same_pictures(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    ours, folder = karlo_like(), tmp_path / "karlo"
    ours.save_pretrained(tmp_path / "ours")
    convert(tmp_path / "ours", folder)
    for name in ("diffusers", "transformers"):
        logging.getLogger(name).addHandler(caplog.handler)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        parts: dict[str, Any] = {
            "prior": PriorTransformer.from_pretrained(folder / "prior"),
            "decoder": UNet2DConditionModel.from_pretrained(folder / "decoder"),
            "text_proj": UnCLIPTextProjModel.from_pretrained(folder / "text_proj"),
            "super_res_first": UNet2DModel.from_pretrained(folder / "super_res_first"),
            "super_res_last": UNet2DModel.from_pretrained(folder / "super_res_last"),
            "text_encoder": CLIPTextModelWithProjection.from_pretrained(folder / "text_encoder"),
            "tokenizer": CLIPTokenizer.from_pretrained(folder / "tokenizer"),
        }
        for part in ("prior_scheduler", "decoder_scheduler", "super_res_scheduler"):
            parts[part] = UnCLIPScheduler.from_pretrained(folder / part)
    for name in ("diffusers", "transformers"):
        logging.getLogger(name).removeHandler(caplog.handler)
    assert not [r for r in caplog.records if r.levelno >= logging.WARNING], caplog.text
    theirs = UnCLIPPipeline(**parts)
    theirs.set_progress_bar_config(disable=True)
    prompt = "a red apple and two green circles"
    expected = theirs(
        prompt,
        generator=torch.Generator().manual_seed(3),
        prior_guidance_scale=1.0,
        decoder_guidance_scale=2.0,
        prior_num_inference_steps=3,
        decoder_num_inference_steps=3,
        super_res_num_inference_steps=3,
    ).images[0]
    made = ours.text_to_image(prompt, seed=3, size=32)[0]
    assert np.asarray(expected).std() > 5
    assert np.abs(np.int16(made) - np.int16(expected)).max() <= 2


def test_the_image_tower_travels_beside_a_text_to_image_pipeline(tmp_path: Path) -> None:
    ours = karlo_like()
    ours.save_pretrained(tmp_path / "ours")
    notes = convert(tmp_path / "ours", tmp_path / "karlo")
    assert any("image_encoder lie beside" in note for note in notes)
    back = UnCLIP.from_pretrained(tmp_path / "karlo")
    noise = np.random.default_rng(0).integers(0, 256, (16, 16, 3), dtype=np.uint8)
    image = Image.fromarray(noise)
    torch.testing.assert_close(back.encode_image(image), ours.encode_image(image))
    assert back.variations(image, size=16, steps=2)[0].size == (16, 16)


def test_an_image_variation_folder_stays_one(tmp_path: Path) -> None:
    pipeline(Shape(), tmp_path / "karlo", images=True)
    convert(tmp_path / "karlo", tmp_path / "ours")
    convert(tmp_path / "ours", tmp_path / "back")
    index = [json.loads((tmp_path / n / "model_index.json").read_text()) for n in ("karlo", "back")]
    assert index[0] == index[1]
    pixels = np.random.default_rng(0).integers(0, 256, (40, 40, 3), dtype=np.uint8)
    before, after = (
        UnCLIP.from_pretrained(tmp_path / name).variations(Image.fromarray(pixels), steps=3)
        for name in ("karlo", "back")
    )
    assert (np.asarray(before[0]) == np.asarray(after[0])).all()


def test_what_karlo_cannot_express_is_named_and_nothing_is_written(
    model_folder: Path, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError) as error:
        convert(model_folder, tmp_path / "out")
    for said in ("decoder", "text_embed = False", "scale.kind = unit", "diffusion.target = v"):
        assert said in str(error.value)
    assert not (tmp_path / "out").exists()


def test_a_folder_that_holds_a_model_is_not_overwritten(karlo: Path, copy: Path) -> None:
    before = (copy / "model_index.json").read_bytes()
    with pytest.raises(ConfigError, match="holds a model already"):
        convert(karlo, copy)
    assert (copy / "model_index.json").read_bytes() == before


def test_a_place_that_cannot_be_written_is_a_clear_error(karlo: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="can't write into"):
        convert(karlo, tmp_path / "file" / "out")


def test_pickled_weights_are_read_only_when_allowed(
    copy: Path, tmp_path: Path, karlo: Path
) -> None:
    for path in sorted(copy.glob("*/*.safetensors")):
        name = "pytorch_model" if path.name.startswith("model") else path.stem
        torch.save(load_file(path), path.with_name(f"{name}.bin"))
        path.unlink()
    with pytest.raises(CheckpointError, match="--allow-pickle"):
        UnCLIP.from_pretrained(copy)
    with pytest.raises(CheckpointError, match="--allow-pickle"):
        convert(copy, tmp_path / "ours")
    convert(copy, tmp_path / "ours", allow_pickle=True)
    convert(tmp_path / "ours", tmp_path / "back")
    assert (tmp_path / "back" / "prior" / WEIGHTS).read_bytes() == (
        karlo / "prior" / WEIGHTS
    ).read_bytes()


def test_a_pickle_that_holds_code_is_refused_even_when_allowed(copy: Path, tmp_path: Path) -> None:
    path = copy / "prior" / WEIGHTS
    path.unlink()
    torch.save({"weight": Path("x")}, path.with_name("diffusion_pytorch_model.bin"))
    with pytest.raises(CheckpointError, match="can't be used"):
        convert(copy, tmp_path / "ours", allow_pickle=True)


def rename_tensor(folder: Path) -> None:
    tensors = load_file(folder / "decoder" / WEIGHTS)
    tensors["conv_inn.weight"] = tensors.pop("conv_in.weight")
    save_file(tensors, folder / "decoder" / WEIGHTS)


def reshape_tensor(folder: Path) -> None:
    tensors = load_file(folder / "super_res_last" / WEIGHTS)
    tensors["conv_in.bias"] = tensors["conv_in.bias"][:-1].clone()
    save_file(tensors, folder / "super_res_last" / WEIGHTS)


def truncate(folder: Path, file: str) -> None:
    path = folder / file
    path.write_bytes(path.read_bytes()[:-100])


def change(folder: Path, file: str, **entries: Any) -> None:
    data = json.loads((folder / file).read_text()) | entries
    (folder / file).write_text(json.dumps(data))


MISTAKES = {
    "a missing folder": (lambda f: shutil.rmtree(f / "text_proj"), "names 'text_proj'"),
    "half a stage": (
        lambda f: change(f, "model_index.json", super_res_last=[None, None]),
        "lacks super_res_last",
    ),
    "a renamed tensor": (rename_tensor, "1 missing (conv_in.weight); 1 left over (conv_inn"),
    "another shape": (reshape_tensor, "conv_in.bias (15,), expected (16,)"),
    "a truncated network": (lambda f: truncate(f, f"prior/{WEIGHTS}"), "truncated"),
    "a truncated tower": (lambda f: truncate(f, "text_encoder/model.safetensors"), "truncated"),
    "no tokenizer": (lambda f: shutil.rmtree(f / "tokenizer"), "names 'tokenizer'"),
    "an empty tokenizer": (
        lambda f: [path.unlink() for path in (f / "tokenizer").iterdir()],
        "no CLIP tokenizer in",
    ),
    "an unknown scheduler": (
        lambda f: change(f, "prior_scheduler/scheduler_config.json", _class_name="DDIMScheduler"),
        "DDIMScheduler is not supported; expected UnCLIPScheduler",
    ),
    "an unknown setting": (
        lambda f: change(f, "decoder/config.json", encoder_hid_dim=3),
        "encoder_hid_dim = 3",
    ),
    "a setting of another kind": (
        lambda f: change(f, "super_res_first/config.json", block_out_channels=16),
        "is damaged",
    ),
    "another pipeline": (
        lambda f: change(f, "model_index.json", vae=["diffusers", "AutoencoderKL"]),
        "its part 'vae' is a AutoencoderKL",
    ),
    "broken JSON": (lambda f: (f / "prior/config.json").write_text("{"), "not valid JSON"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_folder_that_is_not_right_is_refused_before_weights_are_read(
    mistake: str,
    copy: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    damage, said = MISTAKES[mistake]
    damage(copy)
    monkeypatch.setattr("unclip.stages.stored.materialise", lambda *_: pytest.fail("too late"))
    with pytest.raises(CheckpointError) as error:
        UnCLIP.from_pretrained(copy)
    assert said in str(error.value)
    with pytest.raises(SystemExit) as exit:
        main(["convert", str(copy), str(tmp_path / "ours")])
    assert exit.value.code == 4
    assert "error:" in capsys.readouterr().err
    assert not (tmp_path / "ours").exists()


def test_constants_that_old_transformers_saved_are_no_mistake(copy: Path) -> None:
    path = copy / "text_encoder" / "model.safetensors"
    tensors = load_file(path)
    tensors["text_model.embeddings.position_ids"] = torch.arange(12)[None]
    save_file(tensors, path, metadata={"format": "pt"})
    UnCLIP.from_pretrained(copy)


def run_of(pipe: UnCLIP, name: str, folder: Path, out: Path) -> Any:
    """One step of training a stage further from `folder`, too small a step to see."""
    stage = next(stage for stage in pipe.stages if stage.name == name)
    described = {key: stage.describe()[key] for key in ("model", "diffusion", "sampling")}
    side = 32 if stage.kind == "upsampler" else 16
    extra: dict[str, Any] = {"clip": str(folder), "drop": {}}
    if stage.kind == "upsampler":
        extra = {"degradation": "blur"}
    train = {"out": str(out), "steps": 1, "batch": 2, "lr": 1e-12, "init": str(folder)}
    train |= {"save_every": 1, "sample_every": 1}
    data = {"train": "shapes", "resolution": side}
    schema = {"prior": PriorRun, "decoder": DecoderRun, "upsampler": UpsamplerRun}[stage.kind]
    return parse_config({**described, **extra, "data": data, "train": train}, schema, name)


def test_training_starts_from_a_folder_like_karlos_and_ends_in_one(tmp_path: Path) -> None:
    karlo_like().save_pretrained(tmp_path / "ours")
    folder = tmp_path / "karlo"
    convert(tmp_path / "ours", folder)
    pipe, accelerator = UnCLIP.from_pretrained(folder), Accelerator(cpu=True)
    trainers = {
        "prior": train_prior,
        "decoder": train_decoder,
        "upsampler_32": train_upsampler,
    }
    for name, train in trainers.items():
        train(run_of(pipe, name, folder, tmp_path / name), accelerator)
    where = [tmp_path / name for name in trainers]
    assemble(tmp_path / "tuned", folder, where[0], where[1], where[2:])
    convert(tmp_path / "tuned", tmp_path / "back")
    for part in NETWORKS:
        before, after = (load_file(f / part / WEIGHTS) for f in (folder, tmp_path / "back"))
        assert before.keys() == after.keys()
        for key, x in before.items():
            torch.testing.assert_close(after[key], x, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        ("model", {"transformer": {"heads": 4}}, "transformer.heads = 2, here 4"),
        ("model", {"scale": {"normalize": True}}, "scale.normalize = False, here True"),
        ("diffusion", {"target": "v"}, "target = x0, here v"),
    ],
)
def test_training_refuses_weights_that_were_made_with_other_settings(
    tmp_path: Path, key: str, value: dict[str, Any], said: str
) -> None:
    pipe = karlo_like()
    pipe.save_pretrained(tmp_path / "ours")
    run = run_of(pipe, "prior", tmp_path / "ours", tmp_path / "run").model_dump()
    for name, inner in value.items():
        run[key][name] = run[key][name] | inner if isinstance(inner, dict) else inner
    with pytest.raises(CheckpointError) as error:
        train_prior(parse_config(run, PriorRun, "test"), Accelerator(cpu=True))
    assert said in str(error.value)


def test_training_refuses_weights_of_another_encoder(tmp_path: Path) -> None:
    pipe = karlo_like()
    pipe.save_pretrained(tmp_path / "ours")
    convert(tmp_path / "ours", tmp_path / "karlo")
    tiny_clip(seed=9).save(tmp_path / "other")
    run = run_of(pipe, "prior", tmp_path / "karlo", tmp_path / "run").model_dump()
    run["clip"] = str(tmp_path / "other")
    with pytest.raises(CheckpointError, match="are different CLIP encoders"):
        train_prior(parse_config(run, PriorRun, "test"), Accelerator(cpu=True))


def test_a_hub_id_is_downloaded_without_pickles(
    karlo: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: dict[str, Any] = {}

    def snapshot_download(repo: str, revision: str | None, allow_patterns: list[str]) -> str:
        asked.update(repo=repo, patterns=allow_patterns)
        return str(karlo)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    pipe = UnCLIP.from_pretrained("kakaobrain/karlo-v1-alpha")
    assert pipe.sizes == [16, 32]
    assert asked["repo"] == "kakaobrain/karlo-v1-alpha"
    assert not any("bin" in pattern for pattern in asked["patterns"])


def test_a_hub_that_has_only_pickles_is_told_how_they_are_read(
    copy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They are not downloaded, so that no file told of them: the option was not named."""
    weights = copy / "prior" / WEIGHTS
    weights.rename(tmp_path / "kept")
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda *_, **__: str(copy))
    with pytest.raises(CheckpointError, match=r"no weights at .*\.bin, a pickle.*--allow-pickle"):
        UnCLIP.from_pretrained("owner/karlo")
    with pytest.raises(CheckpointError, match=r"no weights at [^;]*$"):
        convert(copy, tmp_path / "ours", allow_pickle=True)
    (tmp_path / "kept").rename(weights.with_suffix(".fp16.safetensors"))
    with pytest.raises(CheckpointError, match=r"--variant fp16 reads those$"):
        UnCLIP.from_pretrained("owner/karlo")


def test_a_hub_that_cannot_be_reached_is_a_clear_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def snapshot_download(repo: str, revision: str | None, allow_patterns: list[str]) -> str:
        raise OSError("no connection")

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    with pytest.raises(CheckpointError, match=r"no model at nobody/nothing: .*no connection"):
        UnCLIP.from_pretrained("nobody/nothing")


@pytest.mark.parametrize(
    "more", [{"interval": (0.25, 1.0)}, {"time_shift": 0.05}, {"sampler": "ddim", "eta": 1.0}]
)
def test_every_setting_that_karlos_layout_has_no_place_for_is_named(more):
    sampling = SamplingConfig(**{"sampler": "ddpm", "steps": 25, "guidance": 8.0, **more})
    decoder = replace(tiny_decoder(tiny_clip()), sampling=sampling)
    (note,) = _forgotten(decoder)
    assert all(key in note for key in more)
