"""Two gateways of one site, devices that ask all the time, and SIGKILL for one gateway after the other.

    make gateway-failover ARGS="--events 45 --seed 1"

The gateways are processes of their own in one shared group, behind a real broker; the devices are the real device code
with an outbox on disk, all on one loop. What happens next is chance of a fixed seed: a gateway is killed as it works, or
frozen until questions wait in it and then killed, or frozen for longer than the devices' patience and thawed, so that its
answers come after those of the other. One of the two always works.

The last line is JSON: `asked` and `answered` must be equal, and `answered_twice`, which is what the application heard
twice of, and `late` must be 0. A question may take `retry_after_s` for each kill while it was open, at least once, and as
long as a gateway was frozen meanwhile, and `slack_s`. How much of a test it was: `asked_again` questions needed a second
try, `replied_twice` had a reply of both gateways.
"""

import argparse
import json
import random
import signal
import subprocess
import sys
import tempfile
from collections import Counter
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper

from device_agent.device import Device, DeviceConfig
from device_agent.policy import PolicyConfig
from device_agent.readings import AnsweredBy, Reading
from fleet_console.broker import BrokerKind, start_broker
from shoal.delivery.outbox import Limits, Outbox, lane_by_device
from shoal.link import Link
from shoal.link_config import node_identity, parse_broker_url
from shoal.loop import Loop
from shoal.routes import Route
from shoal.v1.inference_pb2 import STATUS_OK

SITE, MODEL = "failover", "double"
GATEWAYS = ("gw-a", "gw-b")
DEVICES = 8
RATE_HZ = 40.0
RETRY_AFTER_S = 1.0
# Of a machine that others use too: a tick of the devices, a commit to disk, the way there and back.
SLACK_S = 1.0
# So many questions wait in a frozen gateway before it is killed.
CAUGHT = 10
FROZEN_S = 1.5 * RETRY_AFTER_S
EVENTS = ("kill", "freeze and kill", "freeze and thaw")
_TICK_S = 0.02
_PATIENCE_S = 60.0
_FAILURES = ("answered_twice", "late", "unanswered")


def write_model(path):
    graph = helper.make_graph(
        [helper.make_node("Add", ["x", "x"], ["y"])],
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", 2])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n", 2])],
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9), path)


class GatewayProcess:
    """One gateway, as `python -m edge_gateway` runs it; the one after a kill has the same name."""

    def __init__(self, name, url, folder):
        self.name = name
        self._log = folder / f"{name}.log"
        self._command = [sys.executable, "-m", "edge_gateway", "--model", str(folder / f"{MODEL}.onnx")]
        self._command += ["--broker", url, "--site", SITE, "--name", name, "--metrics-address", ""]

    def start(self):
        with self._log.open("wb") as log:
            self.process = subprocess.Popen(self._command, stdin=subprocess.DEVNULL, stdout=log, stderr=log)

    @property
    def is_serving(self):
        assert self.process.poll() is None, self._log.read_text()
        return "serving models=" in self._log.read_text()

    def freeze(self):
        self.process.send_signal(signal.SIGSTOP)

    def thaw(self):
        self.process.send_signal(signal.SIGCONT)

    def kill(self):
        self.process.kill()
        self.process.wait()


class Site:
    """Devices on one loop that read, ask and hear; whom they ask is another process."""

    def __init__(self, url, folder, rng):
        self.loop = Loop()
        self.rng = rng
        self.asked_at = {}
        self.answered_at = {}
        self.heard = Counter()
        self.replied = Counter()
        self.kills_at = []
        self.frozen = []
        self.outbox = Outbox(folder / "outbox.sqlite", Limits(), lane_by_device)
        config = replace(parse_broker_url(url, session_expiry_s=60), backoff_max_s=0.5)
        self.devices = [self._device(f"cam-{index:02d}", config) for index in range(DEVICES)]
        self.watcher = Link(config, node_identity(SITE, "watcher", "operator"))
        self.watcher.subscribe(Route.REPLY, self._watch, site=SITE)
        self.links = [self.watcher, *(device.link for device in self.devices)]
        self._is_reading = True

    def _device(self, node, config):
        return Device(
            DeviceConfig(
                SITE, node, MODEL, policy=PolicyConfig(max_per_minute=10**6), retry_after_s=RETRY_AFTER_S, max_rows=4
            ),
            Link(config, node_identity(SITE, node, "device")),
            self.outbox,
            rng=self.rng,
            clock=self.loop.clock,
            lane=node,
            on_outcome=lambda outcome: self._hear(node, outcome),
        )

    def _hear(self, node, outcome):
        if outcome.by is AnsweredBy.GATEWAY:
            self.heard[node, outcome.seq] += 1
            self.answered_at.setdefault((node, outcome.seq), self.loop.clock())

    def _watch(self, delivery):
        self.replied.update(
            (delivery.address.node, row.seq) for row in delivery.message.rows if row.status == STATUS_OK
        )

    def start(self, gateways):
        """Read from when somebody answers: nothing is owed for the time before."""
        for link in self.links:
            link.attach(self.loop)
        self.loop.call_every(_TICK_S, self._tick)
        self.until(lambda: all(link.connected and link.is_subscribed for link in self.links))
        self.until(lambda: all(gateway.is_serving for gateway in gateways))
        for device in self.devices:
            self.loop.call_at(
                self.loop.clock() + self.rng.random() / RATE_HZ, lambda now, device=device: self._read(device, now)
            )

    def _read(self, device, now):
        if self._is_reading:
            values = np.array([self.rng.random(), self.rng.random()], np.float32)
            outcome = device.read(Reading(values, 1), now)
            assert outcome.reason == "asked.no_model"
            self.asked_at[device.config.node, outcome.seq] = now
            self.loop.call_at(now + 1 / RATE_HZ, lambda later: self._read(device, later))

    def _tick(self, now):
        self.outbox.commit()
        for device in self.devices:
            device.tick(now)

    def until(self, ready):
        deadline = self.loop.clock() + _PATIENCE_S
        self.loop.run(until=lambda: ready() or self.loop.clock() > deadline)
        assert ready(), f"it did not come in time: {self.outbox.in_flight} questions in flight"

    def load_for(self, seconds):
        """Let the devices go on."""
        end = self.loop.clock() + seconds
        self.until(lambda: self.loop.clock() >= end)

    def finish(self):
        """Read no more, and wait for the last answer."""
        self._is_reading = False
        self.until(lambda: not self.outbox.in_flight and not self.outbox.is_dirty)

    def close(self):
        for link in self.links:
            link.close()
        self.loop.close()
        self.outbox.close()

    def figures(self):
        took_s = {key: self.answered_at[key] - at for key, at in self.asked_at.items() if key in self.answered_at}
        return {
            "asked": len(self.asked_at),
            "answered": len(self.answered_at),
            "answered_twice": sum(count > 1 for count in self.heard.values()),
            "late": sum(took > self._allowed_s(key) for key, took in took_s.items()),
            "kills": len(self.kills_at),
            "freezes": len(self.frozen),
            "unanswered": len(self.asked_at.keys() - self.answered_at.keys()),
            "asked_again": sum(took > RETRY_AFTER_S for took in took_s.values()),
            "replied_twice": sum(count > 1 for count in self.replied.values()),
            "slowest_s": round(max(took_s.values()), 3),
            "p50_ms": round(1000 * sorted(took_s.values())[len(took_s) // 2], 2),
            "retry_after_s": RETRY_AFTER_S,
            "slack_s": SLACK_S,
        }

    def _allowed_s(self, key):
        began, ended = self.asked_at[key], self.answered_at[key]
        met = sum(began <= at <= ended for at in self.kills_at)
        frozen_s = sum(max(0.0, min(ended, thawed) - max(began, frozen)) for frozen, thawed in self.frozen)
        return RETRY_AFTER_S * max(1, met) + frozen_s + SLACK_S


def run(url, folder, events, seed):
    """Let so many things happen to the gateways, and return what the devices saw of it."""
    rng = random.Random(seed)
    write_model(folder / f"{MODEL}.onnx")
    with ExitStack() as stack:
        gateways = [GatewayProcess(name, url, folder) for name in GATEWAYS]
        for gateway in gateways:
            gateway.start()
            stack.callback(gateway.kill)
        site = Site(url, folder, rng)
        stack.callback(site.close)
        site.start(gateways)
        for number in range(events):
            site.load_for(rng.uniform(0.2, 1.5))
            happen(site, rng.choice(gateways), EVENTS[number % len(EVENTS)])
            site.until(lambda: all(gateway.is_serving for gateway in gateways))
        site.load_for(0.2)
        site.finish()
        return site.figures()


def happen(site, gateway, event):
    frozen_at = site.loop.clock()
    if event != "kill":
        waiting = site.outbox.in_flight
        gateway.freeze()
        site.until(lambda: site.outbox.in_flight >= waiting + CAUGHT)
    if event == "freeze and thaw":
        site.load_for(FROZEN_S)
        gateway.thaw()
        site.frozen.append((frozen_at, site.loop.clock()))
    else:
        gateway.kill()
        site.kills_at.append(site.loop.clock())
        gateway.start()


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--events", type=int, default=45, help="two of three are kills (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        with start_broker(folder / "broker", BrokerKind.MOSQUITTO) as broker:
            figures = run(broker.url, folder, options.events, options.seed)
    print(json.dumps(figures))
    return any(figures[name] for name in _FAILURES)


if __name__ == "__main__":
    sys.exit(main())
