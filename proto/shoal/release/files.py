"""Whole small files (metadata, plans, release specs) out of chunks, kept in memory."""

from collections.abc import Callable

from shoal.codec import MAX_PAYLOAD_BYTES
from shoal.errors import PayloadError
from shoal.release.chunks import Manifest, digest
from shoal.release.fetch import BlobFetch
from shoal.v1.release_pb2 import BundleEntry


class FileFetch:
    """Fetches the file of one bundle entry and hands it over once, when its digest is right."""

    def __init__(self, blobs: BlobFetch, entry: BundleEntry, on_file: Callable[[bytes], None]) -> None:
        """Check the entry.

        Raises:
            PayloadError: it cannot describe a file, or a file too large to be one of these.
        """
        if not 0 < entry.length_bytes <= MAX_PAYLOAD_BYTES:
            raise PayloadError(f"{entry.length_bytes} bytes, at most {MAX_PAYLOAD_BYTES}", field="entries.length_bytes")
        self._sha256 = entry.sha256
        self._manifest = Manifest(tuple(entry.chunks) or (entry.sha256,), entry.length_bytes)
        self._blobs = blobs
        self._on_file = on_file
        self._chunks: dict[bytes, bytes] = {}
        self._lengths = {item: self._manifest.length_of(index) for index, item in enumerate(self._manifest.digests)}

    def start(self) -> None:
        self._blobs.want(self._lengths, self._on_chunk)

    def cancel(self) -> None:
        self._blobs.forget(self._lengths, self._on_chunk)

    def _on_chunk(self, sha256: bytes, payload: bytes) -> None:
        self._chunks[sha256] = payload
        if len(self._chunks) < len(self._lengths):
            return
        data = b"".join(self._chunks[item] for item in self._manifest.digests)
        # The index is not signed: chunks that make another file are as good as missing.
        if digest(data) == self._sha256:
            self._on_file(data)
