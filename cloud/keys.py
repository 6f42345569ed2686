"""Signing keys by TUF role.

Only what a process signs with needs to be where it runs: the publisher has `snapshot` and `timestamp`, the trainer its
models' roles, the controller `rollout`; `root` and `targets` stay away from all of them.

Invariants:
- a key file is never overwritten, and never removed: what is no longer wanted moves to `retired/`;
- a key is not encrypted only where somebody asked for that.
"""

import functools
import getpass
import os
import sys
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import Protocol

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import (
    BestAvailableEncryption,
    Encoding,
    NoEncryption,
    PrivateFormat,
    load_pem_private_key,
)
from securesystemslib.signer import CryptoSigner, Key, Signer
from tuf.api.metadata import Role

from shoal.errors import ConfigError
from shoal.release.durable import sync_directory

PASSWORD_VARIABLE = "SHOAL_KEY_PASSWORD"  # noqa: S105  where it is, not what it is
ROOT_KEYS = 3

_PRIVATE_MODE = 0o600
_PRIVATE_DIRECTORY_MODE = 0o700
_RETIRED = "retired"
_ENCRYPTED_PEM = b"-----BEGIN ENCRYPTED PRIVATE KEY-----"
# Enough of a key's id to tell the keys of one role apart.
_SHORT_ID = 8

Password = Callable[[], bytes]


class KeyStore(Protocol):
    """Where signers come from: files now, an external signer behind the same port."""

    def signers(self, role: str) -> list[Signer]:
        """Every signer of a role that this process may use.

        Raises:
            ConfigError: there is none.
        """


class KeyMaker(KeyStore, Protocol):
    """A key store that makes new keys too, beside those that a role has."""

    def add(self, role: str, count: int = 1) -> list[Signer]: ...


def public_keys(keys: KeyStore, role: str) -> list[Key]:
    return [signer.public_key for signer in keys.signers(role)]


def authorised(signers: Sequence[Signer], name: str, role: Role) -> list[Signer]:
    """Those of `signers` that `role` is delegated to.

    Raises:
        ConfigError: fewer than the role's threshold.
    """
    found = [signer for signer in signers if signer.public_key.keyid in role.keyids]
    if len(found) < role.threshold:
        raise ConfigError(
            f"role {name} is signed by {role.threshold} of {len(role.keyids)} keys, and {len(found)} of these are here"
        )
    return found


def short_id(keyid: str) -> str:
    return keyid[:_SHORT_ID]


def key_password() -> bytes:
    """The password of the key files: from SHOAL_KEY_PASSWORD, or asked for, once, at a terminal.

    Raises:
        ConfigError: it is empty, or there is neither.
    """
    if PASSWORD_VARIABLE in os.environ:
        password = os.environ[PASSWORD_VARIABLE]
    elif sys.stdin.isatty():
        password = _asked_password()
    else:
        raise ConfigError(f"the key files need a password: set {PASSWORD_VARIABLE}, or start this at a terminal")
    if not password:
        raise ConfigError("the password of the key files is empty")
    return password.encode()


@functools.cache
def _asked_password() -> str:
    return getpass.getpass("Password of the key files: ")


class FileKeyStore:
    """Ed25519 keys as PKCS8 PEM files, `{role}.{name}.pem`, readable by their owner only.

    Args:
        directory: holds the files; retired ones move into `retired/` below it.
        password: asked for only when it is needed. What it makes is encrypted with it; without one it makes files
            that are not encrypted, and reads no others.
    """

    def __init__(self, directory: Path, password: Password | None = None) -> None:
        self._directory = directory
        self._password = password

    def create(self, role: str, count: int = 1) -> None:
        """Make the first keys of a role.

        Raises:
            ConfigError: it has keys already.
        """
        if self._paths(role):
            raise ConfigError(f"role {role} has keys in {self._directory} already")
        for number in range(1, count + 1):
            self._write(self._directory / f"{role}.{number}.pem", Ed25519PrivateKey.generate(), self._password)

    def add(self, role: str, count: int = 1) -> list[Signer]:
        """Make keys beside those that a role has; encrypted unless what is here of the role is not.

        They are named after their ids: numbers would meet those of keys that are kept elsewhere.
        """
        password = self._password if self.is_encrypted(role) else None
        made: list[Signer] = []
        for _ in range(count):
            key = Ed25519PrivateKey.generate()
            signer = CryptoSigner(key)
            self._write(self._directory / f"{role}.{short_id(signer.public_key.keyid)}.pem", key, password)
            made.append(signer)
        return made

    def signers(self, role: str) -> list[Signer]:
        found: list[Signer] = [self._load(path) for path in self._paths(role)]
        if not found:
            raise ConfigError(f"no key of role {role} in {self._directory}")
        return found

    def is_encrypted(self, role: str) -> bool:
        """Whether any key file of a role is encrypted; what would be made, where there is none yet."""
        paths = self._paths(role)
        if not paths:
            return self._password is not None
        return any(path.read_bytes().startswith(_ENCRYPTED_PEM) for path in paths)

    def retire(self, role: str, keep: Collection[str]) -> list[Path]:
        """Move the keys of a role whose ids are not in `keep` to `retired/`; return where they are now."""
        moved = []
        for path in self._paths(role):
            if self._load(path).public_key.keyid in keep:
                continue
            retired = self._directory / _RETIRED
            retired.mkdir(mode=_PRIVATE_DIRECTORY_MODE, exist_ok=True)
            target = retired / path.name
            if target.exists():
                raise ConfigError(f"{target} is in the way of {path}: move one of them away")
            path.rename(target)
            sync_directory(retired)
            sync_directory(self._directory)
            moved.append(target)
        return moved

    def _write(self, path: Path, key: Ed25519PrivateKey, password: Password | None) -> None:
        encryption = NoEncryption() if password is None else BestAvailableEncryption(password())
        data = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, encryption)
        self._directory.mkdir(mode=_PRIVATE_DIRECTORY_MODE, parents=True, exist_ok=True)
        handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, _PRIVATE_MODE)
        with os.fdopen(handle, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        sync_directory(self._directory)

    def _load(self, path: Path) -> CryptoSigner:
        if path.stat().st_mode & 0o077:
            raise ConfigError(f"{path} can be read by others: chmod 600 {path}")
        data = path.read_bytes()
        password = None
        if data.startswith(_ENCRYPTED_PEM):
            if self._password is None:
                raise ConfigError(f"{path} is encrypted, and no password was given")
            password = self._password()
        try:
            return CryptoSigner(load_pem_private_key(data, password))
        except ValueError as exc:
            hint = f"is {PASSWORD_VARIABLE} right? " if password else ""
            raise ConfigError(f"{path} is no private key that can be read: {hint}{exc}") from exc

    def _paths(self, role: str) -> list[Path]:
        return sorted(self._directory.glob(f"{role}.*.pem"))
