import datetime as dt

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cloud.pipelines.file import DriftTrigger, Triggers
from cloud.triggers import TriggerState, in_hours, why_run

NOON = dt.datetime(2026, 11, 23, 12, 0, tzinfo=dt.UTC)
TRIGGERS = Triggers(new_labels=50, drift=DriftTrigger(new_labels=10))


def why(*, triggers=TRIGGERS, now=NOON, releases=1, ran=True, labelled=0, at_last=0, drifted=False, asked=False):
    state = TriggerState(releases, ran, labelled, at_last, drifted, asked)
    return why_run(triggers, state, now)


@pytest.mark.parametrize(
    ("state", "reason"),
    [
        ({"ran": False, "releases": 0}, "first release"),
        ({"ran": False, "releases": 0, "labelled": 500}, "first release"),
        ({}, None),
        ({"labelled": 49}, None),
        ({"labelled": 50}, "50 new labels"),
        ({"labelled": 149, "at_last": 100}, None),
        ({"labelled": 163, "at_last": 100}, "63 new labels"),
        ({"at_last": 100}, None),
        ({"asked": True}, "asked for"),
        ({"asked": True, "labelled": 60}, "asked for"),
        ({"ran": False, "asked": True}, "asked for"),
        ({"drifted": True, "labelled": 9}, None),
        ({"drifted": True, "labelled": 10}, "drift, 10 new labels"),
        ({"drifted": True, "labelled": 50}, "50 new labels"),
        ({"releases": 0, "labelled": 49}, None),
    ],
)
def test_run_is_due_for_a_reason(state, reason):
    """The first one at once, then when somebody asks, or when enough was labelled; after drift less is enough.

    The last line is a model whose only run was refused: the same samples would be refused again.
    """
    assert why(**state) == reason


def test_drift_says_nothing_where_nobody_asked_for_it():
    """Without the trigger, scores decide nothing."""
    assert why(triggers=Triggers(new_labels=50), drifted=True, labelled=49) is None


@pytest.mark.parametrize(("releases", "due"), [(0, True), (1, True), (2, False), (3, False)])
@pytest.mark.parametrize("asked", [False, True])
def test_no_release_after_the_last(releases, due, asked):
    """The bound holds for every reason."""
    bounded = Triggers(new_labels=50, max_releases=2)
    assert (why(triggers=bounded, releases=releases, labelled=1000, asked=asked) is not None) == due


@pytest.mark.parametrize(
    ("hours", "time", "inside"),
    [
        ([], "12:00", True),
        (["22:00-06:00"], "21:59", False),
        (["22:00-06:00"], "22:00", True),
        (["22:00-06:00"], "05:59", True),
        (["22:00-06:00"], "06:00", False),
        (["01:00-02:00", "13:00-14:30"], "14:29", True),
        (["01:00-02:00", "13:00-14:30"], "02:00", False),
        (["00:00-00:00"], "17:17", True),
    ],
)
def test_windows_are_utc_and_may_cross_midnight(hours, time, inside):
    """Whatever the zone of the clock that is read."""
    hour, minute = map(int, time.split(":"))
    now = NOON.replace(hour=hour, minute=minute)
    assert in_hours(hours, now) == inside
    assert in_hours(hours, now.astimezone(dt.timezone(dt.timedelta(hours=5, minutes=30)))) == inside


def test_only_what_is_not_urgent_waits_for_the_cheap_hours():
    """The first release and what a person asks for do not; labels and drift do."""
    night = Triggers(new_labels=50, drift=DriftTrigger(new_labels=10), hours=["22:00-06:00"])
    assert why(triggers=night, labelled=60) is None
    assert why(triggers=night, labelled=20, drifted=True) is None
    assert why(triggers=night, labelled=60, now=NOON.replace(hour=23)) == "60 new labels"
    assert why(triggers=night, ran=False) == "first release"
    assert why(triggers=night, asked=True) == "asked for"


@given(labelled=st.integers(0, 1000), at_last=st.integers(0, 1000), more=st.integers(0, 99), drifted=st.booleans())
def test_more_labels_never_take_a_reason_away(labelled, at_last, more, drifted):
    """What is due stays due while labels come in."""
    if why(labelled=labelled, at_last=at_last, drifted=drifted):
        assert why(labelled=labelled + more, at_last=at_last, drifted=drifted)
