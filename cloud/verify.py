"""Check a release store, or a copy of one, with nothing but its files: what nodes check, and then the rest.

Reads only. A fault is one line for people; a fault does not hide those that follow, as far as anything can be read.
"""

import datetime as dt
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from tuf.api.exceptions import RepositoryError
from tuf.api.metadata import Metadata, MetaFile, Root, Snapshot, Targets, Timestamp

from cloud.release_orders import check_content
from cloud.repository import ROOT_VERSION_FIELD, Generation, parse_metadata, parse_role, parse_root
from cloud.rotation_check import role_faults, signature_fault, verify_root
from shoal.errors import ShoalError, TrustError
from shoal.release.chunks import digest
from shoal.release.trust import parse_target

_TRIES = 3


@dataclass(frozen=True, slots=True)
class Checked:
    """What was found.

    Attributes:
        versions: by role, of what could be read.
        files: how many delivered files are whole.
    """

    faults: tuple[str, ...]
    versions: Mapping[str, int]
    files: int


def verify_store(directory: Path, now: dt.datetime, root: bytes | None = None) -> Checked:
    """Check every signature, version, expiry, digest and file, from the first root to the last chunk.

    Args:
        directory: has `metadata/` and `files/`.
        now: the time to check expiry against.
        root: what nodes were provisioned with; without it the store's own first root is believed.
    """
    for _ in range(_TRIES):
        check = _Check(directory, now)
        check.run(root)
        # A publisher may have gone on to another generation meanwhile.
        if not check.faults or check.timestamp_data == _read(directory / "metadata" / "timestamp.json"):
            break
    return Checked(tuple(check.faults), check.versions, check.files)


class _Check:
    """One reading of a store."""

    def __init__(self, directory: Path, now: dt.datetime) -> None:
        self.faults: list[str] = []
        self.versions: dict[str, int] = {}
        self.files = 0
        self.timestamp_data: bytes | None = None
        self._metadata = directory / "metadata"
        self._files = directory / "files"
        self._now = now

    def run(self, root: bytes | None) -> None:
        try:
            generation = self._load(root)
            self.faults += role_faults(generation)
        except (ShoalError, RepositoryError) as exc:
            self.faults.append(str(exc))
            return
        for role, data in generation.roles.items():
            try:
                self._check_files(role, parse_role(data), generation)
            except ShoalError as exc:
                self.faults.append(str(exc))

    def _load(self, trusted: bytes | None) -> Generation:
        """Read metadata from the timestamp on.

        Raises:
            TrustError: so much is missing or broken that nothing more can be said.
        """
        self.timestamp_data = self._need("timestamp.json")
        timestamp = parse_metadata(Timestamp, self.timestamp_data)
        roots, root = self._load_roots(timestamp.signed, trusted)
        self._check_signed("timestamp", timestamp, root)
        info = timestamp.signed.snapshot_meta
        data = self._need(f"{info.version}.snapshot.json")
        self._check_meta(f"{info.version}.snapshot.json", data, info)
        snapshot = parse_metadata(Snapshot, data)
        self._check_signed("snapshot", snapshot, root, info.version)
        roles = {}
        for name, meta in snapshot.signed.meta.items():
            role = name.removesuffix(".json")
            roles[role] = self._need(f"{meta.version}.{name}")
            self._check_meta(f"{meta.version}.{name}", roles[role], meta)
            self._check_age(role, parse_role(roles[role]), meta.version)
        return Generation(roots, roles, data, self.timestamp_data)

    def _load_roots(self, timestamp: Timestamp, trusted: bytes | None) -> tuple[tuple[bytes, ...], Root]:
        said = timestamp.unrecognized_fields.get(ROOT_VERSION_FIELD)
        count = said if isinstance(said, int) else len(list(self._metadata.glob("*.root.json")))
        roots: list[bytes] = []
        before: Root | None = None
        for version in range(1, count + 1):
            roots.append(self._need(f"{version}.root.json"))
            before = verify_root(before, roots[-1])
        if before is None:
            raise TrustError("1.root.json is missing")
        if trusted is not None and trusted not in roots:
            self.faults.append(f"root {parse_root(trusted).signed.version} as given is none of this store's")
        self._check_age("root", before)
        return tuple(roots), before

    def _check_signed(
        self, role: str, metadata: Metadata[Timestamp] | Metadata[Snapshot], root: Root, version: int | None = None
    ) -> None:
        fault = signature_fault(root, role, metadata)
        if fault:
            self.faults.append(f"{role}: {fault}")
        self._check_age(role, metadata.signed, version)

    def _check_age(self, role: str, signed: Root | Timestamp | Snapshot | Targets, version: int | None = None) -> None:
        self.versions[role] = signed.version
        if version is not None and signed.version != version:
            self.faults.append(f"{role}: version {signed.version}, expected {version}")
        if signed.is_expired(self._now):
            self.faults.append(f"{role}: expired at {signed.expires.isoformat()}")

    def _check_meta(self, name: str, data: bytes, info: MetaFile) -> None:
        try:
            info.verify_length_and_hashes(data)
        except RepositoryError as exc:
            self.faults.append(f"{name}: {exc}")

    def _check_files(self, role: str, targets: Targets, generation: Generation) -> None:
        found: dict[str, bytes] = {}
        for path, info in sorted(targets.targets.items()):
            target = parse_target(path, info)
            data = _read(self._files / target.sha256.hex())
            if data is None:
                self.faults.append(f"{path}: {target.sha256.hex()} is missing")
            elif (len(data), digest(data)) != (target.length_bytes, target.sha256):
                self.faults.append(f"{path}: {target.sha256.hex()} is damaged")
            else:
                found[path] = data
        self.files += len(found)
        if role == "targets" or len(found) < len(targets.targets):
            return
        check_content(role, found, generation.roles)

    def _need(self, name: str) -> bytes:
        data = _read(self._metadata / name)
        if data is None:
            raise TrustError(f"{name} is missing")
        return data


def _read(path: Path) -> bytes | None:
    try:
        return path.read_bytes()
    except OSError:
        return None
