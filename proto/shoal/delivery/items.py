"""What an outbox holds, and its bounds."""

from dataclasses import dataclass
from enum import IntEnum, unique
from typing import NamedTuple


class Key(NamedTuple):
    """What identifies a reading for ever."""

    device: str
    epoch: bytes
    seq: int


@unique
class Priority(IntEnum):
    """Who makes way for whom in a full outbox. Stored: never renumber."""

    TELEMETRY = 0
    ALARM = 1


@dataclass(frozen=True, slots=True)
class Item:
    """What waits: `payload` is opaque to the outbox; `model` says which queue of the peer it is for."""

    key: Key
    model: str
    payload: bytes
    priority: Priority = Priority.TELEMETRY


@dataclass(frozen=True, slots=True)
class Refusal:
    """Why an item can never be delivered.

    Attributes:
        status: who refused it and how, for machines.
        field: of the item, as the schema spells it; empty where all of it is at fault.
        message: for people.
    """

    status: str
    field: str = ""
    message: str = ""


@dataclass(frozen=True, slots=True)
class Limits:
    """Bounds of the whole store; at 100 bytes a reading the defaults hold a fortnight of one a minute.

    What is quarantined has bounds of its own: enough to see what is wrong, and none of the room that is owed to others.
    """

    max_items: int = 20_000
    max_bytes: int = 64 << 20
    quarantine_items: int = 1000
    quarantine_bytes: int = 4 << 20


@dataclass(frozen=True, slots=True)
class Hold:
    """How much may be in memory alone while the link is connected, and so be lost by a kill.

    Attributes:
        max_s: since the first change that is not on disk.
        max_items, max_bytes: of items that are not on disk.
    """

    max_s: float
    max_items: int = 256
    max_bytes: int = 1 << 20
