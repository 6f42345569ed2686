"""Whatever the demo starts is gone when it is over."""

import json
import os
import signal
import threading
import time
from contextlib import suppress

import psutil
import pytest

from fleet_console.demo.processes import ProcessDiedError, Processes

PATIENCE_S = 20.0
GONE_S = 5.0

# What a test's process does: `python -m actor WHAT FILE`. It names itself in the file once it is ready.
ACTOR = """
import os, signal, subprocess, sys, time
what, place = sys.argv[1:]
child = 0
if what in ("deaf", "deaf-parent"):
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
if "parent" in what:
    grandchild = "import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN); print(1, flush=True); signal.pause()"
    process = subprocess.Popen([sys.executable, "-c", grandchild], stdout=subprocess.PIPE)
    process.stdout.readline()
    child = process.pid
with open(place + ".new", "w") as file:
    file.write(f"{os.getpid()} {child}")
os.replace(place + ".new", place)
print("ready as", what, os.environ.get("OMP_NUM_THREADS"))
if what == "fails":
    print("x" * 900, "last words", file=sys.stderr)
    sys.exit(3)
if what != "ends":
    while True:
        signal.pause()
"""


def poll(is_so, limit_s=PATIENCE_S):
    """Wait for something that another process does."""
    deadline = time.monotonic() + limit_s
    while not is_so():
        assert time.monotonic() < deadline
        threading.Event().wait(0.01)


def is_there(pid):
    with suppress(psutil.NoSuchProcess):
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    return False


class Stage:
    """Processes of `actor`, and who they say they are."""

    def __init__(self, directory):
        self.directory = directory
        self.processes = None

    def open(self, *, keep_going=False):
        self.processes = Processes(self.directory, keep_going=keep_going)
        return self.processes

    def start(self, name, what, **options):
        self.processes.start(name, "actor", what, str(self.directory / f"{name}.pid"), **options)
        return self.await_pids(name)

    def await_pids(self, name, other_than=()):
        """Return the process and its child, 0 where it has none; of the next process where the last is named."""
        path = self.directory / f"{name}.pid"
        pids = ()

        def is_known():
            nonlocal pids
            pids = tuple(map(int, path.read_text().split())) if path.exists() else ()
            return pids and pids != other_than

        poll(is_known)
        return pids


@pytest.fixture
def stage(tmp_path, monkeypatch):
    (tmp_path / "actor.py").write_text(ACTOR)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")]))
    stage = Stage(tmp_path)
    yield stage
    for child in stage.processes.children.values():
        with suppress(ProcessLookupError):
            os.killpg(child.process.pid, signal.SIGKILL)


def test_nobody_is_left(stage):
    """Obedient, deaf, with a child, both: all children and grandchildren are gone within five seconds of the end."""
    with stage.open():
        pids = [pid for what in ("waits", "deaf", "parent", "deaf-parent") for pid in stage.start(what, what) if pid]
        assert len(pids) == 6
        assert all(map(is_there, pids))
        began = time.monotonic()
    poll(lambda: not any(map(is_there, pids)), GONE_S - (time.monotonic() - began))
    assert stage.processes.children["waits"].process.returncode == -signal.SIGTERM
    assert stage.processes.children["deaf"].process.returncode == -signal.SIGKILL


def test_obedient_processes_cost_no_grace(stage):
    """Nobody waits for a time to pass when everybody has ended."""
    with stage.open():
        stage.start("one", "waits")
        stage.start("two", "waits")
        began = time.monotonic()
    assert time.monotonic() - began < 2.0


def test_impatience_leaves_nobody_either(stage):
    """A second Ctrl-C during the grace cuts it short."""
    processes = stage.open()
    pids = [pid for pid in (*stage.start("one", "deaf-parent"), *stage.start("two", "parent")) if pid]
    timer = threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGINT))
    timer.start()
    began = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        processes.stop()
    timer.join()
    poll(lambda: not any(map(is_there, pids)), GONE_S - (time.monotonic() - began))
    assert time.monotonic() - began < 2.5


def test_error_in_the_block_ends_everybody_and_is_raised(stage):
    """Whatever ends the demo."""
    with pytest.raises(RuntimeError, match="mine"), stage.open():  # noqa: PT012
        pids = stage.start("one", "parent")
        raise RuntimeError("mine")
    poll(lambda: not any(map(is_there, pids)), GONE_S)


def test_pids_are_written_for_people(stage):
    """The file names who runs, from the moment on in which they do; output goes to a log of each."""
    with stage.open():
        (one, _), (two, _) = stage.start("one", "waits"), stage.start("two", "waits")
        assert json.loads((stage.directory / "pids.json").read_text()) == {"one": one, "two": two}
        poll(lambda: (stage.directory / "one.log").read_text() == "ready as waits 1\n")
        assert os.getpgid(one) == one


def test_process_that_dies_is_an_error_with_its_last_words(stage):
    """Who ended, with which status, and the end of its log, in the message."""
    with stage.open() as processes:
        stage.start("other", "waits")
        assert processes.watch() == []
        stage.start("gateway", "fails")
        processes.children["gateway"].process.wait(PATIENCE_S)
        with pytest.raises(ProcessDiedError, match=r"(?s)^gateway ended with 3: x+ last words$") as caught:
            processes.watch()
        assert len(str(caught.value)) < 900


def test_process_that_is_killed_is_an_error_too(stage):
    """As is one that ends well but should not end."""
    with stage.open() as processes:
        pid, _ = stage.start("gateway", "waits")
        os.kill(pid, signal.SIGKILL)
        processes.children["gateway"].process.wait(PATIENCE_S)
        with pytest.raises(ProcessDiedError, match=r"^gateway ended with -9: "):
            processes.watch()
    with stage.open() as processes:
        stage.start("ingest", "ends")
        processes.children["ingest"].process.wait(PATIENCE_S)
        with pytest.raises(ProcessDiedError, match=r"^ingest ended with 0: "):
            processes.watch()


def test_finite_process_may_end_well(stage):
    """And only well."""
    with stage.open() as processes:
        stage.start("fleet", "ends", finite=True)
        processes.children["fleet"].process.wait(PATIENCE_S)
        assert processes.watch() == processes.watch() == []
        assert not processes.children["fleet"].is_running
        stage.start("fleet", "fails", finite=True)
        processes.children["fleet"].process.wait(PATIENCE_S)
        with pytest.raises(ProcessDiedError):
            processes.watch()


def test_group_that_is_gone_is_not_signalled_again(stage, monkeypatch):
    """Its number may be somebody else's by the time the demo ends."""
    with stage.open() as processes:
        stage.start("fleet", "ends", finite=True)
        other, _ = stage.start("other", "waits")
        processes.children["fleet"].process.wait(PATIENCE_S)
        processes.watch()
        signalled = []
        monkeypatch.setattr(os, "killpg", lambda pid, _signal: signalled.append(pid))
    assert signalled == [other]


def test_process_that_dies_is_started_again_where_that_is_wanted(stage):
    """With the same arguments and log, as often as it dies, without what the dead one had started."""
    with stage.open(keep_going=True) as processes:
        first = stage.start("trainer", "parent")
        stage.start("other", "waits")
        os.kill(first[0], signal.SIGKILL)
        processes.children["trainer"].process.wait(PATIENCE_S)
        assert is_there(first[1])
        assert processes.watch() == ["trainer"]
        poll(lambda: not is_there(first[1]))
        second = stage.await_pids("trainer", other_than=first)
        assert processes.watch() == []
        assert json.loads((stage.directory / "pids.json").read_text())["trainer"] == second[0]
        os.kill(second[0], signal.SIGKILL)
        processes.children["trainer"].process.wait(PATIENCE_S)
        processes.watch()
        third = stage.await_pids("trainer", other_than=second)
        assert {name: child.restarts for name, child in processes.children.items()} == {"trainer": 2, "other": 0}
    poll(lambda: not any(map(is_there, third)), GONE_S)
    assert (stage.directory / "trainer.log").read_text().count("ready as parent") == 3


def test_some_may_be_asked_to_end_before_the_others(stage):
    """The named ones end, the others run on."""
    with stage.open() as processes:
        (one, _), (two, _) = stage.start("one", "waits"), stage.start("two", "waits")
        processes.end("one")
        assert (is_there(one), is_there(two)) == (False, True)


def test_module_is_run_to_its_end(stage):
    """What must be done first is waited for; its failure is an error with its last words."""
    processes = stage.open()
    processes.run("actor", "ends", str(stage.directory / "done"))
    assert (stage.directory / "done").exists()
    with pytest.raises(ProcessDiedError, match=r"^actor fails .*last words$"):
        processes.run("actor", "fails", str(stage.directory / "done"))
