"""Everything that steps make, by the SHA-256 of its content: a tree names files, a file is bytes.

    objects/{first two digits}/{sha256}     a file, or a tree: the JSON of its files' names and digests

Equal content is kept once, whoever made it; a name can never come to mean something else. Pure Python's files, nothing
cleverer: a model is megabytes, and a run makes twenty.
"""

import hashlib
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

import msgspec

from shoal.errors import ModelError
from shoal.release.durable import write_atomic


def tree_bytes(digests: Mapping[str, str]) -> bytes:
    """Return what a tree with these files is as an object."""
    return msgspec.json.encode(dict(digests), order="deterministic")


class ObjectStore:
    """See the module. `put` survives a power cut; a damaged object is never returned."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory

    def put(self, files: Mapping[str, bytes]) -> str:
        """Keep a tree of files; return its digest, in hex."""
        return self._put(tree_bytes({name: self._put(data) for name, data in files.items()}))

    def get(self, digest: str) -> dict[str, bytes]:
        """Return the files of a tree.

        Raises:
            ModelError: something of it is missing or damaged.
        """
        return {name: self._get(file) for name, file in self.names(digest).items()}

    def names(self, digest: str) -> dict[str, str]:
        """Return the digests of a tree's files, by name.

        Raises:
            ModelError: the tree is missing or damaged.
        """
        return msgspec.json.decode(self._get(digest), type=dict[str, str])

    def holds(self, digest: str) -> bool:
        """Whether a tree is here with all its files, whole: reads every byte."""
        try:
            self.get(digest)
        except ModelError:
            return False
        return True

    def keep(self, digests: Iterable[str], older_than: float) -> int:
        """Delete what is older but these trees and their files. Returns how many objects went.

        Args:
            digests: trees to keep; one that is not here keeps nothing.
            older_than: Unix time. Newer objects stay, for another process may have put them and not yet said what for.
        """
        kept = set()
        for digest in digests:
            if self.holds(digest):
                kept |= {digest, *self.names(digest).values()}
        gone = [path for path in self._paths() if path.name not in kept and path.stat().st_mtime < older_than]
        for path in gone:
            path.unlink()
        return len(gone)

    def _paths(self) -> Iterator[Path]:
        return self._directory.glob("??/*")

    def _path(self, digest: str) -> Path:
        return self._directory / digest[:2] / digest

    def _put(self, data: bytes) -> str:
        digest = hashlib.sha256(data).hexdigest()
        path = self._path(digest)
        if _is_whole(path, digest):
            # As good as new, and as young: `keep` must not take it for one that nobody wants any more.
            path.touch()
        else:
            path.parent.mkdir(parents=True, exist_ok=True)
            write_atomic(path, data)
        return digest

    def _get(self, digest: str) -> bytes:
        try:
            data = self._path(digest).read_bytes()
        except OSError as exc:
            raise ModelError(f"object {digest[:12]}: {exc.strerror}") from exc
        if hashlib.sha256(data).hexdigest() != digest:
            raise ModelError(f"object {digest[:12]} is damaged")
        return data


def _is_whole(path: Path, digest: str) -> bool:
    try:
        return hashlib.sha256(path.read_bytes()).hexdigest() == digest
    except OSError:
        return False
