"""What is wrong with a device's configuration and its surroundings, in plain words. Starts nothing, changes nothing."""

import json
import os
import shutil
import socket
import ssl
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from device_agent.agent import AgentSettings
from device_agent.runtime import runtime_name
from device_agent.timekeeping import BORN, is_unsynced
from shoal.config import link_config
from shoal.errors import ConfigError
from shoal.link_config import LinkConfig

_CONNECT_S = 5.0
# Beside the outbox: two releases, TUF's files, SQLite's log.
_SPARE_BYTES = 64 << 20


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that was looked at; `text` says what was found, and where it is wrong what to do."""

    name: str
    is_well: bool
    text: str


def check(settings: AgentSettings) -> Iterator[Finding]:
    """Look at everything that the agent needs, one after the other."""
    looks: list[tuple[str, Callable[[], str]]] = [
        ("runtime", lambda: runtime_name(settings.runtime)),
        ("data directory", lambda: _look_at_directory(Path(settings.data_dir), settings.outbox_bytes)),
        ("trusted root", lambda: _look_at_root(Path(settings.trusted_root))),
        ("clock", _look_at_clock),
        ("broker", lambda: _look_at_broker(link_config(settings.broker, session_expiry_s=0))),
    ]
    for name, look in looks:
        try:
            yield Finding(name, is_well=True, text=look())
        except (ConfigError, OSError) as exc:
            yield Finding(name, is_well=False, text=str(exc))


def _look_at_directory(directory: Path, outbox_bytes: int) -> str:
    existing = next(path for path in (directory, *directory.parents) if path.exists())
    if not existing.is_dir() or not os.access(existing, os.W_OK | os.X_OK):
        raise ConfigError(f"{existing} cannot be written by this user: change its owner, or data_dir")
    if existing == directory:
        with tempfile.TemporaryFile(dir=directory) as file:  # a read-only file system says so only now
            file.write(b"x")
    free, needed = shutil.disk_usage(existing).free, outbox_bytes + _SPARE_BYTES
    if free < needed:
        raise ConfigError(f"{free >> 20} MiB free, outbox and releases may need {needed >> 20}: lower outbox_bytes")
    return f"{directory}, {free >> 20} MiB free"


def _look_at_root(path: Path) -> str:
    try:
        signed = json.loads(path.read_bytes())["signed"]
        kind, version, expires = signed["_type"], signed["version"], datetime.fromisoformat(signed["expires"])
    except (ValueError, KeyError, TypeError) as exc:
        raise ConfigError(f"{path} is no TUF root: take the one that `shoal keys init` printed") from exc
    if kind != "root":
        raise ConfigError(f"{path} is TUF's {kind}, not its root")
    return f"version {version}, expires {expires.date()}"


def _look_at_clock() -> str:
    now = datetime.now(UTC)
    if now < BORN:
        raise ConfigError(f"it says {now:%Y-%m-%d}: readings will be marked as of suspect time until NTP has set it")
    doubt = "; the kernel knows of nobody who keeps it, so readings will say that they are not synchronised"
    return f"{now:%Y-%m-%d %H:%M} UTC{doubt if is_unsynced() else ''}"


def _look_at_broker(config: LinkConfig) -> str:
    """Connect and shake hands, but not as the device: that would end the session of an agent that runs."""
    began = time.monotonic()
    where = f"{config.host}:{config.port}"
    try:
        with socket.create_connection((config.host, config.port), _CONNECT_S) as raw:
            if config.tls_ca is not None:
                context = ssl.create_default_context(cafile=config.tls_ca)
                if config.tls_cert:
                    context.load_cert_chain(config.tls_cert, config.tls_key)
                with context.wrap_socket(raw, server_hostname=config.host):
                    pass
    except OSError as exc:  # TLS errors are OSErrors too
        raise ConfigError(f"{where}: {exc}") from exc
    kind = "TLS" if config.tls_ca else "TCP"
    took_ms = (time.monotonic() - began) * 1000
    return f"{where} answers over {kind} in {took_ms:.0f} ms; whether it lets us in was not tried"
