"""The object store: content in, content out, and nothing damaged ever."""

import os
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cloud.pipelines.objects import ObjectStore
from shoal.errors import ModelError

FILES = st.dictionaries(st.text("abc.", min_size=1, max_size=6), st.binary(max_size=50), max_size=4)


@given(first=FILES, second=FILES)
def test_digest_stands_for_the_content(tmp_path_factory, first, second):
    """Equal trees have equal digests, different ones different, and what comes back is what went in."""
    store = ObjectStore(tmp_path_factory.mktemp("objects"))
    digests = store.put(first), store.put(second)
    assert (digests[0] == digests[1]) == (first == second)
    assert (store.get(digests[0]), store.get(digests[1])) == (first, second)


@pytest.mark.parametrize("which", ["tree", "file"])
@pytest.mark.parametrize("how", ["gone", "cut", "changed"])
def test_damaged_object_is_never_returned(tmp_path, which, how):
    """It counts as absent, and putting the content again mends it."""
    store = ObjectStore(tmp_path)
    digest = store.put({"model": b"weights"})
    name = digest if which == "tree" else store.names(digest)["model"]
    path = tmp_path / name[:2] / name
    if how == "gone":
        path.unlink()
    else:
        path.write_bytes(path.read_bytes()[:-1] if how == "cut" else b"x" * path.stat().st_size)
    assert not store.holds(digest)
    with pytest.raises(ModelError, match=f"object {name[:12]}"):
        store.get(digest)
    assert store.put({"model": b"weights"}) == digest
    assert store.get(digest) == {"model": b"weights"}


def test_keep_drops_all_but_what_is_named(tmp_path):
    """A file that a kept tree shares with a dropped one stays."""
    store = ObjectStore(tmp_path)
    kept, dropped = store.put({"a": b"1", "b": b"2"}), store.put({"b": b"2", "c": b"3"})
    assert store.keep([kept, "00" * 32], time.time() + 60) == 2
    assert store.get(kept) == {"a": b"1", "b": b"2"}
    assert not store.holds(dropped)


def test_young_objects_stay_and_being_put_again_makes_young(tmp_path):
    """Another process may have put one down a moment ago, and not yet said what for."""
    store = ObjectStore(tmp_path)
    old, renewed = store.put({"a": b"1"}), store.put({"b": b"2"})
    for path in tmp_path.glob("??/*"):
        os.utime(path, (1000, 1000))
    store.put({"b": b"2"})
    young = store.put({"c": b"3"})
    assert store.keep([], time.time() - 60) == 2
    assert [store.holds(digest) for digest in (old, renewed, young)] == [False, True, True]
