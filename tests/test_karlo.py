"""Folders in Karlo's layout: the same seed gives diffusers' picture."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import tiny_upsampler
from diffusers import DDPMScheduler, PriorTransformer
from karlo import Shape, kandinsky_prior, pipeline
from PIL import Image
from safetensors.torch import load_file

from unclip.cli import main
from unclip.errors import CheckpointError, ConfigError
from unclip.interop.names import Renamed, prior_names
from unclip.interop.settings import prior_config
from unclip.pipeline import UnCLIP
from unclip.stages.kinds import build

SMALL = Shape()
OTHERS = [
    Shape(embed=24, heads=3, layers=1, length=9, widths=(32, 32, 64), head_channels=16, groups=16),
    Shape(embed=12, heads=4, head_channels=4, layers=3, widths=(16, 48), blocks=2, groups=4),
]


def generators(seed: int, count: int) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(seed + k) for k in range(count)]


def distance(ours: list[Image.Image], theirs: list[Image.Image]) -> int:
    """The largest difference of a pixel, in steps of 1/255."""
    assert [x.size for x in ours] == [x.size for x in theirs]
    pairs = zip(ours, theirs, strict=True)
    return max(int(np.abs(np.int16(a) - np.int16(b)).max()) for a, b in pairs)


@pytest.mark.parametrize("shape", [SMALL, *OTHERS])
@pytest.mark.parametrize(
    ("prior", "decoder", "steps"),
    [(4.0, 8.0, (5, 6, 3)), (1.0, 1.0, (3, 3, 4)), (2.0, 1.0, (2, 3, 7))],
)
def test_text_to_image_gives_the_picture_of_unclip_pipeline(
    tmp_path: Path, shape: Shape, prior: float, decoder: float, steps: tuple[int, int, int]
) -> None:
    theirs = pipeline(shape, tmp_path / "karlo")
    prompts = ["a red apple", "two dogs"]
    expected = theirs(
        prompts,
        generator=generators(3, 2),
        prior_guidance_scale=prior,
        decoder_guidance_scale=decoder,
        prior_num_inference_steps=steps[0],
        decoder_num_inference_steps=steps[1],
        super_res_num_inference_steps=steps[2],
    ).images
    ours = UnCLIP.from_pretrained(tmp_path / "karlo")
    high = f"upsampler_{shape.large}"
    made = ours.text_to_image(
        prompts,
        seed=3,
        steps={"prior": steps[0], "decoder": steps[1], high: steps[2]},
        guidance={"prior": prior, "decoder": decoder},
    )
    assert np.asarray(expected[0]).std() > 5
    assert distance(made, expected) <= 2


@pytest.mark.parametrize("shape", [SMALL, *OTHERS])
@pytest.mark.parametrize(("guidance", "steps"), [(8.0, (6, 3)), (1.0, (2, 7))])
def test_variations_give_the_pictures_of_unclip_image_variation_pipeline(
    tmp_path: Path, shape: Shape, guidance: float, steps: tuple[int, int]
) -> None:
    theirs = pipeline(shape, tmp_path / "karlo", images=True)
    pixels = np.random.default_rng(0).integers(0, 256, (48, 48, 3), dtype=np.uint8)
    image = Image.fromarray(pixels)
    expected = theirs(
        image,
        num_images_per_prompt=2,
        generator=generators(5, 2),
        decoder_guidance_scale=guidance,
        decoder_num_inference_steps=steps[0],
        super_res_num_inference_steps=steps[1],
    ).images
    ours = UnCLIP.from_pretrained(tmp_path / "karlo")
    made = ours.variations(
        image,
        n=2,
        seed=5,
        steps={"decoder": steps[0], f"upsampler_{shape.large}": steps[1]},
        guidance=guidance,
    )
    assert np.asarray(expected[0]).std() > 5
    assert distance(made, expected) <= 2


@pytest.mark.parametrize("shape", [SMALL, *OTHERS])
@pytest.mark.parametrize("guidance", [1.0, 4.0])
def test_kandinskys_priors_give_the_embeddings_of_its_pipeline(
    tmp_path: Path, shape: Shape, guidance: float
) -> None:
    theirs = kandinsky_prior(shape, tmp_path / "kandinsky")
    prompts = ["a red apple", "two dogs"]
    expected = theirs(
        prompts, generator=generators(3, 2), guidance_scale=guidance, num_inference_steps=5
    ).image_embeds
    ours = UnCLIP.from_pretrained(tmp_path / "kandinsky")
    made = ours.text_to_embedding(prompts, seed=3, guidance=guidance, steps=5)
    torch.testing.assert_close(made, expected, rtol=1e-4, atol=2e-3)
    assert ours.decoder is None and ours.encode_image(Image.new("RGB", (40, 40))).shape[0] == 1


@pytest.mark.parametrize(("embed", "layers"), [(768, 20), (1280, 20)])
def test_kandinskys_published_widths_are_understood(embed: int, layers: int) -> None:
    theirs = {"embedding_dim": embed, "num_layers": layers, "additional_embeddings": 4}
    with torch.device("meta"):
        other = PriorTransformer(**theirs)
    ours = build(prior_config(theirs, "prior"))
    shapes = {name: x.shape for name, x in ours.state_dict().items()}
    Renamed(prior_names(ours.config), other.state_dict(), shapes, "prior")


def test_one_step_is_the_one_of_ddpm_from_the_noisy_end(tmp_path: Path) -> None:
    """UnCLIPScheduler itself divides by zero there, so the oracle is DDPM's x_0 at the last t."""
    theirs = kandinsky_prior(SMALL, tmp_path / "kandinsky")
    ours = UnCLIP.from_pretrained(tmp_path / "kandinsky")
    made = ours.text_to_embedding("two dogs", seed=3, guidance=1.0, steps=1)
    scheduler = DDPMScheduler(
        beta_schedule="squaredcos_cap_v2",
        prediction_type="sample",
        clip_sample_range=10.0,
        timestep_spacing="linspace",
    )
    text = theirs._encode_prompt(["two dogs"], "cpu", 1, False)
    noise = torch.randn(1, SMALL.embed, generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        x0 = theirs.prior(noise, 999, *text).predicted_image_embedding
    expected = scheduler.step(x0, 999, noise).pred_original_sample
    torch.testing.assert_close(made, theirs.prior.post_process_latents(expected))


def test_a_1024_stage_of_ours_follows_a_karlo(tmp_path: Path) -> None:
    pipeline(SMALL, tmp_path / "karlo")
    tiny_upsampler(64).save(tmp_path / "ours")
    with pytest.raises(CheckpointError, match="no stage 'upsampler_1024'"):
        UnCLIP.from_pretrained(tmp_path / "karlo", upsampler_1024=tmp_path / "ours")
    larger = tiny_upsampler(64)
    larger.name = "upsampler_1024"
    larger.save(tmp_path / "more")
    pipe = UnCLIP.from_pretrained(tmp_path / "karlo", upsampler_1024=tmp_path / "more")
    assert pipe.sizes == [16, 32, 64]
    assert pipe.text_to_image("two dogs", size=64, steps=2)[0].size == (64, 64)


def test_info_lists_the_stages_of_a_karlo(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    theirs = pipeline(SMALL, tmp_path / "karlo")
    with pytest.raises(SystemExit) as exit:
        main(["info", str(tmp_path / "karlo")])
    assert not exit.value.code
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines[1:5]] == ["clip", "prior", "decoder", "upsampler_32"]
    count = sum(p.numel() for p in theirs.decoder.parameters())
    count += sum(p.numel() for p in theirs.text_proj.parameters())
    assert f"{count / 1e6:.2f} M" in lines[3]
    assert "ddpm, 25 steps, guidance 8" in lines[3]


@pytest.fixture(scope="module")
def variants(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Karlo's weights: `plain`, `shards`, `fp16` alone, and `both` plain and fp16 in shards."""
    root = tmp_path_factory.mktemp("variants")
    theirs = pipeline(SMALL, root / "plain")
    theirs.save_pretrained(root / "shards", max_shard_size="200KB")
    shutil.copytree(root / "plain", root / "both")
    theirs.to(torch.float16)
    theirs.save_pretrained(root / "fp16", variant="fp16")
    theirs.save_pretrained(root / "both", variant="fp16", max_shard_size="100KB")
    return root


def test_shards_and_variants_give_the_pictures_of_whole_weights(variants: Path) -> None:
    """Sharded weights were "no weights at …"."""

    def made(name: str, **more: str) -> list[Image.Image]:
        pipe = UnCLIP.from_pretrained(variants / name, **more)
        return pipe.text_to_image("two dogs", seed=1, steps=2)

    plain = made("plain")
    assert distance(made("shards"), plain) == distance(made("both"), plain) == 0
    half = made("fp16", variant="fp16")
    assert 0 < distance(half, plain) < 60
    assert distance(made("both", variant="fp16"), half) == 0


def test_info_counts_the_weights_that_are_read(
    variants: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of a folder with two variants it counted both."""

    def info(*words: str) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as exit:
            main(["info", *words])
        shown = capsys.readouterr()
        table = [line for line in shown.out.splitlines() if "parameters" in line]
        return int(exit.value.code or 0), "\n".join(table), shown.err

    _, plain, _ = info(str(variants / "plain"))
    assert info(str(variants / "both"))[1] == plain
    _, half, _ = info(str(variants / "both"), "--variant", "fp16")
    parameters = [[line.split(" M")[0] for line in text.splitlines()] for text in (plain, half)]
    assert parameters[0] == parameters[1] and plain != half
    code, _, error = info(str(variants / "fp16"))
    assert code == 4 and "--variant fp16" in error
    code, _, error = info(str(variants / "both"), "--variant", "int8")
    assert code == 4 and "--variant fp16" in error


def test_a_variant_is_converted_and_a_model_folder_has_none(variants: Path, tmp_path: Path) -> None:
    with pytest.raises(SystemExit) as exit:
        main(["convert", str(variants / "both"), str(tmp_path / "ours"), "--variant", "fp16"])
    assert not exit.value.code
    weights = load_file(tmp_path / "ours" / "decoder" / "model.safetensors")
    assert weights["unet.conv_in.weight"].dtype == torch.float16
    with pytest.raises(ConfigError, match="no variants"):
        UnCLIP.from_pretrained(tmp_path / "ours", variant="fp16")


@pytest.mark.parametrize("shard", ["../plain.safetensors", "absent.safetensors", "", 5])
def test_an_index_of_shards_that_leads_elsewhere_is_refused(
    variants: Path, tmp_path: Path, shard: object
) -> None:
    shutil.copytree(variants / "shards", tmp_path / "karlo")
    index = tmp_path / "karlo" / "decoder" / "diffusion_pytorch_model.safetensors.index.json"
    data = json.loads(index.read_text())
    name = next(iter(data["weight_map"]))
    index.write_text(json.dumps(data | {"weight_map": {**data["weight_map"], name: shard}}))
    with pytest.raises(CheckpointError, match="decoder"):
        UnCLIP.from_pretrained(tmp_path / "karlo")
