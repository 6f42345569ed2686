"""Devices of one process share one runtime, so one self-test of an artefact speaks for all of them."""

from pathlib import Path

from shoal.release.selftest import SelfTester, Trial, Verdict
from shoal.v1.release_pb2 import Artefact


class SharedSelfTest:
    """Starts the real self-test once for each artefact; everybody else gets the same verdict."""

    def __init__(self, tester: SelfTester) -> None:
        self._tester = tester
        self._shared: dict[bytes, _Shared] = {}

    def start(self, path: Path, artefact: Artefact, now: float) -> Trial:
        shared = self._shared.get(artefact.sha256)
        if shared is None:
            shared = self._shared[artefact.sha256] = _Shared(self._tester.start(path, artefact, now))
        return _Ticket(shared)

    def close(self) -> None:
        """End what is under way; no ticket may be polled after that."""
        for shared in self._shared.values():
            shared.cancel()


class _Shared:
    def __init__(self, trial: Trial) -> None:
        self._trial = trial
        self._verdict: Verdict | None = None

    def poll(self, now: float) -> Verdict | None:
        if self._verdict is None:
            self._verdict = self._trial.poll(now)
        return self._verdict

    def cancel(self) -> None:
        if self._verdict is None:
            self._trial.cancel()


class _Ticket:
    """One device's view; cancelling it leaves the trial to the others."""

    def __init__(self, shared: _Shared) -> None:
        self._shared = shared

    def poll(self, now: float) -> Verdict | None:
        return self._shared.poll(now)

    def cancel(self) -> None:
        return
