"""A file as content-addressed chunks, and back. Pure.

Invariants:
- a manifest explains its length exactly: every chunk but the last is `chunk_bytes` long;
- a chunk counts as present only under the digest that the manifest gives for its place;
- what is missing is always named chunk by chunk, never "the whole file".
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

from shoal.errors import PayloadError

# Brokers and client packet limits drop larger messages silently; see MEASURED section 3.
CHUNK_BYTES = 65_536
DIGEST_BYTES = 32


def digest(data: bytes | memoryview) -> bytes:
    return hashlib.sha256(data).digest()


def split(data: bytes, chunk_bytes: int = CHUNK_BYTES) -> list[bytes]:
    """Cut `data` into chunks."""
    return [data[at : at + chunk_bytes] for at in range(0, len(data), chunk_bytes)]


@dataclass(frozen=True, slots=True)
class Manifest:
    """The digests of a file's chunks, in order.

    Raises:
        PayloadError: the digests do not explain the length, or a limit is exceeded.
    """

    digests: tuple[bytes, ...]
    length_bytes: int
    chunk_bytes: int = CHUNK_BYTES

    def __post_init__(self) -> None:
        if not 0 < self.chunk_bytes <= CHUNK_BYTES:
            raise PayloadError(f"{self.chunk_bytes}, expected 1 to {CHUNK_BYTES}", field="chunk_bytes")
        expected = -(-self.length_bytes // self.chunk_bytes)
        if self.length_bytes <= 0 or len(self.digests) != expected:
            raise PayloadError(
                f"{len(self.digests)} chunks, but {self.length_bytes} bytes need {expected}", field="chunks"
            )
        if any(len(item) != DIGEST_BYTES for item in self.digests):
            raise PayloadError(f"a digest is not {DIGEST_BYTES} bytes long", field="chunks")
        if self.length_bytes % self.chunk_bytes and self.digests[-1] in self.digests[:-1]:
            raise PayloadError("one digest for chunks of two lengths", field="chunks")

    def length_of(self, index: int) -> int:
        return min(self.chunk_bytes, self.length_bytes - index * self.chunk_bytes)


def manifest_of(data: bytes, chunk_bytes: int = CHUNK_BYTES) -> Manifest:
    return Manifest(tuple(digest(chunk) for chunk in split(data, chunk_bytes)), len(data), chunk_bytes)


class Assembler:
    """Keeps book of which chunks of a file have arrived. Never holds the bytes.

    Attributes:
        bad_chunks: how many arrived that belong nowhere; each is simply still missing.
    """

    def __init__(self, manifest: Manifest) -> None:
        self.manifest = manifest
        self.bad_chunks = 0
        self._present = bytearray(len(manifest.digests))
        self._places: dict[bytes, list[int]] = {}
        for index, item in enumerate(manifest.digests):
            self._places.setdefault(item, []).append(index)

    @property
    def complete(self) -> bool:
        return all(self._present)

    @property
    def present(self) -> Sequence[bool]:
        return [bool(flag) for flag in self._present]

    def missing(self) -> dict[bytes, int]:
        """Digests still to fetch, in the file's order, with the exact length of each."""
        return {
            item: self.manifest.length_of(index)
            for index, item in enumerate(self.manifest.digests)
            if not self._present[index]
        }

    def accept(self, sha256: bytes, payload: bytes | memoryview) -> list[int]:
        """Take a chunk that has been hashed: `sha256` is the digest of `payload`.

        Returns the offsets where it must be written: several where the file repeats itself, none for a duplicate
        or for a chunk that belongs nowhere.
        """
        places = self._places.get(sha256)
        if places is None or len(payload) != self.manifest.length_of(places[0]):
            self.bad_chunks += 1
            return []
        new = [index for index in places if not self._present[index]]
        for index in new:
            self._present[index] = True
        return [index * self.manifest.chunk_bytes for index in new]

    def restore(self, data: bytes | memoryview) -> None:
        """Recognise what an earlier, interrupted transfer left in a staging file.

        Every chunk is hashed again: after a power cut a stored bitmap may claim what the disk never got.
        """
        for index, item in enumerate(self.manifest.digests):
            start = index * self.manifest.chunk_bytes
            if digest(data[start : start + self.manifest.length_of(index)]) == item:
                self._present[index] = True
