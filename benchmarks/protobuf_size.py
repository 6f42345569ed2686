"""How many bytes one reading takes: protobuf against JSON, as protobuf's canonical mapping and as short as it gets.

    python benchmarks/protobuf_size.py

Readings are the first 10,000 stream rows of Statlog Shuttle (9 channels) and the 1,797 digits images (8x8).
"""

import json

import numpy as np

from shoal.v1.sensor_pb2 import TIME_QUALITY_SYNCED, Scalars, SensorData
from simulator.datasets import load_digits, load_shuttle
from simulator.fleet import json_sizes
from simulator.streams import SimReading

_ROWS = 10_000


def protobuf_bytes(reading: SimReading) -> int:
    return SensorData(
        device="sensor-00",
        epoch=bytes(range(16)),
        seq=reading.row,
        captured_at_us=1_795_000_000_000_000,
        time_quality=TIME_QUALITY_SYNCED,
        scalars=Scalars(values=reading.values.ravel().tolist()),
        reference=reading.reference,
    ).ByteSize()


def measure(name: str, rows: list[SimReading]) -> dict[str, float]:
    wire = np.array([protobuf_bytes(row) for row in rows])
    canonical, compact = np.array([json_sizes("sensor-00", row.row, row) for row in rows]).T
    figures = {
        "protobuf_bytes": round(float(wire.mean()), 1),
        "json_bytes": round(float(canonical.mean()), 1),
        "json_compact_bytes": round(float(compact.mean()), 1),
        "json_ratio": round(float(canonical.sum() / wire.sum()), 2),
        "json_compact_ratio": round(float(compact.sum() / wire.sum()), 2),
    }
    print(
        f"{name}: {figures['protobuf_bytes']} B as protobuf, {figures['json_bytes']} B as canonical JSON, "
        f"{figures['json_compact_bytes']} B as compact JSON without epoch, time quality and reference"
    )
    return figures


def main() -> None:
    results = {}
    for data in (load_shuttle(), load_digits()):
        rows = [
            SimReading(
                int(row), f"{data.name}/{row}", data.values[row], int(data.labels[row]), held_out=False, drifted=False
            )
            for row in data.stream[:_ROWS]
        ]
        results[data.name] = measure(data.name, rows)
    print(json.dumps(results))


if __name__ == "__main__":
    main()
