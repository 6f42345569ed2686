"""Shoal's gateway as a process of its own, serving one file. Says `ready` when it is subscribed; ends on SIGTERM.

python -m benchmarks.gateway.serve_gateway MODEL BROKER BATCH [JSON of other options of Deploy]
"""

import json
import signal
import sys

from benchmarks.gateway.payloads import SITE
from edge_gateway import Deploy


def main(model: str, broker: str, batch: str, options: str = "{}") -> None:
    stops = {signal.SIGTERM, signal.SIGINT}
    signal.pthread_sigmask(signal.SIG_BLOCK, stops)
    chosen = {"site": SITE, "name": "gw-bench", **json.loads(options)}
    with Deploy(model, max_batch_size=int(batch), broker=broker, **chosen) as gateway:
        print("ready", flush=True)
        signal.sigwait(stops)
        print(gateway.stats(), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
