"""onnxruntime with all cores and nothing round it: what no server can exceed. Prints one line of JSON.

    python -m benchmarks.gateway.ort_alone MODEL BATCH SECONDS

Two ways to use the cores: a caller for each that share a session of one thread, and one caller whose session has a
thread for each. The better one counts.
"""

import json
import os
import sys
import threading
import time
from typing import Any

import numpy as np
import onnxruntime

_WARM_UP_CALLS = 3


def main(model: str, batch: int, seconds: float) -> None:
    cores = os.cpu_count() or 1
    shared_rps = _rate(_session(model, 1), batch, cores, seconds / 2)
    alone_rps = _rate(_session(model, cores), batch, 1, seconds / 2)
    rows = round((shared_rps + alone_rps) * seconds / 2)
    rates = {"rps": max(shared_rps, alone_rps), "shared_rps": shared_rps, "one_caller_rps": alone_rps}
    print(json.dumps({"requests": rows, **{name: round(rate, 1) for name, rate in rates.items()}}))


def _session(model: str, threads: int) -> Any:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 3
    return onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])


def _rate(session: Any, batch: int, callers: int, seconds: float) -> float:
    """Rows a second of all callers together."""
    shape = session.get_inputs()[0].shape[1:]
    inputs = np.random.default_rng(1).integers(0, 256, (batch, *shape)).astype(np.float32)
    for _ in range(_WARM_UP_CALLS):
        session.run(None, {"input": inputs})
    calls = [0] * callers
    started = time.perf_counter()

    def call(index: int) -> None:
        while time.perf_counter() - started < seconds:
            session.run(None, {"input": inputs})
            calls[index] += 1

    threads = [threading.Thread(target=call, args=(index,)) for index in range(callers)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return sum(calls) * batch / (time.perf_counter() - started)


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), float(sys.argv[3]))
