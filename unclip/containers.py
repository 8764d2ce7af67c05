"""JPEG, PNG and WebP files down to what their pixels need, and which way up they are.

Metadata say nothing about the pixels, and what is broken in them must not cost a picture: so they
never reach a decoder, and of EXIF only the orientation is read.
"""

from __future__ import annotations

import struct

PNG = b"\x89PNG\r\n\x1a\n"
WEBP_PIXELS = (b"VP8X", b"VP8 ", b"VP8L", b"ALPH", b"ANIM", b"ANMF")
# JPEG's application segments that a decoder takes colours from, with the least length of their data
JPEG_COLOURS = {0xE0: (b"JFIF\0", 14), 0xEE: (b"Adobe", 12)}
ORIENTATION = 0x0112
INTEGERS = {1: "B", 3: "H", 4: "I", 6: "b", 8: "h", 9: "i", 13: "I"}  # by EXIF's type


def bare(data: bytes) -> tuple[bytes, int]:
    """A file without its metadata, and EXIF's orientation (1 to 8, 1 is upright).

    What is neither JPEG, PNG nor WebP comes back as it is, as do the parts behind a broken header.
    """
    if data[:2] == b"\xff\xd8":
        return _bare_jpeg(data)
    if data[:8] == PNG:
        return _bare_png(data)
    if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        return _bare_webp(data)
    return data, 1


def orientation(exif: bytes) -> int:
    """Which way up a picture is, by its EXIF block; 1 where that is absent, odd or broken."""
    exif = exif.removeprefix(b"Exif\0\0")
    order = {b"II*\0": "<", b"MM\0*": ">"}.get(exif[:4])
    if order is None or len(exif) < 10:
        return 1
    (at,) = struct.unpack_from(order + "I", exif, 4)
    entries = exif[at + 2 :] if at + 2 <= len(exif) else b""
    count = struct.unpack_from(order + "H", exif, at)[0] if entries else 0
    value = 1
    for place in range(0, min(12 * count, len(entries) - 11), 12):
        tag, kind, number = struct.unpack_from(order + "HHI", entries, place)
        if tag == ORIENTATION and kind in INTEGERS and number == 1:
            (value,) = struct.unpack_from(order + INTEGERS[kind], entries, place + 8)
    return value if 1 <= value <= 8 else 1


def _bare_jpeg(data: bytes) -> tuple[bytes, int]:
    kept, turn, at = [data[:2]], 1, 2
    while data[at : at + 1] == b"\xff" and at + 4 <= len(data):
        marker = data[at + 1]
        if marker == 0xFF:  # padding
            at += 1
            continue
        end = at + 2 + int.from_bytes(data[at + 2 : at + 4], "big")
        if marker == 0xDA or end > len(data) or end < at + 4:  # the scan, or damage
            break
        body = data[at + 4 : end]
        if marker == 0xE1 and body.startswith(b"Exif\0\0") and turn == 1:
            turn = orientation(body)
        start, least = JPEG_COLOURS.get(marker, (b"", 0))
        colours = marker in JPEG_COLOURS and body.startswith(start) and len(body) >= least
        if colours or not (0xE0 <= marker <= 0xEF or marker == 0xFE):
            kept.append(data[at:end])
        at = end
    return b"".join([*kept, data[at:]]), turn


def _bare_png(data: bytes) -> tuple[bytes, int]:
    kept, turn, at = [PNG], 1, 8
    while at + 12 <= len(data):
        length, kind = int.from_bytes(data[at : at + 4], "big"), data[at + 4 : at + 8]
        end = at + 12 + length
        if kind == b"eXIf":
            turn = orientation(data[at + 8 : end - 4])
        if kind == b"tRNS" or not kind[:1].islower():  # a small letter: not needed for the pixels
            kept.append(data[at:end])
        at = end
    return b"".join([*kept, data[at:]]), turn


def _bare_webp(data: bytes) -> tuple[bytes, int]:
    kept, turn, at = [b"WEBP"], 1, 12
    while at + 8 <= len(data):
        kind, length = data[at : at + 4], int.from_bytes(data[at + 4 : at + 8], "little")
        end = at + 8 + length + length % 2
        chunk = bytearray(data[at:end])
        if kind == b"EXIF":
            turn = orientation(bytes(chunk[8:]))
        if kind == b"VP8X" and length:
            chunk[8] &= 0b11010011  # neither ICC nor EXIF nor XMP
        if kind in WEBP_PIXELS:
            kept.append(bytes(chunk))
        at = end
    body = b"".join(kept)
    return b"RIFF" + len(body).to_bytes(4, "little") + body, turn
