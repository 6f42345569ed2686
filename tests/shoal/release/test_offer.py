"""What a release offers, and small files out of chunks."""

import random
from collections import Counter

import pytest

from shoal.codec import MAX_PAYLOAD_BYTES, encode
from shoal.errors import ModelError, PayloadError
from shoal.release.chunks import CHUNK_BYTES, digest, split
from shoal.release.fetch import BlobFetch
from shoal.release.files import FileFetch
from shoal.release.offer import NodeModel, find_artefact
from shoal.release.trust import Target, TrustedPlan
from shoal.v1.release_pb2 import Artefact, BundleEntry, ReleaseSpec, RolloutPlan, Tier

pytestmark = pytest.mark.device

NODE = NodeModel("digits", Tier.TIER_DEVICE, "toy", max_artefact_bytes=100)
PLAN = TrustedPlan(RolloutPlan(model="digits", release=3), Target("releases/digits/3.spec", b"s" * 32, 9))
PATH = "models/digits/3-device.tflite"


def spec(**changes) -> bytes:
    described = {"tier": Tier.TIER_DEVICE, "path": PATH, "sha256": b"d" * 32, "length_bytes": 100} | changes
    return encode(ReleaseSpec(model="digits", release=3, artefacts=[Artefact(**described)]))


def signed(path: str) -> Target | None:
    return Target(PATH, b"d" * 32, 100) if path == PATH else None


def test_artefact_of_the_nodes_tier_is_found():
    """And none is no error: a release may be for gateways only."""
    assert find_artefact(spec(), PLAN, NODE, signed).path == PATH
    assert find_artefact(spec(tier=Tier.TIER_GATEWAY), PLAN, NODE, signed) is None


@pytest.mark.parametrize(
    "changes",
    [{"sha256": b"e" * 32}, {"length_bytes": 99}, {"path": "models/digits/3-gateway.onnx"}],
    ids=["digest", "length", "path"],
)
def test_artefact_that_the_signed_metadata_knows_otherwise_is_refused(changes):
    """The spec describes, TUF decides."""
    with pytest.raises(ModelError, match="signed metadata"):
        find_artefact(spec(**changes), PLAN, NODE, signed)


@pytest.mark.parametrize("other", [{"model": "shuttle", "release": 3}, {"model": "digits", "release": 2}])
def test_spec_of_another_release_is_refused(other):
    """Swapped specs, both genuine."""
    data = ReleaseSpec.FromString(spec())
    data.model, data.release = other["model"], other["release"]
    with pytest.raises(ModelError, match="is release"):
        find_artefact(encode(data), PLAN, NODE, signed)


def test_artefact_too_large_for_the_node_is_refused_before_any_fetch():
    """A device's disk is not the trainer's to fill."""
    small = NodeModel("digits", Tier.TIER_DEVICE, "toy", max_artefact_bytes=99)
    with pytest.raises(ModelError, match="at most 99"):
        find_artefact(spec(), PLAN, small, signed)


class Topics:
    """Only remembers the handler."""

    def subscribe(self, _route, _handler, *, group=None, ack_late=False, **_segments) -> None:
        assert group is None
        assert ack_late is False

    def unsubscribe(self, _route, *, group=None, **_segments) -> None:
        assert not group


def collect(entry: BundleEntry, chunks: list[bytes]) -> list[bytes]:
    files: list[bytes] = []
    fetch = FileFetch(BlobFetch(Topics(), random.Random(1), Counter()), entry, files.append)
    fetch.start()
    for chunk in chunks:
        fetch._on_chunk(digest(chunk), chunk)
    return files


def test_file_of_several_chunks_is_put_together():
    """A spec with large golden vectors does not fit one chunk."""
    data = random.Random(1).randbytes(CHUNK_BYTES * 2 + 5)
    chunks = split(data)
    entry = BundleEntry(path="x", sha256=digest(data), length_bytes=len(data), chunks=map(digest, chunks))
    assert collect(entry, chunks[::-1]) == [data]


def test_chunks_that_make_another_file_are_as_good_as_missing():
    """The index is not signed; the digest that it claims is what counts."""
    data = random.Random(1).randbytes(CHUNK_BYTES + 5)
    entry = BundleEntry(path="x", sha256=b"e" * 32, length_bytes=len(data), chunks=map(digest, split(data)))
    assert collect(entry, split(data)) == []


@pytest.mark.parametrize("length", [0, MAX_PAYLOAD_BYTES + 1])
def test_entry_too_large_for_a_small_file_is_refused(length):
    """These are kept in memory, so they are bounded before they are fetched."""
    chunks = [bytes([number]) * 32 for number in range(-(-length // CHUNK_BYTES))]
    with pytest.raises(PayloadError):
        FileFetch(
            BlobFetch(Topics(), random.Random(1), Counter()),
            BundleEntry(path="x", sha256=b"x" * 32, length_bytes=length, chunks=chunks),
            print,
        )
