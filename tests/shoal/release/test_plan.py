import pytest
from hypothesis import given
from hypothesis import strategies as st

from shoal.release.plan import cohort, follows, matches
from shoal.v1.release_pb2 import RolloutPlan

pytestmark = pytest.mark.device

IDS = st.from_regex(r"[a-z0-9][a-z0-9_-]{0,20}", fullmatch=True)


@pytest.mark.parametrize(
    ("pattern", "node", "expected"),
    [
        ("*", "cam-1", True),
        ("cam-1", "cam-1", True),
        ("cam-1", "cam-10", False),
        ("cam-*", "cam-", True),
        ("*-1", "cam-1", True),
        ("c*m*1", "cam-31", True),
        ("cam-?", "cam-1", False),
        ("cam-[12]", "cam-1", False),
        ("cam.1", "cam-1", False),
        ("", "cam-1", False),
    ],
)
def test_only_the_star_is_special(pattern, node, expected):
    """Patterns are signed by people: `?` and brackets must not widen them by surprise."""
    assert matches(pattern, node) is expected


@given(IDS, st.integers(0, 1000), st.integers(0, 1000))
def test_a_growing_share_never_drops_a_node(node, share, more):
    """Stages only add nodes, because the cohort does not depend on the share."""
    small, large = sorted((share, more))
    plan = RolloutPlan(rollout_id="r", targets=["*"], share_permille=small)
    grown = RolloutPlan(rollout_id="r", targets=["*"], share_permille=large)
    assert follows(grown, node) or not follows(plan, node)
    assert follows(RolloutPlan(rollout_id="r", targets=["*"], share_permille=1000), node)
    assert not follows(RolloutPlan(rollout_id="r", targets=["*"], share_permille=0), node)


def test_cohort_is_what_the_contract_says():
    """The controller, the console and other languages must agree on these numbers."""
    assert [cohort("r7", f"cam-{number}") for number in range(3)] == [876, 186, 575]
    shares = sum(cohort("r7", f"node-{number}") < 250 for number in range(4000)) / 4000
    assert abs(shares - 0.25) < 0.03
