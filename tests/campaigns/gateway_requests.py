"""Many requests of every kind to a gateway, each answer compared with what onnxruntime says by itself.

    make gateway-requests ARGS="--requests 100000 --seed 1"

Of the requests a tenth are malformed bytes, and others are repeated, late and `answer_only`, of unknown models, in another's
name, misshapen, not finite. What each must get is worked out here by other code than the gateway's. They are asked twice:

  path    whole packets go through the real gateway (parse, check, queue, batch, run, encode) without a socket
  broker  paho asks a gateway process through a real Mosquitto with QoS 1, up to 128 questions under way

The last line is JSON, nested under the two: `missing`, `twice`, `strays`, `wrong` and `wrong_codes` must be 0;
`rss_growth_mb` compares the second half with the first, of the gateway's own process where it has one, and must be small
where the requests are enough to fill its cache in the first half. Over the broker an `answer_only` question may be in time:
`late` says how many rows were not.
"""

import argparse
import json
import random
import subprocess
import sys
import tempfile
import time
from collections import Counter
from contextlib import closing, contextmanager
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import NamedTuple

import numpy as np
import onnx
import onnxruntime
import psutil
from onnx import TensorProto, helper
from paho.mqtt.client import Client, MQTTv5
from paho.mqtt.enums import CallbackAPIVersion
from paho.mqtt.packettypes import PacketTypes
from paho.mqtt.properties import Properties

from edge_gateway.deploy import local_model
from edge_gateway.lanes import LaneConfig
from edge_gateway.rehearsal import SITE, Rehearsal
from fleet_console.broker import BrokerKind, start_broker
from shoal.routes import Route, topic, topic_bytes, topic_filter
from shoal.tensors import DTYPES, to_tensor
from shoal.v1 import inference_pb2 as pb
from shoal.v1.sensor_pb2 import Scalars, SensorData
from shoal.wire import PUBLISH, correlation_property, encode_publish, packet_bounds, parse_publish

MODEL = "mixed"
WIDTH = 6
TOLERANCE = 1e-6
BATCH = 16
# Of 40 devices: few enough that none of them has 64 rows waiting.
OUTSTANDING = 128
FLAT_MB = 8.0
# So many fill the gateway's answer cache in their first half.
FILLING = 60_000
_PATIENCE_S = 30.0
_FAILURES = ("missing", "twice", "strays", "wrong", "wrong_codes")


def write_model(path):
    """Two outputs of six inputs: logits, and their sums."""
    rng = np.random.default_rng(4)
    weight = helper.make_tensor(
        "w", TensorProto.FLOAT, [WIDTH, 4], rng.normal(size=(WIDTH, 4)).astype(np.float32).ravel()
    )
    graph = helper.make_graph(
        [helper.make_node("MatMul", ["x", "w"], ["y"]), helper.make_node("Neg", ["y"], ["z"])],
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", WIDTH])],
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in ("y", "z")],
        [weight],
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9), path)


class Due(NamedTuple):
    """What a row must get: its status in time and too late, and the values that the model sees where it is OK."""

    status: int
    late_status: int
    values: object = None


class Asked(NamedTuple):
    """One request and what it must get."""

    payload: bytes
    device: str
    rows: list
    wants_outputs: bool = False
    is_whole: bool = True


def reading_of(rng, seq, kind):
    """A reading and the values that a model must see; None where it must be refused."""
    if kind == "misshapen":
        return SensorData(seq=seq, scalars=Scalars(values=[1.0] * rng.choice([0, 1, WIDTH - 1, WIDTH + 1]))), None
    if kind == "lies about its shape":
        tensor = to_tensor(np.zeros(WIDTH, np.float32))
        tensor.shape[:] = [rng.choice([WIDTH + 1, 2**31])]
        return SensorData(seq=seq, tensor=tensor), None
    if kind == "not finite":
        return SensorData(seq=seq, scalars=Scalars(values=[rng.choice([float("nan"), float("inf")])] * WIDTH)), None
    dtype = rng.choice(list(DTYPES.values()))
    values = np.array([rng.randrange(0, 100) for _ in range(WIDTH)]).astype(dtype)
    if rng.random() < 0.3:
        return SensorData(seq=seq, scalars=Scalars(values=values.astype(np.float32).tolist())), values
    shape = rng.choice([(WIDTH,), (2, 3), (1, WIDTH, 1)])
    return SensorData(seq=seq, tensor=to_tensor(values.reshape(shape))), values


def make(rng, number):
    device = f"cam{rng.randrange(40):02d}"
    if rng.random() < 0.1:
        return Asked(rng.randbytes(rng.randrange(1, 60)) + b"\xff", device, [], is_whole=False)
    kinds = rng.choices(
        ["good", "misshapen", "lies about its shape", "not finite"], [20, 1, 1, 1], k=rng.choice([1, 1, 1, 2, 5])
    )
    made = [reading_of(rng, number * 8 + place, kind) for place, kind in enumerate(kinds)]
    fields = {"device": device, "epoch": b"e" * 16, "model": MODEL, "wants_outputs": rng.random() < 0.1}
    rows = [due(kind, values) for kind, (_, values) in zip(kinds, made, strict=True)]
    chance = rng.random()
    if chance < 0.03:
        fields["model"] = "unknown"
        rows = [Due(pb.STATUS_NOT_FOUND, pb.STATUS_NOT_FOUND)] * len(rows)
    elif chance < 0.05:
        fields["device"] = "somebody-else"
    elif chance < 0.07:
        fields["epoch"] = b"short"
    elif chance < 0.1:
        fields |= {"answer_only": True, "answer_within_ms": 1}
    if "answer_only" not in fields:
        rows = [row._replace(late_status=row.status) for row in rows]
    request = pb.InferenceRequest(rows=[pb.InferenceRow(reading=reading) for reading, _ in made], **fields)
    is_whole = fields["device"] == device and len(fields["epoch"]) == 16
    return Asked(request.SerializeToString(), device, rows, wants_outputs=fields["wants_outputs"], is_whole=is_whole)


def due(kind, values):
    """What the model itself finds, as values that are not finite, is found too late as well."""
    if values is not None:
        return Due(pb.STATUS_OK, pb.STATUS_DEADLINE_EXCEEDED, values)
    is_found_by_model = kind == "not finite"
    late_status = pb.STATUS_DEADLINE_EXCEEDED if is_found_by_model else pb.STATUS_INVALID_ARGUMENT
    return Due(pb.STATUS_INVALID_ARGUMENT, late_status)


def check(asked, reply, expected, tally, *, is_late=True):
    """Compare one reply with what must be in it; where nobody knows whether it is late, either will do."""
    if not asked.is_whole:
        tally["refused"] += 1
        tally["wrong_codes"] += [row.status for row in reply.rows] != [pb.STATUS_INVALID_ARGUMENT]
        return
    found = [row.status for row in reply.rows]
    wanted = [{row.late_status} if is_late else {row.status, row.late_status} for row in asked.rows]
    if len(found) != len(wanted) or any(status not in of for status, of in zip(found, wanted, strict=True)):
        tally["wrong_codes"] += 1
        return
    tally["rows"] += len(found)
    tally["late"] += found.count(pb.STATUS_DEADLINE_EXCEEDED)
    for row, (*_, values) in zip(reply.rows, asked.rows, strict=True):
        if row.status != pb.STATUS_OK:
            continue
        logits, _ = expected(values)
        certainty = np.exp(logits - logits.max()).max() / np.exp(logits - logits.max()).sum()
        is_right = row.answer.label == logits.argmax() and abs(row.answer.score - (1 - certainty)) < TOLERANCE
        if asked.wants_outputs:
            found = [np.frombuffer(output.data, np.float32) for output in row.answer.outputs]
            is_right &= (
                len(found) == 2 and np.allclose(found[0], logits, atol=1e-4) and np.array_equal(found[0], -found[1])
            )
        else:
            is_right &= not row.answer.outputs
        tally["wrong"] += not is_right


def questions(rng, requests):
    """Drains of up to 64, a twentieth of them what was asked before in the same drain."""
    number = 0
    while number < requests:
        drained = []
        for _ in range(min(64, requests - number)):
            drained.append(make(rng, number) if not drained or rng.random() > 0.05 else rng.choice(drained))
            number += 1
        yield drained


def by_itself(path):
    """What onnxruntime says of one row."""
    alone = onnxruntime.InferenceSession(path)
    return lambda values: [output[0] for output in alone.run(None, {"x": values.astype(np.float32)[None]})]


class Growth:
    """Of a process, from half of the way to the end."""

    def __init__(self, process, requests):
        self._process = process
        self._half = requests / 2
        self._half_mb = 0.0

    def at(self, number):
        if not self._half_mb and number >= self._half:
            self._half_mb = self._process.memory_info().rss / 1e6

    def mb(self):
        return round(self._process.memory_info().rss / 1e6 - self._half_mb, 1)


def figures(requests, tally, growth):
    names = ("rows", "refused", "late", *_FAILURES)
    return {"requests": requests, **{name: tally[name] for name in names}, "rss_growth_mb": growth.mb()}


# -- without a socket ------------------------------------------------------------------------------------------------------


def run(requests, seed):
    """Ask, and return the tally."""
    rng = random.Random(seed)
    tally = Counter()
    growth = Growth(psutil.Process(), requests)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "m.onnx"
        write_model(path)
        expected = by_itself(path)
        lanes = LaneConfig(max_batch_size=BATCH, max_waiting_per_device=4096)
        with Rehearsal(MODEL, local_model(MODEL, path), lanes) as gateway:
            late = gateway.gateway._clock() + 1000.0
            number = 0
            for drained in questions(rng, requests):
                for place, asked in enumerate(drained):
                    gateway.link.receive(packet(asked, place))
                gateway.flush(late)  # so that whoever would not wait is late
                sent, gateway.link.sent = gateway.link.sent, []
                answers = replies_in(sent)
                for place, asked in enumerate(drained):
                    found = answers.pop(place.to_bytes(8, "big"), [])
                    tally["missing"] += not found
                    tally["twice"] += len(found) > 1
                    for reply in found[:1]:
                        check(asked, reply, expected, tally)
                tally["strays"] += len(answers)
                number += len(drained)
                growth.at(number)
        return figures(requests, tally, growth)


def packet(asked, place):
    return encode_publish(
        topic_bytes(Route.INFER, site=SITE, node=asked.device),
        asked.payload,
        qos=1,
        retain=False,
        packet_id=place + 1,
        properties=correlation_property(place.to_bytes(8, "big")),
    )


def replies_in(sent):
    """By correlation data."""
    found = {}
    for data in sent:
        if data[0] & 0xF0 == PUBLISH:
            publish = parse_publish(data, 0, *packet_bounds(data, 0, len(data)))
            found.setdefault(publish.correlation, []).append(pb.InferenceReply.FromString(publish.payload))
    return found


# -- over a broker ---------------------------------------------------------------------------------------------------------


class Asker:
    """All devices behind one connection of another client than ours: paho, with its own thread."""

    def __init__(self, port):
        self.replies = SimpleQueue()
        is_subscribed = SimpleQueue()
        self._client = client = Client(CallbackAPIVersion.VERSION2, "asker", protocol=MQTTv5)
        client.max_inflight_messages_set(2 * OUTSTANDING)
        client.on_connect = lambda *_: client.subscribe(topic_filter(Route.REPLY, site=SITE), qos=1)
        client.on_subscribe = lambda *_: is_subscribed.put(True)
        client.on_message = lambda _client, _data, message: self.replies.put(
            (getattr(message.properties, "CorrelationData", b""), message.payload)
        )
        client.connect("127.0.0.1", port)
        client.loop_start()
        is_subscribed.get(timeout=_PATIENCE_S)

    def ask(self, asked, correlation):
        properties = Properties(PacketTypes.PUBLISH)
        properties.CorrelationData = correlation
        self._client.publish(
            topic(Route.INFER, site=SITE, node=asked.device), asked.payload, qos=1, properties=properties
        )

    def close(self):
        self._client.disconnect()
        self._client.loop_stop()


@contextmanager
def gateway_process(path, url, log):
    """`python -m edge_gateway`, from when it serves."""
    command = [sys.executable, "-m", "edge_gateway", "--model", str(path), "--broker", url, "--site", SITE]
    command += ["--max-batch-size", str(BATCH), "--metrics-address", ""]
    with log.open("wb") as output:
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=output, stderr=output)
    try:
        deadline = time.monotonic() + _PATIENCE_S
        while "serving models=" not in log.read_text():
            if process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(log.read_text())
            try:
                process.wait(0.05)
            except subprocess.TimeoutExpired:
                continue
        yield process.pid
    finally:
        process.kill()
        process.wait()


def run_over_broker(requests, seed, broker):
    """The same questions to a process, and the same tally of what comes back."""
    tally = Counter()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        path = folder / f"{MODEL}.onnx"
        write_model(path)
        with (
            gateway_process(path, broker.url, folder / "gateway.log") as pid,
            closing(Asker(broker.port)) as asker,
        ):
            growth = Growth(psutil.Process(pid), requests)
            exchange = Exchange(asker, by_itself(path), tally)
            for drained in questions(random.Random(seed), requests):
                for asked in drained:
                    exchange.ask(asked)
                growth.at(exchange.number)
            exchange.finish()
            return figures(requests, tally, growth)


class Exchange:
    """Keeps so many questions under way, and checks each answer as it comes."""

    def __init__(self, asker, expected, tally):
        self.number = 0
        self._asker = asker
        self._expected = expected
        self._tally = tally
        self._open = {}

    def ask(self, asked):
        while len(self._open) >= OUTSTANDING and self._hear(_PATIENCE_S):
            pass
        if len(self._open) >= OUTSTANDING:
            raise RuntimeError(f"{len(self._open)} questions have no answer")
        correlation = self.number.to_bytes(8, "big")
        self.number += 1
        self._open[correlation] = asked
        self._asker.ask(asked, correlation)

    def finish(self):
        """Hear the last answers, and then whatever should not come any more."""
        while self._open and self._hear(_PATIENCE_S):
            pass
        self._tally["missing"] += len(self._open)
        while self._hear(0.5):
            pass

    def _hear(self, patience_s):
        """Check one answer; False where none comes."""
        try:
            correlation, payload = self._asker.replies.get(timeout=patience_s)
        except Empty:
            return False
        asked = self._open.pop(correlation, None)
        if asked is None:
            is_known = len(correlation) == 8 and int.from_bytes(correlation, "big") < self.number
            self._tally["twice" if is_known else "strays"] += 1
        else:
            check(asked, pb.InferenceReply.FromString(payload), self._expected, self._tally, is_late=False)
        return True


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--requests", type=int, default=100_000)
    parser.add_argument("--seed", type=int, default=1)
    only = parser.add_mutually_exclusive_group()
    only.add_argument("--path", action="store_true", help="only without a socket")
    only.add_argument("--broker", action="store_true", help="only over a broker")
    options = parser.parse_args()
    result = {}
    if not options.broker:
        result["path"] = run(options.requests, options.seed)
    if not options.path:
        with (
            tempfile.TemporaryDirectory() as folder,
            start_broker(Path(folder) / "broker", BrokerKind.MOSQUITTO) as broker,
        ):
            result["broker"] = run_over_broker(options.requests, options.seed, broker)
    print(json.dumps(result))
    return any(is_bad(each) for each in result.values())


def is_bad(result):
    has_grown = result["requests"] >= FILLING and result["rss_growth_mb"] > FLAT_MB
    return has_grown or any(result[name] for name in _FAILURES)


if __name__ == "__main__":
    sys.exit(main())
