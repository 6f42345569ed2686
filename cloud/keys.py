"""Signing keys by TUF role.

Only what a process signs with needs to be where it runs: the publisher has `snapshot` and `timestamp`, the trainer its
models' roles, the controller `rollout`; `root` and `targets` stay away from all of them.
"""

import os
from pathlib import Path
from typing import Protocol

from cryptography.hazmat.primitives.serialization import load_pem_private_key
from securesystemslib.signer import CryptoSigner, Key, Signer

from shoal.errors import ConfigError

_PRIVATE_MODE = 0o600
_PRIVATE_DIRECTORY_MODE = 0o700


class KeyStore(Protocol):
    """Where signers come from: files now, an external signer behind the same port."""

    def signers(self, role: str) -> list[Signer]:
        """Every signer of a role that this process may use.

        Raises:
            ConfigError: there is none.
        """


def public_keys(keys: KeyStore, role: str) -> list[Key]:
    return [signer.public_key for signer in keys.signers(role)]


class FileKeyStore:
    """Ed25519 keys as PEM files, `{role}.{number}.pem`, readable by their owner only."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory

    def create(self, role: str, count: int = 1) -> None:
        """Make the keys of a role.

        Raises:
            ConfigError: it has keys already.
        """
        self._directory.mkdir(mode=_PRIVATE_DIRECTORY_MODE, parents=True, exist_ok=True)
        if self._paths(role):
            raise ConfigError(f"role {role} has keys in {self._directory} already")
        for number in range(1, count + 1):
            path = self._directory / f"{role}.{number}.pem"
            handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, _PRIVATE_MODE)
            with os.fdopen(handle, "wb") as file:
                file.write(CryptoSigner.generate_ed25519().private_bytes)
                file.flush()
                os.fsync(file.fileno())

    def signers(self, role: str) -> list[Signer]:
        found: list[Signer] = []
        for path in self._paths(role):
            if path.stat().st_mode & 0o077:
                raise ConfigError(f"{path} can be read by others: chmod 600 {path}")
            try:
                found.append(CryptoSigner(load_pem_private_key(path.read_bytes(), None)))
            except ValueError as exc:
                raise ConfigError(f"{path} is no private key: {exc}") from exc
        if not found:
            raise ConfigError(f"no key of role {role} in {self._directory}")
        return found

    def _paths(self, role: str) -> list[Path]:
        return sorted(self._directory.glob(f"{role}.*.pem"))
