"""The publisher's directory: what is published, and what waits to be.

    metadata/timestamp.json        names the current generation: replacing it is the commit
    metadata/{version}.{role}.json every other metadata file, never changed once committed
    files/{sha256}                 plans, release specs and artefacts of the current generation
    queue/{time}.{role}/           an order: `metadata.json`, signed, and the new files it names, by digest;
                                   with a change of keys also `{role}.resigned.json` of the roles that it concerns
    refused/{time}.{role}/         an order that was refused, with `reason`

Trainer and controller write only to `queue/`, under a lock, by renaming a finished directory into it.
"""

import fcntl
import shutil
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import IO

from tuf.api.metadata import Metadata, Snapshot, Timestamp

from cloud.repository import ROOT_VERSION_FIELD, Generation, parse_role, parse_root
from shoal.errors import ConfigError, TrustError
from shoal.release.chunks import digest
from shoal.release.durable import sync_directory, write_atomic

_RESIGNED_SUFFIX = ".resigned.json"
_NO_ROLES: Mapping[str, bytes] = MappingProxyType({})
_DIRECTORIES = ("metadata", "files", "queue", "refused", "tmp")


class PublisherRunsError(ConfigError):
    """Another process is the publisher of this store."""


@dataclass(frozen=True, slots=True)
class Order:
    """New signed metadata of one role, and the files that it names and that are not published yet.

    Attributes:
        role: `root` and `targets` change keys; the others deliver.
        resigned: roles that must change with it, as signed with their new keys.
    """

    name: str
    role: str
    metadata: bytes
    directory: Path
    resigned: Mapping[str, bytes] = field(default_factory=dict)

    def file(self, sha256: bytes) -> bytes | None:
        return _read_if_there(self.directory / sha256.hex())

    def size_bytes(self) -> int:
        """Everything that lies in it."""
        return sum(path.stat().st_size for path in self.directory.iterdir())


class ReleaseStore:
    """See the module. Every method that writes leaves either the old or the new state, whatever kills it."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self._metadata, self._files, self._queue, self._refused, self._tmp = (directory / n for n in _DIRECTORIES)

    def create(self, generation: Generation) -> None:
        """Begin a store.

        Raises:
            ConfigError: there is one already.
        """
        if (self._metadata / "timestamp.json").exists():
            raise ConfigError(f"{self.directory} holds a published generation already")
        for name in _DIRECTORIES:
            (self.directory / name).mkdir(parents=True, exist_ok=True)
        self.commit(generation, {})

    def load(self) -> Generation:
        """Read the current generation.

        Raises:
            ConfigError: the store was never created.
        """
        timestamp = _read_if_there(self._metadata / "timestamp.json")
        if timestamp is None:
            raise ConfigError(f"{self.directory} holds no published generation: create it first")
        signed = Metadata[Timestamp].from_bytes(timestamp).signed
        version = signed.snapshot_meta.version
        snapshot = (self._metadata / f"{version}.snapshot.json").read_bytes()
        meta = Metadata[Snapshot].from_bytes(snapshot).signed.meta
        roles = {
            name.removesuffix(".json"): (self._metadata / f"{info.version}.{name}").read_bytes()
            for name, info in meta.items()
        }
        return Generation(self._roots(signed), roles, snapshot, timestamp)

    def root(self) -> bytes:
        """The first root: what nodes are provisioned with."""
        return (self._metadata / "1.root.json").read_bytes()

    def commit(self, generation: Generation, files: Mapping[bytes, bytes]) -> None:
        """Make `generation` the current one. `files` are those it names that are not here yet."""
        for sha256, data in files.items():
            write_atomic(self.file_path(sha256), data)
        for name, data in generation.files().items():
            if _read_if_there(self._metadata / name) != data:
                write_atomic(self._metadata / name, data)
        write_atomic(self._metadata / "timestamp.json", generation.timestamp)
        self._sweep(generation)

    def metadata_path(self, name: str) -> Path:
        return self._metadata / name

    def file_path(self, sha256: bytes) -> Path:
        return self._files / sha256.hex()

    def file(self, sha256: bytes) -> bytes | None:
        """Return a published file, or None when it is missing or damaged."""
        data = _read_if_there(self.file_path(sha256))
        return data if data is not None and digest(data) == sha256 else None

    def unchecked_file(self, sha256: bytes) -> bytes | None:
        """Return a published file as it lies there, or None when it is missing."""
        return _read_if_there(self.file_path(sha256))

    def own(self) -> IO[str]:
        """Become the one publisher of this store, until the returned file is closed or the process ends.

        Raises:
            PublisherRunsError: another process is.
        """
        lock = (self.directory / "publisher.lock").open("w")
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as exc:
            lock.close()
            raise PublisherRunsError(f"another publisher runs on {self.directory}") from exc
        return lock

    # -- the queue -----------------------------------------------------------------------------------------------

    @contextmanager
    def submitting(self) -> Iterator[None]:
        """Hold the queue against other submitters; the publisher needs no lock."""
        with (self.directory / "lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield

    def submit(
        self, role: str, metadata: bytes, files: Mapping[bytes, bytes], resigned: Mapping[str, bytes] = _NO_ROLES
    ) -> None:
        """Queue an order; when this returns it is on disk."""
        name = f"{time.time_ns():020d}.{role}"
        draft = self._tmp / name
        draft.mkdir()
        for sha256, data in files.items():
            write_atomic(draft / sha256.hex(), data)
        for name_of, data in resigned.items():
            write_atomic(draft / f"{name_of}{_RESIGNED_SUFFIX}", data)
        write_atomic(draft / "metadata.json", metadata)
        draft.rename(self._queue / name)
        sync_directory(self._queue)

    def orders(self) -> list[Order]:
        """What waits, oldest first."""
        found = []
        for directory in sorted(self._queue.iterdir()):
            metadata = _read_if_there(directory / "metadata.json")
            if metadata is not None:
                role = directory.name.partition(".")[2]
                found.append(Order(directory.name, role, metadata, directory, _resigned(directory)))
        return found

    def finish(self, order: Order) -> None:
        """Forget an order that was committed."""
        shutil.rmtree(order.directory)
        sync_directory(self._queue)

    def refuse(self, order: Order, reason: str) -> None:
        """Put an order aside for people."""
        write_atomic(order.directory / "reason", reason.encode())
        order.directory.rename(self._refused / order.name)
        sync_directory(self._queue)

    def newest(self) -> "Newest":
        """What is published, with everything that waits on top. For submitters, who hold the lock."""
        orders = self.orders()  # before the generation: an order that leaves in between is in the generation
        generation = self.load()
        root, roles = generation.roots[-1], dict(generation.roles)
        for order in orders:
            try:
                if order.role == "root":
                    root = max(root, order.metadata, key=_root_version)
                else:
                    _keep_newer(roles, order.role, order.metadata)
                for role, metadata in order.resigned.items():
                    _keep_newer(roles, role, metadata)
            except TrustError:
                continue
        return Newest(root, roles, self, orders)

    def _roots(self, timestamp: Timestamp) -> tuple[bytes, ...]:
        """Every committed root; a later one may lie there, written by a commit that was cut short."""
        written = sum(1 for _ in self._metadata.glob("*.root.json"))
        count = timestamp.unrecognized_fields.get(ROOT_VERSION_FIELD, written)
        return tuple((self._metadata / f"{number}.root.json").read_bytes() for number in range(1, count + 1))

    def _sweep(self, generation: Generation) -> None:
        """Remove what the generation does not name, but never a root."""
        names = set(generation.files()) | {"timestamp.json"}
        for path in self._metadata.iterdir():
            if path.name not in names and not path.name.endswith(".root.json"):
                path.unlink()
        digests = {info.hashes["sha256"] for info in generation.targets().values()}
        for path in self._files.iterdir():
            if path.name not in digests:
                path.unlink()


@dataclass(frozen=True, slots=True)
class Newest:
    """The newest metadata of each role, published or waiting, and the files behind it."""

    root: bytes
    roles: Mapping[str, bytes]
    _store: ReleaseStore
    _orders: list[Order]

    def file(self, sha256: bytes) -> bytes | None:
        waiting = (order.file(sha256) for order in self._orders)
        return next((data for data in waiting if data is not None), None) or self._store.file(sha256)


def _keep_newer(roles: dict[str, bytes], role: str, metadata: bytes) -> None:
    known = parse_role(roles[role]).version if role in roles else 0
    if parse_role(metadata).version > known:
        roles[role] = metadata


def _root_version(data: bytes) -> int:
    return parse_root(data).signed.version


def _resigned(directory: Path) -> dict[str, bytes]:
    found = {path: _read_if_there(path) for path in sorted(directory.glob(f"*{_RESIGNED_SUFFIX}"))}
    # One that is gone by now was committed, and is in the generation.
    return {path.name.removesuffix(_RESIGNED_SUFFIX): data for path, data in found.items() if data is not None}


def _read_if_there(path: Path) -> bytes | None:
    try:
        return path.read_bytes()
    except FileNotFoundError:
        return None
