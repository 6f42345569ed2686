import datetime as dt
from dataclasses import replace

import pytest
from tuf.api.metadata import Metadata, Root

from cloud.keys import FileKeyStore
from cloud.repository import (
    ROLLOUT,
    first_generation,
    parse_role,
    renew,
    resign,
    sign_role,
    snapshot_of,
    target_file,
    timestamp_of,
    verify_role,
)
from shoal.errors import TrustError
from shoal.release.trust import model_role

NOW = dt.datetime(2026, 11, 20, tzinfo=dt.UTC)
ROLE = model_role("digits")


@pytest.fixture
def keys(tmp_path):
    keys = FileKeyStore(tmp_path / "keys")
    keys.create("root", 3)
    for role in ("targets", "snapshot", "timestamp", ROLLOUT, ROLE):
        keys.create(role)
    return keys


@pytest.fixture
def generation(keys):
    return first_generation(keys, ["digits"], NOW, root_threshold=2)


def signed(keys, targets, *, version=2, role=ROLE, now=NOW):
    infos = {path: target_file(path, data) for path, data in targets.items()}
    return sign_role(keys.signers(role), version, infos, now)


def test_root_wants_its_threshold(generation):
    """Two of three, as asked; and each key counted once."""
    root = Metadata[Root].from_bytes(generation.roots[0])
    assert root.signed.roles["root"].threshold == 2
    assert len(root.signed.roles["root"].keyids) == 3
    root.verify_delegate("root", root)


def test_expiry_is_what_the_design_promises(generation):
    """A late node converges with no server as long as these live."""
    assert timestamp_of(generation).expires - NOW == dt.timedelta(days=30)
    assert snapshot_of(generation).expires - NOW == dt.timedelta(days=90)
    for data in generation.roles.values():
        assert parse_role(data).expires - NOW == dt.timedelta(days=365)


def test_resigning_a_changed_role_raises_versions(keys, generation):
    """New snapshot, new timestamp, everything else byte for byte as it was."""
    data = signed(keys, {"releases/digits/1.spec": b"spec"})
    verify_role(generation, ROLE, data, NOW)
    after = resign(replace(generation, roles={**generation.roles, ROLE: data}), keys, NOW)
    assert after.roles == {**generation.roles, ROLE: data}
    assert (snapshot_of(after).version, timestamp_of(after).version) == (2, 2)
    assert snapshot_of(after).meta[f"{ROLE}.json"].version == 2
    assert set(after.files()) == {
        "1.root.json", "1.targets.json", "1.rollout.json", "2.model-digits.json", "2.snapshot.json"
    }  # fmt: skip


@pytest.mark.parametrize(
    ("role", "change", "message"),
    [
        (ROLE, {"version": 1}, "version 1"),
        (ROLE, {"role": ROLLOUT}, "signed by"),
        (ROLE, {"now": NOW - dt.timedelta(days=400)}, "expired"),
        ("model-other", {}, "not delegated"),
        ("targets", {}, "not delegated"),
    ],
)
def test_role_metadata_that_must_not_be_published_is_refused(keys, generation, role, change, message):
    """The publisher trusts no submitter."""
    with pytest.raises(TrustError, match=message):
        verify_role(generation, role, signed(keys, {}, **change), NOW)


@pytest.mark.parametrize("path", ["plans/digits.plan", "releases/other/1.spec", "releases/digits/a/b", "digits"])
def test_a_role_stays_under_its_own_paths(keys, generation, path):
    """The trainer of one model releases that model, and no plans."""
    with pytest.raises(TrustError, match="may not deliver"):
        verify_role(generation, ROLE, signed(keys, {path: b"x"}), NOW)


@pytest.mark.parametrize("data", [b"", b"{}", b"[1]", b"\xff\xff"])
def test_rubbish_is_no_metadata(generation, data):
    """Whatever lies in the queue, the answer is a TrustError."""
    with pytest.raises(TrustError):
        verify_role(generation, ROLE, data, NOW)


def test_snapshot_is_no_role_metadata(generation):
    """Genuine, signed, and of the wrong type."""
    with pytest.raises(TrustError, match="snapshot"):
        verify_role(generation, ROLE, generation.snapshot, NOW)


@pytest.mark.parametrize(
    ("days", "versions"),
    [(0, None), (9, None), (11, (1, 2)), (29, (1, 2)), (31, (2, 2))],
)
def test_renewal_comes_after_a_third_of_a_life(keys, generation, days, versions):
    """Early enough that a publisher that was down for weeks still renews in time."""
    renewed = renew(generation, keys, NOW + dt.timedelta(days=days))
    got = renewed and (snapshot_of(renewed).version, timestamp_of(renewed).version)
    assert got == versions


def test_renewal_does_not_repeat_itself(keys, generation):
    """What was just renewed is young."""
    now = NOW + dt.timedelta(days=31)
    renewed = renew(generation, keys, now)
    assert renew(renewed, keys, now) is None
