"""Pictures: our own decoder against Pillow, directories, and what the camera's thread hands over."""

import os
import shutil
import struct
import sys
import zlib
from io import BytesIO

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from device_agent import png
from device_agent.sources.images import Framing, ImagesSettings, ImagesSource
from shoal.errors import ConfigError, PayloadError

pytestmark = pytest.mark.device


def pixels_of(height=5, width=7, channels=3):
    return np.random.default_rng(4).integers(0, 256, (height, width, channels), dtype=np.uint8)


def pnm(pixels):
    height, width, channels = pixels.shape
    return f"P{5 if channels == 1 else 6}\n# made here\n{width} {height}\n255\n".encode() + pixels.tobytes()


@pytest.fixture
def without_opencv(monkeypatch):
    monkeypatch.setitem(sys.modules, "cv2", None)


@pytest.mark.parametrize("mode", ["L", "RGB", "LA", "RGBA", "P"])
@pytest.mark.parametrize("kind", ["noise", "slope"])
def test_png_is_read_as_pillow_reads_it(mode, kind):
    """Pins every colour type against another decoder."""
    image = pytest.importorskip("PIL.Image", reason="left out: needs Pillow")
    noise = pixels_of(40, 33)
    slope = (
        np.add.outer(np.arange(40) * 3, np.arange(33) * 2)[..., None].repeat(3, axis=2).astype(np.uint8) + noise // 64
    )
    picture = image.fromarray(noise if kind == "noise" else slope).convert(mode)
    file = BytesIO()
    picture.save(file, "PNG")
    expected = np.asarray(picture.convert("L" if mode in ("L", "LA") else "RGB")).reshape(40, 33, -1)
    np.testing.assert_array_equal(png.decode(file.getvalue()), expected)


def filtered_png(pixels, kind):
    """A PNG whose rows all have one filter; a filter's guesses are made of pixels, so numpy makes all at once."""
    height, width, depth = pixels.shape
    padded = np.pad(pixels.astype(int), ((1, 0), (1, 0), (0, 0)))
    left, up, corner = padded[1:, :-1], padded[:-1, 1:], padded[:-1, :-1]
    choices = np.stack([left, up, corner])
    paeth = np.take_along_axis(choices, np.abs(left + up - corner - choices).argmin(axis=0)[None], axis=0)[0]
    guess = [0, left, up, (left + up) // 2, paeth][kind]
    rows = ((pixels.astype(int) - guess) % 256).astype(np.uint8).reshape(height, -1)
    raw = np.insert(rows, 0, kind, axis=1).tobytes()
    header = struct.pack(">IIBBBBB", width, height, 8, 2 if depth == 3 else 0, 0, 0, 0)
    chunks = ((b"IHDR", header), (b"IDAT", zlib.compress(raw)), (b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunk(name, body) for name, body in chunks)


def chunk(name, body):
    return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))


@pytest.mark.parametrize("kind", range(5))
@pytest.mark.parametrize("channels", [1, 3])
def test_every_filter_is_undone(kind, channels):
    """Pins the five filters, each alone, in grey and in colour."""
    pixels = pixels_of(9, 11, channels)
    np.testing.assert_array_equal(png.decode(filtered_png(pixels, kind)), pixels)


def test_unknown_filter_is_refused():
    """Pins a number that no version of the format has."""
    broken = filtered_png(pixels_of(), 4)
    raw = b"\x07" + bytes(5 * (7 * 3 + 1) - 1)
    with pytest.raises(PayloadError, match="png: filter 7 in row 1"):
        png.decode(broken[: broken.index(b"IDAT") - 4] + chunk(b"IDAT", zlib.compress(raw)))


def test_picture_beyond_the_bound_is_refused_before_it_is_inflated():
    """Pins what a small file may claim and contain: zeros without end cost no memory."""
    huge = filtered_png(np.zeros((600, 600, 3), np.uint8), 0)
    with pytest.raises(PayloadError, match="png: 600x600, expected 8 bits each of at most 1048576 bytes"):
        png.decode(huge)


@pytest.mark.parametrize("channels", [1, 3])
def test_pnm_is_read_as_it_is_written(channels):
    """Pins the plainest format there is, with a comment in its header."""
    pixels = pixels_of(channels=channels)
    np.testing.assert_array_equal(png.decode(pnm(pixels)), pixels)


@pytest.fixture(scope="module")
def whole_png():
    image = pytest.importorskip("PIL.Image", reason="left out: needs Pillow")
    file = BytesIO()
    image.fromarray(pixels_of()).save(file, "PNG")
    return file.getvalue()


@given(data=st.data())
def test_broken_png_is_refused_and_never_half_read(whole_png, data):
    """Pins one byte changed or the end missing, anywhere: refused, no PNG any more, or, past all pixels, the same."""
    at = data.draw(st.integers(0, len(whole_png) - 1))
    cut = data.draw(st.booleans())
    broken = whole_png[:at] if cut else whole_png[:at] + bytes([whole_png[at] ^ 0x41]) + whole_png[at + 1 :]
    try:
        found = png.decode(broken)
    except PayloadError:
        return
    assert found is None or np.array_equal(found, pixels_of())


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"P5 2 2 255\nabc", "pnm: 2x2 to 255"),
        (b"P5 2 2 65535\nabcdefgh", "pnm: 2x2 to 65535"),
        (b"P5 99999 99999 255\nabc", "pnm: 99999x99999"),
        (b"P6 0 2 255\n", "pnm: 0x2"),
    ],
)
def test_bad_pnm_is_refused(data, message):
    """Pins sizes that do not fit what is there."""
    with pytest.raises(PayloadError, match=message):
        png.decode(data)


def test_other_bytes_are_no_picture_of_these_kinds():
    """Pins what is left to OpenCV."""
    assert png.decode(b"\xff\xd8\xff\xe0 JFIF") is None
    assert png.decode(b"") is None


def write_all(folder, **files):
    folder.mkdir(exist_ok=True)
    for name, data in files.items():
        (folder / name.replace("_", ".")).write_bytes(data)
    return folder


def serve(feed, path, until=None, **settings):
    source = ImagesSource(ImagesSettings(path=str(path), rate_hz=100.0, **settings))
    feed.serve(source, until or (lambda: feed.is_ended))


def test_directory_is_read_in_order_without_a_library(tmp_path, feed, without_opencv):
    """Pins shape, range and names, and that what does not match the pattern is left alone."""
    pixels = pixels_of()
    folder = write_all(tmp_path / "in", a_ppm=pnm(pixels), b_ppm=pnm(pixels[:, :, ::-1]), c_txt=b"no picture")
    serve(feed, folder, pattern="*.ppm")
    assert feed.references == ["a.ppm", "b.ppm"]
    np.testing.assert_array_equal(feed.readings[0].values, pixels)
    assert feed.readings[0].values.dtype == np.float32


def test_single_file_is_read_once(tmp_path, feed, without_opencv):
    """Pins a path that is a file."""
    write_all(tmp_path, one_pgm=pnm(pixels_of(channels=1)))
    serve(feed, tmp_path / "one.pgm")
    assert feed.heard == ["one.pgm", "end"]


def test_pictures_are_framed_before_anybody_sees_them(tmp_path, feed, without_opencv):
    """Pins size and grey of the settings, without which a picture may not fit a message."""
    write_all(tmp_path / "in", a_ppm=pnm(np.full((8, 6, 3), 90, np.uint8)))
    serve(feed, tmp_path / "in", size=(4, 3), grey=True)
    assert feed.readings[0].values == pytest.approx(np.full((4, 3, 1), 90))


def test_bad_file_is_named_and_the_next_is_read(tmp_path, feed, without_opencv):
    """Pins that each broken picture costs itself alone."""
    write_all(tmp_path / "in", a_png=b"\x89PNG\r\n\x1a\n", b_jpg=b"\xff\xd8\xff", c_pgm=pnm(pixels_of(channels=1)))
    serve(feed, tmp_path / "in")
    assert feed.heard == ["refused", "refused", "c.pgm", "end"]
    assert feed.refused[0] == "a.png: png: broken or cut short"
    assert feed.refused[1].startswith("b.jpg: neither PNG nor PNM")
    assert "shoal[camera]" in feed.refused[1]


def test_followed_directory_gives_what_comes_later(tmp_path, feed, without_opencv):
    """Pins that a file moved in is read whatever its own time is, each once, and that the source does not end."""
    folder = write_all(tmp_path / "in", a_pgm=pnm(pixels_of(channels=1)))
    late = write_all(tmp_path / "elsewhere", old_pgm=pnm(pixels_of(channels=1))) / "old.pgm"
    os.utime(late, (1, 1))
    source = ImagesSource(ImagesSettings(path=str(folder), rate_hz=100.0, follow=True))
    source.start(feed)
    feed.until(lambda: feed.readings)
    shutil.move(late, folder / "old.pgm")
    feed.until(lambda: len(feed.readings) > 1)
    source.close()
    assert feed.heard == ["a.pgm", "old.pgm"]


def test_missing_directory_is_told_at_the_start(tmp_path, feed):
    """Pins the operator's line."""
    with pytest.raises(ConfigError, match=r"source .*gone: No such file or directory"):
        serve(feed, tmp_path / "gone")


def test_huge_picture_is_refused():
    """Pins the bound for what OpenCV decodes."""
    with pytest.raises(PayloadError, match="size: 5000x1000, at most 4194304 pixels"):
        Framing().frame(np.zeros((1000, 5000, 1), np.uint8))


def test_opencv_reads_what_we_do_not_and_agrees_where_we_do(tmp_path, feed):
    """Pins JPEG, and the same values of a PNG by either way, colours in their order, grey as one channel."""
    pytest.importorskip("cv2", reason="left out: needs shoal[camera]")
    image = pytest.importorskip("PIL.Image", reason="left out: needs Pillow")
    folder = tmp_path / "in"
    folder.mkdir()
    pixels = np.full((8, 8, 3), (200, 100, 10), np.uint8)
    image.fromarray(pixels).save(folder / "a.jpg", quality=100)
    image.fromarray(pixels).save(folder / "b.png")
    image.fromarray(pixels[:, :, 0]).save(folder / "c.png")
    (folder / "d.png").write_bytes(b"")
    serve(feed, folder)
    assert feed.heard == ["a.jpg", "b.png", "c.png", "refused", "end"]
    jpeg, colour, grey = (reading.values for reading in feed.readings)
    assert np.abs(jpeg - pixels).max() < 8
    np.testing.assert_array_equal(colour, png.decode((folder / "b.png").read_bytes()))
    np.testing.assert_array_equal(grey, png.decode((folder / "c.png").read_bytes()))
