"""Windows of a series, pictures of a size: what a release's input schema asks for."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from device_agent.inputs import MAX_PIXELS, InputMaker
from device_agent.pictures import resize, with_channels
from device_agent.windows import Windows
from shoal.errors import ModelError
from shoal.v1.release_pb2 import RESIZE_AREA, RESIZE_NEAREST, InputSchema

pytestmark = pytest.mark.device

SMALL = st.integers(1, 9)
# Readings between two resets.
RUNS = st.lists(st.integers(0, 40), max_size=4)


def floats(*values):
    return np.array(values, dtype=np.float32)


@given(SMALL, SMALL, RUNS)
def test_every_window_is_right_and_none_spans_a_reset(window, stride, runs):
    """Pins content, order and number of all windows, overlapping, adjacent or apart, against slices of each run."""
    windows, found, expected = Windows(window, stride), [], []
    for number, length in enumerate(runs):
        rows = [floats(number, at) for at in range(length)]
        windows.reset()
        found += [made for made in map(windows.add, rows) if made is not None]
        expected += [rows[at : at + window] for at in range(0, length - window + 1, stride)]
    assert [made.tolist() for made in found] == [np.array(rows).tolist() for rows in expected]


def test_window_keeps_what_its_source_overwrites():
    """Pins that a source may use one buffer for all its readings."""
    windows, buffer = Windows(2, 2), floats(1)
    assert windows.add(buffer) is None
    buffer[0] = 2
    assert windows.add(buffer).tolist() == [[1], [2]]


@pytest.mark.parametrize(("window", "stride"), [(0, 1), (1, 0)])
def test_windows_of_nothing_are_a_mistake_of_ours(window, stride):
    """Pins that neither number may be 0."""
    with pytest.raises(ValueError, match="must be positive"):
        Windows(window, stride)


def made(schema, readings):
    maker = InputMaker(schema)
    return [value if value is None else value.tolist() for value in map(maker.add, readings)]


def test_schema_without_a_window_passes_readings_on():
    """Pins that a plain release changes nothing, whatever the shape of the reading."""
    reading = floats(1, 2, 3)
    assert InputMaker(InputSchema(shape=[2])).add(reading) is reading


def test_windows_have_the_shape_of_the_schema():
    """Pins that readings become (time, channel), and windows do not overlap unless told to."""
    schema = InputSchema(shape=[2, 2], window=2)
    readings = [floats(at, -at) for at in range(5)]
    assert made(schema, readings) == [None, [[0, 0], [1, -1]], None, [[2, -2], [3, -3]], None]
    schema.stride = 1
    assert [value is None for value in made(schema, readings)] == [True, False, False, False, False]


def test_stride_alone_takes_every_nth_reading():
    """Pins that a stride without a window thins the readings."""
    assert made(InputSchema(shape=[1], stride=2), [floats(at) for at in range(4)]) == [[0], None, [2], None]


def test_reading_of_another_size_passes_alone_and_begins_anew():
    """Pins that a reading which no window can hold reaches the gateway as it is, and that no window spans it."""
    readings = [floats(1, 1), floats(9), floats(2, 2), floats(3, 3)]
    assert made(InputSchema(shape=[4], window=2), readings) == [None, [9], None, [2, 2, 3, 3]]


@pytest.mark.parametrize(
    ("schema", "message"),
    [
        (InputSchema(shape=[5], window=2), "5 values are not a window of 2"),
        (InputSchema(shape=[0], window=2), "0 values are not a window of 2"),
        (InputSchema(shape=[1 << 20], window=2), "does not fit a message"),
        (InputSchema(shape=[4, 4], window=2, resize=RESIZE_AREA), "both a window and a picture"),
        (InputSchema(shape=[4, 4, 2], resize=RESIZE_AREA), r"no picture can be resized to \[4, 4, 2\]"),
        (InputSchema(shape=[4], resize=RESIZE_AREA), r"no picture can be resized to \[4\]"),
        (InputSchema(shape=[4, 0], resize=RESIZE_AREA), r"no picture can be resized to \[4, 0\]"),
        (InputSchema(shape=[4, 4], resize=9), "unknown way 9"),
    ],
)
def test_schema_that_contradicts_itself_is_refused(schema, message):
    """Pins that such a release is never switched to."""
    with pytest.raises(ModelError, match=message):
        InputMaker(schema)


@given(SMALL, SMALL, SMALL, SMALL, st.booleans())
def test_picture_grown_and_shrunk_by_whole_factors_is_itself(height, width, down, across, nearest):
    """Pins both ways against each other: repeated pixels, averaged again, are the picture that they came from."""
    picture = np.random.default_rng(3).random((height, width, 3), dtype=np.float32)
    grown = resize(picture, height * down, width * across, nearest=nearest)
    np.testing.assert_allclose(grown, picture.repeat(down, axis=0).repeat(across, axis=1), rtol=1e-5)
    np.testing.assert_allclose(resize(grown, height, width, nearest=nearest), picture, rtol=1e-5)


@given(SMALL, SMALL, SMALL, SMALL)
def test_mean_of_a_picture_survives_any_size(height, width, new_height, new_width):
    """Pins that the shares of all pixels are right where edges cut through them."""
    picture = np.random.default_rng(5).random((height, width, 1), dtype=np.float32)
    sized = resize(picture, new_height, new_width)
    assert sized.shape == (new_height, new_width, 1)
    assert sized.dtype == np.float32
    assert sized.mean() == pytest.approx(picture.mean(), rel=1e-4)


def test_edges_cut_pixels_in_parts():
    """Pins one picture by hand: three pixels become two, the middle one shared."""
    assert resize(floats(0, 3, 9).reshape(1, 3, 1), 1, 2).ravel() == pytest.approx([1, 7])
    assert resize(floats(0, 3, 9).reshape(1, 3, 1), 1, 2, nearest=True).ravel().tolist() == [0, 9]


def test_channels_are_weighed_or_repeated():
    """Pins grey of a colour, colour of a grey, and that anything else is a mistake."""
    assert with_channels(floats(10, 20, 30).reshape(1, 1, 3), 1).ravel() == pytest.approx([18.15])
    assert with_channels(floats(7).reshape(1, 1, 1), 3).ravel().tolist() == [7, 7, 7]
    with pytest.raises(ValueError, match="2 channels, expected 3"):
        with_channels(np.zeros((1, 1, 2), np.float32), 3)


@pytest.mark.parametrize("resize_as", [RESIZE_AREA, RESIZE_NEAREST])
@pytest.mark.parametrize(("shape", "reading"), [((2, 2), (4, 4, 3)), ((2, 2, 3), (6, 4)), ((3, 1, 1), (5, 2, 1))])
def test_pictures_come_to_the_shape_of_the_schema(resize_as, shape, reading):
    """Pins size and channels at once, with and without a last dimension."""
    maker = InputMaker(InputSchema(shape=shape, resize=resize_as))
    picture = maker.add(np.full(reading, 50, np.float32))
    assert picture.shape == shape
    assert picture == pytest.approx(np.full(shape, 50))


@pytest.mark.parametrize("shape", [(5,), (0, 4), (2, 2, 2), (1, MAX_PIXELS + 1)])
def test_what_is_no_picture_passes_as_it_is(shape):
    """Pins that the gateway judges what cannot be resized."""
    reading = np.zeros(shape, np.float32)
    assert InputMaker(InputSchema(shape=[2, 2], resize=RESIZE_AREA)).add(reading) is reading
