import pytest
from hypothesis import given
from hypothesis import strategies as st

from cloud.triggers import TriggerState, why_build

MIN_NEW = 50


def why(releases, labelled, at_last, asked, max_releases=0):
    state = TriggerState(releases, labelled, at_last, asked)
    return why_build(state, min_new_labels=MIN_NEW, max_releases=max_releases)


@pytest.mark.parametrize(
    ("releases", "labelled", "at_last", "asked", "reason"),
    [
        (0, 0, 0, False, "first release"),
        (0, 0, 0, True, "first release"),
        (0, 500, 0, False, "first release"),
        (1, 0, 0, False, None),
        (1, 49, 0, False, None),
        (1, 50, 0, False, "50 new labels"),
        (1, 149, 100, False, None),
        (1, 163, 100, False, "63 new labels"),
        (9, 0, 100, False, None),
        (1, 0, 0, True, "asked for"),
        (1, 60, 0, True, "asked for"),
    ],
)
def test_release_is_due_for_a_reason(releases, labelled, at_last, asked, reason):
    """The first one at once, then when somebody asks, or when enough was labelled since the last."""
    assert why(releases, labelled, at_last, asked) == reason


@pytest.mark.parametrize(("releases", "due"), [(0, True), (1, True), (2, False), (3, False)])
@pytest.mark.parametrize("asked", [False, True])
def test_no_release_after_the_last(releases, due, asked):
    """The bound holds for every reason."""
    assert (why(releases, 1000, 0, asked, max_releases=2) is not None) == due


@given(
    releases=st.integers(1, 99), labelled=st.integers(0, 1000), at_last=st.integers(0, 1000), more=st.integers(0, 99)
)
def test_more_labels_never_take_a_reason_away(releases, labelled, at_last, more):
    """What is due stays due while labels come in."""
    if why(releases, labelled, at_last, asked=False):
        assert why(releases, labelled + more, at_last, asked=False)
