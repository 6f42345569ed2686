"""Configuration: a TOML file into frozen typed structs, unknown keys refused; secrets from `SHOAL_*` variables."""

import os
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TypeVar

import msgspec

from shoal.errors import ConfigError
from shoal.link_config import LinkConfig, parse_broker_url

T = TypeVar("T", bound=msgspec.Struct)


class BrokerSettings(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The `[broker]` table. The password comes from SHOAL_PASSWORD, never from a file."""

    url: str = "mqtt://127.0.0.1:1883"
    tls_ca: str | None = None
    tls_cert: str | None = None
    tls_key: str | None = None


def load_config(path: Path, kind: type[T]) -> T:
    """Read a TOML file.

    Raises:
        ConfigError: no such file, no TOML, an unknown key or a value of the wrong kind; the message names it.
    """
    try:
        return msgspec.toml.decode(path.read_bytes(), type=kind)
    except OSError as exc:
        raise ConfigError(f"{path}: {exc.strerror}") from exc
    except (msgspec.DecodeError, msgspec.ValidationError, UnicodeDecodeError) as exc:
        raise ConfigError(f"{path}: {exc}") from exc


def link_config(
    broker: BrokerSettings, *, session_expiry_s: int, environment: Mapping[str, str] = os.environ
) -> LinkConfig:
    """Where to connect: SHOAL_BROKER overrides the file's URL, SHOAL_USERNAME and SHOAL_PASSWORD add credentials.

    Raises:
        ConfigError: the URL is not one.
    """
    parsed = parse_broker_url(environment.get("SHOAL_BROKER") or broker.url, session_expiry_s=session_expiry_s)
    return replace(
        parsed,
        tls_ca=broker.tls_ca or parsed.tls_ca,
        tls_cert=broker.tls_cert,
        tls_key=broker.tls_key,
        username=environment.get("SHOAL_USERNAME", parsed.username),
        password=environment.get("SHOAL_PASSWORD", parsed.password),
    )
