"""The contrastive loss, retrieval scores, augmentation, and a small run of train/clip.py."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from processes import script, together
from torch import Tensor

from unclip.clip.contrastive import contrastive_loss, retrieval_rank
from unclip.clip.encoder import FrozenCLIP
from unclip.config import load_config
from unclip.data.open import open_dataset
from unclip.training.augment import PlaceConfig, place
from unclip.training.clip import ClipRun, ClipTask, drop_words

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


def test_scale_is_limited() -> None:
    z_image, z_text, ids = unit(0), unit(1), torch.arange(8)[:, None]
    a, b = (contrastive_loss(z_image, z_text, ids, torch.tensor(s))["loss"] for s in (100.0, 1e4))
    torch.testing.assert_close(a, b)


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
