"""One model of one node: from a trusted plan to a running artefact, and back.

Invariants:
- what runs was self-tested here, or was confirmed before, and its bytes were hashed before this start;
- a model on probation is confirmed or refused by what the node saw of it, and what is refused stops answering;
- the state on disk is saved before what it describes happens;
- one release is worked on at a time, and a newer plan replaces it; chunks that have arrived are kept;
- what takes long, the disk's sync and the self-test, is polled: the loop never waits for it.
"""

import logging
from collections import Counter
from collections.abc import Callable
from concurrent.futures import Executor, Future, wait
from dataclasses import dataclass, replace
from enum import Enum, unique
from pathlib import Path

from shoal.codec import decode
from shoal.errors import ModelError, PayloadError
from shoal.release.chunks import Assembler, Manifest
from shoal.release.fetch import BlobFetch
from shoal.release.files import FileFetch
from shoal.release.model_state import model_state
from shoal.release.offer import Lookup, NodeModel, find_artefact
from shoal.release.probation import Decision, Watch
from shoal.release.probation import Outcome as Fitness
from shoal.release.selftest import Outcome, SelfTester, Trial
from shoal.release.slot_store import Identity, SlotStore, Staging
from shoal.release.slots import Content, Phase, Slots
from shoal.release.trust import TrustedPlan
from shoal.v1.node_pb2 import ModelState
from shoal.v1.release_pb2 import Artefact, BundleEntry, ReleaseSpec

log = logging.getLogger(__name__)

_DISK_RETRY_S = 30.0

# Loads and serves an artefact; raises whatever it likes when it cannot.
Activate = Callable[[str, ReleaseSpec, Path], None]
# Stops serving a model that has no release left to go back to.
Deactivate = Callable[[str], None]
# What the node has seen of the running model; None where nobody watches, so that probation ends by time alone.
FindWatch = Callable[[str], Watch | None]


@unique
class _Step(Enum):
    IDLE = "idle"
    SPEC = "spec"
    CHECK = "check"
    ARTEFACT = "artefact"
    READY = "ready"
    ADMISSION = "admission"
    TESTING = "testing"


@dataclass(slots=True)
class _Goal:
    """The release being installed."""

    plan: TrustedPlan
    lookup: Lookup
    entry: BundleEntry | None = None
    spec_data: bytes = b""
    artefact: Artefact | None = None
    staging: Staging | None = None

    @property
    def content(self) -> Content:
        sha256 = b"" if self.artefact is None else self.artefact.sha256
        return Content(self.plan.plan.release, sha256, self.plan.spec.sha256)


class Installer:
    """See the module. `start` once, then `follow` on news and `tick` often."""

    def __init__(
        self,
        *,
        node: NodeModel,
        store: SlotStore,
        blobs: BlobFetch,
        self_test: SelfTester,
        activate: Activate,
        deactivate: Deactivate,
        find_watch: FindWatch,
        counters: Counter[str],
        disk: Executor,
    ) -> None:
        self._node = node
        self._store = store
        self._disk = disk
        self._blobs = blobs
        self._self_test = self_test
        self._activate = activate
        self._deactivate = deactivate
        self._find_watch = find_watch
        self._counters = counters
        self._slots = Slots()
        self._is_open = False
        self._news: tuple[TrustedPlan, BundleEntry | None, Lookup] | None = None
        self._step = _Step.IDLE
        self._goal: _Goal | None = None
        self._spec_fetch: FileFetch | None = None
        self._admission: Future[Identity] | None = None
        self._trial: Trial | None = None
        self._watched_since: float | None = None
        self._paused_until = 0.0

    # -- what the client calls -----------------------------------------------------------------------------------

    def start(self) -> None:
        """Run what this node already has. Needs no network; on a disk that fails it is tried again by `tick`."""
        try:
            self._open()
        except OSError as exc:
            self._note_disk_error(exc)

    def _open(self) -> None:
        self._slots = self._store.open()
        self._start_running()
        self._is_open = True

    def _start_running(self) -> None:
        while (running := self._slots.running) is not None:
            index = self._slots.active or 0
            if running.phase is Phase.PROBATION and running.tries_left == 0:
                self._save(self._slots.fail(index, "it did not survive its probation"))
                continue
            if running.phase is Phase.PROBATION:
                self._save(self._slots.attempt())
            if self._activate_running():
                return

    def follow(self, plan: TrustedPlan, entry: BundleEntry | None, lookup: Lookup) -> None:
        """Work towards the release that `plan` names; `entry` says where its spec is, None while nobody knows."""
        if not self._is_open:
            self._news = (plan, entry, lookup)
            return
        content = Content(plan.plan.release, b"", plan.spec.sha256)
        if self._goal is not None and self._goal.plan.spec == plan.spec:
            if self._step is _Step.SPEC and self._goal.entry != entry:
                self._fetch_spec(entry)
            return
        self._abandon()
        running = self._slots.running
        if (running is not None and running.content.spec_sha256 == plan.spec.sha256) or self._slots.is_refused(content):
            return
        if self._slots.spare.phase is Phase.CONFIRMED and self._slots.spare.content.spec_sha256 == plan.spec.sha256:
            self._go_back()
            return
        self._goal = _Goal(plan, lookup)
        self._step = _Step.SPEC
        self._fetch_spec(entry)

    def fail(self, reason: str) -> None:
        """The node finds its running model unfit: refuse it for good and go back."""
        if self._slots.active is not None:
            self._refuse_running(reason)

    def tick(self, now: float) -> None:
        """Do what is due; at most one self-test is polled and one file is moved."""
        if now < self._paused_until:
            return
        try:
            if not self._is_open:
                self._open()
            if self._news is not None:
                news, self._news = self._news, None
                self.follow(*news)
            self._end_probation(now)
            if self._step is _Step.CHECK:
                self._check_spec()
            elif self._step is _Step.READY and not self._slots.on_probation:
                self._install(now)
            elif self._step is _Step.ADMISSION:
                self._poll_admission(now)
            elif self._step is _Step.TESTING:
                self._poll_trial(now)
        except OSError as exc:
            self._paused_until = now + _DISK_RETRY_S
            self._note_disk_error(exc)

    def state(self) -> ModelState:
        return model_state(self._node, self._slots, self._find_watch(self._node.model))

    def excuse_start(self) -> None:
        """The process ends because it was told to, which says nothing about a model on probation."""
        if self._slots.on_probation:
            try:
                self._save(self._slots.excuse())
            except OSError as exc:
                self._note_disk_error(exc)

    def close(self) -> None:
        self._abandon()

    # -- running models ------------------------------------------------------------------------------------------

    def _activate_running(self) -> bool:
        """Hand the active slot to the node; on failure the slots have changed and False is returned."""
        index = self._slots.active
        if index is None:
            return False
        content = self._slots.pair[index].content
        spec_data = self._store.load(content.spec_sha256)
        if spec_data is None or not self._store.has(content.sha256):
            log.error("model files are damaged model=%s release=%d", self._node.model, content.release)
            self._save(self._slots.drop(index))
            return False
        try:
            self._activate(self._node.model, decode(ReleaseSpec, spec_data), self._store.path(content.sha256))
        except Exception as exc:  # noqa: BLE001  a runtime may raise anything; the answer is to go back
            self._note_refusal(content.release, f"activation: {exc}")
            self._save(self._slots.fail(index, f"activation: {exc}"))
            return False
        self._watched_since = None
        self._counters["activations"] += 1
        log.info("model active model=%s release=%d", self._node.model, content.release)
        return True

    def _run_what_is_left(self) -> None:
        while self._slots.active is not None:
            if self._activate_running():
                return
        self._deactivate(self._node.model)

    def _go_back(self) -> None:
        self._save(self._slots.switch())
        self._run_what_is_left()

    def _refuse_running(self, reason: str) -> None:
        index = self._slots.active
        if index is not None:
            self._note_refusal(self._slots.pair[index].content.release, reason)
            self._save(self._slots.fail(index, reason))
            if self._goal is not None and self._slots.is_refused(self._goal.content):
                self._abandon()
            self._run_what_is_left()

    def _end_probation(self, now: float) -> None:
        if not self._slots.on_probation:
            return
        if self._watched_since is None:
            self._watched_since = now
        decision = self._judge(now - self._watched_since)
        if decision.outcome is Fitness.FAIL:
            self.fail(f"probation: {decision.reason}")
        elif decision.outcome is Fitness.CONFIRM:
            self._save(self._slots.confirm())

    def _judge(self, waited_s: float) -> Decision:
        watch = self._find_watch(self._node.model)
        if watch is not None:
            return watch.decide(waited_s, self._node.probation_s)
        return Decision(Fitness.WAIT if waited_s < self._node.probation_s else Fitness.CONFIRM)

    # -- installing ----------------------------------------------------------------------------------------------

    def _fetch_spec(self, entry: BundleEntry | None) -> None:
        if self._spec_fetch is not None:
            self._spec_fetch.cancel()
            self._spec_fetch = None
        if self._goal is not None and entry is not None:
            self._goal.entry = entry
            self._spec_fetch = FileFetch(self._blobs, entry, self._on_spec)
            self._spec_fetch.start()

    def _on_spec(self, data: bytes) -> None:
        self._spec_fetch = None
        if self._goal is not None:
            self._goal.spec_data = data
            self._step = _Step.CHECK

    def _check_spec(self) -> None:
        goal = self._goal
        if goal is None:
            return
        try:
            goal.artefact = find_artefact(goal.spec_data, goal.plan, self._node, goal.lookup)
        except (ModelError, PayloadError) as exc:
            self._refuse_goal(str(exc))
            return
        if goal.artefact is None:
            log.info("release has nothing for this tier model=%s release=%d", self._node.model, goal.content.release)
            self._step = _Step.IDLE
        elif self._slots.is_refused(goal.content):
            self._refuse_goal("its artefact was refused before")
        else:
            self._fetch_artefact(goal, goal.artefact)

    def _fetch_artefact(self, goal: _Goal, artefact: Artefact) -> None:
        try:
            manifest = Manifest(tuple(artefact.chunks), artefact.length_bytes, artefact.chunk_bytes)
        except PayloadError as exc:
            self._refuse_goal(f"{artefact.path}: {exc}")
            return
        self._step = _Step.READY
        if self._store.has(artefact.sha256):
            return
        assembler = Assembler(manifest)
        goal.staging = self._store.stage(artefact.sha256, goal.spec_data, assembler)
        if not assembler.complete:
            self._step = _Step.ARTEFACT
            self._blobs.want(assembler.missing(), self._on_chunk)

    def _on_chunk(self, sha256: bytes, payload: bytes) -> None:
        goal = self._goal
        if goal is None or goal.staging is None:
            return
        try:
            if goal.staging.accept(sha256, payload):
                self._step = _Step.READY
        except OSError as exc:
            self._note_disk_error(exc)
            self._blobs.forget(goal.artefact.chunks if goal.artefact else (), self._on_chunk)
            self._step = _Step.READY

    def _install(self, now: float) -> None:
        """Bring the artefact and its spec to where slots find them, unless they are there already."""
        goal = self._goal
        if goal is None or goal.artefact is None:
            return
        if goal.staging is not None:
            self._admission = self._disk.submit(self._store.admit, goal.staging)
            self._step = _Step.ADMISSION
            self._poll_admission(now)
        elif self._store.has(goal.artefact.sha256):
            self._store.put(goal.spec_data)
            self._write_slot(goal, goal.artefact, now)
        else:
            self._fetch_artefact(goal, goal.artefact)

    def _poll_admission(self, now: float) -> None:
        goal, admission = self._goal, self._admission
        if goal is None or goal.artefact is None or admission is None or not admission.done():
            return
        self._admission = None
        self._step = _Step.READY
        try:
            self._store.recognise(goal.artefact.sha256, admission.result())
        except ModelError as exc:
            self._refuse_goal(str(exc))
            return
        goal.staging = None
        self._write_slot(goal, goal.artefact, now)

    def _write_slot(self, goal: _Goal, artefact: Artefact, now: float) -> None:
        """Put the release into the spare slot and start its self-test."""
        spare = self._slots.spare
        if spare.phase is not Phase.WRITTEN or spare.content != goal.content:
            self._slots = self._slots.write(goal.content)  # saved together with the attempt that follows
        if self._slots.spare.tries_left == 0:
            self._refuse_written("it did not survive its self-tests")
        else:
            self._begin_trial(artefact, now)

    def _begin_trial(self, artefact: Artefact, now: float) -> None:
        self._save(self._slots.attempt())
        self._trial = self._self_test.start(self._store.path(artefact.sha256), artefact, now)
        self._step = _Step.TESTING

    def _poll_trial(self, now: float) -> None:
        goal = self._goal
        if goal is None or goal.artefact is None:
            return
        verdict = None
        if self._trial is not None:
            verdict = self._trial.poll(now)
            if verdict is None:
                return
            self._trial = None
        if verdict is not None and verdict.outcome is Outcome.PASSED:
            self._save(self._slots.pass_test())
            self._finish_goal()
            if not self._activate_running():
                self._run_what_is_left()
        elif (verdict is None or verdict.outcome is Outcome.UNDECIDED) and self._slots.spare.tries_left:
            self._begin_trial(goal.artefact, now)
        else:
            self._refuse_written(f"self-test: {verdict.reason if verdict else 'it cannot be started'}")

    def _refuse_written(self, reason: str) -> None:
        release = self._slots.spare.content.release
        self._save(self._slots.fail(self._slots.spare_index, reason))
        self._note_refusal(release, reason)
        self._finish_goal()

    def _refuse_goal(self, reason: str) -> None:
        """Refuse a release that never reached a slot."""
        if self._goal is not None:
            content = self._goal.content
            self._note_refusal(content.release, reason)
            self._abandon()
            # The bytes were not at fault, so that another release may bring them again.
            self._save(self._slots.refuse(replace(content, sha256=b""), reason))

    def _note_disk_error(self, error: OSError) -> None:
        """Nothing half-written is believed: what is staged will be hashed again."""
        self._counters["install_errors"] += 1
        log.warning("install paused model=%s error=%s", self._node.model, error)
        if self._goal is not None:
            self._close_staging(self._goal)
        if self._step is _Step.ADMISSION:
            self._step = _Step.READY

    def _close_staging(self, goal: _Goal) -> None:
        if self._admission is not None and not self._admission.cancel():
            wait([self._admission])  # its thread uses the file that is closed next
        self._admission = None
        if goal.staging is not None:
            goal.staging.close()
            goal.staging = None

    def _note_refusal(self, release: int, reason: str) -> None:
        self._counters["refused_releases"] += 1
        log.warning("release refused model=%s release=%d reason=%s", self._node.model, release, reason)

    def _finish_goal(self) -> None:
        self._goal = None
        self._step = _Step.IDLE

    def _abandon(self) -> None:
        """Stop working on the goal; what is staged stays on disk."""
        goal, self._goal = self._goal, None
        if self._spec_fetch is not None:
            self._spec_fetch.cancel()
            self._spec_fetch = None
        if goal is not None and goal.artefact is not None:
            self._blobs.forget(goal.artefact.chunks, self._on_chunk)
        if goal is not None:
            self._close_staging(goal)
        if self._trial is not None:
            self._trial.cancel()
            self._trial = None
        self._step = _Step.IDLE

    def _save(self, slots: Slots) -> None:
        self._store.save(slots)
        self._slots = slots
