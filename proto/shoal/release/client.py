"""The update client of a device or gateway: retained messages in, verified and tested models out.

Invariants:
- messages only mark that there is news; verifying, writing and testing happen in `tick`;
- nothing is fetched that no verified plan names, but for the metadata that verifies it;
- whatever goes wrong, what runs keeps running.
"""

import logging
import random
from collections import Counter
from concurrent.futures import Executor, ThreadPoolExecutor
from functools import partial
from pathlib import Path

from shoal.errors import PayloadError, ShoalError
from shoal.inbox import Delivery
from shoal.release.fetch import BlobFetch, Subscriber
from shoal.release.files import FileFetch
from shoal.release.installer import Activate, Deactivate, FindWatch, Installer
from shoal.release.offer import NodeModel
from shoal.release.plan import follows
from shoal.release.selftest import SelfTester
from shoal.release.slot_store import SlotStore
from shoal.release.trust import TrustedView, TrustStore, Wait, metadata_entries
from shoal.routes import Route
from shoal.v1.node_pb2 import ModelState
from shoal.v1.release_pb2 import TrustBundle

log = logging.getLogger(__name__)

# A bundle of 50 roles and 50 models has about 200; the rest is room for root rotations.
MAX_ENTRIES = 1024
# What failed may come right by itself: a clock gets set, a disk gets room.
_RETRY_S = 60.0
# A broker that shows no news may be hiding it: what was verified is verified again, so that expiry is noticed.
_RECHECK_S = 3600.0


class UpdateClient:
    """See the module.

    Args:
        node: this node's id, for cohorts and target patterns.
        models: what to run here, with the file store and the bounds of each.
        activate: called on the loop's thread, at start and after each update.
        deactivate: the running model was refused, and there is none to go back to.
        find_watch: what this node has seen of its running model, for probation.
        refresh_jitter_s: news reaches a whole fleet at once; each node waits up to this long before it acts.
        disk: where artefacts are hashed and synced, which may take seconds; by default a thread of this client's own.

    Attributes:
        counters: blobs_fetched, blobs_bad, blobs_retried, trust_refreshes, trust_waits, trust_errors, activations,
            refused_releases, install_errors.
        clock_suspect: the system's clock stands before what signed metadata proves.
    """

    def __init__(
        self,
        link: Subscriber,
        trust: TrustStore,
        directory: Path,
        models: list[NodeModel],
        *,
        node: str,
        self_test: SelfTester,
        activate: Activate,
        rng: random.Random,
        counters: Counter[str],
        deactivate: Deactivate = lambda _: None,
        find_watch: FindWatch = lambda _: None,
        refresh_jitter_s: float = 0.5,
        disk: Executor | None = None,
    ) -> None:
        self.counters = counters
        self.clock_suspect = False
        self._link = link
        self._trust = trust
        self._node = node
        self._rng = rng
        self._refresh_jitter_s = refresh_jitter_s
        self._fetch = BlobFetch(link, rng, counters)
        # Its thread starts with the first artefact.
        self._own_disk = ThreadPoolExecutor(1, thread_name_prefix="shoal-disk")
        self._installers = {
            item.model: Installer(
                node=item,
                store=SlotStore(directory / item.model),
                blobs=self._fetch,
                self_test=self_test,
                activate=activate,
                deactivate=deactivate,
                find_watch=find_watch,
                counters=counters,
                disk=self._own_disk if disk is None else disk,
            )
            for item in models
        }
        self._bundle: TrustBundle | None = None
        self._timestamp = b""
        self._files: dict[bytes, bytes] = {}
        self._fetching: dict[bytes, FileFetch] = {}
        self._has_news = False
        self._refresh_at: float | None = None
        self._last_error = ""

    def start(self) -> None:
        """Run what this node has, then listen. The first needs no network."""
        for installer in self._installers.values():
            installer.start()
        self._link.subscribe(Route.TRUST_BUNDLE, self._on_bundle)
        self._link.subscribe(Route.TRUST_TIMESTAMP, self._on_timestamp)

    def tick(self, now: float) -> None:
        """Do what is due; call it a few times a second."""
        self._fetch.tick(now)
        if self._has_news and not self._fetching:
            self._has_news = False
            self._refresh_at = now + self._rng.uniform(0.0, self._refresh_jitter_s)
        if self._refresh_at is not None and now >= self._refresh_at and not self._fetching:
            self._refresh_at = None
            self._refresh(now)
        for installer in self._installers.values():
            installer.tick(now)

    def fail(self, model: str, reason: str) -> None:
        """Say that the running release of `model` is unfit here: it is refused for good and the last one returns."""
        self._installers[model].fail(reason)

    def state(self) -> list[ModelState]:
        return [installer.state() for installer in self._installers.values()]

    def excuse_start(self) -> None:
        """The process ends in order: no model on probation has lost this try. Not for one that ends by an error."""
        for installer in self._installers.values():
            installer.excuse_start()

    def close(self) -> None:
        """Stop self-tests and close files; what is staged stays."""
        for installer in self._installers.values():
            installer.close()
        self._own_disk.shutdown()

    def _on_bundle(self, delivery: Delivery) -> None:
        bundle = delivery.message
        if not isinstance(bundle, TrustBundle) or bundle == self._bundle:
            return
        if len(bundle.entries) > MAX_ENTRIES:
            raise PayloadError(f"{len(bundle.entries)} entries, at most {MAX_ENTRIES}", field="entries")
        entries = metadata_entries(bundle, frozenset(self._installers))
        wanted = {
            entry.sha256: FileFetch(self._fetch, entry, partial(self._file_arrived, entry.sha256)) for entry in entries
        }
        self._bundle = bundle
        self._has_news = True
        self._fetch_files(wanted)

    def _on_timestamp(self, delivery: Delivery) -> None:
        if delivery.payload and delivery.payload != self._timestamp:
            self._timestamp = delivery.payload
            self._has_news = True

    def _fetch_files(self, wanted: dict[bytes, FileFetch]) -> None:
        """Fetch what this bundle needs and is not here; drop what it no longer needs."""
        self._files = {sha256: data for sha256, data in self._files.items() if sha256 in wanted}
        for file in self._fetching.values():
            file.cancel()
        self._fetching = {sha256: file for sha256, file in wanted.items() if sha256 not in self._files}
        for file in list(self._fetching.values()):
            file.start()

    def _file_arrived(self, sha256: bytes, data: bytes) -> None:
        self._files[sha256] = data
        self._fetching.pop(sha256, None)

    def _refresh(self, now: float) -> None:
        if self._bundle is None or not self._timestamp:
            return
        self._refresh_at = now + _RECHECK_S
        try:
            view = self._trust.refresh(self._bundle, self._timestamp, self._files, frozenset(self._installers))
            if isinstance(view, Wait):
                self.counters["trust_waits"] += 1
                return
            self._follow(view, self._bundle)
        except (ShoalError, OSError) as exc:
            self.counters["trust_errors"] += 1
            self._refresh_at = now + _RETRY_S
            self._warn_once(f"{type(exc).__name__}: {exc}")
            return
        self.counters["trust_refreshes"] += 1
        self._last_error = ""

    def _follow(self, view: TrustedView, bundle: TrustBundle) -> None:
        self.clock_suspect = view.clock_suspect
        for model, reason in view.refused.items():
            self._warn_once(f"plan of {model}: {reason}")
        entries = {(entry.path, entry.sha256): entry for entry in bundle.entries}
        for model, plan in view.plans.items():
            if follows(plan.plan, self._node):
                entry = entries.get((plan.spec.path, plan.spec.sha256))
                self._installers[model].follow(plan, entry, view.target)

    def _warn_once(self, error: str) -> None:
        if error != self._last_error:
            self._last_error = error
            log.warning("trust refused node=%s error=%s", self._node, error)
