"""Key files at rest: encrypted unless somebody asked otherwise, and never made or read with the wrong password."""

import pytest

from cloud import keys as keys_module
from cloud import services
from cloud.keys import FileKeyStore, key_password
from cloud.release_store import ReleaseStore
from cloud.repository import root_of
from cloud.settings import CloudSettings, ModelSettings
from shoal.errors import ConfigError

ENCRYPTED = b"-----BEGIN ENCRYPTED PRIVATE KEY-----"
PLAIN = b"-----BEGIN PRIVATE KEY-----"


def password() -> bytes:
    return b"correct horse"


def test_encrypted_keys_sign_with_their_password_only(tmp_path):
    """The file is useless without it; the message says what to look at."""
    made = FileKeyStore(tmp_path, password)
    made.create("root")
    (path,) = tmp_path.glob("root.*.pem")
    assert path.read_bytes().startswith(ENCRYPTED)
    (signer,) = FileKeyStore(tmp_path, password).signers("root")
    signer.public_key.verify_signature(signer.sign(b"x"), b"x")
    with pytest.raises(ConfigError, match="SHOAL_KEY_PASSWORD right"):
        FileKeyStore(tmp_path, lambda: b"wrong").signers("root")
    with pytest.raises(ConfigError, match="no password was given"):
        FileKeyStore(tmp_path).signers("root")


def test_plain_keys_are_read_without_asking(tmp_path):
    """A demo's publisher needs no password, and is asked for none."""
    FileKeyStore(tmp_path).create("root")
    (path,) = tmp_path.glob("root.*.pem")
    assert path.read_bytes().startswith(PLAIN)

    def refuse() -> bytes:
        raise AssertionError("asked for a password")

    assert len(FileKeyStore(tmp_path, refuse).signers("root")) == 1


@pytest.mark.parametrize(("first", "kind"), [(password, ENCRYPTED), (None, PLAIN)])
def test_added_keys_are_like_those_that_are_there(tmp_path, first, kind):
    """Rotating leaves a service that runs without a password running, and never drops encryption."""
    FileKeyStore(tmp_path, first).create("rollout")
    (signer,) = FileKeyStore(tmp_path, password).add("rollout")
    path = tmp_path / f"rollout.{signer.public_key.keyid[:8]}.pem"
    assert path.read_bytes().startswith(kind)
    assert path.stat().st_mode & 0o777 == 0o600
    assert len(FileKeyStore(tmp_path, password).signers("rollout")) == 2


def test_password_comes_from_the_environment(monkeypatch):
    """How a service gets it."""
    monkeypatch.setenv("SHOAL_KEY_PASSWORD", "secret")
    assert key_password() == b"secret"


def test_password_is_asked_for_once_at_a_terminal(monkeypatch):
    """A command that signs nine times asks once."""
    asked = []
    monkeypatch.delenv("SHOAL_KEY_PASSWORD", raising=False)
    monkeypatch.setattr(keys_module.sys, "stdin", type("Terminal", (), {"isatty": lambda _: True})())
    monkeypatch.setattr(keys_module.getpass, "getpass", lambda prompt: asked.append(prompt) or "typed")
    keys_module._asked_password.cache_clear()
    assert [key_password(), key_password()] == [b"typed", b"typed"]
    assert len(asked) == 1
    keys_module._asked_password.cache_clear()


@pytest.mark.parametrize(("value", "message"), [("", "empty"), (None, "set SHOAL_KEY_PASSWORD")])
def test_no_password_is_said_plainly(monkeypatch, value, message):
    """A service without a terminal must not wait for one."""
    monkeypatch.delenv("SHOAL_KEY_PASSWORD", raising=False)
    if value is not None:
        monkeypatch.setenv("SHOAL_KEY_PASSWORD", value)
    monkeypatch.setattr(keys_module.sys, "stdin", type("Pipe", (), {"isatty": lambda _: False})())
    with pytest.raises(ConfigError, match=message):
        key_password()


@pytest.mark.parametrize(("chosen", "kind"), [(password, ENCRYPTED), (None, PLAIN)])
def test_init_makes_a_root_of_three_keys_and_says_when_they_are_plain(tmp_path, caplog, chosen, kind):
    """Two of them must sign; keys without encryption are there only with a warning."""
    settings = CloudSettings(data_dir=str(tmp_path), models=[ModelSettings("digits")])
    services.init(settings, chosen)
    root = root_of(ReleaseStore(settings.releases_dir).load()).roles["root"]
    assert (root.threshold, len(root.keyids)) == (2, 3)
    files = list(settings.keys_dir.glob("*.pem"))
    assert len(files) == 8
    assert all(path.read_bytes().startswith(kind) for path in files)
    assert ("NOT encrypted" in caplog.text) == (chosen is None)


def test_retired_key_is_not_overwritten(tmp_path):
    """Two keys of one name are two keys."""
    keys = FileKeyStore(tmp_path)
    keys.create("rollout")
    (tmp_path / "retired").mkdir()
    (tmp_path / "retired" / "rollout.1.pem").write_bytes(b"another")
    with pytest.raises(ConfigError, match="in the way"):
        keys.retire("rollout", ())
    assert (tmp_path / "retired" / "rollout.1.pem").read_bytes() == b"another"
