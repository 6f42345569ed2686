"""Golden vectors, in process and in a child that may do its worst."""

import os
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from shoal.errors import ModelError
from shoal.release.chunks import digest
from shoal.release.selftest import ChildSelfTest, Limits, Outcome, run_golden, selftest_in_child
from shoal.tensors import to_tensor
from shoal.v1.release_pb2 import Artefact, GoldenVectors

pytestmark = pytest.mark.device

TOY_RUNTIME = """
import os, time
import numpy as np

class Toy:
    def __init__(self, text):
        self.text = text

    def run(self, inputs):
        if self.text == "hang":
            time.sleep(600)
        if self.text == "spin":
            while True:
                pass
        if self.text == "hoard":
            return np.zeros(1 << 31, dtype=np.uint8)  # lazy: costs address space only
        if self.text == "crash":
            os.abort()
        if self.text == "exit":
            os._exit(0)
        if self.text == "chatter":
            print("x" * 1_000_000)
        return inputs * 2

    def __del__(self):
        if self.text == "crash at teardown":
            os.abort()

def load(path):
    return Toy(path.read_text())
"""


class Doubler:
    def __init__(self, change=lambda output: output) -> None:
        self.change = change

    def run(self, inputs):
        return self.change(inputs * 2)


def artefact(data: bytes = b"", rows: int = 3) -> Artefact:
    inputs = np.arange(rows * 4, dtype=np.float32).reshape(rows, 4)
    golden = GoldenVectors(inputs=to_tensor(inputs), outputs=to_tensor(inputs * 2), tolerance=0.5)
    return Artefact(sha256=digest(data), golden=golden)


def test_right_answers_pass():
    """Within the tolerance, row by row."""
    run_golden(Doubler(), artefact())
    run_golden(Doubler(lambda output: output + 0.4), artefact())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda output: output + 0.6, "off by"),
        (lambda output: output * np.nan, "off by nan"),
        (lambda output: np.full_like(output, np.inf), "off by"),
        (lambda output: output[:, :3], r"output \[1, 3\]"),
        (lambda output: output[0], r"output \[4\]"),
        (lambda output: output[:0], r"output \[0, 4\]"),
    ],
)
def test_wrong_answers_are_refused(change, message):
    """NaN and shapes that would broadcast are wrong answers too."""
    with pytest.raises(ModelError, match=message):
        run_golden(Doubler(change), artefact())


def test_release_without_golden_vectors_is_refused():
    """Nothing untested ever runs, so no vectors is no release."""
    with pytest.raises(ModelError):
        run_golden(Doubler(), Artefact())
    empty = to_tensor(np.zeros((0, 4), dtype=np.float32))
    with pytest.raises(ModelError, match="0, 4"):
        run_golden(Doubler(), Artefact(golden=GoldenVectors(inputs=empty, outputs=empty)))


@pytest.fixture
def try_model(tmp_path: Path, monkeypatch):
    (tmp_path / "toy_runtime.py").write_text(TOY_RUNTIME)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path), *sys.path]))

    def run(text: str, limits: Limits | None = None, signed: str | None = None):
        path = tmp_path / "model"
        path.write_text(text)
        described = artefact((signed or text).encode())
        return selftest_in_child(path, described, "toy_runtime", clock=time.monotonic, sleep=time.sleep, limits=limits)

    return run


def test_child_passes_a_good_model(try_model):
    """And a noisy one: output is no verdict and fills no pipe."""
    assert try_model("good").outcome is Outcome.PASSED
    assert try_model("chatter").outcome is Outcome.PASSED


@pytest.mark.parametrize(
    ("text", "limits", "outcome", "reason"),
    [
        ("crash", Limits(), Outcome.FAILED, "died with -6"),
        ("crash at teardown", Limits(), Outcome.FAILED, "died with -6"),
        ("exit", Limits(), Outcome.FAILED, "died with 0"),
        ("hoard", Limits(), Outcome.FAILED, "MemoryError"),
        ("spin", Limits(cpu_s=1), Outcome.FAILED, "died with -"),
        ("hang", Limits(wall_s=1.0), Outcome.UNDECIDED, "in time"),
    ],
)
def test_child_contains_the_worst(try_model, text, limits, outcome, reason):
    """Crash, even when all is answered, silent exit, endless memory, work or sleep: always a verdict, always here."""
    verdict = try_model(text, limits)
    assert verdict.outcome is outcome
    assert reason in verdict.reason


def test_child_refuses_a_file_other_than_signed(try_model):
    """The bytes that are tested are the bytes that were verified."""
    verdict = try_model("good", signed="other")
    assert verdict.outcome is Outcome.FAILED
    assert "signed" in verdict.reason


def test_child_reports_a_missing_runtime(tmp_path):
    """A typo in the configuration is a readable reason."""
    path = tmp_path / "model"
    path.write_bytes(b"good")
    verdict = selftest_in_child(path, artefact(b"good"), "no_such_runtime", clock=time.monotonic, sleep=time.sleep)
    assert "no_such_runtime" in verdict.reason


def test_cancelled_child_is_gone(try_model, tmp_path):
    """A newer plan ends a test that is under way."""
    path = tmp_path / "model"
    path.write_text("hang")
    trial = ChildSelfTest("toy_runtime").start(path, artefact(b"hang"), 0.0)
    assert trial.poll(0.0) is None
    trial.cancel()
    assert trial._process.returncode == -9
