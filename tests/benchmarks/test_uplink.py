"""What docs/devices.md promises of the upload budget, measured again on the data that ships with the packages."""

import numpy as np
import pytest

from benchmarks import uplink


@pytest.fixture(scope="module")
def shuttle():
    return uplink.shuttle_devices()


def test_budget_on_shuttle_keeps_its_promise(shuttle):
    """Pins 0.85 of an oracle's anomalies at 2 % of the readings, and the share to a tenth, device by device."""
    tally = uplink.Tally(shuttle, uplink._budgeted, uplink.BUDGET, seeds=1)
    found = tally.anomalies_found.sum()
    assert found / max(tally.asked.sum(), uplink.BUDGET * tally.readings.sum()) >= 0.85
    errors = tally.share_errors(uplink.BUDGET)
    assert errors["share_error"] <= 0.05
    assert errors["worst_device"] <= 0.1


def test_bytes_of_a_day_keep_their_cap(shuttle):
    """Pins that no 24 hours exceed the cap, and that most of it is used."""
    tally = uplink.Tally(shuttle[:3], uplink._by_bytes, uplink.BUDGET, seeds=1)
    assert max(tally.over_cap) <= 1.0
    assert np.mean(tally.used) >= 0.85


@pytest.mark.skipif(not uplink._NAB.is_dir(), reason="left out: ../shared/data/sensor_nab is not there")
def test_budget_on_nab_keeps_its_promise():
    """Pins the share to a fifth and three windows in four, on series that drift and jump."""
    devices = uplink.nab_devices(uplink._NAB)
    tally = uplink.Tally(devices, uplink._budgeted, uplink.BUDGET, seeds=1)
    assert tally.share_errors(uplink.BUDGET)["share_error"] <= 0.2
    assert tally.windows_found.sum() / tally.windows.sum() >= 0.75


def test_most_in_a_day_is_of_any_day():
    """Pins the sliding sum: what is 24 hours old counts no more, what is a second younger does."""
    day = 86_400.0
    device = uplink.DeviceData(
        "dev",
        scores=np.zeros(4),
        calibration=np.zeros(1),
        seconds=np.array([0.0, 10.0, day, day + 9.0]),
        sizes=np.array([1, 2, 4, 8]),
        warm_up=0,
        anomalies=np.zeros(4, bool),
    )
    assert uplink._most_in_a_day(device, np.ones(4, bool)) == 14
    assert uplink._most_in_a_day(device, np.array([True, False, True, False])) == 4
