"""What a node believes: TUF metadata out of retained messages, verified by python-tuf.

Invariants:
- trust starts from the root that the node was provisioned with, never from a file that we fetched;
- no version ever goes back: our own floor, checksummed and fsync'd, stands even when TUF's files are lost or torn;
- the floor is written before a view is handed out;
- time never goes back behind the clock floor: the build, what was verified before, and when it was signed;
- nothing here stops a model that runs.
"""

import datetime as dt
import json
import re
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from tuf.api.exceptions import DownloadError, DownloadHTTPError, ExpiredMetadataError, RepositoryError
from tuf.api.metadata import TargetFile
from tuf.ngclient.config import UpdaterConfig
from tuf.ngclient.fetcher import FetcherInterface
from tuf.ngclient.updater import Updater

from shoal.codec import MAX_PAYLOAD_BYTES, decode
from shoal.errors import PayloadError, TrustError
from shoal.release.durable import CheckedFile
from shoal.v1.release_pb2 import BundleEntry, RolloutPlan, TrustBundle

# 2026-11-01: no honest clock of a node that runs this code is earlier.
BUILT_AT = 1_793_491_200
# Written by the publisher into the timestamp role; python-tuf keeps fields that it does not know, and signs them.
SIGNED_AT_FIELD = "x-shoal-signed-at"

LIMITS = UpdaterConfig(
    max_root_rotations=64,
    max_delegations=8,
    root_max_length=65_536,
    timestamp_max_length=16_384,
    snapshot_max_length=262_144,
    targets_max_length=MAX_PAYLOAD_BYTES,
)
# The clock alone is worth a write once an hour: a floor need not be exact.
_HOUR_S = 3600
_NOT_FOUND = 404
_MODEL_ROLE_FILE = re.compile(r"\d+\.model-(.+)\.json")


class ExpiredError(TrustError):
    """Metadata was signed too long ago. What runs goes on running."""


def plan_path(model: str) -> str:
    return f"plans/{model}.plan"


def spec_path(model: str, release: int) -> str:
    return f"releases/{model}/{release}.spec"


def model_role(model: str) -> str:
    """The TUF role that signs releases of `model`; the prefix keeps a model called `root` harmless."""
    return f"model-{model}"


def metadata_entries(bundle: TrustBundle, models: frozenset[str]) -> list[BundleEntry]:
    """The entries that a refresh for these models may read: metadata but for other models' roles, and the plans."""
    plans = {plan_path(model) for model in models}
    chosen = []
    for entry in bundle.entries:
        other = _MODEL_ROLE_FILE.fullmatch(entry.path)
        is_metadata = "/" not in entry.path and (other is None or other[1] in models)
        if is_metadata or entry.path in plans:
            chosen.append(entry)
    return chosen


@dataclass(frozen=True, slots=True)
class Target:
    """What signed metadata says about a file."""

    path: str
    sha256: bytes
    length_bytes: int


def parse_target(path: str, info: TargetFile) -> Target:
    """Read what TUF says about a file.

    Raises:
        TrustError: it is signed without a SHA-256.
    """
    try:
        return Target(path, bytes.fromhex(info.hashes["sha256"]), info.length)
    except (KeyError, ValueError) as exc:
        raise TrustError(f"{path} is signed without a SHA-256") from exc


@dataclass(frozen=True, slots=True)
class TrustedPlan:
    """A verified plan and the release that it names."""

    plan: RolloutPlan
    spec: Target


@dataclass(frozen=True, slots=True)
class Wait:
    """The bundle does not match the timestamp yet: more will come."""

    missing: str


@dataclass(frozen=True, slots=True)
class TrustedView:
    """What one timestamp vouches for.

    Attributes:
        plans: by model; a model without a plan has none.
        refused: why a model's plan cannot be followed; other models are not held up by it.
        clock_suspect: the system's clock stands before the clock floor, which was used in its place. Versions are
            enforced as ever; metadata that expired after the floor cannot be told from fresh.
    """

    versions: Mapping[str, int]
    plans: Mapping[str, TrustedPlan]
    refused: Mapping[str, str]
    clock_suspect: bool
    _updater: Updater = field(repr=False)

    def target(self, path: str) -> Target | None:
        """What the signed metadata says about `path`, or None when it does not know it.

        Raises:
            TrustError: the role that may answer cannot be verified.
        """
        try:
            return _find(self._updater, path)
        except (RepositoryError, DownloadError) as exc:
            raise TrustError(f"{path}: {exc}") from exc


@dataclass(frozen=True, slots=True)
class _Floor:
    versions: Mapping[str, int]
    clock_at: int


class TrustStore:
    """One node's trust.

    Args:
        bootstrap_root: the root metadata that the node was provisioned with.
        clock: Unix time.
    """

    def __init__(
        self,
        directory: Path,
        bootstrap_root: bytes,
        *,
        clock: Callable[[], float] = time.time,
        built_at: int = BUILT_AT,
    ) -> None:
        self._directory = directory
        self._bootstrap_root = bootstrap_root
        self._clock = clock
        self._built_at = built_at
        self._floor_file = CheckedFile(directory / "floor")

    def refresh(
        self, bundle: TrustBundle, timestamp: bytes, blobs: Mapping[bytes, bytes], models: frozenset[str]
    ) -> TrustedView | Wait:
        """Verify what the broker holds.

        Args:
            bundle: says under which digest each file is.
            timestamp: the newest timestamp metadata.
            blobs: files by digest; only from here is anything read.
            models: whose plans to look up.

        Raises:
            TrustError: something is forged, rolled back or inconsistent.
            ExpiredError: something is too old.
            DamagedError: both copies of the floor are damaged; a person must provision the node again.
            OSError: the disk failed.
        """
        self._directory.mkdir(parents=True, exist_ok=True)
        floor = self._load_floor()
        reader = _BundleReader(bundle, timestamp, blobs)
        system_at = int(self._clock())
        try:
            updater = self._updater(reader, max(system_at, floor.clock_at))
            updater.refresh()
            versions = self._checked_versions(updater, floor)
            plans, refused = _find_plans(updater, reader, models)
        except ExpiredMetadataError as exc:
            raise ExpiredError(str(exc)) from exc
        except DownloadError as exc:
            if reader.missing:
                return Wait(reader.missing)
            raise TrustError(str(exc)) from exc
        except RepositoryError as exc:
            raise TrustError(str(exc)) from exc
        clock_at = max(floor.clock_at, _signed_at(updater), system_at)
        self._save_floor(floor, _Floor(versions, clock_at))
        return TrustedView(versions, plans, refused, system_at < floor.clock_at, updater)

    def _updater(self, reader: "_BundleReader", reference_at: int) -> Updater:
        updater = Updater(
            str(self._directory / "tuf"),
            "shoal:",
            fetcher=reader,
            config=LIMITS,
            bootstrap=self._bootstrap_root,
        )
        # ngclient reads the system's clock in its constructor and offers no other; ours has a floor.
        updater._trusted_set.reference_time = dt.datetime.fromtimestamp(reference_at, dt.UTC)  # noqa: SLF001
        return updater

    def _checked_versions(self, updater: Updater, floor: _Floor) -> dict[str, int]:
        trusted = updater._trusted_set  # noqa: SLF001  ngclient shows verified versions nowhere else
        versions = {
            "root": trusted.root.version,
            "timestamp": trusted.timestamp.version,
            "snapshot": trusted.snapshot.version,
            **{name.removesuffix(".json"): meta.version for name, meta in trusted.snapshot.meta.items()},
        }
        for role, least in floor.versions.items():
            if versions.get(role, 0) < least:
                raise TrustError(f"{role} went back to version {versions.get(role, 0)}, {least} was seen before")
        return versions

    def _load_floor(self) -> _Floor:
        body = self._floor_file.load()
        if body is None:
            return _Floor({}, self._built_at)
        stored = json.loads(body)
        return _Floor(stored["versions"], max(stored["clock_at"], self._built_at))

    def _save_floor(self, old: _Floor, new: _Floor) -> None:
        if new.versions != old.versions or new.clock_at - old.clock_at >= _HOUR_S:
            self._floor_file.save(json.dumps({"versions": dict(new.versions), "clock_at": new.clock_at}).encode())


class _BundleReader(FetcherInterface):
    """Gives ngclient the files of one bundle, and nothing else.

    Attributes:
        missing: the first file that was asked for and is not here.
    """

    def __init__(self, bundle: TrustBundle, timestamp: bytes, blobs: Mapping[bytes, bytes]) -> None:
        self.missing = ""
        self._timestamp = timestamp
        self._digests = {entry.path: entry.sha256 for entry in bundle.entries}
        self._blobs = blobs

    def _fetch(self, url: str) -> Iterator[bytes]:
        name = url.rpartition("/")[2]
        if name == "timestamp.json":
            return iter([self._timestamp])
        data = self._blobs.get(self._digests.get(name, b""))
        if data is not None:
            return iter([data])
        if name.endswith(".root.json") and name not in self._digests:
            raise DownloadHTTPError(f"{name} does not exist", _NOT_FOUND)
        self.missing = self.missing or name
        raise DownloadError(f"{name} is not here")

    def load(self, target: Target) -> bytes | None:
        data = self._blobs.get(target.sha256)
        if data is None:
            self.missing = self.missing or target.path
        return data


def _find(updater: Updater, path: str) -> Target | None:
    info = updater.get_targetinfo(path)
    if info is None:
        return None
    return parse_target(path, info)


def _find_plans(
    updater: Updater, reader: _BundleReader, models: frozenset[str]
) -> tuple[dict[str, TrustedPlan], dict[str, str]]:
    plans: dict[str, TrustedPlan] = {}
    refused: dict[str, str] = {}
    for model in sorted(models):
        try:
            found = _find_plan(updater, reader, model)
        except (RepositoryError, DownloadError, TrustError) as exc:
            if reader.missing:
                raise
            refused[model] = str(exc)
            continue
        if found is not None:
            plans[model] = found
    return plans, refused


def _find_plan(updater: Updater, reader: _BundleReader, model: str) -> TrustedPlan | None:
    target = _find(updater, plan_path(model))
    if target is None:
        return None
    data = reader.load(target)
    if data is None:
        raise DownloadError(f"{target.path} is not here")
    try:
        plan = decode(RolloutPlan, data)
    except PayloadError as exc:
        raise TrustError(f"{target.path}: {exc}") from exc
    if plan.model != model or plan.spec_path != spec_path(model, plan.release):
        raise TrustError(f"{target.path} is for {plan.model!r} and names {plan.spec_path!r}")
    spec = _find(updater, plan.spec_path)
    if spec is None:
        raise TrustError(f"{plan.spec_path} is in no trusted metadata")
    return TrustedPlan(plan, spec)


def _signed_at(updater: Updater) -> int:
    """When the publisher says that it signed, at most when what it signed expires."""
    trusted = updater._trusted_set  # noqa: SLF001  as above
    said = trusted.timestamp.unrecognized_fields.get(SIGNED_AT_FIELD, 0)
    expires_at = min(int(trusted.timestamp.expires.timestamp()), int(trusted.root.expires.timestamp()))
    return min(said, expires_at) if isinstance(said, int) else 0
