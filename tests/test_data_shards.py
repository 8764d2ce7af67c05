"""Tar shards by number: their index, and what becomes of damaged ones and of bad samples."""

from __future__ import annotations

import errno
import io
import multiprocessing
import os
import pickle
import resource
import subprocess
import tarfile
import time
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from unclip.data import shards as shards_module
from unclip.data.captions import Columns
from unclip.data.open import open_dataset
from unclip.data.order import batches
from unclip.data.sample import Dataset
from unclip.data.shards import Shards, read_index
from unclip.data.tar import ENTRY
from unclip.errors import ConfigError, DataError, UnclipWarning
from unclip.images import Fit

ANY = torch.Generator()


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Indexes of these tests go nowhere else."""
    monkeypatch.setenv("UNCLIP_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "shards"


def encode(level: int, form: str = "PNG") -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (9, 9), (level, 0, 0)).save(file, form, quality=95)
    return file.getvalue()


def write(
    path: Path,
    members: dict[str, bytes] | list[tuple[str, bytes]],
    form: int = tarfile.PAX_FORMAT,
) -> Path:
    with tarfile.open(path, "w", format=form) as tar:
        for name, data in members.items() if isinstance(members, dict) else members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def samples(first: int, count: int) -> dict[str, bytes]:
    return {
        f"{n:04}.{suffix}": data
        for n in range(first, first + count)
        for suffix, data in (("png", encode(n % 256)), ("txt", f"number {n}".encode()))
    }


def many(root: Path, count: int, each: int = 10) -> list[Path]:
    root.mkdir(exist_ok=True)
    return [
        write(root / f"s-{k:02}.tar", samples(each * k, each)) for k in range(count)
    ]  # sample n says so in caption and colour


def captions(dataset: Dataset) -> list[str]:
    return [dataset.get(index, ANY).caption for index in range(len(dataset))]


def replace(path: Path, old: bytes, new: bytes, *, unseen: bool = False) -> None:
    """Change bytes in place; `unseen` keeps the time of the last change."""
    data, stat = path.read_bytes(), path.stat()
    assert old in data and len(old) == len(new)
    path.write_bytes(data.replace(old, new, 1))
    if unseen:
        os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))


def test_shards_by_folder_pattern_and_braces(tmp_path: Path) -> None:
    first = {
        "d/1.png": encode(255),
        "d/1.txt": b"one",
        "2.v1.jpg": b"",
        "2.webp": encode(9, "WEBP"),
        "2.json": b'{"caption": "two"}',
    }
    write(tmp_path / "s-08.tar", first)
    write(tmp_path / "s-09.tar", {"1.jpg": encode(9, "JPEG"), "1.txt": "drei ü".encode()})
    for spec in (tmp_path, f"{tmp_path}/s-*.tar", f"{tmp_path}/s-{{08..09}}.tar"):
        assert captions(open_dataset(str(spec), 8)) == ["one", "two", "drei ü"]
    one = open_dataset(str(tmp_path / "s-08.tar"), 8).get(0, ANY)
    assert one.image[:, 4, 4].tolist() == [1, -1, -1]
    assert one.key == "s-08.tar:d/1"


def test_two_stars_stand_for_folders_of_any_depth(tmp_path: Path) -> None:
    """They stood for one folder: what lay higher or deeper was passed over in silence."""
    for number, folder in enumerate((tmp_path, tmp_path / "a", tmp_path / "a" / "b")):
        folder.mkdir(exist_ok=True)
        write(folder / "s.tar", samples(number, 1))
    dataset = open_dataset(f"{tmp_path}/**/*.tar", 8)
    keys = [dataset.get(index, ANY).key for index in range(len(dataset))]
    assert keys == ["a/b/s.tar:0002", "a/s.tar:0001", "s.tar:0000"]


FUZZ = settings(
    max_examples=25,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
WORD = st.text(st.characters(exclude_characters="/\0", exclude_categories=["Cs"]), max_size=20)
NAME = st.one_of(
    st.tuples(st.sampled_from(["a", "写真", "caf\udce9", "x.y"]), WORD).map("".join),
    st.integers(0, 30).map(lambda n: "long" * 30 + str(n)),
    st.integers(0, 30).map(lambda n: f"deep/{'er/' * 60}{n}.v1"),
)


@FUZZ
@given(
    keys=st.lists(NAME, unique=True, min_size=1, max_size=6),
    form=st.sampled_from([tarfile.PAX_FORMAT, tarfile.GNU_FORMAT]),
    front=st.sampled_from(["", "./", "d/"]),
)
def test_every_sample_has_the_name_that_it_was_given(
    tmp_path: Path, keys: list[str], form: int, front: str
) -> None:
    """Headers cut names at 100 bytes, or write ? for what isn't ASCII; the whole name stands in a
    header before. Samples of one key got one embedding."""
    members = [
        (f"{front}{key}{suffix}", data)
        for n, key in enumerate(keys)
        for suffix, data in ((".PNG", encode(n)), (".txt", f"number {n}".encode()))
    ]
    path = write(tmp_path / "names.tar", members, form)
    dataset = open_dataset(str(path), 9)
    found = [dataset.get(n, ANY) for n in range(len(dataset))]
    front = front.removeprefix("./")
    names = [f"names.tar:{front}{key}".replace("\udce9", r"\udce9") for key in keys]
    assert [sample.key for sample in found] == names
    assert [sample.caption for sample in found] == [f"number {n}" for n in range(len(keys))]


@FUZZ
@given(data=st.data())
def test_damage_anywhere_in_a_shard_is_no_traceback(tmp_path: Path, data: st.DataObject) -> None:
    """Names and captions that are whole still belong together."""
    members = {**samples(0, 3), "写真.png": encode(3), "写真.txt": b"number 3"}
    path = write(tmp_path / "torn.tar", members)
    torn = bytearray(path.read_bytes())
    headers = st.sampled_from(range(0, len(torn) - 10240, 512)).flatmap(
        lambda block: st.integers(block, block + 300)
    )
    for place in data.draw(st.lists(headers, min_size=1, max_size=3)):
        torn[place] ^= data.draw(st.integers(1, 255))
    path.write_bytes(torn)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            captions(open_dataset(str(path), 9))
        except DataError as error:
            assert "torn.tar" in str(error)


def test_the_key_is_all_before_the_last_dot(tmp_path: Path) -> None:
    """Split at the first one, every fourth sample was lost without a word. What adds a part to a
    whole sample, as masks do, is none itself."""
    stems = [f"{n:03}.v1" if n % 4 == 0 else f"{n:03}" for n in range(40)]
    members = [(f"{stem}{end}", body) for stem in stems for end, body in PAIR]
    mask = [("001.mask.png", encode(0)), ("002.en.txt", b"english")]
    dataset = open_dataset(str(write(tmp_path / "a.tar", [*members, *mask])), 9)
    keys = [dataset.get(n, ANY).key for n in range(len(dataset))]
    assert keys == [f"a.tar:{stem}" for stem in stems]


PAIR = [(".png", encode(0)), (".txt", b"x")]


def test_two_samples_of_one_name_are_counted_and_left_out(tmp_path: Path) -> None:
    """The last one silently stood for both."""
    members = [(f"{n:03}{end}", body) for n in range(60) for end, body in PAIR]
    path = write(tmp_path / "a.tar", [*members, ("007.png", encode(1))])
    with pytest.warns(UnclipWarning, match=r"2 samples lack .*, or have two: \S*a\.tar:007 and 1"):
        assert len(open_dataset(str(path), 9)) == 59
    write(path, [("000" + end, body) for _ in range(10) for end, body in PAIR])
    with pytest.raises(DataError, match="10 samples lack"):
        open_dataset(str(path), 9)
    write(path, members)
    with pytest.raises(DataError, match=r"names \S*a\.tar twice"):
        open_dataset(f"{tmp_path}/{{a,a*}}.tar", 9)


def test_hidden_members_are_passed_over(tmp_path: Path) -> None:
    """As a tar written on macOS holds them."""
    hidden = ["._0000", "__MACOSX/._0000", ".ipynb_checkpoints/0000-checkpoint"]
    members = {name + end: body for name in hidden for end, body in PAIR}
    assert len(open_dataset(str(write(tmp_path / "a.tar", {**samples(0, 3), **members})), 9)) == 3


def test_a_shard_that_is_no_file_is_left_out(tmp_path: Path) -> None:
    """A link to nowhere was a traceback."""
    many(tmp_path / "data", 60)
    (tmp_path / "data" / "t.tar").symlink_to("nowhere")
    (tmp_path / "data" / "u.tar").mkdir()
    os.mkfifo(tmp_path / "data" / "v.tar")
    told = r"2 of 62 shards: \S*t\.tar can't be read \(No such file.*v\.tar can't .*is no file"
    with pytest.warns(UnclipWarning, match=told):
        assert len(open_dataset(str(tmp_path / "data"), 9)) == 600


def test_a_set_has_the_same_keys_from_wherever_it_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A cache of embeddings made by an absolute path did not fit a relative one."""
    (tmp_path / "d").mkdir()
    many(tmp_path / "d" / "a", 1), many(tmp_path / "d" / "b", 1)
    monkeypatch.chdir(tmp_path)

    def keys(spec: str) -> list[str]:
        dataset = open_dataset(spec, 9)
        return [dataset.get(n, ANY).key for n in range(0, len(dataset), 10)]

    for spec in ("d/a", "d/a/", f"{tmp_path}/d/a", "./d/../d/a/*.tar", "d/a/s-{00..00}.tar"):
        assert keys(spec) == ["s-00.tar:0000"]
    odd = write(tmp_path / "d" / "x[1] {2..3}.tar", samples(0, 1))
    assert keys(str(odd)) == ["x[1] {2..3}.tar:0000"]
    odd.unlink()
    for spec in ("d", "d/*/*.tar", f"{tmp_path}/d/{{a,b}}/s-00.tar"):
        assert keys(spec) == ["a/s-00.tar:0000", "b/s-00.tar:0000"]


def test_a_column_is_a_key_of_the_json(tmp_path: Path) -> None:
    row = b'{"caption": "short", "long": ["a long one", 7]}'
    path = write(tmp_path / "a.tar", {"0.png": encode(0), "0.txt": b"plain", "0.json": row})
    assert open_dataset(str(path), 9).get(0, ANY).caption == "plain"
    dataset = open_dataset(str(path), 9, columns=Columns("long"))
    drawn = {dataset.get(0, torch.Generator().manual_seed(k)).caption for k in range(20)}
    assert drawn == {"a long one", "7"}


def test_any_sample_is_reached_by_its_number(tmp_path: Path) -> None:
    long = "a" * 120  # longer than a header's name: tar writes it beside
    members = {f"{long}/{name}": data for name, data in samples(30, 5).items()}
    paths = [*many(tmp_path / "data", 3), write(tmp_path / "data" / "t.tar", members)]
    dataset = open_dataset(str(tmp_path / "data"), 9)
    assert len(dataset) == 35
    for number in (34, 0, 10, 29, 30, 9):
        sample = dataset.get(number, ANY)
        assert sample.caption == f"number {number}"
        assert round((sample.image[0, 4, 4].item() + 1) * 127.5) == number
        assert sample.key.startswith(f"{paths[min(number // 10, 3)].name}:")
        assert sample.key.endswith(f"{number:04}")


def test_an_index_is_made_once_and_mapped(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """46 bytes for each sample: ten million rows take half a GB, mapped from a file."""
    (path,) = many(tmp_path / "data", 1)
    made = read_index(path)
    assert isinstance(made.entries, np.memmap) and ENTRY.itemsize <= 100
    monkeypatch.setattr(shards_module, "index_shard", lambda *_: pytest.fail("indexed again"))
    entries = np.array(made.entries)  # not mapped: below its file is damaged
    del made
    assert np.array_equal(read_index(path).entries, entries)
    monkeypatch.undo()
    monkeypatch.setenv("UNCLIP_CACHE", str(cache.parent))
    for file in cache.iterdir():
        file.write_bytes(b"")  # damaged: made again
    assert np.array_equal(read_index(path).entries, entries)
    write(path, samples(0, 3))
    assert len(read_index(path).entries) == 3  # the shard has changed
    monkeypatch.setenv("UNCLIP_CACHE", str(path))  # no folder: nothing can be kept
    assert len(read_index(path).entries) == 3


@pytest.mark.parametrize("length", [1024, 1500, 512 * 5, 512 * 10])
def test_what_is_whole_of_a_cut_shard_is_used(tmp_path: Path, length: int) -> None:
    """Inside and between members; alone such a shard is more than 5 % of all."""
    paths = many(tmp_path / "data", 40)
    paths[7].write_bytes(paths[7].read_bytes()[:length])
    with pytest.warns(UnclipWarning, match=r"1 of 40 shards: \S*s-07\.tar is (truncated|not a)"):
        dataset = open_dataset(str(tmp_path / "data"), 9)
    whole = length // 2048  # a sample takes four blocks of 512
    kept = [n for n in range(400) if n < 70 + whole or n >= 80]
    assert captions(dataset) == [f"number {n}" for n in kept]
    with pytest.raises(DataError, match=r"1 of 1 shards: \S*s-07\.tar is (truncated|not a)"):
        open_dataset(str(paths[7]), 9)


def test_a_flipped_bit_in_a_header_is_seen(tmp_path: Path) -> None:
    paths = many(tmp_path / "data", 40)
    replace(paths[3], b"0035.png", b"0135.png")
    with pytest.warns(UnclipWarning, match=r"s-03\.tar is truncated or damaged after 10,240 of"):
        dataset = open_dataset(str(tmp_path / "data"), 9)
    assert len(dataset) == 395


def test_missing_and_empty_shards_are_counted(tmp_path: Path) -> None:
    many(tmp_path / "data", 39)
    write(tmp_path / "data" / "s-39.tar", {})
    spec = str(tmp_path / "data" / "s-{00..40}.tar")
    with pytest.warns(UnclipWarning) as told:
        dataset = open_dataset(spec, 9)
    assert len(dataset) == 390 and len(told) == 1
    text = str(told[0].message)
    assert "2 of 41 shards" in text
    assert "s-40.tar is not there" in text and "s-39.tar holds no samples" in text
    with pytest.raises(DataError, match=r"4 of 43 shards: \S*s-40\.tar is not there; "):
        open_dataset(str(tmp_path / "data" / "s-{00..42}.tar"), 9)


def test_samples_without_a_part_are_left_out(tmp_path: Path) -> None:
    lacking = {"a.png": encode(1), "b.txt": b"blind", "c.gif": b"", "d.pickle": b"cos\nsystem\n"}
    (tmp_path / "data").mkdir()
    path = write(tmp_path / "data" / "a.tar", {**samples(0, 60), **lacking})
    with pytest.warns(UnclipWarning, match=r"2 samples lack a JPEG.*a\.tar:a and 1 more"):
        assert len(open_dataset(str(path), 9)) == 60
    write(path, {"1.png": encode(0)})
    with pytest.raises(DataError, match=r"1 samples lack .*a\.tar:1\."):
        open_dataset(str(path), 8)
    write(path, {"1.pickle": b"cos\nsystem\n"})
    with pytest.raises(DataError, match=r"a\.tar holds no samples"):
        open_dataset(str(path), 8)


@pytest.mark.parametrize("form", ["gnu", "posix"])
@pytest.mark.parametrize("place", [0, 30, 59])
def test_a_sparse_member_costs_its_sample_alone(tmp_path: Path, form: str, place: int) -> None:
    """Its size without holes isn't the stored one: the whole shard was called damaged."""
    for name, data in samples(0, 60).items():
        (tmp_path / name).write_bytes(data)
    with (tmp_path / f"{place:04}.png").open("r+b") as file:
        file.truncate(2**20)
    names = sorted(path.name for path in tmp_path.iterdir())
    made = ["tar", "-cSf", "s.tar", f"--format={form}", *names]
    if subprocess.run(made, cwd=tmp_path, capture_output=True).returncode:
        pytest.skip("tar is not GNU's")
    with pytest.warns(UserWarning, match=rf"1 samples lack a JPEG.*s\.tar:{place:04}"):
        dataset = open_dataset(str(tmp_path / "s.tar"), 9)
    assert captions(dataset) == [f"number {n}" for n in range(60) if n != place]


def soiled(root: Path) -> Dataset:
    """400 samples, one of each of five kinds bad, and two of the same kind."""
    paths = many(root, 40)
    huge = io.BytesIO()
    Image.new("1", (9000, 9000)).save(huge, "PNG")
    write(paths[20], {**samples(200, 10), "0205.png": huge.getvalue()})
    write(paths[21], {**samples(210, 10), "0215.png": b"GIF89a"})
    write(paths[22], {**samples(220, 10), "0225.txt": b"\xff\xfe no"})
    write(paths[23], {**samples(230, 10), "0235.txt": b" \n"})
    dataset = open_dataset(str(root), 9)
    replace(paths[24], b"number 245", b"number 999", unseen=True)
    replace(paths[24], b"number 246", b"number 998", unseen=True)
    return dataset


def test_bad_samples_are_reported_once_a_kind_and_replaced(tmp_path: Path) -> None:
    dataset = soiled(tmp_path / "data")
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        found = captions(dataset)
    bad = [205, 215, 225, 235, 245, 246]
    for number in set(range(400)) - set(bad):
        assert found[number] == f"number {number}"
    stand = [int(found[number].split()[1]) for number in bad]
    assert not {*stand} & {*bad, 998, 999} and len({*stand}) == len(bad)
    texts = [str(one.message) for one in told]
    assert len(texts) == 5  # of the two changed ones the second is only counted
    for number, what in [
        (205, "pixels"),
        (215, "is not a JPEG"),
        (225, "is not UTF-8"),
        (235, "has an empty caption"),
        (245, "its text has changed since"),
    ]:
        assert sum(f"{number:04}" in text and what in text for text in texts) == 1, what
    again = soiled(tmp_path / "data")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        backwards = [again.get(number, ANY).caption for number in reversed(range(400))]
    assert backwards[::-1] == found  # whoever asks, and whenever


@pytest.mark.parametrize("bad", ["1" + "0" * 400, "[" * 600 + "]" * 600])
def test_what_in_a_json_is_no_caption_does_not_end_training(tmp_path: Path, bad: str) -> None:
    """Integers that no float holds, and deep lists, were tracebacks."""
    members = {}
    for n in range(30):
        caption = bad if n == 7 else f'"number {n}"'
        members |= {f"{n}.png": encode(n), f"{n}.json": f'{{"caption": {caption}}}'.encode()}
    dataset = open_dataset(str(write(tmp_path / "a.tar", members)), 9)
    with pytest.warns(UserWarning, match="a.tar:7 has an empty caption"):
        assert dataset.get(7, ANY).caption.startswith("number ")


def test_too_many_bad_samples_stop_with_the_shards_they_are_in(tmp_path: Path) -> None:
    paths = many(tmp_path / "data", 40)
    dataset = open_dataset(str(tmp_path / "data"), 9)
    for path in paths[:3]:
        for number in range(10 * int(path.stem[2:]), 10 * int(path.stem[2:]) + 10):
            replace(path, f"number {number}".encode(), b"x" * len(f"number {number}"), unseen=True)
    with warnings.catch_warnings(), pytest.raises(DataError) as stopped:
        warnings.simplefilter("ignore")
        captions(dataset)
    text = str(stopped.value)
    assert "11 of 11 samples" in text  # more than 5 % of 200
    assert "s-00.tar (10), " in text and "s-01.tar (1)" in text
    assert stopped.value.exit_code == 3


def test_a_loaders_workers_stop_the_same_way(tmp_path: Path) -> None:
    (path,) = many(tmp_path / "data", 1)
    dataset = open_dataset(str(path), 9)
    replace(path, b"number 4", b"xumber 4", unseen=True)
    with pytest.raises(DataError, match="its text has changed") as stopped:
        for batch in batches(dataset, batch=10, seed=0, workers=1):
            assert len(batch) == 10
    assert "Traceback" not in str(stopped.value)


def test_shards_pass_to_workers_whole(tmp_path: Path) -> None:
    many(tmp_path / "data", 3)
    dataset = open_dataset(str(tmp_path / "data"), 9)
    here = next(batches(dataset, batch=30, seed=1))
    there = next(batches(dataset, batch=30, seed=1, workers=2))
    assert here.captions == there.captions and sorted({*here.captions}) == sorted(captions(dataset))
    assert isinstance(dataset.dataset, Shards)  # type: ignore[attr-defined]


def test_a_spawned_worker_is_sent_names_and_opens_the_indexes(tmp_path: Path) -> None:
    dataset = Shards("x", many(tmp_path / "d", 3, each=200), Fit(16), tmp_path)
    sent = pickle.dumps(dataset)
    assert len(sent) < 1000  # bytes, for 600 samples of 46
    again = pickle.loads(sent)
    assert [again.get(i, ANY).caption for i in (0, 599)] == ["number 0", "number 599"]


def test_a_hundred_shards_take_few_descriptors(tmp_path: Path) -> None:
    """Each process kept one open for each shard: of 256 allowed, the 250th shard's failed."""
    paths = many(tmp_path / "data", 100, each=2)
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    used = len(os.listdir("/proc/self/fd"))
    resource.setrlimit(resource.RLIMIT_NOFILE, (used + 40, before[1]))
    try:
        dataset = Shards("x", paths, Fit(9), tmp_path)
        assert [dataset.get(k, ANY).caption for k in (0, 199)] == ["number 0", "number 199"]
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)
    assert len(os.listdir("/proc/self/fd")) <= used + 1


@pytest.mark.parametrize("when", ["indexing", "reading"])
def test_running_out_of_descriptors_is_no_damage(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, when: str
) -> None:
    """It was taken for a damaged index, and ended in a traceback."""
    (path,) = many(tmp_path / "data", 1)
    dataset = None if when == "indexing" else open_dataset(str(path), 9)

    def opened(*_: object, **__: object) -> None:
        raise OSError(errno.EMFILE, "Too many open files")

    with monkeypatch.context() as patched, pytest.raises(ConfigError, match="ulimit -n"):
        patched.setattr(tarfile, "open", opened)
        patched.setattr(Path, "open", opened)
        dataset = dataset or open_dataset(str(path), 9)
        dataset.get(0, ANY)
    assert captions(open_dataset(str(path), 9)) == [f"number {n}" for n in range(10)]


def _indexed(shards: list[Path], rank: int, both: Any, told: Any) -> None:
    os.environ |= {"LOCAL_RANK": str(rank), "LOCAL_WORLD_SIZE": "2"}
    index_shard = shards_module.index_shard

    def slowly(shard: Path, *texts: Any) -> shards_module.ShardIndex:
        time.sleep(0.05)
        told.put((rank, shard.name))
        return index_shard(shard, *texts)

    shards_module.index_shard = slowly
    both.wait()
    assert len(Shards("x", shards, Fit(9), shards[0].parent)) == 200


def test_the_processes_of_a_machine_index_each_shard_once(tmp_path: Path) -> None:
    """Every process read every shard."""
    paths = many(tmp_path / "data", 20)
    context = multiprocessing.get_context("fork")
    both, told = context.Barrier(2), context.Queue()
    processes = [
        context.Process(target=_indexed, args=(paths, rank, both, told)) for rank in (0, 1)
    ]
    for process in processes:
        process.start()
    work = [told.get(timeout=60) for _ in paths]
    for process in processes:
        process.join(60)
        assert process.exitcode == 0
    assert told.empty() and sorted(name for _, name in work) == [path.name for path in paths]
    assert {rank for rank, _ in work} == {0, 1}


def test_a_shard_that_changed_is_read_again_and_no_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    paths = many(tmp_path / "data", 3)
    assert len(Shards("x", paths, Fit(9), tmp_path)) == 30
    read: list[Path] = []
    index_shard = shards_module.index_shard
    monkeypatch.setattr(
        shards_module, "index_shard", lambda shard, *_: read.append(shard) or index_shard(shard)
    )
    assert len(Shards("x", paths, Fit(9), tmp_path)) == 30 and not read
    write(paths[1], samples(100, 5))
    again = Shards("x", paths, Fit(9), tmp_path)
    assert read == [paths[1]]
    assert [again.get(k, ANY).caption for k in (9, 10, 15)] == [
        "number 9",
        "number 100",
        "number 20",
    ]
