"""Where a node keeps one model on disk.

    state.a, state.b   the slots, in two checksummed copies
    files/{sha256}     artefacts and release specs, addressed by content; never changed once here
    staging/{sha256}   what has arrived of an artefact so far

A file is in `files/` before the state names it and leaves only after the state no longer does, so that the state
alone decides what runs and one atomic write switches it.

Synced are, in this order: the artefact's bytes and the spec, the names of both, then each state; chunks on their way
are not. What a power cut makes of `staging/`, or of `files/` before a state names it, has another digest than its name,
and is fetched again.

`admit` hashes and syncs a whole artefact, which may take seconds on a card. It touches nothing that a state names, so
that another thread can do it; everything else is quick and belongs to the loop.
"""

import contextlib
import hashlib
import json
import logging
import os
from pathlib import Path
from typing import Any

from shoal.errors import ModelError
from shoal.release.chunks import Assembler, digest
from shoal.release.durable import CheckedFile, DamagedError, sync_directory, write_atomic, write_synced
from shoal.release.slots import Content, Phase, Refusal, Slot, Slots

log = logging.getLogger(__name__)

# Of a file: inode, size in bytes, and when it was written in nanoseconds.
Identity = tuple[int, int, int]


class SlotStore:
    """Files of one model. `open()` makes the directories and the first state; nothing is written before."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._files = directory / "files"
        self._staging = directory / "staging"
        self._state = CheckedFile(directory / "state")
        # What a file was like when its digest was right; a start begins with nothing.
        self._whole: dict[bytes, Identity] = {}
        # The names that are being admitted, which no state has yet: not to be swept.
        self._incoming: frozenset[str] = frozenset()

    def open(self) -> Slots:
        """Return the slots as they were saved; empty ones where nothing usable was."""
        for directory in (self._files, self._staging):
            directory.mkdir(parents=True, exist_ok=True)
        try:
            body = self._state.load()
        except DamagedError as exc:
            log.error("slots are lost, the model will be fetched again error=%s", exc)  # noqa: TRY400  no bug of ours
            return Slots()
        if body is not None:
            return _parse_slots(json.loads(body))
        self._state.begin(_slots_bytes(Slots()))
        return Slots()

    def save(self, slots: Slots) -> None:
        self._state.save(_slots_bytes(slots))
        self._sweep(slots)

    def path(self, sha256: bytes) -> Path:
        return self._files / sha256.hex()

    def load(self, sha256: bytes) -> bytes | None:
        """Return a file, or None when it is missing or damaged."""
        try:
            data = self.path(sha256).read_bytes()
        except FileNotFoundError:
            return None
        return data if digest(data) == sha256 else None

    def has(self, sha256: bytes) -> bool:
        """Whether a file is here and whole. It is hashed once; later only its size and its time are looked at."""
        try:
            found = _identity(self.path(sha256))
        except FileNotFoundError:
            return False
        if self._whole.get(sha256) != found:
            self._whole.pop(sha256, None)
            if _digest_file(self.path(sha256)) != sha256:
                return False
            self._whole[sha256] = found
        return True

    def put(self, data: bytes) -> None:
        """Keep a file; on return it is durable."""
        write_atomic(self.path(digest(data)), data)

    def stage(self, sha256: bytes, spec_data: bytes, assembler: Assembler) -> "Staging":
        """Open the staging file of an artefact and tell `assembler` which chunks it has; others are removed."""
        path = self._staging / sha256.hex()
        for other in self._staging.iterdir():
            if other != path:
                other.unlink()
        staging = Staging(path, sha256, spec_data, assembler)
        self._incoming = frozenset((path.name, staging.spec_path.name))
        return staging

    def admit(self, staging: "Staging") -> Identity:
        """Move what has arrived to where slots find it, verified and durable; hand the result to `recognise`.

        Raises:
            ModelError: the chunks do not add up to the artefact that was signed.
        """
        staging.seal()
        staging.path.replace(self.path(staging.sha256))
        staging.spec_path.replace(self._files / staging.spec_path.name)
        sync_directory(self._files)
        return _identity(self.path(staging.sha256))

    def recognise(self, sha256: bytes, identity: Identity) -> None:
        """Take an artefact that was admitted for whole as long as its file stays as it is."""
        self._whole[sha256] = identity

    def _sweep(self, slots: Slots) -> None:
        named = {item for slot in slots.pair for item in (slot.content.sha256, slot.content.spec_sha256)}
        self._whole = {sha256: found for sha256, found in self._whole.items() if sha256 in named}
        keep = {sha256.hex() for sha256 in named}
        if self._incoming <= keep:
            self._incoming = frozenset()
        keep |= self._incoming
        for path in self._files.iterdir():
            if path.name not in keep:
                with contextlib.suppress(OSError):  # the state is saved already; the next sweep tries again
                    path.unlink()


class Staging:
    """An artefact on its way, with the spec that describes it: chunks go to their places as they come, in any order."""

    def __init__(self, path: Path, sha256: bytes, spec_data: bytes, assembler: Assembler) -> None:
        self.path = path
        self.sha256 = sha256
        self.spec_path = path.with_name(digest(spec_data).hex())
        self._spec_data = spec_data
        self._assembler = assembler
        self._handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        assembler.restore(path.read_bytes())

    def accept(self, sha256: bytes, payload: bytes) -> bool:
        """Write a chunk, whose digest is `sha256`, where it belongs; true once all are here."""
        for offset in self._assembler.accept(sha256, payload):
            os.pwrite(self._handle, payload, offset)
        return self._assembler.complete

    def seal(self) -> None:
        """Verify all of it, make it durable and close it; what is not good is removed.

        Raises:
            ModelError: the chunks do not add up to the artefact that was signed.
        """
        os.ftruncate(self._handle, self._assembler.manifest.length_bytes)
        if _digest_file(self.path) != self.sha256:
            self.path.unlink()
            raise ModelError(f"the chunks of {self.sha256.hex()} make another file")
        try:
            os.fsync(self._handle)
        except OSError:
            # The kernel takes pages for clean that it failed to write: a second fsync would succeed without them.
            with contextlib.suppress(OSError):
                self.path.unlink()
            raise
        self.close()
        write_synced(self.spec_path, self._spec_data)

    def close(self) -> None:
        if self._handle >= 0:
            os.close(self._handle)
            self._handle = -1


def _digest_file(path: Path) -> bytes:
    with path.open("rb", buffering=0) as file:
        return hashlib.file_digest(file, "sha256").digest()


def _identity(path: Path) -> Identity:
    found = path.stat()
    return found.st_ino, found.st_size, found.st_mtime_ns


def _content_body(content: Content) -> dict[str, Any]:
    return {"release": content.release, "sha256": content.sha256.hex(), "spec_sha256": content.spec_sha256.hex()}


def _parse_content(body: dict[str, Any]) -> Content:
    return Content(body["release"], bytes.fromhex(body["sha256"]), bytes.fromhex(body["spec_sha256"]))


def _slots_bytes(slots: Slots) -> bytes:
    body = {
        "active": slots.active,
        "pair": [
            {"phase": slot.phase.value, "tries_left": slot.tries_left, "content": _content_body(slot.content)}
            for slot in slots.pair
        ],
        "refusals": [{"reason": item.reason, "content": _content_body(item.content)} for item in slots.refusals],
    }
    return json.dumps(body).encode()


def _parse_slots(body: dict[str, Any]) -> Slots:
    first, second = (
        Slot(Phase(item["phase"]), _parse_content(item["content"]), item["tries_left"]) for item in body["pair"]
    )
    refusals = tuple(Refusal(_parse_content(item["content"]), item["reason"]) for item in body["refusals"])
    return Slots((first, second), body["active"], refusals)
