"""Caches of embeddings: what they hold, who writes and reads them, and what a prior does."""

from __future__ import annotations

import io
import json
import os
import pickle
import tarfile
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from accelerate import Accelerator
from conftest import tiny_clip
from PIL import Image
from processes import script, together
from test_tasks import tiny
from test_training_ar_prior import tiny as tiny_ar
from torch.testing import assert_close

from unclip.clip.encoder import FrozenCLIP
from unclip.data.cache import EmbeddingCache, Joined
from unclip.data.open import open_dataset
from unclip.data.order import batches
from unclip.data.sample import fixed
from unclip.errors import CheckpointError, ConfigError, DataError, UnclipWarning
from unclip.images import to_pil
from unclip.randomness import generator
from unclip.training.ar_prior import train_ar_prior
from unclip.training.decoder import train_decoder
from unclip.training.embed import CachePlan, begin_cache, finish_cache, write_cache
from unclip.training.embed import main as embed
from unclip.training.prior import PriorRun, PriorTask, open_pairs, train_prior

ROWS, ROUNDS = 700, 2  # the shapes' validation set has 512


@pytest.fixture(autouse=True)
def kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """What these tests keep goes nowhere else."""
    monkeypatch.setenv("UNCLIP_CACHE", str(tmp_path / "kept"))
    return tmp_path / "kept" / "metadata"


@pytest.fixture(scope="module")
def clip() -> FrozenCLIP:
    return tiny_clip()


def make(root: Path, clip: FrozenCLIP, world: int = 1, rows: int = ROWS) -> EmbeddingCache:
    dataset = open_dataset("shapes:val", 16)
    plan = CachePlan("shapes:val", 16, 0, ROUNDS, rows, ROUNDS * len(dataset))
    begin_cache(root, clip, plan)
    for rank in range(world):
        write_cache(root, dataset, clip, plan, rank=rank, world=world, batch=64)
    finish_cache(root)
    return EmbeddingCache(root)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory, clip: FrozenCLIP) -> Path:
    path = tmp_path_factory.mktemp("cache") / "shapes"
    make(path, clip)
    return path


def copy(root: Path, to: Path) -> Path:
    for file in root.rglob("*"):
        if file.is_file():
            (to / file.relative_to(root)).parent.mkdir(parents=True, exist_ok=True)
            (to / file.relative_to(root)).write_bytes(file.read_bytes())
    return to


def test_a_cache_holds_embedding_caption_and_key_of_every_sample(
    root: Path, clip: FrozenCLIP
) -> None:
    dataset, cache = open_dataset("shapes:val", 16), open_dataset(str(root), 16, embeddings=True)
    n = len(dataset)
    assert len(cache) == ROUNDS * n
    for number in (0, 1, ROWS - 1, ROWS, n, ROUNDS * n - 1):
        sample = dataset.get(number % n, generator(0, "embedding", number))
        row = cache.get(number, torch.Generator())
        assert (row.caption, row.key) == (sample.caption, sample.key)
        assert_close(row.z_image, clip.encode_image(sample.image[None])[0], rtol=1e-3, atol=1e-3)
    with pytest.raises(IndexError):
        cache.get(ROUNDS * n, torch.Generator())


def test_the_statistics_are_those_of_all_rows(root: Path) -> None:
    shards = sorted((root / "img_emb").glob("*.npy"))
    assert [len(np.load(shard)) for shard in shards] == [700, 324]
    z = torch.from_numpy(np.concatenate([np.load(shard) for shard in shards])).double()
    index = json.loads((root / "embeddings.json").read_text())
    assert_close(torch.tensor(index["mean"], dtype=torch.double), z.mean(0))
    assert_close(torch.tensor(index["std"], dtype=torch.double), z.std(0, correction=0))


def test_several_processes_and_an_interruption_give_the_same_files(
    root: Path, clip: FrozenCLIP, tmp_path: Path
) -> None:
    begun = copy(root, tmp_path / "begun")
    (begun / "img_emb" / "img_emb_00001.npy").unlink()
    half = begun / "img_emb" / "img_emb_00001.tmp"
    half.write_bytes(b"half")
    kept = (begun / "img_emb" / "img_emb_00000.npy").stat().st_mtime_ns
    make(begun, clip)
    assert (begun / "img_emb" / "img_emb_00000.npy").stat().st_mtime_ns == kept
    assert not half.exists()
    make(tmp_path / "two", clip, world=2)
    for file in (path.relative_to(root) for path in root.rglob("*") if path.is_file()):
        assert (begun / file).read_bytes() == (root / file).read_bytes(), file
        assert (tmp_path / "two" / file).read_bytes() == (root / file).read_bytes(), file


def test_the_prior_learns_the_same_from_a_cache_as_from_pictures(
    model_folder: Path, tmp_path: Path
) -> None:
    clip = FrozenCLIP.load(str(model_folder))
    folder = tmp_path / "pictures"
    folder.mkdir()
    for i in range(8):
        shape = open_dataset("shapes:val", 16).get(i, generator(0, "", i))
        pixels = ((shape.image.permute(1, 2, 0) + 1) * 127.5).round().byte().numpy()
        Image.fromarray(pixels).save(folder / f"{i}.png")
        (folder / f"{i}.txt").write_text(shape.caption)
    dataset = open_dataset(str(folder), 16)
    plan = CachePlan(str(folder), 16, 0, 1, 5, 8)
    begin_cache(tmp_path / "cache", clip, plan)
    write_cache(tmp_path / "cache", dataset, clip, plan)
    finish_cache(tmp_path / "cache")
    run = tiny("prior", model_folder)
    task = PriorTask(run, clip)
    torch.nn.init.normal_(task.model.out.weight)
    losses = []
    for source in (str(folder), str(tmp_path / "cache")):
        opened = open_dataset(source, 16, embeddings=True)
        batch = next(batches(opened, batch=8, seed=0))
        losses.append(task.loss(task.model.eval(), batch, 0)["loss"])
    assert_close(losses[0], losses[1], rtol=2e-3, atol=2e-3)


def pictures_and_cache(
    folder: Path, clip: FrozenCLIP, side: int = 16, cached: tuple[int, ...] = (6, 2, 4, 0, 5, 1, 3)
) -> tuple[str, Path]:
    """A tar shard of 8 pictures, and a cache of some in another order."""
    shard = folder / "0.tar"
    with tarfile.open(shard, "w") as tar:
        for i in range(8):
            shape = open_dataset("shapes:val", side).get(i, generator(0, "", i))
            file = io.BytesIO()
            to_pil(shape.image).save(file, "PNG")
            for suffix, data in (("png", file.getvalue()), ("txt", shape.caption.encode())):
                member = tarfile.TarInfo(f"00{i}.{suffix}")
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))
    dataset = open_dataset(str(shard), side)
    samples = [fixed(dataset, i) for i in cached]
    z = clip.encode_image(torch.stack([sample.image for sample in samples]))
    for name in ("img_emb", "metadata"):
        (folder / "cache" / name).mkdir(parents=True)
    np.save(folder / "cache" / "img_emb" / "img_emb_0.npy", z.float().numpy())
    table = {"key": [s.key for s in samples], "caption": [s.caption for s in samples]}
    pq.write_table(pa.table(table), folder / "cache" / "metadata" / "metadata_0.parquet")
    return str(shard), folder / "cache"


@pytest.mark.parametrize("keys", ["ours", "img2dataset's"])
def test_pictures_find_their_embeddings_by_key(tmp_path: Path, clip: FrozenCLIP, keys: str) -> None:
    spec, root = pictures_and_cache(tmp_path, clip)
    if keys != "ours":
        path = root / "metadata" / "metadata_0.parquet"
        table = pq.read_table(path).to_pydict()
        table["key"] = [key.rpartition(":")[2] for key in table["key"]]
        assert table["key"][0] == "006"
        pq.write_table(pa.table(table), path)
    joined = Joined(open_dataset(spec, 16), EmbeddingCache(root))
    assert len(joined) == 8
    for dataset in (joined, pickle.loads(pickle.dumps(joined))):
        for i in range(7):
            sample = fixed(dataset, i)
            assert sample.z_image is not None
            assert_close(sample.z_image, clip.encode_image(sample.image[None])[0].float())
    with pytest.raises(DataError, match=r"0\.tar:007 has no embedding in .*cache"):
        fixed(joined, 7)


def pictures(shard: Path, names: list[str], first: int = 0, form: int = tarfile.PAX_FORMAT) -> Path:
    shard.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(shard, "w", format=form) as tar:
        for k, name in enumerate(names, first):
            file = io.BytesIO()
            Image.new("RGB", (8, 8), (k * 25 % 256, k * 70 % 256, 255 - k * 25)).save(file, "PNG")
            for suffix, data in (("png", file.getvalue()), ("txt", f"number {k}".encode())):
                member = tarfile.TarInfo(f"{name}.{suffix}")
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))
    return shard


def embedded(root: Path, spec: str, clip: FrozenCLIP, keys: str = "ours") -> EmbeddingCache:
    dataset = open_dataset(spec, 16)
    plan = CachePlan(spec, 16, 0, 1, 100, len(dataset))
    begin_cache(root, clip, plan)
    write_cache(root, dataset, clip, plan)
    finish_cache(root)
    if keys != "ours":
        path = root / "metadata" / "metadata_00000.parquet"
        table = pq.read_table(path).to_pydict()
        table["key"] = [key.rpartition(":")[2] for key in table["key"]]
        pq.write_table(pa.table(table), path)
        (root / "embeddings.json").unlink()
    return EmbeddingCache(root)


def all_their_own(joined: Joined, clip: FrozenCLIP) -> bool:
    samples = [fixed(joined, k) for k in range(len(joined))]
    z = torch.stack([sample.z_image for sample in samples if sample.z_image is not None])
    own = clip.encode_image(torch.stack([sample.image for sample in samples])).float()
    return bool(torch.allclose(z, own, rtol=1e-2, atol=1e-2))


@pytest.mark.parametrize("form", [tarfile.PAX_FORMAT, tarfile.GNU_FORMAT])
@pytest.mark.parametrize("stem", ["写真", "a" * 120, "x.v"])
@pytest.mark.parametrize("keys", ["ours", "img2dataset's"])
def test_names_that_no_header_holds_find_their_own_embeddings(
    tmp_path: Path, clip: FrozenCLIP, form: int, stem: str, keys: str
) -> None:
    """All samples had one key, and trained with the embedding of the first."""
    shard = pictures(tmp_path / "a.tar", [f"{stem}{k}" for k in range(8)], form=form)
    cache = embedded(tmp_path / "cache", str(shard), clip, keys)
    assert all_their_own(Joined(open_dataset(str(shard), 16), cache), clip)


def test_keys_that_occur_in_two_shards_are_told_apart_or_refused(
    tmp_path: Path, clip: FrozenCLIP
) -> None:
    """The second of two sets trained with the first one's embeddings."""
    names = [f"{k:09}" for k in range(5)]
    first, second = (pictures(tmp_path / s / "0.tar", names, n) for s, n in (("a", 0), ("b", 5)))
    both = f"{tmp_path}/{{a,b}}/0.tar"
    dataset = open_dataset(both, 16)
    assert all_their_own(Joined(dataset, embedded(tmp_path / "ours", both, clip)), clip)
    joined = Joined(dataset, embedded(tmp_path / "bare", both, clip, "img2dataset's"))
    with pytest.raises(DataError, match=r"more than one picture is called 000000002"):
        fixed(joined, 2)
    half = embedded(tmp_path / "half", str(first), clip, "img2dataset's")
    with pytest.raises(DataError, match="more than one picture is called 000000002"):
        fixed(Joined(dataset, half), 7)
    assert all_their_own(Joined(open_dataset(str(first), 16), half), clip)
    with pytest.warns(UnclipWarning, match=r"was made of \S*a/0\.tar, not of \S*b/0\.tar"):
        Joined(open_dataset(str(second), 16), embedded(tmp_path / "a's", str(first), clip))


def test_one_folder_is_one_folder_by_whatever_path(
    tmp_path: Path, clip: FrozenCLIP, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A cache made by the absolute path had no embedding for pictures named by the relative one."""
    spec, root = pictures_and_cache(tmp_path, clip)
    monkeypatch.chdir(tmp_path)
    path = root / "metadata" / "metadata_0.parquet"
    table = pq.read_table(path).to_pydict()
    names = [key.rpartition(":")[2] for key in table["key"]]
    for written in ("0.tar", str(tmp_path / "0.tar")):  # by earlier versions, as it was named
        table["key"] = [f"{written}:{name}" for name in names]
        pq.write_table(pa.table(table), path)
        for given in (spec, "0.tar", "./0.tar"):
            joined = Joined(open_dataset(given, 16), EmbeddingCache(root))
            assert fixed(joined, 3).z_image is not None, (written, given)
    plan = CachePlan("0.tar", 16, 0, 1, 5, 8)
    begin_cache(tmp_path / "begun", clip, plan)
    begin_cache(tmp_path / "begun", clip, replace(plan, data=spec))
    with pytest.raises(ConfigError, match=r"data = '0\.tar', not '1\.tar'"):
        begin_cache(tmp_path / "begun", clip, replace(plan, data="1.tar"))


def test_a_row_that_is_not_finite_is_replaced(root: Path, tmp_path: Path) -> None:
    """It ended the run, and resuming came to the same row for ever."""
    array = copy(root, tmp_path / "cache") / "img_emb" / "img_emb_00001.npy"
    z = np.load(array)
    z[0] = np.nan
    np.save(array, z)
    dataset = open_dataset(str(tmp_path / "cache"), 16, embeddings=True)
    with pytest.warns(UnclipWarning, match="row 700 of all is not finite. Another sample"):
        sample = fixed(dataset, ROWS)
    assert sample.z_image is not None and sample.z_image.isfinite().all()
    z[:100] = np.nan
    np.save(array, z)
    dataset = open_dataset(str(tmp_path / "cache"), 16, embeddings=True)
    with pytest.warns(), pytest.raises(DataError, match=r"can't be used, .*img_emb_00001\.npy"):
        [fixed(dataset, ROWS + k) for k in range(100)]


def test_a_cache_of_other_parts_of_the_pictures_is_refused(
    tmp_path: Path, clip: FrozenCLIP
) -> None:
    """An embedding of the middle says nothing of a crop at random."""
    cache = EmbeddingCache(pictures_and_cache(tmp_path, clip)[1])
    cache.check_fit("middle")  # of a cache that isn't ours nobody knows
    with pytest.raises(ConfigError, match=r"data\.fit = crop, but .* data\.fit = middle"):
        cache.check_fit("crop")
    cache.index = {"data": "a", "fit": "middle"}
    cache.check_fit("middle")
    with pytest.raises(ConfigError, match=r"data\.fit = pad, but .* data\.fit = middle"):
        cache.check_fit("pad")


def test_the_decoder_learns_the_same_with_embeddings_from_a_cache(
    model_folder: Path, tmp_path: Path
) -> None:
    clip = FrozenCLIP.load(str(model_folder))
    spec, root = pictures_and_cache(tmp_path, clip, 32, (6, 2, 7, 4, 0, 5, 1, 3))
    steps = ["train.steps=4", "train.log_every=1", "sampling.steps=2", "train.precision=fp32"]

    def losses(name: str, *more: str) -> torch.Tensor:
        out = f"train.out={tmp_path / name}"
        run = tiny("decoder", model_folder, f"data.train={spec}", *steps, out, *more)
        torch.manual_seed(0)
        train_decoder(run, Accelerator(cpu=True))
        log = (tmp_path / name / "metrics.jsonl").read_text().splitlines()
        return torch.tensor([json.loads(line)["loss"] for line in log])

    made, cached = losses("made"), losses("cached", f"embeddings={root}")
    assert_close(made, cached, rtol=1e-4, atol=1e-5)
    array = root / "img_emb" / "img_emb_0.npy"
    np.save(array, np.load(array)[::-1])  # each picture with another's embedding
    assert not torch.allclose(made, losses("others", f"embeddings={root}"), rtol=1e-4)
    with pytest.raises(CheckpointError, match="of width 16, but the CLIP encoder other"):
        EmbeddingCache(root).check_encoder(SimpleNamespace(width=8), "other")  # type: ignore[arg-type]


def test_the_prior_trains_from_a_cache_alone(
    root: Path, model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("unclip.training.drafts.DRAFT_COUNT", 256)
    more = ["train.steps=2", f"train.out={tmp_path / 'run'}", "model.draft={width: 8}"]
    given = tiny("prior", model_folder, f"data.train={root}", "data.val=null", *more)
    assert isinstance(given, PriorRun)
    assert (train_prior(given, Accelerator(cpu=True)) / "prior" / "model.safetensors").is_file()
    assert not list((tmp_path / "run" / "samples").glob("*")), "a cache has no pictures to show"


@pytest.mark.parametrize("stage", ["prior", "ar_prior"])
def test_a_cache_to_validate_on_measures_and_shows_nothing(
    root: Path, model_folder: Path, tmp_path: Path, stage: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first preview once ended the run: a cache was looked for pictures."""
    monkeypatch.setattr("unclip.training.drafts.QUANTIZER_COUNT", 128)
    more = ["data.train=shapes:val", f"data.val={root}", f"train.out={tmp_path / 'run'}"]
    more += ["train.steps=2", "train.sample_every=1", "train.warmup=0"]
    if stage == "prior":
        given = tiny("prior", model_folder, *more)
        train_prior(given, Accelerator(cpu=True))  # type: ignore[arg-type]
    else:
        train_ar_prior(tiny_ar(model_folder, *more), Accelerator(cpu=True))
    lines = (tmp_path / "run" / "val.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [0, 1, 2]
    assert not list((tmp_path / "run" / "samples").glob("*"))


def test_a_cache_of_another_encoder_is_not_validated_on(
    root: Path, model_folder: Path, tmp_path: Path
) -> None:
    index = copy(root, tmp_path / "other") / "embeddings.json"
    tiny_clip(seed=1).save(tmp_path / "clip")
    said = json.loads(index.read_text())
    said["clip"] = FrozenCLIP.load(str(tmp_path / "clip")).fingerprint.model_dump(mode="json")
    index.write_text(json.dumps(said))
    run = tiny("prior", model_folder, f"data.val={index.parent}")
    with pytest.raises(CheckpointError, match="different CLIP encoders"):
        open_pairs(run, Accelerator(cpu=True))


def test_a_decoder_is_told_that_it_cannot_validate_on_a_cache_before_it_begins(
    root: Path, model_folder: Path, tmp_path: Path
) -> None:
    run = tiny("decoder", model_folder, f"data.val={root}", f"train.out={tmp_path / 'run'}")
    with pytest.raises(DataError, match="only a prior learns from them"):
        train_decoder(run, Accelerator(cpu=True))  # type: ignore[arg-type]
    assert not (tmp_path / "run").exists()


def test_unit_vectors_are_not_taken_for_raw_embeddings(
    root: Path, clip: FrozenCLIP, model_folder: Path, tmp_path: Path
) -> None:
    """LAION's embeddings are normalised; a Karlo's are not, and it learned nothing from them."""
    EmbeddingCache(root).check_raw(clip)
    for array in (copy(root, tmp_path / "unit") / "img_emb").glob("*.npy"):
        z = np.load(array).astype(np.float32)
        np.save(array, (z / np.linalg.norm(z, axis=1, keepdims=True)).astype(np.float16))
    (tmp_path / "unit" / "embeddings.json").unlink()
    cache, loud = EmbeddingCache(tmp_path / "unit"), SimpleNamespace(norm=10.3)
    with pytest.raises(DataError, match=r"norms are 1, .* about 10\.3; set model\.scale\.norm"):
        cache.check_raw(loud)  # type: ignore[arg-type]
    cache.check_raw(SimpleNamespace(norm=1.2))  # type: ignore[arg-type]  # it can't be told
    more = [f"data.train={tmp_path / 'unit'}", "data.val=null", f"train.out={tmp_path / 'run'}"]
    run = tiny("prior", model_folder, *more, "model.scale={kind: whiten}")
    with pytest.MonkeyPatch.context() as patched, pytest.raises(DataError, match="normalised"):
        patched.setattr(FrozenCLIP, "norm", 10.3)
        train_prior(run, Accelerator(cpu=True))


def test_a_cache_of_another_encoder_is_refused(root: Path, tmp_path: Path) -> None:
    cache, other = EmbeddingCache(root), tiny_clip(seed=1)
    with pytest.raises(CheckpointError, match="'tiny 1' and 'tiny 0' are different"):
        cache.check_encoder(other, "other")
    with pytest.raises(CheckpointError, match="are different CLIP encoders"):
        make(copy(root, tmp_path / "mixed"), other)
    with pytest.raises(ConfigError, match="rows = 700, not 100"):
        make(copy(root, tmp_path / "rows"), tiny_clip(), rows=100)


def test_layouts_of_clip_retrieval_are_read(tmp_path: Path, clip: FrozenCLIP) -> None:
    """Without our index: shards by number, keys from image_path, any float type."""
    rows = np.random.default_rng(0).normal(size=(5, 16)).astype(np.float32)
    for number, part in enumerate((rows[:2], rows[2:])):
        for folder in ("img_emb", "text_emb", "metadata"):
            (tmp_path / folder).mkdir(exist_ok=True)
        np.save(tmp_path / "img_emb" / f"img_emb_{number}.npy", part)
        np.save(tmp_path / "text_emb" / f"text_emb_{number}.npy", part)
        names = [f"{number}/{row}.jpg" for row in range(len(part))]
        table = {"image_path": names, "caption": [f"a picture {name}" for name in names]}
        pq.write_table(pa.table(table), tmp_path / "metadata" / f"metadata_{number}.parquet")
    cache = EmbeddingCache(tmp_path)
    cache.check_encoder(clip, "tiny")
    samples = [cache.get(i, torch.Generator()) for i in range(5)]
    assert_close(torch.stack([sample.z_image for sample in samples]), torch.from_numpy(rows))
    assert [sample.key for sample in samples] == ["0/0.jpg", "0/1.jpg", *names]
    assert samples[2].caption == "a picture 1/0.jpg"
    sent = pickle.dumps(cache)  # to a loader's worker
    assert len(sent) < 300
    assert pickle.loads(sent).get(4, torch.Generator()).key == names[-1]
    wide = tiny_clip()
    wide.width = 17
    with pytest.raises(CheckpointError, match="width 16, but the CLIP encoder wide"):
        cache.check_encoder(wide, "wide")


def large(folder: Path, tables: int = 30, rows: int = 50) -> Path:
    """A cache of many files; the key of row n is `k n`, some captions are missing."""
    for name in ("img_emb", "metadata"):
        (folder / name).mkdir(parents=True)
    for number in range(tables):
        first = number * rows
        z = np.arange(first, first + rows, dtype=np.float16)[:, None].repeat(4, 1)
        np.save(folder / "img_emb" / f"img_emb_{number}.npy", z)
        table = {
            "url": [f"k {n}" for n in range(first, first + rows)],
            "TEXT": [f"row {n}" if n % 10 else None for n in range(first, first + rows)],
        }
        path = folder / "metadata" / f"metadata_{number}.parquet"
        pq.write_table(pa.table(table), path, row_group_size=7)
    return folder


def held() -> int:
    return len(os.listdir("/proc/self/fd"))


def test_keys_and_captions_are_mapped_from_one_file(
    tmp_path: Path, kept: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They stood in the memory of every process, 80 to 100 bytes a row, and a descriptor a file."""
    root, before, anonymous = large(tmp_path / "cache"), held(), pa.total_allocated_bytes()
    cache = EmbeddingCache(root)
    assert held() <= before + 1
    assert pa.total_allocated_bytes() - anonymous < 10_000
    for n in (1, 49, 51, 777, 1499):
        row = cache.get(n, torch.Generator())
        assert (row.key, row.caption) == (f"k {n}", f"row {n}")
        assert row.z_image is not None and row.z_image.tolist() == [n] * 4
    with pytest.raises(DataError, match=r"img_emb_\S*\.npy: row 50 of all has no caption"):
        cache.get(50, torch.Generator())
    monkeypatch.setattr("unclip.data.metadata._convert", lambda *_: pytest.fail("made again"))
    assert EmbeddingCache(root).key(1499) == "k 1499"
    monkeypatch.undo()
    monkeypatch.setenv("UNCLIP_CACHE", str(kept.parent))
    (made,) = kept.glob("*.arrow")
    made.write_bytes(made.read_bytes()[:-30])
    assert EmbeddingCache(root).key(1499) == "k 1499"  # damaged: made again
    monkeypatch.setenv("UNCLIP_CACHE", str(made))  # no folder: nothing can be kept
    assert EmbeddingCache(root).key(1499) == "k 1499"


def test_rows_are_found_by_key(tmp_path: Path, kept: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = EmbeddingCache(large(tmp_path / "cache"))
    assert [[*cache.rows(key)] for key in ("k 0", "k 1234", "k 1500")] == [[0], [1234], []]
    assert isinstance(cache._by_key, np.memmap)
    monkeypatch.setattr("unclip.data.metadata.hash_of", lambda key: len(key))  # many collide
    monkeypatch.setattr("unclip.data.cache.hash_of", lambda key: len(key))
    monkeypatch.setenv("UNCLIP_CACHE", str(tmp_path / "other"))
    again = EmbeddingCache(tmp_path / "cache")
    assert [[*again.rows(key)] for key in ("k 7", "k 1234", "k 1500")] == [[7], [1234], []]


@pytest.mark.parametrize("form", ["bytes", "strings"])
def test_bytes_that_are_not_utf_8_cost_one_caption_and_no_key(tmp_path: Path, form: str) -> None:
    """Arrow's own errors, or a traceback when the row was read, ended the training."""
    (tmp_path / "img_emb").mkdir()
    (tmp_path / "metadata").mkdir()
    np.save(tmp_path / "img_emb" / "0.npy", np.ones((40, 4), np.float16))
    columns = {
        "key": [b"caf\xe9", *(b"%d" % n for n in range(1, 40))],
        "caption": [*(b"row %d" % n for n in range(39)), b"caf\xe9"],
    }
    table = {name: pa.array(column) for name, column in columns.items()}
    if form == "strings":
        for name, column in table.items():
            table[name] = pa.StringArray.from_buffers(40, *column.buffers()[1:])
    pq.write_table(pa.table(table), tmp_path / "metadata" / "0.parquet")
    dataset = open_dataset(str(tmp_path), 8, embeddings=True)
    assert fixed(dataset, 0).key == "caf\\udce9"
    assert [fixed(dataset, n).caption for n in range(39)] == [f"row {n}" for n in range(39)]
    with pytest.warns(UserWarning, match=r"0\.npy: row 39 of all has no caption in UTF-8"):
        assert fixed(dataset, 39).caption.startswith("row ")


def damaged(root: Path, name: str) -> None:
    array, table = root / "img_emb" / "img_emb_00001.npy", root / "metadata"
    if name == "truncated":
        array.write_bytes(array.read_bytes()[:-20])
    elif name == "not finite":
        z = np.load(array)
        z[0] = np.nan
        np.save(array, z)
    elif name == "narrower":
        np.save(array, np.load(array)[:, :8])
    elif name == "no captions":
        (table / "metadata_00001.parquet").unlink()
    elif name == "fewer captions":
        first = pq.read_table(table / "metadata_00001.parquet")
        pq.write_table(first.slice(1), table / "metadata_00001.parquet")
    elif name == "no columns":
        pq.write_table(pa.table({"a": [1]}), table / "metadata_00001.parquet")
    elif name == "two of one number":
        np.save(root / "img_emb" / "img_emb_1.npy", np.load(array))
    elif name == "two tables":
        first = table / "metadata_00001.parquet"
        (table / "metadata_1.parquet").write_bytes(first.read_bytes())
    elif name == "lists of captions":
        lists = {"key": ["a"] * 324, "caption": [["a", "b"]] * 324}
        pq.write_table(pa.table(lists), table / "metadata_00001.parquet")
    elif name == "not parquet":
        (table / "metadata_00001.parquet").write_bytes(b"PAR1")
    else:
        index = json.loads((root / "embeddings.json").read_text())
        del index["mean"]
        (root / "embeddings.json").write_text(json.dumps(index))


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("truncated", "img_emb_00001.npy is not a whole .npy file"),
        ("not finite", "img_emb_00001.npy: row 700 of all is not finite"),
        ("narrower", "img_emb_00001.npy has embeddings of width 8, others here of 16"),
        ("no captions", "has no captions for shard 1"),
        ("fewer captions", "img_emb_00001.npy has 324 embeddings but 323 captions"),
        ("no columns", "has the columns a; expected one of key"),
        ("two of one number", "img_emb_00001.npy and img_emb_1.npy have the same number"),
        ("two tables", "metadata_00001.parquet and metadata_1.parquet have the same number"),
        ("lists of captions", r"has captions of type list<.*>; expected one text each"),
        ("not parquet", "metadata_00001.parquet is not a whole parquet file"),
        ("incomplete", "is not complete; run `unclip train embed` again"),
    ],
)
def test_damaged_caches_are_named(root: Path, tmp_path: Path, name: str, message: str) -> None:
    damaged(copy(root, tmp_path / "cache"), name)
    with pytest.raises(DataError, match=message):
        EmbeddingCache(tmp_path / "cache").get(ROWS, torch.Generator())


def test_numbers_that_make_no_sense_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A negative number of workers ended in a traceback of torch's loader."""
    for name, value in (("--workers", "-1"), ("--batch", "0")):
        with pytest.raises(SystemExit) as ended:
            embed(["shapes", str(tmp_path / "cache"), "--clip", "nowhere", name, value])
        assert ended.value.code == 2
        assert f"error: {name} = {value} must be at least" in capsys.readouterr().err


def test_only_a_prior_may_train_on_embeddings(root: Path) -> None:
    with pytest.raises(DataError, match="holds embeddings, not pictures"):
        open_dataset(str(root), 16)


def test_two_processes_write_one_cache(
    model_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cache = ["shapes:val", str(tmp_path / "cache"), "--clip", str(model_folder)]
    options = [*cache, "--rows", "100", "--resolution"]
    printed = together(script, "train/embed.py", *options, "16")
    assert printed.count("512 embeddings") == 1
    assert len(EmbeddingCache(tmp_path / "cache")) == 512
    with pytest.raises(SystemExit) as stopped:
        embed([*options, "17"])
    assert stopped.value.code == 2
    assert "resolution = 16, not 17" in capsys.readouterr().err
