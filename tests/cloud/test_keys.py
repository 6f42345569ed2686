import stat

import pytest

from cloud.keys import FileKeyStore, public_keys
from shoal.errors import ConfigError


def test_keys_come_back_and_sign(tmp_path):
    """What is created is what signs, in every process that opens the directory."""
    FileKeyStore(tmp_path / "keys").create("rollout", 2)
    keys = FileKeyStore(tmp_path / "keys")
    first, second = keys.signers("rollout")
    assert first.public_key.keyid != second.public_key.keyid
    assert public_keys(keys, "rollout") == [first.public_key, second.public_key]
    first.public_key.verify_signature(first.sign(b"plan"), b"plan")


def test_keys_are_readable_by_their_owner_only(tmp_path):
    """Both ways: made so, and refused otherwise."""
    keys = FileKeyStore(tmp_path / "keys")
    keys.create("root")
    path = tmp_path / "keys" / "root.1.pem"
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700
    path.chmod(0o640)
    with pytest.raises(ConfigError, match="chmod 600"):
        keys.signers("root")


def test_existing_keys_are_never_overwritten(tmp_path):
    """A second `keys init` must not cost a fleet its root."""
    keys = FileKeyStore(tmp_path)
    keys.create("root")
    before = (tmp_path / "root.1.pem").read_bytes()
    with pytest.raises(ConfigError, match="already"):
        keys.create("root")
    assert (tmp_path / "root.1.pem").read_bytes() == before


@pytest.mark.parametrize("content", [None, b"rubbish"])
def test_missing_or_broken_keys_are_named(tmp_path, content):
    """The operator reads which file to look at."""
    if content is not None:
        (tmp_path / "targets.1.pem").write_bytes(content)
        (tmp_path / "targets.1.pem").chmod(0o600)
    with pytest.raises(ConfigError, match="targets"):
        FileKeyStore(tmp_path).signers("targets")


def test_role_names_do_not_overlap(tmp_path):
    """`model-a` must not find the keys of `model-a-b`."""
    keys = FileKeyStore(tmp_path)
    keys.create("model-a-b")
    with pytest.raises(ConfigError):
        keys.signers("model-a")
