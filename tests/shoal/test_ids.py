"""Names that are safe in a topic, a file name and a client id."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shoal.errors import PayloadError
from shoal.ids import parse_id

pytestmark = pytest.mark.device


@given(st.from_regex(r"[a-z0-9][a-z0-9_-]{0,62}", fullmatch=True))
def test_id_is_returned_as_it_came(text):
    """Nothing is folded or trimmed: two spellings never become one node."""
    assert parse_id(text, "node") == text


@pytest.mark.parametrize(
    "text",
    [
        *("", "a" * 64, "-a", "_a", "A", "a.b", "a/b", "+", "#", "$share", "a b", " a", "a\n", "a\0", "..", "é"),
        "\N{ARABIC-INDIC DIGIT ONE}",
    ],
)
def test_anything_else_is_refused_by_field(text):
    """Wildcards, levels, control characters and look-alike digits cannot reach a topic."""
    with pytest.raises(PayloadError, match="is not an id") as caught:
        parse_id(text, "topic.node")
    assert caught.value.field == "topic.node"


@given(st.text(max_size=70))
def test_accepted_text_makes_one_topic_level(text):
    """Whatever passes is ASCII, one level, and no wildcard."""
    try:
        parse_id(text, "node")
    except PayloadError:
        return
    assert text.isascii()
    assert not set(text) & set("/+#$")
    assert 1 <= len(text) <= 63


def test_refusal_quotes_only_the_beginning():
    """The sentence goes into the answer to whoever sent it, and a megabyte would not fit."""
    with pytest.raises(PayloadError) as caught:
        parse_id("\x01" * 1_000_000, "node")
    assert len(str(caught.value)) < 500
