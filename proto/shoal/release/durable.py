"""Files that survive a power cut: whole, or as they were."""

import hashlib
import os
from pathlib import Path

from shoal.errors import ShoalError


def sync_directory(directory: Path) -> None:
    """Make renames and removals in `directory` durable."""
    handle = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_atomic(path: Path, data: bytes, mode: int = 0o644) -> None:
    """Replace `path` with `data`: temporary file, fsync, rename, fsync of the directory."""
    temporary = path.with_name(path.name + ".tmp")
    write_synced(temporary, data, mode)
    temporary.replace(path)
    sync_directory(path.parent)


def write_synced(path: Path, data: bytes, mode: int = 0o644) -> None:
    """Write a file whose bytes, though not yet its name, survive a power cut."""
    handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, mode)
    with os.fdopen(handle, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


class DamagedError(ShoalError):
    """Both copies of a checked file exist and neither can be read."""


class CheckedFile:
    """A small file in two checksummed copies, written in turn, so that one is always whole.

    A copy is overwritten where it lies, for one fsync instead of the two of a rename: whatever a power cut makes of
    it, the other copy, one version older, stands.
    """

    def __init__(self, path: Path) -> None:
        self._copies = (path.with_suffix(".a"), path.with_suffix(".b"))
        # The newest whole copy: its serial number and its place; None until it was looked for, or a write failed.
        self._newest: tuple[int, int] | None = None

    def load(self) -> bytes | None:
        """Return the newest whole copy, or None when none was ever written.

        Raises:
            DamagedError: something was written, and no copy is whole.
        """
        found = self._find()
        if found is not None:
            serial, place, body = found
            self._newest = serial, place
            return body
        if any(path.exists() for path in self._copies):
            raise DamagedError(f"{self._copies[0]} and its second copy are damaged")
        return None

    def begin(self, body: bytes) -> None:
        """Make the first version, in both copies, so that no later save has to make a name durable."""
        for path in self._copies:
            write_atomic(path, _signed(0, body))
        self._newest = 0, 1

    def save(self, body: bytes) -> None:
        """Write over the older copy."""
        if self._newest is None:
            found = self._find()
            self._newest = (-1, 1) if found is None else found[:2]
        serial, place = self._newest
        self._newest = None
        _overwrite(self._copies[1 - place], _signed(serial + 1, body))
        self._newest = serial + 1, 1 - place

    def _find(self) -> tuple[int, int, bytes] | None:
        """The newest whole copy: its serial number, its place and what it says."""
        whole = [(copy[0], place, copy[1]) for place, path in enumerate(self._copies) if (copy := _read_copy(path))]
        return max(whole, default=None)


def _signed(serial: int, body: bytes) -> bytes:
    signed = b"%d\n" % serial + body
    return hashlib.sha256(signed).hexdigest().encode() + b"\n" + signed


def _overwrite(path: Path, data: bytes) -> None:
    """Replace what is in a file; a power cut may leave anything in it."""
    try:
        handle = os.open(path, os.O_WRONLY)
    except FileNotFoundError:
        write_atomic(path, data)  # a new name must be durable too
        return
    with os.fdopen(handle, "wb") as file:
        file.write(data)
        file.truncate()
        file.flush()
        os.fsync(file.fileno())


def _read_copy(path: Path) -> tuple[int, bytes] | None:
    try:
        checksum, _, signed = path.read_bytes().partition(b"\n")
    except FileNotFoundError:
        return None
    if hashlib.sha256(signed).hexdigest().encode() != checksum:
        return None
    serial, _, body = signed.partition(b"\n")
    return int(serial), body
