import io
from dataclasses import replace

import pytest
from rich.console import Console

from fleet_console.demo.live import LiveView, Snapshot, picture, print_summary, status_line
from fleet_console.demo.measure import Accuracy
from fleet_console.demo.report import make_report

HIDE_CURSOR, SHOW_CURSOR = "\x1b[?25l", "\x1b[?25h"
SNAPSHOT = Snapshot(
    elapsed_s=73.4,
    stage="fleets are reading",
    devices_online=23,
    devices_total=24,
    messages={"infer": 2123, "reply": 2110},
    messages_per_s=64.0,
    uplink_share=0.072,
    asked_share=0.078,
    # Sorted by name, as it is measured; the story goes the other way.
    accuracy={(1, "after_drift"): Accuracy(0.435, 0.704, 700), (1, "before_drift"): Accuracy(0.993, 0.995, 290)},
    nodes_by_release={"digits": {1: 9, 2: 4}, "shuttle": {1: 1}},
    labels=312,
    builds=["shuttle 1", "digits 1", "digits 2"],
    restarts={"gateway": 1},
    notes=["  2.0 s  fleets are reading", " 15.0 s  the cameras [drift]"],
)
BLANK = Snapshot(0.0, "training", 0, 24, {}, 0.0, None, None, {}, {}, 0, [], {}, [])


@pytest.fixture
def terminal(monkeypatch):
    """A terminal whose bytes can be read."""
    monkeypatch.delenv("CI", raising=False)
    monkeypatch.setenv("TERM", "xterm-256color")
    return Console(file=io.StringIO(), force_terminal=True, width=120, height=50)


@pytest.fixture
def pipe():
    return Console(file=io.StringIO(), width=80)


def _draw(snapshot, width):
    console = Console(file=io.StringIO(), width=width)
    console.print(picture(snapshot, width))
    return console.file.getvalue()


@pytest.mark.parametrize("width", [80, 99, 100, 120, 200])
def test_picture_fits_and_shows_everything(width):
    """Pins every figure on every width that terminals have; nothing is cut off or wrapped."""
    text = _draw(SNAPSHOT, width)
    assert max(len(line) for line in text.splitlines()) <= width
    for expected in (
        *("1:13", "23 of 24", "2,123", "7.2%", "7.8%", "312", "99.3%", "70.4%", "700", "before drift", "digits 2"),
        *("4 nodes", "1 node ", "gateway restarted", "the cameras [drift]"),
    ):
        assert expected in text
    assert "…" not in text
    assert text.index("before drift") < text.index("after drift")


def test_picture_of_the_first_moment_has_no_figures_yet():
    """Pins that nothing measured is not shown as nought."""
    text = _draw(BLANK, 120)
    assert "not yet" in text
    assert "0.0%" not in text


def test_terminal_is_restored_when_the_run_ends(terminal):
    """Pins that the cursor comes back and the last picture stays."""
    with LiveView(terminal) as view:
        view.update(SNAPSHOT)
    written = terminal.file.getvalue()
    assert HIDE_CURSOR in written
    assert written.rstrip().endswith(SHOW_CURSOR)
    assert "fleets are reading" in written


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_terminal_is_restored_when_the_run_breaks(terminal, error):
    """Pins Ctrl-C and crashes: the cursor comes back, the error goes on."""

    def run():
        with LiveView(terminal) as view:
            view.update(SNAPSHOT)
            raise error

    with pytest.raises(error):
        run()
    assert terminal.file.getvalue().rstrip().endswith(SHOW_CURSOR)


@pytest.mark.parametrize(("name", "value"), [("CI", "true"), ("TERM", "dumb")])
def test_terminal_that_nobody_watches_gets_lines(monkeypatch, name, value):
    """Pins that logs of CI and dumb terminals hold no pictures."""
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setenv(name, value)
    console = Console(file=io.StringIO(), force_terminal=True, width=120)
    with LiveView(console) as view:
        view.update(SNAPSHOT)
    assert HIDE_CURSOR not in console.file.getvalue()
    assert len(console.file.getvalue().splitlines()) == 1


def test_pipe_gets_a_line_every_five_seconds_and_at_each_stage(pipe):
    """Pins the pace of a log, by the run's own clock."""
    with LiveView(pipe) as view:
        for half_seconds in range(25):
            elapsed_s = half_seconds / 2
            stage = "training" if elapsed_s < 3 else "reading"
            view.update(replace(BLANK, elapsed_s=elapsed_s, stage=stage))
    starts = [line.split()[:3:2] for line in pipe.file.getvalue().splitlines()]
    assert starts == [["0.0", "training"], ["3.0", "reading"], ["8.0", "reading"]]


def test_status_line_is_one_line_with_the_newest_accuracy(pipe):
    """Pins what a log tells, however narrow its reader; brackets are no markup."""
    with LiveView(pipe) as view:
        view.update(replace(SNAPSHOT, stage="[bold]drift"))
    (line,) = pipe.file.getvalue().splitlines()
    for expected in ("73.4 s", "[bold]drift", "devices 23/24", "messages 4,233", "uplink 7.2%", "after drift 43.5%"):
        assert expected in line
    assert "gateway restarted 1" in line
    assert "uplink" not in status_line(BLANK)


def test_update_outside_with_is_plain(terminal):
    """Pins that a view which was left draws no more pictures."""
    view = LiveView(terminal)
    with view:
        view.update(SNAPSHOT)
    terminal.file.truncate(0)
    view.update(SNAPSHOT)
    assert HIDE_CURSOR not in terminal.file.getvalue()


def test_summary_tells_checks_and_figures(pipe, evidence):
    """Pins the last words of a good run."""
    report = make_report(evidence)
    print_summary(pipe, report)
    text = pipe.file.getvalue()
    assert "The loop closed." in text
    assert text.count("ok ") == len(report["checks"])
    for expected in ("90.0% after update", "100.0% of anomalies", "800 bytes", "canonical JSON 20,000", "digits 2"):
        assert expected in text
    assert "61.3 s, seed 7" in text


def test_summary_of_a_failed_run_says_which_check(pipe, empty):
    """Pins the last words of a bad run; there may be no reply and no model to speak of."""
    print_summary(pipe, make_report(empty))
    text = pipe.file.getvalue()
    assert "The loop did not close." in text
    assert "FAILED" in text
    assert "no reply" in text
