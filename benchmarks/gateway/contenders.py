"""Who is measured, and how one run of each is done: Shoal's gateway, the echo, mosec, and onnxruntime alone."""

import contextlib
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

import numpy as np
import onnxruntime

from benchmarks.gateway.models import BenchModel
from benchmarks.gateway.payloads import DEVICES, SITE, read_payload
from benchmarks.gateway.processes import Measured, measure, running
from fleet_console.broker import RunningBroker, free_port
from shoal.routes import ROUTES, Route
from shoal.v1 import inference_pb2 as pb

OUTSTANDING = 64
_ECHO_SITE = "echo"
_WARM_UP_S = 1.0
_FIRST_ANSWER_S = 30.0
_RETRY_S = 0.2


@dataclass(frozen=True, slots=True)
class MosecTuning:
    """mosec's settings; see `tune_mosec.py` for how they were found."""

    workers: int
    batch: int
    wait_ms: int
    threads: int = 1

    def environment(self, model: Path) -> dict[str, str]:
        return {
            "BENCH_MODEL": str(model),
            "BENCH_WORKERS": str(self.workers),
            "BENCH_BATCH": str(self.batch),
            "BENCH_WAIT_MS": str(self.wait_ms),
            "BENCH_THREADS": str(self.threads),
        }


@dataclass(frozen=True, slots=True)
class Kit:
    """Where the things are that runs need: programs, one model's file, its payloads and a reply."""

    model: BenchModel
    folder: Path
    native: Path
    logs: Path
    mosec_python: Path

    @property
    def onnx(self) -> Path:
        return self.folder / f"{self.model.name}.onnx"

    @property
    def payloads(self) -> Path:
        return self.folder / f"{self.model.name}.requests"

    @property
    def reply(self) -> Path:
        return self.folder / f"{self.model.name}.reply"


class MqttContender:
    """Devices ask over the broker: the gateway, or the echo."""

    def __init__(self, kit: Kit, broker: RunningBroker, pid: int, site: str) -> None:
        self._kit = kit
        self._broker = broker
        self._pid = pid
        self._site = site

    def run(self, seconds: float, rate: int = 0, qos: int = 1) -> Measured:
        """One run at the devices' `qos`; `rate` 0 keeps `OUTSTANDING` questions under way."""
        command = [str(self._kit.native / "mqtt_load"), "--port", str(self._broker.port), "--site", self._site]
        command += ["--payloads", str(self._kit.payloads), "--devices", str(DEVICES), "--seconds", str(seconds)]
        command += ["--qos", str(qos)]
        command += ["--rate", str(rate)] if rate else ["--outstanding", str(OUTSTANDING)]
        return measure(command, {"broker": self._broker.process.pid, "server": self._pid}, seconds)


class HttpContender:
    """wrk asks: any server that takes a request's bytes by POST."""

    def __init__(self, kit: Kit, pid: int, url: str) -> None:
        self._kit = kit
        self._pid = pid
        self._url = url

    def run(self, seconds: float) -> Measured:
        script = Path(__file__).parent / "rotate.lua"
        whole_s = max(1, round(seconds))
        command = ["wrk", "-t1", f"-c{OUTSTANDING}", f"-d{whole_s}s", "--timeout", "10s", "-s", str(script), self._url]
        return measure([*command, "--", str(self._kit.payloads)], {"server": self._pid}, whole_s)

    def check(self) -> None:
        """Ask one question, as soon as the server takes it, and compare the answer with onnxruntime's own.

        Raises:
            RuntimeError: they differ.
        """
        payload = read_payload(self._kit.payloads)
        row = pb.InferenceReply.FromString(self._post(payload)).rows[0]
        expected = expected_label(self._kit.onnx, payload)
        if (row.status, row.answer.label) != (pb.STATUS_OK, expected):
            raise RuntimeError(f"{self._url} answered {row}, expected label {expected}")

    def _post(self, payload: bytes) -> bytes:
        """Some servers open their port before they know what to serve."""
        request = urllib.request.Request(self._url, payload, {"Content-Type": "application/x-protobuf"})
        deadline = time.monotonic() + _FIRST_ANSWER_S
        while True:
            try:
                with urllib.request.urlopen(request, timeout=_FIRST_ANSWER_S) as response:
                    answer: bytes = response.read()
                    return answer
            except urllib.error.URLError as exc:
                if time.monotonic() > deadline:
                    raise RuntimeError(f"{self._url}: {exc}") from exc
            time.sleep(_RETRY_S)


def expected_label(onnx: Path, payload: bytes) -> int:
    """What onnxruntime says of a payload's only row."""
    tensor = pb.InferenceRequest.FromString(payload).rows[0].reading.tensor
    values = np.frombuffer(tensor.data, np.uint8).reshape(1, *tensor.shape).astype(np.float32)
    session = onnxruntime.InferenceSession(onnx, providers=["CPUExecutionProvider"])
    return int(session.run(None, {"input": values})[0].argmax())


@contextlib.contextmanager
def gateway(kit: Kit, broker: RunningBroker) -> Iterator[MqttContender]:
    arguments = [str(kit.onnx), broker.url, str(kit.model.batch)]
    command = [sys.executable, "-m", "benchmarks.gateway.serve_gateway", *arguments]
    with running(command, kit.logs / f"gateway-{kit.model.name}.log", ready="ready") as pid:
        contender = MqttContender(kit, broker, pid, SITE)
        contender.run(_WARM_UP_S)
        yield contender


@contextlib.contextmanager
def echo(kit: Kit, broker: RunningBroker) -> Iterator[MqttContender]:
    arguments = ["--port", str(broker.port), "--site", _ECHO_SITE, "--reply", str(kit.reply)]
    arguments += ["--reply-qos", str(ROUTES[Route.REPLY].qos)]
    command = [str(kit.native / "mqtt_echo"), *arguments]
    with running(command, kit.logs / "echo.log", ready="ready") as pid:
        contender = MqttContender(kit, broker, pid, _ECHO_SITE)
        contender.run(_WARM_UP_S)
        yield contender


@contextlib.contextmanager
def mosec(kit: Kit, tuning: MosecTuning) -> Iterator[HttpContender]:
    port = free_port()
    command = [str(kit.mosec_python), "-m", "benchmarks.gateway.serve_mosec", "--port", str(port), "--timeout", "30000"]
    command += ["--address", "127.0.0.1", "--log-level", "warning"]
    log = kit.logs / f"mosec-{kit.model.name}.log"
    with http_server(
        kit, command, log, f"http://127.0.0.1:{port}/inference", tuning.environment(kit.onnx)
    ) as contender:
        yield contender


@contextlib.contextmanager
def http_server(
    kit: Kit, command: list[str], log: Path, url: str, settings: Mapping[str, str]
) -> Iterator[HttpContender]:
    """Start it, wait until it answers rightly, and warm it up."""
    port = urlsplit(url).port or 80
    with running(command, log, port=port, env=settings) as pid:
        contender = HttpContender(kit, pid, url)
        contender.check()
        contender.run(_WARM_UP_S)
        yield contender


def ort_alone(kit: Kit, seconds: float) -> Measured:
    arguments = [str(kit.onnx), str(kit.model.batch), str(seconds)]
    return measure([sys.executable, "-m", "benchmarks.gateway.ort_alone", *arguments], {}, seconds)
