"""`shoal keys`, as an operator types it."""

import pytest
from typer.testing import CliRunner

from cloud.keys import FileKeyStore, key_password
from cloud.release_store import ReleaseStore
from fleet_console import keys_cli
from fleet_console.cli import app
from shoal.errors import ConfigError

ENCRYPTED = b"-----BEGIN ENCRYPTED PRIVATE KEY-----"


@pytest.fixture
def config(tmp_path):
    path = tmp_path / "cloud.toml"
    path.write_text(f'data_dir = "{tmp_path}/data"\n[[models]]\nname = "digits"\n')
    return path


@pytest.fixture
def keys_dir(tmp_path):
    return tmp_path / "data" / "keys"


@pytest.fixture
def password(monkeypatch):
    monkeypatch.setenv("SHOAL_KEY_PASSWORD", "secret")


@pytest.fixture
def shoal(config):
    """Run `shoal keys ...`; an error that the operator would read is raised."""

    def run(*arguments, **options):
        result = CliRunner().invoke(app, ["keys", *arguments, "--config", str(config)], **options)
        if result.exception is not None and not isinstance(result.exception, SystemExit):
            raise result.exception
        return result

    return run


@pytest.fixture
def initialised(shoal, password):
    return shoal("init")


def test_init_makes_encrypted_keys_and_prints_the_root(initialised, keys_dir):
    """The root file is what goes to the nodes; stdout holds its path and nothing else."""
    assert initialised.exit_code == 0
    assert initialised.stdout.strip() == str(keys_dir.parent / "root.json")
    assert "encrypted" in initialised.stderr
    assert "NOT" not in initialised.stderr
    files = sorted(keys_dir.glob("*.pem"))
    assert len(files) == 8
    assert all(path.read_bytes().startswith(ENCRYPTED) for path in files)
    assert len(FileKeyStore(keys_dir, key_password).signers("root")) == 3


def test_init_without_encryption_says_so(shoal, keys_dir, monkeypatch):
    """Only when asked for; then no password is needed."""
    monkeypatch.delenv("SHOAL_KEY_PASSWORD", raising=False)
    result = shoal("init", "--no-encryption")
    assert result.exit_code == 0
    assert "NOT encrypted" in result.stderr
    assert len(FileKeyStore(keys_dir).signers("root")) == 3


def test_init_without_a_password_makes_nothing(shoal, keys_dir, monkeypatch):
    """Neither keys in the clear nor half an installation."""
    monkeypatch.delenv("SHOAL_KEY_PASSWORD", raising=False)
    with pytest.raises(ConfigError, match="set SHOAL_KEY_PASSWORD, or say --no-encryption"):
        shoal("init")
    assert not keys_dir.exists()


def test_init_twice_is_refused(initialised, shoal, keys_dir):
    """A second root would strand every node that trusts the first."""
    before = {path: path.read_bytes() for path in keys_dir.iterdir()}
    with pytest.raises(ConfigError, match="already"):
        shoal("init")
    assert {path: path.read_bytes() for path in keys_dir.iterdir()} == before


@pytest.mark.parametrize("role", ["root", "targets", "snapshot", "timestamp", "rollout", "model-digits"])
def test_rotate_makes_keys_and_queues_an_order(initialised, shoal, keys_dir, role):
    """What was queued and which keys it names; the new files are encrypted as the old ones are."""
    delegator = "targets" if role in {"rollout", "model-digits"} else "root"
    before = set(keys_dir.iterdir())
    result = shoal("rotate", role)
    made = set(keys_dir.iterdir()) - before
    assert f"Queued {delegator} 2: it names for {role} the keys" in result.stdout
    assert len(made) == (3 if role == "root" else 1)
    assert all(path.read_bytes().startswith(ENCRYPTED) for path in made)
    (order,) = ReleaseStore(keys_dir.parent / "releases").orders()
    assert order.role == delegator


def test_rotate_with_a_wrong_password_changes_nothing(initialised, shoal, keys_dir, monkeypatch):
    """The file is named, and the variable."""
    monkeypatch.setenv("SHOAL_KEY_PASSWORD", "other")
    before = set(keys_dir.iterdir())
    with pytest.raises(ConfigError, match=r"root\.1\.pem .+ is SHOAL_KEY_PASSWORD right"):
        shoal("rotate", "timestamp")
    assert set(keys_dir.iterdir()) == before


def test_add_model_queues_a_role(initialised, shoal, keys_dir):
    """It can be released for once the publisher took it, and even before."""
    assert "Queued targets 2" in shoal("add-model", "valve").stdout
    assert list(keys_dir.glob("model-valve.*.pem"))
    assert "model-valve" in ReleaseStore(keys_dir.parent / "releases").newest().roles


def test_retire_prints_what_it_moved(initialised, shoal, keys_dir):
    """A key that nothing names, as a killed rotation leaves it; those in use stay."""
    FileKeyStore(keys_dir, key_password).add("rollout")
    (moved,) = shoal("retire").stdout.split()
    assert moved.startswith(f"{keys_dir}/retired/rollout.")
    assert shoal("retire").stdout == ""
    assert (keys_dir / "rollout.1.pem").exists()


def test_unknown_role_is_one_line(initialised, shoal):
    """With those that there are."""
    with pytest.raises(ConfigError, match="'root', 'targets', 'snapshot', 'timestamp', 'model-digits', 'rollout'"):
        shoal("rotate", "nobody")


def test_password_is_asked_for_twice_at_a_terminal(config, keys_dir, monkeypatch):
    """A typing error in a new password would lock the keys up for good."""
    monkeypatch.delenv("SHOAL_KEY_PASSWORD", raising=False)
    monkeypatch.setattr(keys_cli.sys, "stdin", type("Terminal", (), {"isatty": lambda _: True})())
    asked = []
    monkeypatch.setattr(keys_cli.typer, "prompt", lambda _text, **options: asked.append(options) or "typed")
    keys_cli.init(config)
    assert asked == [{"hide_input": True, "confirmation_prompt": True}]
    assert len(FileKeyStore(keys_dir, lambda: b"typed").signers("targets")) == 1
