"""Many requests of every kind to a gateway, each answer compared with what onnxruntime says by itself.

    make gateway-requests ARGS="--requests 100000 --seed 1"

Whole packets go through the real gateway (parse, check, queue, batch, run, encode) without a socket. Of the requests a tenth
are malformed bytes, and others are repeated, late and `answer_only`, of unknown models, in another's name, misshapen, not
finite. What each must get is worked out here by other code than the gateway's. The last line is JSON: `missing`, `twice`,
`wrong` and `wrong_codes` must be 0; `rss_growth_mb` compares the second half with the first.
"""

import argparse
import json
import random
import sys
import tempfile
from collections import Counter
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import psutil
from onnx import TensorProto, helper

from edge_gateway.deploy import local_model
from edge_gateway.lanes import LaneConfig
from edge_gateway.rehearsal import SITE, Rehearsal
from shoal.routes import Route, topic_bytes
from shoal.tensors import DTYPES, to_tensor
from shoal.v1 import inference_pb2 as pb
from shoal.v1.sensor_pb2 import Scalars, SensorData
from shoal.wire import PUBLISH, correlation_property, encode_publish, packet_bounds, parse_publish

MODEL = "mixed"
WIDTH = 6
TOLERANCE = 1e-6


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


class Asked:
    """One request and what it must get: for each row a status, and the values that the model sees where it is OK."""

    def __init__(self, payload, device, rows, *, wants_outputs=False, is_whole=True):
        self.payload = payload
        self.device = device
        self.rows = rows
        self.wants_outputs = wants_outputs
        self.is_whole = is_whole


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
    rows = [(pb.STATUS_INVALID_ARGUMENT if values is None else pb.STATUS_OK, values) for _, values in made]
    chance = rng.random()
    if chance < 0.03:
        fields["model"] = "unknown"
        rows = [(pb.STATUS_NOT_FOUND, None)] * len(rows)
    elif chance < 0.05:
        fields["device"] = "somebody-else"
    elif chance < 0.07:
        fields["epoch"] = b"short"
    elif chance < 0.1:
        fields |= {"answer_only": True, "answer_within_ms": 1}
        rows = [
            (pb.STATUS_DEADLINE_EXCEEDED if status == pb.STATUS_OK or is_finite_fault else status, None)
            for (status, _), is_finite_fault in zip(rows, [kind == "not finite" for kind in kinds], strict=True)
        ]
    request = pb.InferenceRequest(rows=[pb.InferenceRow(reading=reading) for reading, _ in made], **fields)
    is_whole = fields["device"] == device and len(fields["epoch"]) == 16
    return Asked(request.SerializeToString(), device, rows, wants_outputs=fields["wants_outputs"], is_whole=is_whole)


def check(asked, reply, expected, tally):
    """Compare one reply with what must be in it."""
    if not asked.is_whole:
        tally["refused"] += 1
        tally["wrong_codes"] += [row.status for row in reply.rows] != [pb.STATUS_INVALID_ARGUMENT]
        return
    tally["wrong_codes"] += [row.status for row in reply.rows] != [status for status, _ in asked.rows]
    for row, (status, values) in zip(reply.rows, asked.rows, strict=True):
        tally["rows"] += 1
        if status != pb.STATUS_OK or row.status != status:
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


def run(requests, seed):
    """Ask, and return the tally."""
    rng = random.Random(seed)
    tally = Counter()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "m.onnx"
        write_model(path)
        alone = onnxruntime.InferenceSession(path)

        def expected(values):
            return [output[0] for output in alone.run(None, {"x": values.astype(np.float32)[None]})]

        lanes = LaneConfig(max_batch_size=16, max_waiting_per_device=4096)
        process, half_mb = psutil.Process(), 0.0
        with Rehearsal(MODEL, local_model(MODEL, path), lanes) as gateway:
            late = gateway.gateway._clock() + 1000.0
            number = 0
            while number < requests:
                drained = []
                for _ in range(min(64, requests - number)):
                    drained.append(make(rng, number) if not drained or rng.random() > 0.05 else rng.choice(drained))
                    number += 1
                packets = [packet(asked, place) for place, asked in enumerate(drained)]
                for one in packets:
                    gateway.link.receive(one)
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
                if not half_mb and number >= requests / 2:
                    half_mb = process.memory_info().rss / 1e6
        growth = process.memory_info().rss / 1e6 - half_mb
    names = ("rows", "refused", "missing", "twice", "strays", "wrong", "wrong_codes")
    return {"requests": requests, **{name: tally[name] for name in names}, "rss_growth_mb": round(growth, 1)}


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


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--requests", type=int, default=100_000)
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    result = run(options.requests, options.seed)
    print(json.dumps(result))
    return any(result[name] for name in ("missing", "twice", "strays", "wrong", "wrong_codes"))


if __name__ == "__main__":
    sys.exit(main())
