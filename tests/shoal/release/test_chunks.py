import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shoal.errors import PayloadError
from shoal.release.chunks import CHUNK_BYTES, Assembler, Manifest, digest, manifest_of, split

pytestmark = pytest.mark.device

FILES = st.tuples(st.integers(1, 300), st.integers(1, 40), st.integers(0, 3)).map(
    # Few distinct bytes, so that chunks repeat.
    lambda spec: (bytes(random.Random(spec[2]).choices(b"ab", k=spec[0])), spec[1])
)


@given(FILES, st.randoms(use_true_random=False))
def test_any_order_with_duplicates_and_rubbish_makes_the_file(file, rng):
    """Chunks find all their places by content; rubbish only counts."""
    data, chunk_bytes = file
    assembler = Assembler(manifest_of(data, chunk_bytes))
    stream = split(data, chunk_bytes) * 2 + [b"rubbish that is longer than any chunk can be........."] * 3
    rng.shuffle(stream)
    made = bytearray(len(data))
    for chunk in stream:
        for offset in assembler.accept(digest(chunk), chunk):
            made[offset : offset + len(chunk)] = chunk
    assert bytes(made) == data
    assert assembler.complete
    assert assembler.bad_chunks == 3
    assert not assembler.missing()


def test_swapped_and_tampered_chunks_of_the_right_length_belong_nowhere():
    """Content decides where a chunk goes, never the order in which it came or its length."""
    data = bytes(range(96))
    assembler = Assembler(manifest_of(data, 32))
    assert assembler.accept(digest(data[32:64]), data[32:64]) == [32]
    assert assembler.accept(digest(bytes(32)), bytes(32)) == []
    assert assembler.bad_chunks == 1
    assert len(assembler.missing()) == 2


@given(FILES, st.integers(0, 300), st.integers(0, 299))
def test_restore_believes_only_whole_chunks(file, cut, flip):
    """Whatever is left of a staging file, exactly its good chunks count."""
    data, chunk_bytes = file
    torn = bytearray(data[:cut])
    if flip < len(torn):
        torn[flip] ^= 0xFF
    assembler = Assembler(manifest_of(data, chunk_bytes))
    assembler.restore(bytes(torn))
    expected = [torn[at : at + chunk_bytes] == data[at : at + chunk_bytes] for at in range(0, len(data), chunk_bytes)]
    assert assembler.present == expected
    assert set(assembler.missing()) == {
        digest(chunk) for chunk, good in zip(split(data, chunk_bytes), expected, strict=True) if not good
    }


@pytest.mark.parametrize(
    ("digests", "length", "chunk_bytes", "field"),
    [
        ((), 0, 4, "chunks"),
        ((b"d" * 32,), 5, 4, "chunks"),
        ((b"d" * 32, b"e" * 32, b"f" * 32), 5, 4, "chunks"),
        ((b"d" * 31,), 4, 4, "chunks"),
        ((b"d" * 32, b"d" * 32), 5, 4, "chunks"),
        ((b"d" * 32,), 4, 0, "chunk_bytes"),
        ((b"d" * 32,), 4, CHUNK_BYTES + 1, "chunk_bytes"),
        ((b"d" * 32,), 1 << 62, 4, "chunks"),
    ],
)
def test_manifest_that_explains_no_file_is_refused(digests, length, chunk_bytes, field):
    """Announced lengths are bounded by the digests that come with them."""
    with pytest.raises(PayloadError) as caught:
        Manifest(digests, length, chunk_bytes)
    assert caught.value.field == field
