"""Model files that others made, from `shoal release publish` to a device's answers, as processes over a real broker.

In all but the last test the cloud has ended before a device connects: retained messages are all there is.
"""

import datetime as dt
import json
import os
import random
import signal
import subprocess
import sys
import time
from contextlib import contextmanager, suppress
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from cloud.keys import FileKeyStore
from cloud.release_orders import submit_plan, submit_release
from cloud.release_store import ReleaseStore
from fleet_console.broker import BrokerKind, find_mosquitto, start_broker
from fleet_console.cli import app
from shoal.errors import ConfigError
from shoal.link import Link
from shoal.link_config import node_identity, parse_broker_url
from shoal.loop import Loop
from shoal.routes import Route
from shoal.scoring import score_rows
from shoal.tensors import to_array
from shoal.v1 import release_pb2 as pb
from shoal.v1.node_pb2 import SlotPhase

ROOT = Path(__file__).parents[2]
SITE = "lab"
PATIENCE_S = 60.0
FILES = (
    "ad01_fp32.tflite",
    "ad01_int8.tflite",
    "hello_world_int8.tflite",
    "keyword_scrambled_8bit.tflite",
    "kws_ref_model.tflite",
    "pretrainedResnet.tflite",
    "pretrainedResnet_quant.tflite",
)
# By the name of the runtime's distribution: the interpreter of the environment that has it.
RUNTIMES = {"ai-edge-litert": Path(sys.executable), "tflite-runtime": ROOT / ".venv-device" / "bin" / "python"}
# Which runtime refuses which file at its self-test. docs/models.md has the same table.
REFUSED: frozenset[tuple[str, str]] = frozenset()

pytestmark = pytest.mark.skipif(find_mosquitto() is None, reason="left out: needs Mosquitto, to keep what is retained")


def model_of(name: str) -> str:
    return Path(name).stem.lower()


def shoal(*arguments) -> str:
    """Run a command as an operator types it."""
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == 0
    return result.stdout


def environment() -> dict[str, str]:
    """Both environments run this checkout."""
    names = {name: value for name, value in os.environ.items() if not name.startswith("SHOAL_")}
    return {**names, "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "proto")])}


@contextmanager
def process(python: Path, module: str, *arguments: str):
    """A process of ours; killed after the block, unless it has ended."""
    command = [str(python), "-m", module, *arguments]
    with subprocess.Popen(command, env=environment(), stderr=subprocess.PIPE, text=True) as child:
        try:
            yield child
        finally:
            child.kill()


def end(child: subprocess.Popen) -> None:
    """Nothing that it loaded may spoil its end."""
    assert child.poll() is None
    child.send_signal(signal.SIGTERM)
    _, said = child.communicate(timeout=PATIENCE_S)
    assert child.returncode == 0, said


class Published:
    """A broker that holds releases of several models, and the store that they came from."""

    def __init__(self, url: str, store: ReleaseStore) -> None:
        self.url, self.store = url, store
        self.root = store.directory.parent / "root.json"

    def spec(self, model: str) -> pb.ReleaseSpec:
        info = self.store.load().targets()[f"releases/{model}/1.spec"]
        return pb.ReleaseSpec.FromString(self.store.file(bytes.fromhex(info.hashes["sha256"])))


@pytest.fixture(scope="module")
def files(shared_data):
    return {path.name: path for path in sorted((shared_data / "models_tflite").glob("*.tflite"))}


@pytest.fixture(scope="module")
def published(files, tmp_path_factory):
    """Every file released by the command; then the cloud ends, and the broker is restarted."""
    directory = tmp_path_factory.mktemp("cloud")
    config = directory / "cloud.toml"
    tables = "".join(f'[[models]]\nname = "{model_of(name)}"\n' for name in files)
    with start_broker(directory / "broker", BrokerKind.MOSQUITTO) as running:
        config.write_text(f'data_dir = "{directory}/data"\n[broker]\nurl = "{running.url}"\n{tables}')
        shoal("keys", "init", "--no-encryption", "--config", config)
        for name, path in files.items():
            shoal("release", "publish", "--model", model_of(name), path, "--config", config)
        with process(sys.executable, "cloud", "publisher", "--config", str(config)) as publisher:
            await_releases(running.url, len(files))
            end(publisher)
    with start_broker(directory / "broker", BrokerKind.MOSQUITTO) as running:
        yield Published(running.url, ReleaseStore(directory / "data" / "releases"))


def await_releases(url: str, count: int) -> None:
    deadline = time.monotonic() + PATIENCE_S
    found: list[object] = []
    while len(found) < count:
        assert time.monotonic() < deadline
        with suppress(ConfigError):  # nothing there yet, or not all of it
            found = json.loads(shoal("models", "--json", "--broker", url))["models"]


class Observer:
    """Hears what one device says of itself and asks; answers nothing."""

    def __init__(self, url: str, node: str) -> None:
        self.loop = Loop()
        self.link = Link(parse_broker_url(url, session_expiry_s=0), node_identity(SITE, f"{node}-gw", "gateway"))
        self.link.subscribe(Route.STATE, self._on_state, site=SITE)
        self.link.subscribe(Route.INFER, self._on_question, site=SITE)
        self.link.attach(self.loop)
        self.node = node
        self.state = None
        self.counters = {}
        self.rows = {}
        self.until(lambda: self.link.connected)

    def _on_state(self, delivery) -> None:
        if delivery.address.node == self.node and delivery.message.models:
            self.state = delivery.message.models[0]
            self.counters = delivery.message.counters

    def _on_question(self, delivery) -> None:
        if delivery.address.node == self.node:
            self.rows |= {row.reading.reference: row for row in delivery.message.rows}

    def until(self, is_so) -> None:
        deadline = time.monotonic() + PATIENCE_S
        late = self.loop.call_at(deadline, lambda _: None)
        self.loop.run(until=lambda: is_so() or time.monotonic() >= deadline)
        late.cancel()
        assert is_so(), self.state

    def close(self) -> None:
        self.link.close()
        self.loop.close()


@pytest.fixture
def observe(request):
    def start(url: str, node: str) -> Observer:
        made = Observer(url, node)
        request.addfinalizer(made.close)
        return made

    return start


class Bench:
    """Agents of one device on one runtime."""

    def __init__(self, directory: Path, published: Published, model: str, runtime: str) -> None:
        self.directory, self.published, self.model = directory, published, model
        self.python = python_of(runtime)
        self.node = f"{model}-{runtime}"

    def run(self, rows: np.ndarray, name: str):
        """An agent that reads these rows and asks about each, with its own answer where it has a model."""
        columns = [f"c{index}" for index in range(rows.shape[1])]
        lines = [",".join(columns), *(",".join(map(repr, row)) for row in rows.tolist())]
        (self.directory / f"{name}.csv").write_text("\n".join(lines) + "\n")
        keys = {
            "site": SITE,
            "node": self.node,
            "model": self.model,
            "data_dir": str(self.directory / "data"),
            "trusted_root": str(self.published.root),
            "audit_share": 1.0,
            "max_share": 1.0,
            "probation_s": 0.2,
            "state_interval_s": 0.5,
            "retry_after_s": 1.0,
        }
        source = {"kind": "csv", "path": str(self.directory / f"{name}.csv"), "columns": columns, "rate_hz": 50.0}
        text = [*as_toml(keys), "[broker]", f"url = {self.published.url!r}", "[source]", *as_toml(source)]
        config = self.directory / f"{name}.toml"
        config.write_text("\n".join(text))
        return process(self.python, "device_agent", "run", "--config", str(config))


def as_toml(keys: dict[str, object]) -> list[str]:
    """Quoted as Python has it is quoted as TOML has it."""
    return [f"{key} = {value!r}" for key, value in keys.items()]


def python_of(runtime: str) -> Path:
    if not RUNTIMES[runtime].exists():
        pytest.skip("left out: needs the environment of `make venv-device`")
    return RUNTIMES[runtime]


def test_every_file_is_tried(files):
    """One that comes to the data later is not forgotten here."""
    assert set(files) <= set(FILES)


@pytest.mark.parametrize("runtime", RUNTIMES)
@pytest.mark.parametrize("name", FILES)
def test_device_that_comes_later_reproduces_the_golden_answers(published, observe, tmp_path, name, runtime):
    """It converges on the plan's release, ends well, and with no network answers the golden inputs as was signed."""
    model = model_of(name)
    bench = Bench(tmp_path, published, model, runtime)
    if f"releases/{model}/1.spec" not in published.store.load().targets():
        pytest.skip(f"left out: the data has no {name}")
    spec = published.spec(model)
    [artefact] = spec.artefacts
    inputs = to_array(artefact.golden.inputs)
    rows = inputs.reshape(len(inputs), -1)
    observer = observe(published.url, bench.node)
    with bench.run(rows[:1], "first") as agent:
        observer.until(lambda: observer.state and (observer.state.refused_release or is_confirmed(observer.state)))
        assert observer.state.runtime.startswith(runtime)
        assert observer.counters["trust_refreshes"] >= 1
        end(agent)
    if (name, runtime) in REFUSED:
        assert (observer.state.refused_release, observer.state.release) == (1, 0)
        assert observer.state.refused_reason
        return
    assert (observer.state.release, observer.state.sha256) == (1, artefact.sha256), observer.state.refused_reason
    with bench.run(rows, "golden") as agent:
        observer.until(lambda: len(answers(observer)) == len(rows))
        end(agent)
    check_answers(spec, inputs, answers(observer))


def is_confirmed(state) -> bool:
    return state.phase == SlotPhase.SLOT_PHASE_CONFIRMED


def answers(observer: Observer) -> list:
    rows = (observer.rows.get(f"golden:{number}") for number in range(1, 100))
    return [row.device_answer for row in rows if row is not None and row.HasField("device_answer")]


def check_answers(spec: pb.ReleaseSpec, inputs: np.ndarray, given: list) -> None:
    """Score and label are those of the golden outputs, within what the tolerance of an output allows."""
    golden = spec.artefacts[0].golden
    outputs, tolerance = to_array(golden.outputs), golden.tolerance
    wanted = score_rows(spec.score, inputs, outputs)
    scores = np.array([answer.score for answer in given])
    if spec.score == pb.SCORE_KIND_RECONSTRUCTION:
        error = np.abs(outputs.reshape(inputs.shape) - inputs).reshape(len(inputs), -1)
        allowed = 2 * tolerance * error.mean(axis=1) + tolerance**2
    else:
        allowed = np.full(len(inputs), 2 * tolerance)
        labels = outputs.reshape(len(outputs), -1)
        best = np.sort(labels, axis=1)
        clear = best[:, -1] - best[:, -2] > 2 * tolerance
        assert [answer.label for answer, is_clear in zip(given, clear, strict=True) if is_clear] == list(
            wanted.labels[clear]
        )
    assert (np.abs(scores - wanted.scores) <= allowed + 1e-4 * (1 + np.abs(wanted.scores))).all()
    assert {answer.release for answer in given} == {1}


# -- files that were broken -------------------------------------------------------------------------------------------


def broken_files(good: bytes) -> list[bytes]:
    """No model at all, a model that was cut off, and models with two bytes changed.

    On x86_64 tflite-runtime 2.14 dies of the scrambled ones by SIGSEGV and SIGBUS, or they run as if nothing were.
    """
    return [b"no model", good[: len(good) // 2], *(scrambled(good, seed) for seed in (0, 1, 9, 13))]


def scrambled(good: bytes, seed: int) -> bytes:
    data, rng = bytearray(good), random.Random(seed)
    for _ in range(2):
        data[rng.randrange(8, len(data))] = rng.randrange(256)
    return bytes(data)


@pytest.fixture
def cloud(files, tmp_path):
    """A cloud that goes on running, whose trainer signs whatever it is given."""
    with start_broker(tmp_path / "broker") as running:
        config = tmp_path / "cloud.toml"
        config.write_text(
            f'data_dir = "{tmp_path}/cloud"\n[broker]\nurl = "{running.url}"\n[[models]]\nname = "sine"\n'
        )
        shoal("keys", "init", "--no-encryption", "--config", config)
        shoal("release", "publish", "--model", "sine", files["hello_world_int8.tflite"], "--config", config)
        with process(sys.executable, "cloud", "publisher", "--config", str(config)) as publisher:
            await_releases(running.url, 1)
            yield Published(running.url, ReleaseStore(tmp_path / "cloud" / "releases"))
            end(publisher)


@pytest.mark.parametrize("runtime", RUNTIMES)
def test_agent_survives_any_model_file(files, cloud, observe, tmp_path, runtime):
    """Signed, and broken: each is refused with its reason or runs, in the same process, which then ends well."""
    bench = Bench(tmp_path, cloud, "sine", runtime)
    observer = observe(cloud.url, bench.node)
    keys, first = FileKeyStore(tmp_path / "cloud" / "keys"), cloud.spec("sine")
    with bench.run(np.ones((1, 1)), "sine") as agent:
        observer.until(lambda: observer.state and is_confirmed(observer.state))
        for number, data in enumerate(broken_files(files["hello_world_int8.tflite"].read_bytes()), start=2):
            now = dt.datetime.now(dt.UTC)
            spec = pb.ReleaseSpec(model="sine", parent=1, input=first.input, score=first.score)
            spec.artefacts.add(tier=pb.TIER_DEVICE, format=pb.MODEL_FORMAT_TFLITE, golden=first.artefacts[0].golden)
            assert submit_release(cloud.store, spec, [data], keys, now).release == number
            plan = pb.RolloutPlan(
                rollout_id=f"r{number}", model="sine", release=number, targets=["*"], share_permille=1000
            )
            submit_plan(cloud.store, plan, keys, now)
            observer.until(lambda number=number: has_judged(observer.state, number))
            assert agent.poll() is None
            assert observer.state.release == number or observer.state.refused_reason
        end(agent)


def has_judged(state, release: int) -> bool:
    return state.refused_release == release or (state.release == release and is_confirmed(state))
