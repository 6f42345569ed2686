import numpy as np
import pytest

from device_agent.sources.csv_replay import CsvSettings, CsvSource
from shoal.codec import MAX_REFERENCE_BYTES
from shoal.errors import ConfigError

pytestmark = pytest.mark.device

READINGS = "temperature,note,vibration\n20.5,fine,0.1\n21.0,fine,-0.2\n1e3,hot,nan\n"


@pytest.fixture
def csv_file(tmp_path):
    """Write a file, text or bytes, and say where it is."""

    def write(content, name="readings.csv"):
        path = tmp_path / name
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return path

    return write


def source(path, columns, **settings):
    return CsvSource(CsvSettings(path=str(path), columns=columns, **settings))


def replayed(path, columns, **settings):
    return list(source(path, columns, **settings).readings())


def test_rows_are_replayed_in_the_order_of_the_columns_asked_for(csv_file):
    """Pins values, dtype and reference of every row, with columns picked and ordered by the settings."""
    readings = replayed(csv_file(READINGS), ["vibration", "temperature"])
    expected = np.array([[0.1, 20.5], [-0.2, 21.0], [np.nan, 1000.0]], np.float32)
    np.testing.assert_array_equal([reading.values for reading in readings], expected)
    assert {reading.values.dtype for reading in readings} == {np.dtype(np.float32)}
    assert [reading.reference for reading in readings] == ["readings:1", "readings:2", "readings:3"]


def test_readings_are_captured_when_they_are_read(csv_file, monkeypatch):
    """Pins Unix microseconds of the moment of the replay, not of the file."""
    monkeypatch.setattr("device_agent.sources.feed.time.time", lambda: 1_700_000_000.25)
    (reading, *_) = replayed(csv_file(READINGS), ["vibration"])
    assert reading.captured_at_us == 1_700_000_000_250_000


def test_published_file_is_replayed_whole(shared_data):
    """Pins a file that others made, of NAB, read to its last row."""
    path = shared_data / "sensor_nab" / "data" / "realKnownCause" / "ambient_temperature_system_failure.csv"
    readings = replayed(path, ["value"])
    assert len(readings) == len(path.read_text().splitlines()) - 1 > 7000
    assert all(np.isfinite(reading.values).all() for reading in readings)


@pytest.mark.parametrize(
    "content",
    [READINGS, "temperature,note,vibration\n", "temperature,note,vibration\n1,2,3,4,5\n"],
    ids=["rows", "no rows", "more cells than names"],
)
def test_missing_column_is_named_with_those_there_are(csv_file, content):
    """Pins the operator's line for a wrong column, before any row is read."""
    path = csv_file(content)
    with pytest.raises(ConfigError) as caught:
        next(source(path, ["temperature", "pressure"]).readings())
    assert str(caught.value) == f"source {path}: no column pressure; there are temperature, note, vibration"


def test_empty_file_has_no_columns(csv_file):
    """Pins that a file without a header is a mistake, not a source that has ended."""
    with pytest.raises(ConfigError, match="no column temperature; there are none"):
        replayed(csv_file(""), ["temperature"])


@pytest.mark.parametrize(("row", "cell"), [("1.0,x,broken", "'broken'"), ("1.0,x,", "'nothing'"), ("1.0", "'nothing'")])
def test_bad_cell_is_named_by_row_and_column(csv_file, row, cell):
    """Pins the operator's line for a cell that is no number, empty or missing; the rows before it are read."""
    path = csv_file(f"temperature,note,vibration\n1.0,x,2.0\n{row}\n3.0,x,4.0\n")
    readings = source(path, ["temperature", "vibration"]).readings()
    assert next(readings).reference == "readings:1"
    with pytest.raises(ConfigError) as caught:
        next(readings)
    assert str(caught.value) == f"source {path}, row 2, column vibration: {cell} is not a number"


def test_number_beyond_float32_is_infinite(csv_file):
    """Pins that a value too large travels as infinity, which the gateway refuses by name, without a warning here."""
    (reading,) = replayed(csv_file("a\n1e39\n"), ["a"])
    assert np.isinf(reading.values).all()


def test_missing_file_is_named(tmp_path):
    """Pins the operator's line for a wrong path."""
    with pytest.raises(ConfigError, match=r"source .*gone\.csv: No such file"):
        replayed(tmp_path / "gone.csv", ["a"])


@pytest.mark.parametrize(
    "content", [b"a\n\xff\xfe\n", b"a\n" + b"9" * 200_000 + b"\n"], ids=["no UTF-8", "one huge cell"]
)
def test_file_that_is_no_csv_is_an_error_of_the_operator(csv_file, content):
    """Pins that bytes which cannot be read as a table end in one line too."""
    with pytest.raises(ConfigError, match=r"source .*readings\.csv: "):
        replayed(csv_file(content), ["a"])


@pytest.mark.parametrize("stem", ["a" * 80, "温度" * 25, "é" * 60])
def test_reference_of_a_long_name_keeps_to_the_contract(csv_file, stem):
    """Pins that a reference is cut by bytes: the gateway refuses one that is longer, for ever."""
    (reading,) = replayed(csv_file("a\n1\n", f"{stem}.csv"), ["a"])
    name, _, row = reading.reference.rpartition(":")
    assert row == "1"
    assert name
    assert stem.startswith(name)
    assert len(reading.reference.encode()) <= MAX_REFERENCE_BYTES - 10


def test_file_without_a_header_is_read_by_number(csv_file):
    """Pins columns counted from 1, another delimiter, and that the first row is data."""
    readings = replayed(csv_file("1;x;2\n3;y;4\n"), ["3", "1"], header=False, delimiter=";")
    assert [reading.values.tolist() for reading in readings] == [[2, 1], [4, 3]]
    with pytest.raises(ConfigError, match="column 0, a; without a header they are 1, 2"):
        replayed(csv_file("1\n"), ["0", "1", "a"], header=False)


def test_source_ends_with_its_file(csv_file, feed):
    """Pins what an agent hears that runs until dry."""
    feed.serve(source(csv_file(READINGS), ["temperature"], rate_hz=1e6), until=lambda: feed.is_ended)
    assert feed.references == ["readings:1", "readings:2", "readings:3"]


def test_repeated_file_starts_again_after_a_gap(csv_file, feed):
    """Pins `repeat`: the same rows again, and no window over the seam."""
    feed.serve(source(csv_file(READINGS), ["temperature"], rate_hz=1e6, repeat=True), until=lambda: len(feed.heard) > 6)
    assert feed.heard[:6] == ["readings:1", "readings:2", "readings:3", "gap", "readings:1", "readings:2"]


def test_repeated_file_without_rows_ends(csv_file, feed):
    """Pins that nothing is not repeated for ever."""
    feed.serve(source(csv_file("a\n"), ["a"], repeat=True), until=lambda: feed.is_ended)
    assert feed.heard == ["end"]


def test_high_rates_are_kept_in_bursts(csv_file, feed):
    """Pins that 10,000 readings a second need no 10,000 rounds of the loop: a hundred in each of a hundred."""
    rounds = []
    feed.loop.on_idle(rounds.append)
    path = csv_file("a\n" + "1\n" * 1000)
    feed.serve(source(path, ["a"], rate_hz=10_000.0), until=lambda: feed.is_ended)
    assert len(feed.readings) == 1000
    assert len(rounds) < 100
