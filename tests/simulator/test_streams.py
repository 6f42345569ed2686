import contextlib
from itertools import islice

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from shoal.errors import PayloadError
from simulator.datasets import DataSet
from simulator.drift import MAX_PIXEL, Drift
from simulator.streams import CameraStream, FleetKind, SensorStream, Share, Truth, open_stream

SEEDS = st.integers(0, 2**63)
DEVICES = st.from_regex(r"[a-z0-9][a-z0-9_-]{0,20}", fullmatch=True)


def small_shuttle():
    return DataSet(
        name="shuttle",
        values=np.arange(9 * 60, dtype=np.float32).reshape(60, 9),
        labels=np.arange(60, dtype=np.int64) % 2,
        stream=np.arange(10, 60, dtype=np.int64),
        held_out=np.zeros(60, dtype=np.bool_),
    )


def small_digits():
    rng = np.random.default_rng(0)
    return DataSet(
        name="digits",
        values=rng.uniform(0, MAX_PIXEL, (12, 8, 8, 1)).astype(np.float32),
        labels=np.arange(12, dtype=np.int64) % 10,
        stream=np.arange(5, 12, dtype=np.int64),
        held_out=np.arange(12) >= 9,
    )


def read_all(stream):
    return list(iter(stream.next, None))


def same(first, second):
    return (
        first.reference == second.reference
        and first.drifted == second.drifted
        and np.array_equal(first.values, second.values)
    )


@given(devices=st.integers(1, 70), max_rows=st.one_of(st.none(), st.integers(0, 60)))
def test_every_streamed_row_goes_to_exactly_one_sensor(devices, max_rows):
    """Pins that the shares part the flight: nothing twice, nothing left out, each in order."""
    data = small_shuttle()
    shares = [read_all(SensorStream(data, Share(i, devices), max_rows=max_rows)) for i in range(devices)]
    rows = [[reading.row for reading in share] for share in shares]
    assert sorted(row for share in rows for row in share) == data.stream[:max_rows].tolist()
    assert all(share == sorted(share) for share in rows)


def test_sensors_take_turns(shuttle_data):
    """Pins which row goes where, so that a report of one run can be read beside another's."""
    stream = SensorStream(shuttle_data, Share(5, 12))
    assert len(stream) == 3091
    first, second = stream.next(), stream.next(drifted=True)
    assert (first.reference, second.reference) == ("shuttle/12005", "shuttle/12017")
    assert (first.values.shape, first.values.dtype) == ((9,), np.float32)
    assert not second.drifted
    assert not first.held_out


def test_sensor_stream_stays_at_its_end():
    """Pins that a stream that is over does not begin again."""
    stream = SensorStream(small_shuttle(), Share(0, 1))
    assert len(read_all(stream)) == len(stream) == 50
    assert stream.next() is None


@given(start=st.integers(0, 60))
def test_sensor_stream_resumes_where_it_was(start):
    """Pins that a restarted device neither repeats nor skips a row."""
    whole = read_all(SensorStream(small_shuttle(), Share(1, 3)))
    rest = read_all(SensorStream(small_shuttle(), Share(1, 3), start=start))
    assert [r.reference for r in rest] == [r.reference for r in whole[start:]]


@given(seed=SEEDS, device=DEVICES, drifted=st.lists(st.booleans(), max_size=20), start=st.integers(0, 20))
def test_camera_reading_depends_on_seed_device_ordinal_and_drift_alone(seed, device, drifted, start):
    """Pins that neither what was read before nor where the stream was opened changes a reading."""
    data = small_digits()
    whole = CameraStream(data, seed=seed, device=device)
    readings = [whole.next(drifted=flag) for flag in drifted]
    resumed = CameraStream(data, seed=seed, device=device, start=start)
    assert all(same(r, resumed.next(drifted=f)) for r, f in zip(readings[start:], drifted[start:], strict=True))
    flipped = CameraStream(data, seed=seed, device=device)
    assert [flipped.next(drifted=not flag).row for flag in drifted] == [r.row for r in readings]


@given(seed=SEEDS, device=DEVICES, rounds=st.integers(1, 4))
def test_each_round_shows_every_streamed_image_once(seed, device, rounds):
    """Pins that a camera sees all of its world before it sees any of it again."""
    data = small_digits()
    stream = CameraStream(data, seed=seed, device=device)
    for _ in range(rounds):
        assert sorted(stream.next().row for _ in range(len(data.stream))) == data.stream.tolist()


def test_seeds_devices_and_rounds_shuffle_differently(digits_data):
    """Pins that two cameras do not show the same images at the same time."""
    keys = [(7, "cam-1", 0), (8, "cam-1", 0), (7, "cam-2", 0), (7, "cam-1", 1097)]
    orders = {
        tuple(CameraStream(digits_data, seed=s, device=d, start=n + i).next().row for i in range(5)) for s, d, n in keys
    }
    assert len(orders) == len(keys)


def test_camera_references_are_unique_and_short(digits_data):
    """Pins that a reference names one reading of a device, within the schema's 64 bytes."""
    stream = CameraStream(digits_data, seed=7, device="cam-1", start=10**12)
    references = {stream.next().reference for _ in range(2500)}
    assert len(references) == 2500
    assert max(map(len, references)) <= 64


def test_drift_is_applied_only_when_told(digits_data):
    """Pins that clean readings are the data set's own images, and drifted ones are not."""
    clean, drifted = (CameraStream(digits_data, seed=7, device="cam-1").next(drifted=flag) for flag in (False, True))
    np.testing.assert_array_equal(clean.values, digits_data.values[clean.row])
    assert not np.array_equal(drifted.values, clean.values)
    assert (clean.drifted, drifted.drifted) == (False, True)
    assert drifted.values.shape == (8, 8, 1)


def test_same_image_drifts_differently_on_two_cameras():
    """Pins that jitter is the device's own."""
    data = small_digits()
    one = {
        device: {r.row: r.values for r in (stream.next(drifted=True) for _ in data.stream)}
        for device in ("cam-1", "cam-2")
        for stream in [CameraStream(data, seed=7, device=device)]
    }
    assert not any(np.array_equal(one["cam-1"][row], one["cam-2"][row]) for row in data.stream)


def test_same_image_drifts_differently_in_each_round():
    """Pins that jitter is the reading's own, so that no drifted image comes twice to the bit."""
    data = small_digits()
    stream = CameraStream(data, seed=7, device="cam-1")
    first, second = ({r.row: r.values for r in (stream.next(drifted=True) for _ in data.stream)} for _ in range(2))
    assert not any(np.array_equal(first[row], second[row]) for row in data.stream)


def test_stream_uses_the_drift_it_was_given():
    """Pins that the demo's drift settings reach the images."""
    stream = CameraStream(small_digits(), seed=7, device="cam-1", drift=Drift(strength=0))
    reading = stream.next(drifted=True)
    np.testing.assert_array_equal(reading.values, small_digits().values[reading.row])


@pytest.mark.parametrize("kind", list(FleetKind))
def test_truth_agrees_with_every_reading(kind, shuttle_data, digits_data):
    """Pins that the annotator's look-up gives what the stream knew."""
    data = shuttle_data if kind is FleetKind.SENSORS else digits_data
    truth = Truth([shuttle_data, digits_data])
    stream = open_stream(kind, data, seed=7, device="node-1", share=Share(0, 2))
    readings = list(islice(iter(stream.next, None), 1500))
    assert len(readings) == 1500
    assert [truth.label_of(r.reference) for r in readings] == [r.label for r in readings]
    assert [truth.is_held_out(r.reference) for r in readings] == [r.held_out for r in readings]
    assert {r.label for r in readings} == set(np.unique(data.labels))


@given(st.text(max_size=80))
def test_truth_survives_any_reference(reference):
    """Pins that a peer's string is answered or refused, never anything else."""
    with contextlib.suppress(PayloadError):
        Truth([small_digits()]).label_of(reference)


@pytest.mark.parametrize(
    "reference",
    ["", "digits", "digits/", "digits/12", "digits/-1", "digits/05", "digits/5/", "digits/5/x", "digits/5/1/1",
     "other/5", "digits/5\n", "digits/\u0665", " digits/5", "digits/1e0", "digits/99999999999999999999"],
)  # fmt: skip
def test_truth_refuses(reference):
    """Pins the grammar of references."""
    truth = Truth([small_digits()])
    for look_up in (truth.label_of, truth.is_held_out):
        with pytest.raises(PayloadError, match="names no row") as refused:
            look_up(reference)
        assert refused.value.field == "reference"


@pytest.mark.parametrize(("index", "devices"), [(-1, 3), (3, 3), (0, 0)])
def test_share_outside_the_fleet_is_refused(index, devices):
    """Pins that a miscounted fleet cannot lose rows silently."""
    with pytest.raises(ValueError, match="share"):
        Share(index, devices)
