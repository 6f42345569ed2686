"""What a node says of itself: when, where, and under names that the documentation has."""

import ast
import itertools
import random
import re
from collections import Counter
from pathlib import Path

import pytest

from shoal.link_config import node_identity, service_identity
from shoal.routes import Route
from shoal.state import MAX_INTERVAL_S, BootTime, Report, StateReporter
from shoal.v1.node_pb2 import ModelState, UploadState
from shoal.v1.sensor_pb2 import TIME_QUALITY_SUSPECT, TIME_QUALITY_SYNCED

pytestmark = pytest.mark.device

_ROOT = Path(__file__).parent.parent.parent


class Wire:
    """What a reporter needs of a link, in memory; takes nothing while it is full."""

    def __init__(self, identity):
        self.identity = identity
        self.connected = True
        self.is_full = False
        self.published = []
        self.hooks = []

    def on_connect(self, hook):
        self.hooks.append(hook)

    def publish(self, route, message, **segments):
        if not self.is_full:
            self.published.append((route, segments, message))
        return not self.is_full


@pytest.fixture
def wire():
    return Wire(node_identity("plant", "cam", "device"))


def reporter_of(wire, seed=1, **options):
    return StateReporter(wire, lambda: Report(Counter(answered=3)), rng=random.Random(seed), **options)


def test_state_bears_what_the_report_says(wire):
    """Counters, models, the doubt in the clock, and who it is."""
    report = Report(
        Counter(answered=3),
        [ModelState(model="digits", release=7)],
        TIME_QUALITY_SUSPECT,
        boot=BootTime(b"b" * 16, 3, 70),
    )
    StateReporter(wire, lambda: report, rng=random.Random(1)).tick(0.0)
    route, segments, state = wire.published[0]
    assert (route, segments) == (Route.STATE, {"site": "plant", "node": "cam"})
    assert dict(state.counters) == {"answered": 3}
    assert [(model.model, model.release) for model in state.models] == [("digits", 7)]
    assert (state.role, state.version, state.time_quality) == ("device", wire.identity.version, TIME_QUALITY_SUSPECT)
    assert (state.boot_id, state.boot_count, state.since_boot_us) == (b"b" * 16, 3, 70)
    assert state.at_us > 0
    assert not state.HasField("upload")


def test_state_of_a_device_bears_its_budgets():
    """What the threshold and the share have come to; nodes that ask nobody say nothing of it."""
    wire = Wire(node_identity("plant", "cam", "device"))
    report = Report(Counter(), upload=UploadState(threshold=0.5, budget_ppm=20_000, asked_ppm=19_000))
    StateReporter(wire, lambda: report, rng=random.Random(1)).tick(0.0)
    assert wire.published[0][2].upload == report.upload


def test_service_reports_on_its_own_topic():
    """It belongs to no site; its clock is trusted unless it says otherwise."""
    wire = Wire(service_identity("ingest"))
    reporter_of(wire).tick(0.0)
    route, segments, state = wire.published[0]
    assert (route, segments) == (Route.CLOUD_STATE, {"service": "ingest"})
    assert state.time_quality == TIME_QUALITY_SYNCED


@pytest.mark.parametrize("seed", range(20))
def test_interval_is_jittered_within_its_bound(wire, seed):
    """Never longer than the interval, never shorter than half of it."""
    reporter = reporter_of(wire, seed)
    times = []
    for now in range(4 * int(MAX_INTERVAL_S)):
        before = len(wire.published)
        reporter.tick(float(now))
        times += [now] * (len(wire.published) - before)
    gaps = [later - earlier for earlier, later in itertools.pairwise(times)]
    assert times[0] == 0
    assert len(set(gaps)) > 1
    assert all(MAX_INTERVAL_S / 2 <= gap <= MAX_INTERVAL_S for gap in gaps)


def test_nodes_that_start_together_do_not_stay_together():
    """Each has jitter of its own."""
    dues = set()
    for seed in range(10):
        reporter = reporter_of(Wire(node_identity("plant", f"cam{seed}", "device")), seed)
        reporter.tick(0.0)
        dues.add(reporter._due)
    assert len(dues) == 10


def test_state_is_told_again_at_each_connect_and_when_asked(wire):
    """At the next tick, whatever the interval says."""
    reporter = reporter_of(wire)
    reporter.tick(0.0)
    reporter.tick(1.0)
    assert len(wire.published) == 1
    for hook in wire.hooks:
        hook()
    assert reporter.is_due
    reporter.tick(2.0)
    reporter.soon()
    reporter.tick(3.0)
    assert len(wire.published) == 3
    assert not reporter.is_due


@pytest.mark.parametrize("trouble", [{"is_full": True}, {"connected": False}])
def test_state_that_the_link_did_not_take_stays_due(wire, trouble):
    """It is told as soon as there is room, not an interval later."""
    reporter = reporter_of(wire)
    vars(wire).update(trouble)
    reporter.tick(0.0)
    assert reporter.is_due
    assert not wire.published
    vars(wire).update(is_full=False, connected=True)
    reporter.tick(1.0)
    assert len(wire.published) == 1


@pytest.mark.parametrize("interval_s", [0.0, -1.0, MAX_INTERVAL_S + 0.1, float("nan")])
def test_interval_outside_the_contract_is_our_own_mistake(wire, interval_s):
    """At least every ten minutes, and never all the time."""
    with pytest.raises(ValueError, match="state interval"):
        reporter_of(wire, interval_s=interval_s)


# -- names of counters ----------------------------------------------------------------------------------------------


def _counter_names(source):
    """Every name that a file counts under; of a name put together at run time, the family: `replies.`."""
    for node in ast.walk(ast.parse(source)):
        name = None
        if isinstance(node, ast.Subscript) and ast.unparse(node.value).endswith("counters"):
            name = node.slice
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith("._count") and node.args:
            name = node.args[0]
        if isinstance(name, ast.JoinedStr):
            name = name.values[0]
        if isinstance(name, ast.Constant) and isinstance(name.value, str):
            yield name.value


def _all_counter_names():
    folders = ("proto/shoal", "device_agent", "edge_gateway", "cloud")
    files = [path for folder in folders for path in (_ROOT / folder).rglob("*.py") if "_pb2" not in path.name]
    return sorted({name for path in files for name in _counter_names(path.read_text())})


def test_counters_are_found_in_the_source():
    """What the next test looks for, it can find: plain, by method, and put together at run time."""
    names = set(_all_counter_names())
    assert {"connects", "bad_payloads", "produced", "rows.inferred", "replies.", "samples."} <= names


@pytest.mark.parametrize("name", _all_counter_names())
def test_every_counter_is_in_the_documentation(name):
    """Plain names as they are; of a family, any member or a star."""
    page = (_ROOT / "docs" / "topics.md").read_text()
    family, dot, _ = name.partition(".")
    wanted = rf"`{re.escape(family)}\.[a-z_*]+`" if dot else f"`{re.escape(name)}`"
    assert re.search(wanted, page)
