"""Low-rank changes: what they compute, how they are trained, and onto what they are laid."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from conftest import tiny_clip, tiny_decoder, tiny_pipeline, tiny_prior
from test_convert import karlo_like, run_of
from test_tasks import SCHEMAS, tiny
from torch import Tensor
from torch.testing import assert_close

from unclip.assemble import assemble
from unclip.cli import main
from unclip.conditioning import Cond
from unclip.config import parse_config
from unclip.errors import CheckpointError, ConfigError
from unclip.files.tensors import TensorFile
from unclip.interop.convert import convert
from unclip.models.lora import adapt
from unclip.pipeline import UnCLIP
from unclip.sources import Source
from unclip.stages.lora import read_loras
from unclip.training.decoder import train_decoder
from unclip.training.prior import train_prior

TRAIN = {"prior": train_prior, "decoder": train_decoder}
RANK = 2


def train(name: str, run: Any) -> Path:
    """As the command does it."""
    torch.manual_seed(run.train.seed)
    return TRAIN[name](run, Accelerator(cpu=True))


def drawn(network: Any, shape: tuple[int, ...]) -> Tensor:
    clip = tiny_clip()
    x = torch.randn(2, *shape, generator=torch.Generator().manual_seed(0))
    text = clip.encode_text(["a red apple", "a blue square"])
    cond = Cond(image_embed=text.embed, text=text)
    with torch.no_grad():
        return network(x, torch.tensor([3, 900]), cond)


@pytest.mark.parametrize("make", [tiny_prior, tiny_decoder])
def test_a_change_is_none_at_first_and_then_the_sum_of_w_and_ba(make: Any) -> None:
    stage = make(tiny_clip())
    network, plain = stage.network, dict(stage.network.state_dict())
    before = drawn(network, stage.shape)
    tree = adapt(network, RANK)
    assert torch.equal(drawn(network, stage.shape), before)
    changes = {name.removesuffix(".b"): p for name, p in tree.named_parameters() if p.ndim == 2}
    generator = torch.Generator().manual_seed(1)
    for name, p in tree.named_parameters():
        if name.endswith(".b"):
            p.data.normal_(std=0.1, generator=generator)
    after = drawn(network, stage.shape)
    assert not torch.allclose(after, before)
    trained = dict(tree.named_parameters())
    for layer in [name.removesuffix(".a") for name in changes if name.endswith(".a")]:
        a, b = trained[f"{layer}.a"], trained[f"{layer}.b"]
        assert a.shape[0] == b.shape[1] == RANK
        plain[f"{layer}.weight"] = plain[f"{layer}.weight"] + b.detach() @ a.detach()
    merged = make(tiny_clip()).network
    merged.load_state_dict(plain)
    assert torch.equal(drawn(merged, stage.shape), after)
    trainable = {name for name, p in network.named_parameters() if p.requires_grad}
    assert len(trainable) == len(trained) and all("parametrizations" in n for n in trainable)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose stages are those of the tiny configurations."""
    root = tmp_path_factory.mktemp("base")
    tiny_pipeline().save_pretrained(root / "clip")
    stages: dict[str, Any] = {}
    for name in TRAIN:
        run = tiny(name, root / "clip", f"train.out={root / name}", "train.steps=1")
        stages[name] = train(name, run)
    assemble(root / "model", root / "clip", stages["prior"], stages["decoder"], [])
    return root / "model"


def lora_run(base: Path, name: str, out: Path, *more: str) -> Any:
    own = [f"lora={RANK}", f"train.init={base}", f"train.out={out}", "train.lr=0.05"]
    rest = ["train.steps=4", "train.warmup=0", "train.save_every=2", "train.decay=constant"]
    return tiny(name, base, *own, *rest, *more)


def digests(folder: Path) -> dict[str, str]:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(f.relative_to(folder)): hashlib.sha256(f.read_bytes()).hexdigest() for f in files}


@pytest.fixture(scope="module")
def loras(base: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A run for each stage; the base's bytes are the same afterwards."""
    root, before = tmp_path_factory.mktemp("loras"), digests(base)
    for name in TRAIN:
        train(name, lora_run(base, name, root / name))
    assert digests(base) == before
    return {name: root / name for name in TRAIN}


def test_a_run_saves_the_changes_alone_and_the_pipeline_takes_them(
    base: Path, loras: dict[str, Path], tmp_path: Path
) -> None:
    for name, run in loras.items():
        weights = run / "checkpoints" / "step-4" / name / "model.safetensors"
        whole = TensorFile(base / name / "model.safetensors")
        changes = TensorFile(weights)
        assert {n.rpartition(".")[2] for n in changes} == {"a", "b", "base"}
        assert any(bool(x.any()) for n, x in changes.items() if n.endswith(".b"))
        loaded = Source(base).change(read_loras([run])).stage(name).load().network.state_dict()
        for key, old in whole.items():
            layer = key.removesuffix(".weight")
            if f"{layer}.a" in changes:
                old = old + changes[f"{layer}.b"] @ changes[f"{layer}.a"]
            assert_close(loaded[key], old, rtol=0, atol=0)
    both = [loras["prior"], loras["decoder"]]
    pipe, plain = UnCLIP.from_pretrained(base, lora=both), UnCLIP.from_pretrained(base)
    (picture,) = pipe.text_to_image("a red apple")
    assert picture.tobytes() != plain.text_to_image("a red apple")[0].tobytes()
    assemble(tmp_path / "merged", base, base, base, [], lora=both)
    merged = UnCLIP.from_pretrained(tmp_path / "merged")
    assert picture.tobytes() == merged.text_to_image("a red apple")[0].tobytes()
    assert Source(base).change(read_loras(both)).hash != Source(base).hash


def test_a_stopped_run_goes_on_exactly(base: Path, loras: dict[str, Path], tmp_path: Path) -> None:
    out = tmp_path / "again"
    train("decoder", lora_run(base, "decoder", out, "train.steps=2"))
    last = train("decoder", lora_run(base, "decoder", out))
    whole = digests(loras["decoder"] / "checkpoints" / "step-4")
    assert digests(last) == whole


def test_another_base_is_refused(
    base: Path, loras: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = tmp_path / "other"
    pipe = UnCLIP.from_pretrained(base)
    for p in pipe.need("decoder", "").network.parameters():
        p.mul_(1.1)
    pipe.save_pretrained(other)
    with pytest.raises(CheckpointError, match=f"changes another model: .* made for {base}"):
        UnCLIP.from_pretrained(other, lora=[loras["decoder"]])
    half = tmp_path / "half"
    UnCLIP.from_pretrained(base).save_pretrained(half, torch.bfloat16)
    UnCLIP.from_pretrained(half, lora=[loras["decoder"]])  # the same one, rounded
    folder = tmp_path / "run"
    train("decoder", lora_run(base, "decoder", folder, "train.steps=1"))
    with pytest.raises(CheckpointError, match="changes another model"):  # before it trains on it
        train("decoder", lora_run(other, "decoder", folder))
    for model, lora, says in (
        (loras["decoder"], loras["decoder"], "is a LoRA, which changes a decoder"),
        (base, base, "holds a whole clip, no LoRA"),
    ):
        with pytest.raises(SystemExit) as ended:
            main(["text", "a", "--model", str(model), "--lora", str(lora), "--out", str(tmp_path)])
        assert ended.value.code == 4 and says in capsys.readouterr().err


def test_a_change_needs_a_base(base: Path) -> None:
    with pytest.raises(ConfigError, match=r"lora needs train\.init"):
        tiny("decoder", base, "lora=2")


def test_plans_count_what_is_trained(base: Path, tmp_path: Path) -> None:
    from unclip.training.counting import network_of

    with torch.device("meta"):
        network = network_of(lora_run(base, "prior", tmp_path))
    trained = sum(p.numel() for p in network.parameters() if p.requires_grad)
    assert 0 < trained < sum(p.numel() for p in network.parameters()) / 2


def test_a_karlo_takes_changes_as_it_is_and_converted(tmp_path: Path) -> None:
    karlo_like().save_pretrained(tmp_path / "ours")
    folder = tmp_path / "karlo"
    convert(tmp_path / "ours", folder)
    plain = UnCLIP.from_pretrained(folder)
    for name in TRAIN:
        run = run_of(plain, name, folder, tmp_path / name).model_dump(mode="json")
        run = {**run, "lora": RANK, "train": {**run["train"], "lr": 0.05}}
        train(name, parse_config(run, SCHEMAS[name], "test"))
    both = [tmp_path / name for name in TRAIN]
    as_it_is, converted = (
        Source(model).change(read_loras(both)) for model in (folder, tmp_path / "ours")
    )
    for name in TRAIN:
        old = Source(folder).stage(name).load().network.state_dict()
        new, ours = (s.stage(name).load().network.state_dict() for s in (as_it_is, converted))
        assert any(not torch.equal(old[key], x) for key, x in new.items())
        for key, x in new.items():
            assert_close(x, ours[key], rtol=0, atol=0)


@pytest.mark.parametrize("other", ["diffusion.schedule=linear", "diffusion.steps=100"])
def test_a_change_is_not_trained_on_another_process_than_its_base_is_drawn_with(
    model_folder: Path, tmp_path: Path, other: str
) -> None:
    run = tiny(
        "prior",
        model_folder,
        "lora=2",
        f"train.init={model_folder}",
        other,
        f"train.out={tmp_path}",
    )
    key = other.partition("=")[0].partition(".")[2]
    with pytest.raises(CheckpointError, match=rf"train\.init: .*{key} = \w+, here"):
        train_prior(run, Accelerator(cpu=True))
