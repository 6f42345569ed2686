"""Words on samples as CSV, for spreadsheets and other labelling tools. Pure.

The first line names the columns, in any order. `device`, `epoch`, `seq` and `label` are needed; what else there is may
be left empty. Epochs are 32 hex digits, times ISO 8601 with their offset.
"""

import csv
import datetime as dt
from collections.abc import Iterable, Iterator

from cloud.labels import parse_source, source_name
from cloud.sample_store import MAX_SEQ, SampleKey, StoredLabel
from shoal.errors import PayloadError
from shoal.ids import parse_id
from shoal.tensors import check_epoch

COLUMNS = ("device", "epoch", "seq", "label", "source", "author", "labelled_at", "settles", "note")
_NEEDED = COLUMNS[:4]
# What the wire carries.
MAX_LABEL = (1 << 32) - 1
_EPOCH_START = dt.datetime(1970, 1, 1, tzinfo=dt.UTC)
_YES_OR_NO = {"": False, "0": False, "1": True}


def parse_key(device: str, epoch: str, seq: str) -> SampleKey:
    """A sample's key as people type it.

    Raises:
        PayloadError: naming the part that is wrong.
    """
    try:
        raw = bytes.fromhex(epoch)
    except ValueError as exc:
        raise PayloadError(f"{epoch!r}, expected hex digits", field="epoch") from exc
    check_epoch(raw)
    return SampleKey(parse_id(device, "device"), raw, _parse_number(seq, "seq", MAX_SEQ))


def parse_labels(lines: Iterable[str], *, author: str, now_us: int) -> Iterator[StoredLabel]:
    """Read words, one a line.

    Args:
        lines: of a file.
        author: of words whose line does not say.
        now_us: likewise.

    Raises:
        PayloadError: naming the line and what is wrong with it.
    """
    reader = csv.DictReader(lines, strict=True)
    try:
        names = reader.fieldnames or []
        missing = [name for name in _NEEDED if name not in names]
        unknown = [name for name in names if name not in COLUMNS]
        if missing or unknown:
            raise PayloadError(f"columns {', '.join(names)}; missing {missing}, unknown {unknown}")  # noqa: TRY301
        for row in reader:
            if None in row or None in row.values():
                raise PayloadError(f"not {len(names)} fields")  # noqa: TRY301
            yield _parse_row(row, author, now_us)
    except (PayloadError, csv.Error) as exc:
        raise PayloadError(f"line {reader.line_num}: {exc}") from exc


def format_labels(labels: Iterable[StoredLabel]) -> Iterator[dict[str, str | int]]:
    """What `parse_labels` reads, a line at a time; see `COLUMNS`."""
    for item in labels:
        yield {
            "device": item.device,
            "epoch": item.epoch.hex(),
            "seq": item.seq,
            "label": item.label,
            "source": source_name(item.source),
            "author": item.author,
            "labelled_at": to_iso(item.labelled_at_us),
            "settles": int(item.settles),
            "note": item.note,
        }


def to_iso(at_us: int) -> str:
    """A time as text, to the microsecond."""
    return (_EPOCH_START + dt.timedelta(microseconds=at_us)).isoformat()


def _parse_row(row: dict[str, str], author: str, now_us: int) -> StoredLabel:
    settles = row.get("settles", "")
    if settles not in _YES_OR_NO:
        raise PayloadError(f"{settles!r}, expected 0 or 1", field="settles")
    key = parse_key(row["device"], row["epoch"], row["seq"])
    return StoredLabel(
        device=key.device,
        epoch=key.epoch,
        seq=key.seq,
        label=_parse_number(row["label"], "label", MAX_LABEL),
        source=parse_source(row.get("source") or "person"),
        author=row.get("author") or author,
        labelled_at_us=_parse_time(row.get("labelled_at", ""), now_us),
        note=row.get("note", ""),
        settles=_YES_OR_NO[settles],
    )


def _parse_number(text: str, field: str, most: int) -> int:
    if not (text.isascii() and text.isdigit() and len(text) <= len(str(most)) and int(text) <= most):
        raise PayloadError(f"{text!r}, expected a whole number of at most {most}", field=field)
    return int(text)


def _parse_time(text: str, now_us: int) -> int:
    if not text:
        return now_us
    try:
        at = dt.datetime.fromisoformat(text)
    except ValueError as exc:
        raise PayloadError(f"{text!r}, expected a time such as 2026-01-31T12:00:00+00:00", field="labelled_at") from exc
    if at.tzinfo is None:
        raise PayloadError(f"{text!r} has no offset, expected one such as +00:00", field="labelled_at")
    return (at - _EPOCH_START) // dt.timedelta(microseconds=1)
