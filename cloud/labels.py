"""Which of the words on a sample counts. Pure.

Everybody's newest word stays. A person's stands above a teacher model's, and that above one that came with the sample.
Among words of one source the newest counts; where they differ, it is a conflict that is told. Where persons differ
nobody knows better, so the sample has no label until one of them, or a third, has seen it and settles it.

`DECIDED_LABELS` is the same rule in SQL.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from types import MappingProxyType

from shoal.errors import PayloadError
from shoal.v1.command_pb2 import LABEL_SOURCE_PERSON, LABEL_SOURCE_TEACHER, LABEL_SOURCE_WITH_SAMPLE

# Best last. A source of a later version ranks below all.
_RANKS: Mapping[int, int] = MappingProxyType(
    {LABEL_SOURCE_WITH_SAMPLE: 1, LABEL_SOURCE_TEACHER: 2, LABEL_SOURCE_PERSON: 3}
)
SOURCE_NAMES: Mapping[int, str] = MappingProxyType(
    {LABEL_SOURCE_PERSON: "person", LABEL_SOURCE_TEACHER: "teacher", LABEL_SOURCE_WITH_SAMPLE: "device"}
)


@dataclass(frozen=True, slots=True)
class Word:
    """What one author says of a sample.

    Attributes:
        settles: a person has seen what was said before and decides it; of other sources it means nothing.
    """

    label: int
    source: int
    author: str
    labelled_at_us: int
    settles: bool = False


@dataclass(frozen=True, slots=True)
class Decision:
    """What counts.

    Attributes:
        label: None where persons differ.
        word: the newest of those that count.
        is_conflict: others of its source, as good as it, say something else.
    """

    label: int | None
    word: Word
    is_conflict: bool


def decide(words: Iterable[Word]) -> Decision | None:
    """Decide between the words on one sample; None when there are none."""
    said = list(words)
    if not said:
        return None
    top = max(_rank(word) for word in said)
    standing = [word for word in said if _rank(word) == top]
    settled_at_us = max((word.labelled_at_us for word in standing if _is_settling(word)), default=None)
    if settled_at_us is not None:
        standing = [
            word
            for word in standing
            if word.labelled_at_us > settled_at_us or (word.settles and word.labelled_at_us == settled_at_us)
        ]
    newest = max(standing, key=lambda word: (word.labelled_at_us, word.author, word.source))
    is_conflict = len({word.label for word in standing}) > 1
    undecided = is_conflict and newest.source == LABEL_SOURCE_PERSON
    return Decision(None if undecided else newest.label, newest, is_conflict)


def parse_source(name: str) -> int:
    """The source of that name.

    Raises:
        PayloadError: there is none.
    """
    for source, known in SOURCE_NAMES.items():
        if known == name:
            return source
    raise PayloadError(f"{name!r}, expected one of {sorted(SOURCE_NAMES.values())}", field="source")


def source_name(source: int) -> str:
    return SOURCE_NAMES.get(source, str(source))


def _rank(word: Word) -> int:
    return _RANKS.get(word.source, 0)


def _is_settling(word: Word) -> bool:
    return word.settles and word.source == LABEL_SOURCE_PERSON


def _cases(values: Mapping[int, str], otherwise: str) -> str:
    cases = " ".join(f"WHEN {source} THEN {value}" for source, value in values.items())
    return f"CASE source {cases} ELSE {otherwise} END"


_RANK = _cases({source: str(rank) for source, rank in _RANKS.items()}, "0")
_OF_SAMPLE = "PARTITION BY device, epoch, seq"
SOURCE_NAME = _cases({source: f"'{name}'" for source, name in SOURCE_NAMES.items()}, "CAST(source AS TEXT)")
# One row for each sample that has words; asked for one sample, it reads that sample's words only.
DECIDED_LABELS = f"""
SELECT device, epoch, seq,
  CASE WHEN source = {LABEL_SOURCE_PERSON} AND lowest <> highest THEN NULL ELSE label END AS label,
  source, author, labelled_at_us, lowest <> highest AS is_conflict
FROM (
  SELECT *, MIN(label) OVER ({_OF_SAMPLE}) AS lowest, MAX(label) OVER ({_OF_SAMPLE}) AS highest,
    ROW_NUMBER() OVER ({_OF_SAMPLE} ORDER BY labelled_at_us DESC, author DESC, source DESC) AS place
  FROM (
    SELECT *, {_RANK} AS rank, MAX({_RANK}) OVER ({_OF_SAMPLE}) AS top,
      MAX(CASE WHEN source = {LABEL_SOURCE_PERSON} AND settles THEN labelled_at_us END) OVER ({_OF_SAMPLE})
        AS settled_at_us
    FROM labels)
  WHERE rank = top AND (settled_at_us IS NULL OR labelled_at_us > settled_at_us
    OR (settles AND labelled_at_us = settled_at_us)))
WHERE place = 1
"""  # noqa: S608  our own names and numbers
