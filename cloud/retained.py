"""What one generation keeps retained on the broker, and how much that may be.

Invariants:
- a blob that several files share is counted once, as the broker holds it once;
- no release is taken that makes the live set larger than the budget;
- while the broker still holds what no release names any more, no release is taken that has no room beside it.

Plans and changes of keys are counted and never refused: with them a bad release is stopped and a stolen key replaced,
and there is one plan a model.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from cloud.release_store import ReleaseStore
from cloud.repository import Generation
from shoal.errors import ModelError, TrustError
from shoal.release.chunks import CHUNK_BYTES, digest, manifest_of
from shoal.v1.release_pb2 import BundleEntry, TrustBundle

# Mosquitto holds every retained message in memory and writes all of them at each autosave: with 200 MB of them and an
# autosave a second, a round trip's p99 was 282 ms instead of 0.4.
RETAINED_BUDGET_BYTES = 256 << 20

LoadFile = Callable[[bytes], bytes | None]


class OverBudgetError(ModelError):
    """A release would make the broker retain more than it may."""


@dataclass(frozen=True, slots=True)
class BlobSource:
    """Where a blob's bytes are."""

    path: Path
    offset: int
    length_bytes: int

    def load(self) -> bytes:
        with self.path.open("rb") as file:
            file.seek(self.offset)
            return file.read(self.length_bytes)


@dataclass(frozen=True, slots=True)
class LiveSet:
    """Everything that is retained for one generation."""

    blobs: dict[bytes, BlobSource]
    bundle: TrustBundle
    timestamp: bytes

    @property
    def size_bytes(self) -> int:
        """Payloads alone; topics and properties come to about 200 bytes a message."""
        blobs = sum(source.length_bytes for source in self.blobs.values())
        return blobs + self.bundle.ByteSize() + len(self.timestamp)


def live_set(generation: Generation, store: ReleaseStore, load: LoadFile | None = None) -> LiveSet:
    """List what a generation needs on the broker: metadata, plans and specs through the bundle, artefacts' chunks.

    Args:
        generation: published, or proposed.
        store: where its files are, or will be once it is committed.
        load: finds a file by its digest; by default in the store, where it is not checked again.

    Raises:
        TrustError: a file is missing.
    """
    blobs: dict[bytes, BlobSource] = {}
    entries = [_entry(name, data, store.metadata_path(name), blobs) for name, data in generation.files().items()]
    for path, info in sorted(generation.targets().items()):
        sha256 = bytes.fromhex(info.hashes["sha256"])
        data = (load or store.unchecked_file)(sha256)
        if data is None:
            raise TrustError(f"{path}: the file that was signed is not here")
        source = store.file_path(sha256)
        if path.startswith("models/"):
            _add_chunks(data, source, blobs)
        else:
            entries.append(_entry(path, data, source, blobs))
    return LiveSet(blobs, TrustBundle(entries=entries), generation.timestamp)


def check_budget(name: str, *, present_bytes: int, next_bytes: int, budget_bytes: int) -> None:
    """Refuse a release for which there is no room. One that makes less retained than before is always let through.

    Args:
        name: what is refused.
        present_bytes: the live set's size now.
        next_bytes: and with the release.
        budget_bytes: what it may be.

    Raises:
        OverBudgetError: there is no room.
    """
    if next_bytes > max(present_bytes, budget_bytes):
        raise OverBudgetError(
            f"{name}: {next_bytes} bytes would be retained, {present_bytes} are, "
            f"expected at most {budget_bytes} (retained_budget_bytes)"
        )


def must_clear_first(*, present_bytes: int, stale_blobs: int, brought_bytes: int, budget_bytes: int) -> bool:
    """Whether a release has to wait for blobs to be cleared that are no longer live, since they fill the room for it.

    Each of them counts as a whole chunk, which none exceeds: the ledger knows no lengths.
    """
    return stale_blobs > 0 and present_bytes + stale_blobs * CHUNK_BYTES + brought_bytes > budget_bytes


def _entry(name: str, data: bytes, source: Path, blobs: dict[bytes, BlobSource]) -> BundleEntry:
    chunks = _add_chunks(data, source, blobs)
    return BundleEntry(path=name, sha256=digest(data), length_bytes=len(data), chunks=chunks if len(chunks) > 1 else ())


def _add_chunks(data: bytes, source: Path, blobs: dict[bytes, BlobSource]) -> tuple[bytes, ...]:
    manifest = manifest_of(data)
    for index, item in enumerate(manifest.digests):
        blobs[item] = BlobSource(source, index * CHUNK_BYTES, manifest.length_of(index))
    return manifest.digests
