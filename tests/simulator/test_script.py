import pytest
from hypothesis import given
from hypothesis import strategies as st

from simulator.script import Phase, Script, ScriptConfig

W, B, A, U, D = Phase.WAITING, Phase.BEFORE_DRIFT, Phase.AFTER_DRIFT, Phase.AFTER_UPDATE, Phase.DONE
RANK = {phase: rank for rank, phase in enumerate((W, B, A, U, D))}

PLAIN = ScriptConfig(readings_before=3)
STORY = ScriptConfig(readings_before=2, drifts=True, readings_after=2)
SHORT = ScriptConfig(readings_before=2, drifts=True, readings_after=9, max_readings=4)


@pytest.mark.parametrize(
    ("config", "releases", "phases"),
    [
        # Nothing is read before there is a model.
        (PLAIN, [0, 0, 0], [W, W, W]),
        (PLAIN, [0, 1, 1, 1, 1, 1], [W, B, B, B, D, D]),
        # Without drift the releases do not matter.
        (PLAIN, [1, 2, 3, 4], [B, B, B, D]),
        # The drift waits for its readings, the update for a release, the end for its readings.
        (STORY, [1, 1, 1, 1, 1, 2, 2, 2], [B, B, A, A, A, U, U, D]),
        # The release that was met by the drift is not the newer one, whatever its number.
        (STORY, [1, 7, 7, 7, 8, 8, 8], [B, B, A, A, U, U, D]),
        # A release before the drift is no recovery, and going back to an older one is none.
        (STORY, [1, 2, 2, 1, 2, 3], [B, B, A, A, A, U]),
        # A third release changes nothing more.
        (STORY, [1, 1, 1, 2, 3, 3], [B, B, A, U, U, D]),
        # A release that is taken back after the recovery does not bring the drift's phase back.
        (STORY, [1, 1, 1, 2, 1, 1], [B, B, A, U, U, D]),
        # A story without an end stops: the readings of all phases count.
        (SHORT, [1] * 7, [B, B, A, A, D, D, D]),
        (SHORT, [0, 1, 1, 1, 2, 2], [W, B, B, A, U, D]),
        (ScriptConfig(readings_before=9, max_readings=2), [1, 1, 1], [B, B, D]),
    ],
)
def test_phases_follow_readings_and_releases(config, releases, phases):
    """Each row is one device's story: the release that is active at each reading, and the phase it is made in."""
    script = Script(config)
    assert [script.next(release) for release in releases] == phases
    assert script.phase is phases[-1]


@given(
    before=st.integers(0, 4),
    after=st.integers(0, 4),
    longest=st.integers(0, 12),
    drifts=st.booleans(),
    releases=st.lists(st.integers(0, 3), max_size=30),
)
def test_story_goes_forward_and_is_bounded(before, after, longest, drifts, releases):
    """For any releases: no phase comes back, and no more readings are made than are allowed."""
    script = Script(ScriptConfig(before, drifts=drifts, readings_after=after, max_readings=longest))
    phases = [script.next(release) for release in releases]
    assert [RANK[phase] for phase in phases] == sorted(RANK[phase] for phase in phases)
    # The first reading is made where the model is met.
    assert sum(phase not in (W, D) for phase in phases) <= max(1, longest)


def test_device_that_is_told_so_is_done():
    """A source that has run dry ends the story from outside."""
    script = Script(PLAIN)
    script.next(1)
    script.phase = Phase.DONE
    assert script.next(1) is Phase.DONE
