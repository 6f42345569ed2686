"""What may stay on the broker."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cloud.retained_budget import check_budget
from shoal.errors import ModelError

blobs = st.dictionaries(st.binary(min_size=1, max_size=2), st.integers(0, 100), max_size=8)


@given(blobs, blobs, st.integers(0, 500))
def test_budget_holds_at_every_moment_of_a_change(before, after, budget):
    """Old and new lie there together for a while; only what makes nothing grow may pass above the budget."""
    after = {**after, **{key: before[key] for key in after if key in before}}
    if sum({**before, **after}.values()) > budget and sum(after.values()) > sum(before.values()):
        with pytest.raises(ModelError, match=f"the budget is {budget}"):
            check_budget(before, after, budget)
    else:
        check_budget(before, after, budget)


def test_equal_chunks_count_once():
    """They are one retained message."""
    check_budget({b"a": 60}, {b"a": 60, b"b": 40}, 100)
    with pytest.raises(ModelError, match="101 bytes would be retained"):
        check_budget({b"a": 60}, {b"a": 60, b"b": 41}, 100)
