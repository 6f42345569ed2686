import pytest

from fleet_console.broker import start_broker


@pytest.fixture
def own_broker(tmp_path):
    """A broker of the test's own: what cloud services retain there must not meet what those of another test do."""
    with start_broker(tmp_path / "broker") as running:
        yield running
