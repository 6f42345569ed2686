"""The questions that both servers get: whole InferenceRequest messages, the same bytes over MQTT and HTTP.

A file is a u32 count, then for each payload a u32 size and its bytes, little-endian; payload i is of device i % devices.
There are more different ones than the gateway's answer cache holds, and they come round in order: an LRU cache of fewer
never has the one that is wanted.
"""

import hashlib
import math
import struct
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from shoal.codec import encode
from shoal.tensors import to_tensor
from shoal.v1 import inference_pb2 as pb
from shoal.v1.sensor_pb2 import SensorData, TimeQuality

DEVICES = 64
PREFIX = "cam"
SITE = "bench"
_SEED = 11
_STARTED_AT_US = 1_790_000_000_000_000
# Three times the gateway's default cache, whose keys are the bytes as they came: devices answer in no strict order, and
# what is asked again must be gone by then.
_CACHE_BYTES = 3 * (16 << 20)
_SMALLEST_ENTRY_BYTES = 200


def device_name(index: int, prefix: str = PREFIX, devices: int = DEVICES) -> str:
    return f"{prefix}{index % devices:02d}"


def payload_count(shape: tuple[int, ...], devices: int = DEVICES) -> int:
    """How many different questions outgrow the cache, in whole rounds of the devices."""
    entry_bytes = math.prod(shape) + _SMALLEST_ENTRY_BYTES  # a value is one byte
    return devices * max(2, math.ceil(_CACHE_BYTES / entry_bytes / devices))


def write_payloads(
    path: Path, model: str, shape: tuple[int, ...], *, prefix: str = PREFIX, devices: int = DEVICES
) -> int:
    """Write the file of one model and return how many payloads it has; fleets of different prefixes ask other things."""
    count = payload_count(shape, devices)
    with path.open("wb") as file:
        file.write(struct.pack("<I", count))
        for payload in _payloads(model, shape, count, prefix, devices):
            file.write(struct.pack("<I", len(payload)) + payload)
    return count


def read_payload(path: Path, index: int = 0) -> bytes:
    """One payload of a file."""
    with path.open("rb") as file:
        file.read(4)
        for _ in range(index):
            file.seek(struct.unpack("<I", file.read(4))[0], 1)
        return file.read(struct.unpack("<I", file.read(4))[0])


def typical_reply(model: str) -> bytes:
    """What a gateway answers to one such question, for the echo to say."""
    answer = pb.Answer(release=1, score=0.25, label=3)
    row = pb.RowReply(seq=1000, status=pb.STATUS_OK, answer=answer)
    return encode(pb.InferenceReply(epoch=_epoch(device_name(0)), model=model, rows=[row]))


def _payloads(model: str, shape: tuple[int, ...], count: int, prefix: str, devices: int) -> Iterator[bytes]:
    rng = np.random.default_rng([_SEED, *prefix.encode()])
    for index in range(count):
        reading = SensorData(
            seq=1 + index // devices,
            captured_at_us=_STARTED_AT_US + index * 1000,
            time_quality=TimeQuality.TIME_QUALITY_SYNCED,
            tensor=to_tensor(rng.integers(0, 256, shape, dtype=np.uint8)),
        )
        row = pb.InferenceRow(reading=reading, reason=pb.ASK_REASON_NO_MODEL)
        device = device_name(index, prefix, devices)
        yield encode(pb.InferenceRequest(device=device, epoch=_epoch(device), model=model, rows=[row]))


def _epoch(device: str) -> bytes:
    return hashlib.sha256(device.encode()).digest()[:16]
