"""Pictures in and out: what is accepted, what is refused, and the units."""

from __future__ import annotations

import errno
import io
import struct
import warnings
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageFile, ImageOps

from unclip import images
from unclip.containers import orientation
from unclip.errors import ConfigError, DataError


def _chunk(kind: bytes, body: bytes) -> bytes:
    """Of a PNG."""
    check = struct.pack(">I", zlib.crc32(kind + body))
    return struct.pack(">I", len(body)) + kind + body + check


def _encode(form: str, **more: object) -> bytes:
    """Noise of 12 x 8."""
    file = io.BytesIO()
    noise = np.random.default_rng(0).integers(0, 255, (8, 12, 3), dtype=np.uint8)
    Image.fromarray(noise).save(file, form, lossless=True, **more)
    return file.getvalue()


def _pixels(data: bytes) -> np.ndarray:
    return np.asarray(images.load_image(io.BytesIO(data), "picture"))


def _insert(data: bytes, form: str, exif: bytes) -> bytes:
    """A file with an EXIF block, whatever that is, put in by hand."""
    if form == "JPEG":
        return (
            data[:2]
            + b"\xff\xe1"
            + struct.pack(">H", len(exif) + 8)
            + b"Exif\0\0"
            + exif
            + data[2:]
        )
    if form == "PNG":
        return data[:33] + _chunk(b"eXIf", exif) + data[33:]
    size = struct.pack("<III", 8, 11, 7)
    head = b"VP8X" + struct.pack("<I", 10) + size[:4] + size[4:7] + size[8:11]
    tail = b"EXIF" + struct.pack("<I", len(exif)) + exif + b"\0" * (len(exif) % 2)
    body = b"WEBP" + head + data[12:] + tail
    return b"RIFF" + struct.pack("<I", len(body)) + body


def _png_header(width: int, height: int) -> bytes:
    """A PNG that claims a size and holds next to nothing."""
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    parts = (_chunk(b"IHDR", header), _chunk(b"IDAT", zlib.compress(b"\0")), _chunk(b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


@pytest.mark.parametrize("side", [8_001, 10_000, 30_000])
def test_a_huge_picture_is_refused_by_its_header(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, side: int
) -> None:
    path = tmp_path / "huge.png"
    path.write_bytes(_png_header(side, side))

    def decode(*_: object) -> None:
        raise AssertionError("decoded")

    monkeypatch.setattr(ImageFile.ImageFile, "load", decode)
    with pytest.raises(DataError, match=r"huge\.png.*limit of 64,000,000"):
        images.load_image(path)


def test_transparent_parts_become_white_in_every_mode() -> None:
    rgba = Image.new("RGBA", (2, 1))
    rgba.putpixel((1, 0), (255, 0, 0, 128))
    palette = Image.new("P", (1, 1))
    palette.putpalette([10, 20, 30])
    palette.info["transparency"] = 0
    assert images.to_rgb(rgba).getpixel((0, 0)) == (255, 255, 255)
    assert images.to_rgb(rgba).getpixel((1, 0)) == (255, 127, 127)
    assert images.to_rgb(Image.new("LA", (1, 1), (0, 0))).getpixel((0, 0)) == (255, 255, 255)
    assert images.to_rgb(palette).getpixel((0, 0)) == (255, 255, 255)


def test_sixteen_bit_grey_keeps_its_brightness() -> None:
    file = io.BytesIO()
    Image.fromarray(np.full((2, 2), 128 * 257, np.uint16)).save(file, "PNG")
    file.seek(0)
    assert images.load_image(file, "grey").getpixel((0, 0)) == (128, 128, 128)


@pytest.mark.parametrize("name", ["a.png", "a.jpg", "a.webp"])
def test_a_damaged_picture_is_an_error_that_names_it(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    noise = np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8)
    Image.fromarray(noise).save(path)
    assert images.load_image(path).size == (64, 64)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(DataError, match=name):
        images.load_image(path)


def test_other_formats_and_absent_files_are_errors(tmp_path: Path) -> None:
    Image.new("RGB", (2, 2)).save(tmp_path / "a.gif")
    with pytest.raises(DataError, match="not a JPEG, PNG or WebP"):
        images.load_image(tmp_path / "a.gif")
    with pytest.raises(DataError, match="no picture at"):
        images.load_image(tmp_path / "b.png")


@pytest.mark.parametrize("form", ["JPEG", "PNG", "WEBP"])
@pytest.mark.parametrize("turn", range(1, 9))
def test_a_turned_photograph_comes_out_upright(form: str, turn: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = turn
    data = _encode(form, exif=exif)
    expected = ImageOps.exif_transpose(Image.open(io.BytesIO(data))).convert("RGB")
    assert np.array_equal(_pixels(data), np.asarray(expected))
    assert (_pixels(data).shape[:2] == (12, 8)) == (turn > 4)


@st.composite
def _exif(draw: st.DrawFn) -> bytes:
    """A directory as cameras write it, gone wrong: any type, count and value of any tag."""
    order = draw(st.sampled_from("<>"))
    tags = st.sampled_from([0x010F, 0x0112, 0x011A, 0x011B, 0x0128, 0x8769, 0x8825, 0xA005])
    number = st.sampled_from([0, 1, 1, 2, 5, 1000, 2**31])
    value = st.one_of(
        st.binary(min_size=4, max_size=4),
        st.integers(0, 90).map(lambda n: struct.pack(order + "I", n)),
    )
    row = st.tuples(tags, st.integers(0, 14), number, value)
    rows = [(0x0112, 3, 1, struct.pack(order + "HH", 6, 0)), *draw(st.lists(row, max_size=4))]
    rows = draw(st.permutations(rows))
    body = b"".join(
        struct.pack(order + "HHI", tag, kind, n) + value for tag, kind, n, value in rows
    )
    head = (b"II*\0" if order == "<" else b"MM\0*") + struct.pack(order + "IH", 8, len(rows))
    return head + body + draw(st.binary(max_size=40))


@pytest.mark.parametrize("form", ["JPEG", "PNG", "WEBP"])
@settings(max_examples=40, deadline=None, derandomize=True)
@given(exif=st.one_of(_exif(), st.binary(max_size=60)))
def test_what_else_exif_says_costs_no_picture(form: str, exif: bytes) -> None:
    """A rational camera maker or a text as resolution was a traceback, or a damaged picture."""
    data = _encode(form)
    turn = orientation(exif)
    found, plain = _pixels(_insert(data, form, exif)), _pixels(data)
    if turn == 6:
        plain = np.rot90(plain, -1)
    assert turn not in (1, 6) or np.array_equal(found, plain)


@settings(max_examples=100, deadline=None, derandomize=True)
@given(exif=_exif())
def test_the_orientation_is_the_one_that_pillow_reads(exif: bytes) -> None:
    """Where it reads to the end: at a broken entry it gives up those behind it."""
    theirs = Image.Exif()
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        theirs.load(exif)
        turn = theirs.get(0x0112)
    if not told and (turn is None or isinstance(turn, int)):
        assert orientation(exif) == (turn if turn in range(1, 9) else 1)


JUNK = bytes(range(7))


@pytest.mark.parametrize("marker", [0xE0, 0xE1, 0xE2, 0xED, 0xEE, 0xFE])
@pytest.mark.parametrize(
    "body",
    [
        b"",
        JUNK,
        b"JFIF\0",
        b"Adobe",
        b"ICC_PROFILE\0\1",
        b"MPF\0II*\0" + JUNK,
        b"Exif\0\0" + JUNK,
        b"Photoshop 3.0\x008BIM" + JUNK,
        b"http://ns.adobe.com/xap/1.0/\0<x",
    ],
)
def test_broken_segments_of_a_jpeg_cost_no_picture(marker: int, body: bytes) -> None:
    data = _encode("JPEG")
    soiled = data[:2] + bytes([0xFF, marker]) + struct.pack(">H", len(body) + 2) + body + data[2:]
    assert np.array_equal(_pixels(soiled), _pixels(data))


@pytest.mark.parametrize(
    "kind", [b"gAMA", b"cHRM", b"iCCP", b"iTXt", b"zTXt", b"tEXt", b"pHYs", b"acTL", b"xxXx"]
)
@pytest.mark.parametrize("place", [33, -12])
def test_broken_chunks_of_a_png_cost_no_picture(kind: bytes, place: int) -> None:
    data = _encode("PNG")
    for chunk in (_chunk(kind, b""), _chunk(kind, JUNK), _chunk(kind, JUNK)[:-1] + b"?"):
        assert np.array_equal(_pixels(data[:place] + chunk + data[place:]), _pixels(data))


@pytest.mark.parametrize(
    ("form", "mode"),
    [("JPEG", "CMYK"), ("JPEG", "L"), ("PNG", "P"), ("PNG", "1"), ("PNG", "LA"), ("WEBP", "RGBA")],
)
def test_nothing_that_colours_need_is_left_out(form: str, mode: str) -> None:
    """Pillow's own reading, with all metadata in the file, gives the same pixels."""
    file = io.BytesIO()
    picture = Image.open(io.BytesIO(_encode("PNG"))).convert(mode)
    more = {"icc_profile": b"profile", "exif": Image.Exif(), "xmp": b"<x/>", "dpi": (72, 72)}
    picture.save(file, form, transparency=3, **more) if mode == "P" else picture.save(
        file, form, **more
    )
    expected = images.to_rgb(Image.open(io.BytesIO(file.getvalue())))
    assert np.array_equal(_pixels(file.getvalue()), np.asarray(expected))


def test_an_animation_gives_its_first_picture() -> None:
    frames = [Image.new("RGB", (4, 4), colour) for colour in ("red", "blue")]
    for form in ("PNG", "WEBP"):
        file = io.BytesIO()
        frames[0].save(file, form, save_all=True, append_images=frames[1:], lossless=True)
        assert _pixels(file.getvalue())[0, 0].tolist() == [255, 0, 0]


def test_tensors_and_pictures_convert_back_and_forth_exactly() -> None:
    every = torch.arange(256, dtype=torch.uint8)
    assert torch.equal(images.to_uint8(images.from_uint8(every)), every)
    assert images.from_uint8(every).aminmax() == (-1, 1)
    picture = Image.fromarray(every.repeat(4).reshape(16, 64).numpy()).convert("RGB")
    assert np.array_equal(np.asarray(images.to_pil(images.to_tensor(picture))), np.asarray(picture))
    assert images.to_tensor(picture).shape == (3, 16, 64)


def test_padding_centres_on_white() -> None:
    square = images.pad_to_square(Image.new("RGB", (6, 2)))
    assert square.size == (6, 6)
    column = [square.getpixel((3, y)) for y in range(6)]
    assert column == [(255,) * 3] * 2 + [(0,) * 3] * 2 + [(255,) * 3] * 2


def test_psnr_and_gradient_energy_match_their_formulas() -> None:
    a = torch.zeros(2, 3, 8, 8)
    b = a + torch.tensor([0.2, 0.02]).view(2, 1, 1, 1)
    torch.testing.assert_close(images.psnr(a, b), torch.tensor([20.0, 40.0]))
    ramp = torch.arange(8.0).expand(1, 3, 8, 8) / 4
    torch.testing.assert_close(images.gradient_energy(ramp), torch.tensor([1 / 16]))


def test_resize_keeps_the_mean_and_a_grid_holds_every_picture() -> None:
    x = torch.rand(2, 3, 32, 32)
    small = images.resize(x, 8)
    assert small.shape == (2, 3, 8, 8)
    torch.testing.assert_close(small.mean(), x.mean(), atol=0.02, rtol=0)
    assert images.resize(x, 32) is x
    pictures = [Image.new("RGB", (10, 10), (k, 0, 0)) for k in range(5)]
    sheet = images.grid(pictures, 3, ["a caption that is long"] * 5)
    assert sheet.size == (3 * 14 + 4, 2 * 44 + 4)
    assert sheet.getpixel((4 + 14 + 5, 4 + 44 + 5)) == (4, 0, 0)


def _steps(width: int, height: int) -> Image.Image:
    """Column k has the red level k."""
    levels = np.zeros((height, width, 3), np.uint8)
    levels[:, :, 0] = np.arange(width)
    return Image.fromarray(levels)


def test_a_photograph_is_cut_where_it_would_be_padded(tmp_path: Path) -> None:
    """Padding was the only way to make a square: decoders learned letterboxes."""
    _steps(90, 30).save(tmp_path / "a.png")
    read = {how: images.Fit(30, how).read(tmp_path / "a.png") for how in ("pad", "crop", "middle")}
    assert [tuple(x.shape) for x in read.values()] == [(3, 30, 30), (3, 30, 90), (3, 30, 30)]
    assert all(x.dtype == torch.uint8 for x in read.values())
    assert (read["pad"][:, 0] == 255).all() and not (read["crop"][1] == 255).any()
    assert read["middle"][0, 0].tolist() == list(range(30, 60))
    places = {
        int(images.crop(read["crop"], 30, torch.Generator().manual_seed(k))[0, 0, 0])
        for k in range(200)
    }
    assert min(places) <= 2 and max(places) >= 58 and len(places) > 40
    tall = images.fit_shorter(_steps(40, 100), 20)
    assert tall.size == (20, 50)


def test_a_ribbon_does_not_grow_beyond_the_limit() -> None:
    with pytest.raises(DataError, match="resized to 64 has more pixels than the limit"):
        images.fit_shorter(Image.new("RGB", (20_000, 1)), 64)


def test_a_narrow_picture_is_refused_by_its_header(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Small pictures were enlarged, so that upsamplers learned blur."""
    _steps(90, 30).save(tmp_path / "a.png")
    assert images.Fit(64, min_side=30).read(tmp_path / "a.png").shape == (3, 64, 64)
    monkeypatch.setattr(ImageFile.ImageFile, "load", lambda *_: pytest.fail("decoded"))
    with pytest.raises(DataError, match=r"a\.png is 90 x 30, narrower than data.min_side = 31"):
        images.Fit(64, min_side=31).read(tmp_path / "a.png")


def test_running_out_of_descriptors_is_no_damage(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def opened(*_: object) -> None:
        raise OSError(errno.EMFILE, "Too many open files")

    Image.new("RGB", (2, 2)).save(tmp_path / "a.png")
    monkeypatch.setattr(Path, "open", opened)
    with pytest.raises(ConfigError, match="ulimit -n"):
        images.load_image(tmp_path / "a.png")
