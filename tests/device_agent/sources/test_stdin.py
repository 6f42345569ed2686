import os
import tempfile

import pytest

from device_agent.sources.mapping import MAX_INPUT_BYTES
from device_agent.sources.stdin import StdinSettings, StdinSource
from shoal.errors import ConfigError

pytestmark = pytest.mark.device

PAST_BOUND = b"1" * (MAX_INPUT_BYTES * 3)


@pytest.fixture
def pipe():
    """A pipe: what to read from, and a way to write to it and to close that end."""
    reader, writer = os.pipe()
    ends = {reader, writer}

    def write(data):
        os.write(writer, data)

    def close():
        os.close(writer)
        ends.discard(writer)

    write.close = close
    yield reader, write
    for end in ends:
        os.close(end)


def test_lines_are_read_as_they_come(pipe, feed):
    """Pins lines cut anywhere, empty ones, the last one without its end, and the end of the input."""
    reader, write = pipe
    write(b"1,2\n\n[3, ")

    def finish(_now):
        write(b"4]\n5 , 6")
        write.close()

    feed.loop.call_at(feed.loop.clock() + 0.05, finish)
    feed.serve(StdinSource(StdinSettings(), reader), until=lambda: feed.is_ended)
    assert feed.values == [[1, 2], [3, 4], [5, 6]]
    assert feed.heard == ["stdin:1", "stdin:3", "stdin:4", "end"]


def test_bad_line_is_named_and_the_next_is_read(pipe, feed):
    """Pins that one line spoils nothing but itself."""
    reader, write = pipe
    write(b"1\nready\n2\n")
    write.close()
    feed.serve(StdinSource(StdinSettings(), reader), until=lambda: feed.is_ended)
    assert feed.heard == ["stdin:1", "refused", "stdin:3", "end"]
    assert feed.refused == ["stdin:2: @: 'ready' is not a number"]


@pytest.mark.parametrize("content", [b"1\n2\n3", b""], ids=["rows", "nothing"])
def test_file_instead_of_a_pipe_is_read_too(feed, content):
    """Pins what selectors refuse: `shoal agent < file`, and an empty one."""
    with tempfile.TemporaryFile() as file:
        file.write(content)
        file.seek(0)
        feed.serve(StdinSource(StdinSettings(), file.fileno()), until=lambda: feed.is_ended)
    assert feed.values == [[float(row)] for row in content.split()]


def test_line_without_end_is_refused_once_and_never_kept(feed):
    """Pins the bound: what is longer than a message may be is dropped as it comes, and the next line is read."""
    with tempfile.TemporaryFile() as file:
        file.write(PAST_BOUND + b"\n7\n")
        file.seek(0)
        source = StdinSource(StdinSettings(), file.fileno())
        feed.serve(source, until=lambda: feed.is_ended)
    assert feed.heard == ["refused", "stdin:2", "end"]
    assert feed.refused == [f"stdin:1: a line of more than {MAX_INPUT_BYTES} bytes"]


def test_missing_standard_input_is_told_in_one_line(feed, monkeypatch):
    """Pins an agent that was started without one."""
    monkeypatch.setattr("sys.stdin", None)
    with pytest.raises(ConfigError, match="source stdin: there is no standard input"):
        StdinSource(StdinSettings()).start(feed)
