"""How much the broker may have to retain: the decisions, and the sizes that they rest on."""

import datetime as dt
import re
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cloud.keys import FileKeyStore
from cloud.release_store import ReleaseStore
from cloud.repository import ROLLOUT, first_generation, resign, sign_role, target_file
from cloud.retained import OverBudgetError, check_budget, live_set, must_clear_first
from shoal.codec import encode
from shoal.errors import TrustError
from shoal.release.chunks import CHUNK_BYTES, digest
from shoal.release.trust import model_role

NOW = dt.datetime(2026, 11, 20, tzinfo=dt.UTC)
SIZES = st.integers(min_value=0, max_value=1 << 40)


@pytest.mark.parametrize(
    ("present", "after", "taken"),
    [
        (0, 99, True),
        (0, 100, True),
        (0, 101, False),
        (100, 101, False),
        (200, 199, True),
        (200, 200, True),
        (200, 201, False),
        (200, 100, True),
    ],
)
def test_release_needs_room_unless_it_makes_some(present, after, taken):
    """Up to the budget and not a byte more; a budget that was lowered below what is there still lets it shrink."""
    if taken:
        check_budget("role model-digits", present_bytes=present, next_bytes=after, budget_bytes=100)
        return
    with pytest.raises(OverBudgetError) as refused:
        check_budget("role model-digits", present_bytes=present, next_bytes=after, budget_bytes=100)
    said = [int(number) for number in re.findall(r"\d+", str(refused.value))]
    assert said == [after, present, 100]
    assert "model-digits" in str(refused.value)


@given(start=SIZES, steps=st.lists(SIZES), budget=SIZES)
def test_refusals_keep_the_live_set_within_the_budget(start, steps, budget):
    """However releases come: what is within the budget stays there, what is above it never grows."""
    present = start
    for after in steps:
        before = present
        try:
            check_budget("x", present_bytes=present, next_bytes=after, budget_bytes=budget)
        except OverBudgetError:
            continue
        present = after
        assert present <= max(before, budget)
    assert present <= max(start, budget)


@given(present=SIZES, stale=st.integers(0, 10_000), brought=SIZES, budget=SIZES)
def test_waiting_ends_once_all_is_cleared_and_bounds_the_peak(present, stale, brought, budget):
    """Nothing waits for blobs that are not there; what does not wait has room beside all that is stale."""
    assert not must_clear_first(present_bytes=present, stale_blobs=0, brought_bytes=brought, budget_bytes=budget)
    if stale and not must_clear_first(
        present_bytes=present, stale_blobs=stale, brought_bytes=brought, budget_bytes=budget
    ):
        assert present + brought + stale * CHUNK_BYTES <= budget


@pytest.fixture
def keys(tmp_path):
    keys = FileKeyStore(tmp_path / "keys")
    for role in ("root", "targets", "snapshot", "timestamp", ROLLOUT, model_role("digits"), model_role("shuttle")):
        keys.create(role)
    return keys


def test_live_set_counts_what_the_broker_holds_once(tmp_path, keys):
    """A chunk that two models share is one message, so it is counted once; bundle and timestamp are counted too."""
    store = ReleaseStore(tmp_path / "store")
    generation = first_generation(keys, ["digits", "shuttle"], NOW)
    shared = bytes(CHUNK_BYTES)
    files = {"models/digits/1-device.tflite": shared + b"a", "models/shuttle/1-device.tflite": shared + b"bc"}
    for path, data in files.items():
        role = model_role(path.split("/")[1])
        metadata = sign_role(keys.signers(role), 2, {path: target_file(path, data)}, NOW)
        generation = resign(replace(generation, roles={**generation.roles, role: metadata}), keys, NOW)
    by_digest = {digest(data): data for data in files.values()}
    live = live_set(generation, store, by_digest.get)
    metadata_bytes = sum(map(len, generation.files().values()))
    rest = len(encode(live.bundle)) + len(generation.timestamp)
    assert live.size_bytes == CHUNK_BYTES + 1 + 2 + metadata_bytes + rest


def test_live_set_names_a_file_that_is_missing(tmp_path, keys):
    """The store was damaged, or an order lies."""
    path = "models/digits/1-device.tflite"
    role = model_role("digits")
    generation = first_generation(keys, ["digits"], NOW)
    metadata = sign_role(keys.signers(role), 2, {path: target_file(path, b"x")}, NOW)
    changed = replace(generation, roles={role: metadata})
    with pytest.raises(TrustError, match=re.escape(path)):
        live_set(changed, ReleaseStore(tmp_path / "store"))
