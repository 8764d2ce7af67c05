"""The contrastive loss, retrieval scores, augmentation, and a small run of train/clip.py."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from accelerate import Accelerator
from processes import script, together
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from unclip.clip.contrastive import contrastive_loss, retrieval_rank
from unclip.clip.encoder import FrozenCLIP
from unclip.config import load_config
from unclip.data.open import open_dataset
from unclip.data.sample import Batch, fixed
from unclip.errors import ConfigError
from unclip.training.augment import PlaceConfig, place
from unclip.training.clip import ClipRun, ClipTask, drop_words, train_clip

ROOT = Path(__file__).parents[1]


def unit(seed: int, n: int = 8, width: int = 5) -> Tensor:
    return F.normalize(torch.randn(n, width, generator=torch.Generator().manual_seed(seed)), dim=-1)


def test_contrastive_loss_is_its_closed_form() -> None:
    z_image, z_text, ids = unit(0), unit(1), torch.arange(8)[:, None]
    found = contrastive_loss(z_image, z_text, ids, torch.tensor(3.0))["loss"]
    scores = (3 * z_image.double() @ z_text.double().T).exp()
    own = scores.diagonal()
    expected = -((own / scores.sum(1)).log() + (own / scores.sum(0)).log()) / 2
    torch.testing.assert_close(found, expected.float())


def test_equal_captions_are_no_negatives() -> None:
    """Two pictures with one caption: each is scored as if the other were not there."""
    z_image, z_text = unit(0), unit(1)
    z_text[1] = z_text[0]
    ids = torch.tensor([0, 0, 2, 3, 4, 5, 6, 7])[:, None]
    both = contrastive_loss(z_image, z_text, ids, torch.tensor(3.0))["loss"]
    rest = torch.tensor([0, *range(2, 8)])
    alone = contrastive_loss(z_image[rest], z_text[rest], ids[rest], torch.tensor(3.0))["loss"]
    torch.testing.assert_close(both[0], alone[0])


def one_of_two(folder: Path) -> None:
    dist.init_process_group("gloo")
    assert dist.get_world_size() == 2
    data = torch.load(folder / "in.pt", weights_only=True)
    mine = slice(dist.get_rank() * 4, dist.get_rank() * 4 + 4)
    weight = data["weight"].requires_grad_()
    z = F.normalize(data["image"][mine] @ weight, dim=-1)
    loss = contrastive_loss(z, data["text"][mine], data["ids"][mine], torch.tensor(5.0))["loss"]
    loss.mean().backward()
    dist.all_reduce(weight.grad)  # DDP's mean over processes
    parts = [torch.empty(4) for _ in range(2)]
    dist.all_gather(parts, loss.detach())
    if dist.get_rank() == 0:
        torch.save({"loss": torch.cat(parts), "grad": weight.grad / 2}, folder / "out.pt")
    dist.destroy_process_group()


def test_two_processes_compute_what_one_does(tmp_path: Path) -> None:
    image = torch.randn(8, 6, generator=torch.Generator().manual_seed(2))
    weight = torch.randn(6, 5, generator=torch.Generator().manual_seed(3))
    ids = torch.tensor([0, 1, 2, 3, 4, 0, 6, 7])[:, None]  # the equal captions are apart
    torch.save({"image": image, "text": unit(1), "ids": ids, "weight": weight}, tmp_path / "in.pt")
    together(one_of_two, tmp_path)
    found = torch.load(tmp_path / "out.pt", weights_only=True)
    weight.requires_grad_()
    z = F.normalize(image @ weight, dim=-1)
    loss = contrastive_loss(z, unit(1), ids, torch.tensor(5.0))["loss"]
    loss.mean().backward()
    torch.testing.assert_close(found["loss"], loss.detach())
    torch.testing.assert_close(found["grad"], weight.grad)


def test_a_large_validation_set_is_shown_in_part(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All pairs of 6,000 pictures took 650 MB and became a PNG of 18,000 pixels a side."""
    monkeypatch.setattr("unclip.training.clip.MOST_SHOWN", 20)
    more = [f"train.out={tmp_path}", "vocabulary=full", "model.vision_cfg.layers=1"]
    config = load_config(ROOT / "configs" / "shapes" / "clip.yaml", more, ClipRun)
    val = open_dataset("shapes:val", 32)  # 512
    task = ClipTask(config, val, val)
    shown = task.preview(task.model)
    assert shown is not None and shown.size == (60, 60)
    assert json.loads((tmp_path / "val.jsonl").read_text())["n"] == 20


def test_retrieval_rank_counts_better_captions() -> None:
    z_text = torch.eye(4)
    z_image = torch.tensor([[3.0, 2, 0, 0], [1, 0.5, 0.2, 0], [0, 0, 1, 0], [4, 3, 2, 1]])
    assert retrieval_rank(z_image, z_text).tolist() == [0, 1, 0, 3]
    z_text[1] = z_text[0]  # the same caption twice: no competition
    assert retrieval_rank(z_image, z_text).tolist()[:2] == [0, 0]


def test_placement_depends_on_the_sample_alone() -> None:
    """A picture's shift and scale are the same in any batch, and what is uncovered is white."""
    x = torch.full((3, 3, 16, 16), -1.0)
    ids = torch.tensor([4, 5, 6])
    moved = PlaceConfig(shift=0.2, scale=0.2)
    together = place(x, ids, 0, moved)
    assert torch.equal(together[1:2], place(x[:1], ids[1:2], 0, moved))
    assert not torch.equal(together[0], together[1])
    assert together.min() == -1 and together.max() > 0.99 and together.max() <= 1


def test_dropped_words_leave_start_end_and_padding() -> None:
    ids = torch.arange(1, 9).repeat(4, 1)
    mask = torch.arange(8) < torch.tensor([[2], [5], [8], [8]])
    dropped = drop_words(ids, mask, torch.arange(4), 0, 0.999)
    assert torch.equal(dropped[0], ids[0])  # only the start and the end
    assert dropped[1].tolist() == [1, 0, 0, 0, 5, 6, 7, 8]
    assert dropped[2].tolist() == [1, 0, 0, 0, 0, 0, 0, 8]


def small(out: Path, layers: str = "[1, 1, 1, 1]") -> ClipRun:
    """A training on a few shapes: of a ResNet, or of a ViT of so many layers."""
    overrides = [f"train.out={out}", "train.steps=4", "train.save_every=4", "train.batch=8"]
    overrides += ["train.precision=fp32", "data.train=shapes:val", "data.val=null"]
    overrides += ["model.text_cfg.layers=1", f"model.vision_cfg.layers={layers}"]
    overrides += ["model.vision_cfg.width=16", "model.vision_cfg.head_width=16"]
    return load_config(ROOT / "configs/shapes/clip.yaml", overrides, ClipRun)


def test_a_logit_scale_beyond_its_bound_comes_back(tmp_path: Path) -> None:
    run = small(tmp_path)
    data = open_dataset("shapes:val", run.data.resolution)
    task = ClipTask(run, data, None)
    logit_scale = task.towers.model.logit_scale
    with torch.no_grad():
        logit_scale.fill_(math.log(1e4))
    batch = Batch.of([fixed(data, i) for i in range(8)])
    task.loss(task.model, batch, 0)["loss"].mean().backward()
    assert math.isclose(logit_scale.item(), math.log(100), rel_tol=1e-6)
    assert logit_scale.grad is not None and logit_scale.grad.abs() > 0


def test_batch_norms_see_the_whole_batch_or_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trained = []
    monkeypatch.setattr("unclip.training.clip.train", lambda task, *_: trained.append(task))
    several = SimpleNamespace(num_processes=2, device=torch.device("cpu"))
    with pytest.raises(ConfigError, match="ResNet can't be computed over several"):
        train_clip(small(tmp_path), several)  # type: ignore[arg-type]
    train_clip(small(tmp_path, "1"), several)  # type: ignore[arg-type]
    several.device = torch.device("cuda")
    train_clip(small(tmp_path), several)  # type: ignore[arg-type]
    norms = [m for m in trained[1].product.modules() if isinstance(m, _BatchNorm)]
    assert norms and all(isinstance(norm, nn.SyncBatchNorm) for norm in norms)


def test_a_skipped_batch_leaves_nothing_in_the_norms(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = ClipTask.loss

    def loss(self: ClipTask, model: nn.Module, batch: Batch, step: int) -> dict[str, Tensor]:
        if step == 2:
            batch = replace(batch, pixels=batch.images * torch.inf)
        return plain(self, model, batch, step)

    monkeypatch.setattr(ClipTask, "loss", loss)
    train_clip(small(tmp_path / "run"), Accelerator(cpu=True))
    clip = FrozenCLIP.load(str(tmp_path / "run"))
    assert clip.encode_image(torch.zeros(1, 3, 32, 32)).isfinite().all()


@pytest.mark.parametrize("path", ["emoji/clip", "emoji/judge", "shapes/clip"])
def test_configurations_load(path: str) -> None:
    config = load_config(ROOT / f"configs/{path}.yaml", [], ClipRun)
    assert config.data.resolution == config.model.vision_cfg.image_size


def test_training_learns_and_leaves_an_encoder(tmp_path: Path) -> None:
    """Forty steps on the shapes: the loss falls, and the run folder loads as an encoder."""
    overrides = [
        f"train.out={tmp_path / 'run'}",
        "train.steps=40",
        "train.batch=32",
        "train.warmup=5",
        "train.log_every=4",
        "train.precision=fp32",
        "train.save_every=40",
        "train.sample_every=40",
        "vocabulary=full",
        "model.text_cfg.layers=1",
        "model.vision_cfg.layers=1",
    ]
    together(script, "train/clip.py", "configs/shapes/clip.yaml", *overrides, processes=1)
    lines = (tmp_path / "run/metrics.jsonl").read_text().splitlines()
    losses = [json.loads(line)["loss"] for line in lines]
    assert losses[-1] < losses[0] - 0.7
    scores = [json.loads(line) for line in (tmp_path / "run/val.jsonl").read_text().splitlines()]
    assert [score["step"] for score in scores] == [0, 40]
    assert scores[1]["top5"] > 0.04  # chance is 0.01
    clip = FrozenCLIP.load(str(tmp_path / "run"))
    assert clip.name == "shapes-clip"
    assert clip.encode_text(["a red circle"]).embed.shape == (1, clip.width)
