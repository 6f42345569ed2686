"""Labels to and from spreadsheets: nothing is lost, and a wrong line is named."""

import csv
import io

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cloud.label_csv import COLUMNS, format_labels, parse_key, parse_labels
from cloud.sample_store import MAX_SEQ, StoredLabel
from shoal.errors import PayloadError

EPOCH = bytes(range(16))
HEADER = "device,epoch,seq,label\n"
TEXT = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=12)
LABELS = st.builds(
    StoredLabel,
    device=st.sampled_from(["cam-00", "cam_1"]),
    epoch=st.binary(min_size=16, max_size=16),
    seq=st.integers(0, MAX_SEQ),
    label=st.integers(0, (1 << 32) - 1),
    source=st.sampled_from([1, 2, 3]),
    author=TEXT.filter(bool),
    labelled_at_us=st.integers(-(10**14), 10**17),
    note=TEXT,
    settles=st.booleans(),
)


def parse(text, author="ann"):
    return list(parse_labels(io.StringIO(text, newline=""), author=author, now_us=77))


@given(labels=st.lists(LABELS, max_size=5))
def test_what_is_exported_can_be_imported(labels):
    """Every word comes back as it was, whatever authors and notes hold."""
    out = io.StringIO(newline="")
    writer = csv.DictWriter(out, COLUMNS)
    writer.writeheader()
    writer.writerows(format_labels(labels))
    assert parse(out.getvalue()) == labels


def test_four_columns_are_enough():
    """What a line does not say is the importer's: a person, who and when."""
    (label,) = parse(HEADER + f"cam-00,{EPOCH.hex()},5,7\n")
    assert label == StoredLabel("cam-00", EPOCH, 5, 7, 1, "ann", 77)


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("", "line 0: columns"),
        ("device,epoch,seq\n", r"line 1: .*missing \['label'\]"),
        ("device,epoch,seq,label,colour\n", r"line 1: .*unknown \['colour'\]"),
        (HEADER + "cam-00,00,5,7\n", "line 2: epoch: 1 bytes, expected 16"),
        (HEADER + "cam-00,xy,5,7\n", "line 2: epoch: 'xy', expected hex digits"),
        (HEADER + f"CAM,{EPOCH.hex()},5,7\n", "line 2: device: 'CAM' is not an id"),
        (HEADER + f"cam-00,{EPOCH.hex()},-5,7\n", "line 2: seq: '-5'"),
        (HEADER + f"cam-00,{EPOCH.hex()},{MAX_SEQ + 1},7\n", "line 2: seq: "),
        (HEADER + f"cam-00,{EPOCH.hex()},5,seven\n", "line 2: label: 'seven'"),
        (HEADER + f"cam-00,{EPOCH.hex()},5,{'9' * 5000}\n", "line 2: label: "),
        (HEADER + f"cam-00,{EPOCH.hex()},5\n", "line 2: not 4 fields"),
        (HEADER + f"cam-00,{EPOCH.hex()},5,7,8\n", "line 2: not 4 fields"),
        (HEADER + f"cam-00,{EPOCH.hex()},5,7\ncam-00,{EPOCH.hex()},6,\n", "line 3: label: ''"),
        (HEADER + 'cam-00,"open\n', "unexpected end of data"),
        ("device,epoch,seq,label,source\n" + f"cam-00,{EPOCH.hex()},5,7,oracle\n", "line 2: source: 'oracle'"),
        ("device,epoch,seq,label,labelled_at\n" + f"cam-00,{EPOCH.hex()},5,7,noon\n", "line 2: labelled_at: 'noon'"),
        ("device,epoch,seq,label,labelled_at\n" + f"cam-00,{EPOCH.hex()},5,7,2026-01-01\n", "no offset"),
        ("device,epoch,seq,label,settles\n" + f"cam-00,{EPOCH.hex()},5,7,maybe\n", "line 2: settles: 'maybe'"),
    ],
)
def test_wrong_line_is_named(text, named):
    """With its number and what is wrong with it."""
    with pytest.raises(PayloadError, match=named):
        parse(text)


def test_key_is_read_as_it_is_shown():
    """Hex digits of either case."""
    assert parse_key("cam-00", EPOCH.hex().upper(), "5") == ("cam-00", EPOCH, 5)
