"""Where a node keeps one model on disk.

    state.a, state.b   the slots, in two checksummed copies
    files/{sha256}     artefacts and release specs, addressed by content; never changed once here
    staging/{sha256}   what has arrived of an artefact so far

A file is in `files/` before the state names it and leaves only after the state no longer does, so that the state
alone decides what runs and one atomic write switches it.
"""

import contextlib
import json
import logging
import os
from pathlib import Path
from typing import Any

from shoal.errors import ModelError
from shoal.release.chunks import Assembler, digest
from shoal.release.durable import CheckedFile, DamagedError, sync_directory, write_atomic
from shoal.release.slots import Content, Phase, Refusal, Slot, Slots

log = logging.getLogger(__name__)


class SlotStore:
    """Files of one model. `open()` makes the directories; nothing is written before."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._files = directory / "files"
        self._staging = directory / "staging"
        self._state = CheckedFile(directory / "state")

    def open(self) -> Slots:
        """Return the slots as they were saved; empty ones where nothing usable was."""
        for directory in (self._files, self._staging):
            directory.mkdir(parents=True, exist_ok=True)
        try:
            body = self._state.load()
        except DamagedError as exc:
            log.error("slots are lost, the model will be fetched again error=%s", exc)  # noqa: TRY400  no bug of ours
            return Slots()
        return Slots() if body is None else _parse_slots(json.loads(body))

    def save(self, slots: Slots) -> None:
        self._state.save(json.dumps(_slots_body(slots)).encode())
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

    def put(self, data: bytes) -> None:
        write_atomic(self.path(digest(data)), data)

    def stage(self, sha256: bytes, assembler: Assembler) -> "Staging":
        """Open the staging file of an artefact and tell `assembler` which chunks it has; others are removed."""
        path = self._staging / sha256.hex()
        for other in self._staging.iterdir():
            if other != path:
                other.unlink()
        return Staging(path, self.path(sha256), sha256, assembler)

    def _sweep(self, slots: Slots) -> None:
        keep = {item.hex() for slot in slots.pair for item in (slot.content.sha256, slot.content.spec_sha256)}
        for path in self._files.iterdir():
            if path.name not in keep:
                with contextlib.suppress(OSError):  # the state is saved already; the next sweep tries again
                    path.unlink()


class Staging:
    """An artefact on its way: chunks go to their places as they come, in any order."""

    def __init__(self, path: Path, final: Path, sha256: bytes, assembler: Assembler) -> None:
        self._path = path
        self._final = final
        self._sha256 = sha256
        self._assembler = assembler
        self._handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        assembler.restore(path.read_bytes())

    def accept(self, payload: bytes) -> bool:
        """Write a chunk where it belongs; true once all are here."""
        for offset in self._assembler.accept(payload):
            os.pwrite(self._handle, payload, offset)
        return self._assembler.complete

    def commit(self) -> None:
        """Verify the whole file and move it to where slots find it.

        Raises:
            ModelError: the chunks do not add up to the artefact that was signed.
        """
        os.ftruncate(self._handle, self._assembler.manifest.length_bytes)
        os.fsync(self._handle)
        self.close()
        if digest(self._path.read_bytes()) != self._sha256:
            self._path.unlink()
            raise ModelError(f"the chunks of {self._sha256.hex()} make another file")
        self._path.replace(self._final)
        sync_directory(self._final.parent)

    def close(self) -> None:
        if self._handle >= 0:
            os.close(self._handle)
            self._handle = -1


def _content_body(content: Content) -> dict[str, Any]:
    return {"release": content.release, "sha256": content.sha256.hex(), "spec_sha256": content.spec_sha256.hex()}


def _parse_content(body: dict[str, Any]) -> Content:
    return Content(body["release"], bytes.fromhex(body["sha256"]), bytes.fromhex(body["spec_sha256"]))


def _slots_body(slots: Slots) -> dict[str, Any]:
    return {
        "active": slots.active,
        "pair": [
            {"phase": slot.phase.value, "tries_left": slot.tries_left, "content": _content_body(slot.content)}
            for slot in slots.pair
        ],
        "refusals": [{"reason": item.reason, "content": _content_body(item.content)} for item in slots.refusals],
    }


def _parse_slots(body: dict[str, Any]) -> Slots:
    first, second = (
        Slot(Phase(item["phase"]), _parse_content(item["content"]), item["tries_left"]) for item in body["pair"]
    )
    refusals = tuple(Refusal(_parse_content(item["content"]), item["reason"]) for item in body["refusals"])
    return Slots((first, second), body["active"], refusals)
