"""Fixtures for every test. Imports nothing that the small device environment lacks."""

import os
import signal
from importlib.util import find_spec
from pathlib import Path

import hypothesis
import pytest

from fleet_console.broker import BrokerKind, choose_kind, find_mosquitto, start_broker

_ROOT = Path(__file__).parent.parent


def pytest_configure():
    """Undo an ignored SIGINT, as background jobs of a shell inherit it: the tests' children must hear Ctrl-C."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    # How long one example takes says more about the machine's other work than about the code.
    hypothesis.settings.register_profile("shoal", deadline=None)
    hypothesis.settings.load_profile("shoal")


@pytest.fixture(scope="session")
def broker(tmp_path_factory):
    """A real broker: Mosquitto, or the embedded one where that is missing or SHOAL_TEST_BROKER asks for it."""
    asked = os.environ.get("SHOAL_TEST_BROKER")
    kind = BrokerKind(asked) if asked else choose_kind()
    if kind is BrokerKind.IOTCORE and find_spec("iotcore") is None:
        pytest.skip("left out: needs Mosquitto, or the embedded broker, which this environment lacks")
    with start_broker(tmp_path_factory.mktemp("broker"), kind) as running:
        yield running


@pytest.fixture(scope="session")
def mosquitto(broker, tmp_path_factory):
    """Mosquitto, for what the embedded broker cannot do: sessions, permissions, retained messages on disk."""
    if broker.kind is BrokerKind.MOSQUITTO:
        yield broker
    elif find_mosquitto() is None:
        pytest.skip("left out: needs Mosquitto, which is not installed")
    else:
        with start_broker(tmp_path_factory.mktemp("mosquitto"), BrokerKind.MOSQUITTO) as running:
            yield running


@pytest.fixture(scope="session")
def shared_data():
    """Real data that is not ours to ship: $SHOAL_DATA, or shared/data beside the repository."""
    folder = Path(os.environ.get("SHOAL_DATA", _ROOT.parent / "shared" / "data"))
    if not folder.is_dir():
        pytest.skip(f"left out: needs the data in {folder} (set SHOAL_DATA)")
    return folder
