"""PNG and PNM pictures without a library: what cameras' programs write, 8 bits deep and not interlaced.

Source: Portable Network Graphics (W3C, third edition), sections 5, 9 and 11; netpbm's pgm(5) and ppm(5).
"""

import re
import struct
import zlib

import numpy as np
from numpy.typing import NDArray

from shoal.errors import PayloadError

# 640x480 in colour: what is larger would hold up everything else for too long, see docs/devices.md.
MAX_PICTURE_BYTES = 1 << 20
_LIMITS = f"expected 8 bits each of at most {MAX_PICTURE_BYTES} bytes; with OpenCV (shoal[camera]) there may be more"
_SIGNATURE = b"\x89PNG\r\n\x1a\n"
# Colour type to bytes a pixel: grey, RGB, palette, grey and alpha, RGBA.
_DEPTHS = {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}
_PALETTE, _GREY_ALPHA, _RGB_ALPHA = 3, 4, 6
_CHUNK_FRAME = 12
_LARGEST = 255
_NONE, _SUB, _UP, _AVERAGE, _PAETH = range(5)
_PNM = re.compile(rb"P([56])\s+(?:#[^\n]*\n\s*)*(\d{1,5})\s+(\d{1,5})\s+(\d{1,5})\s")

Pixels = NDArray[np.uint8]


def decode(data: bytes) -> Pixels | None:
    """Decode to (height, width, 1 or 3), alpha dropped; None where it is neither PNG nor PNM.

    Raises:
        PayloadError: it is one, but broken, too large or of a sort that this does not read.
    """
    if data.startswith(_SIGNATURE):
        return _decode_png(data)
    header = _PNM.match(data)
    return None if header is None else _decode_pnm(data, header)


def _decode_pnm(data: bytes, header: re.Match[bytes]) -> Pixels:
    kind, width, height, largest = (int(group) for group in header.groups())
    channels = 3 if kind == 6 else 1  # noqa: PLR2004  the two kinds are P5 and P6
    size = width * height * channels
    if largest != _LARGEST or not 0 < size <= min(MAX_PICTURE_BYTES, len(data) - header.end()):
        raise PayloadError(f"{width}x{height} to {largest}, {_LIMITS}", field="pnm")
    return np.frombuffer(data, np.uint8, size, header.end()).reshape(height, width, channels)


def _decode_png(data: bytes) -> Pixels:
    try:
        chunks = _chunks(data)
        width, height, bits, colour, _, _, interlaced = struct.unpack(">IIBBBBB", chunks[b"IHDR"])
        depth = _DEPTHS.get(colour, 0)
        if bits != 8 or not depth or interlaced:  # noqa: PLR2004
            raise PayloadError(f"{bits} bits, colour type {colour}, interlaced {interlaced}", field="png")
        length = height * (width * depth + 1)
        if not 0 < width * height * depth <= MAX_PICTURE_BYTES:
            raise PayloadError(f"{width}x{height}, {_LIMITS}", field="png")
        raw = zlib.decompressobj().decompress(chunks[b"IDAT"], length)
        rows = np.frombuffer(raw, np.uint8).reshape(height, width * depth + 1)
        pixels = _unfilter(rows, depth).reshape(height, width, depth)
        if colour == _PALETTE:
            return np.frombuffer(chunks[b"PLTE"], np.uint8).reshape(-1, 3)[pixels[:, :, 0]]
    except (KeyError, IndexError, ValueError, struct.error, zlib.error) as exc:
        raise PayloadError("broken or cut short", field="png") from exc
    return pixels[:, :, : depth - 1] if colour in (_GREY_ALPHA, _RGB_ALPHA) else pixels


def _chunks(data: bytes) -> dict[bytes, bytes]:
    """Chunks by name; those of one name are joined, as IDAT is meant to be."""
    found: dict[bytes, list[bytes]] = {}
    at = len(_SIGNATURE)
    while at + _CHUNK_FRAME <= len(data):
        (length,) = struct.unpack_from(">I", data, at)
        name, body = data[at + 4 : at + 8], data[at + 8 : at + 8 + length]
        if struct.unpack_from(">I", data, at + 8 + length)[0] != zlib.crc32(name + body):
            raise PayloadError(f"wrong checksum of {name!r}", field="png")
        found.setdefault(name, []).append(body)
        at += _CHUNK_FRAME + length
    return {name: b"".join(bodies) for name, bodies in found.items()}


def _unfilter(rows: Pixels, depth: int) -> Pixels:
    """Undo the filter of each row, which its first byte names."""
    made = np.zeros((len(rows) + 1, rows.shape[1] - 1), np.uint8)
    for at, row in enumerate(rows, start=1):
        kind, line, above = int(row[0]), row[1:], made[at - 1]
        if kind == _NONE:
            made[at] = line
        elif kind == _SUB:
            made[at] = line.reshape(-1, depth).cumsum(axis=0, dtype=np.uint8).ravel()
        elif kind == _UP:
            made[at] = line + above
        elif kind in (_AVERAGE, _PAETH):
            made[at] = _predicted(line.tobytes(), above.tobytes(), depth, paeth=kind == _PAETH)
        else:
            raise PayloadError(f"filter {kind} in row {at}", field="png")
    return made[1:]


def _predicted(line: bytes, above: bytes, depth: int, *, paeth: bool) -> Pixels:
    """The two filters where each pixel needs the one before: no numpy can do these at once."""
    made = bytearray(depth) + bytearray(len(line))
    upper = bytes(depth) + above
    for at, value in enumerate(line):
        left, up, corner = made[at], upper[at + depth], upper[at]
        if paeth:
            # Distances of left + up - corner to each of the three; the first of the nearest wins.
            to_left, to_up, to_corner = abs(up - corner), abs(left - corner), abs(left + up - 2 * corner)
            guess = left if to_left <= to_up and to_left <= to_corner else up if to_up <= to_corner else corner
        else:
            guess = (left + up) // 2
        made[at + depth] = (value + guess) & 0xFF
    return np.frombuffer(bytes(made[depth:]), np.uint8)
