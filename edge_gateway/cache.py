"""An LRU cache of answers, which steps aside where it does not pay."""

from collections import Counter
from dataclasses import dataclass
from typing import NamedTuple

from cachetools import LRUCache

from edge_gateway.inference import Scored
from edge_gateway.requests import Row

# What CPython spends on an entry beside the input's bytes: key tuple, sample, answer, the order's links.
_OVERHEAD_BYTES = 700
# Inputs up to this size are hashed whole. Of larger ones about as many bytes, evenly spread, because reading 12 KB to
# find nothing costs a tenth of what the gateway does for a request.
_SAMPLE_BYTES = 256


class _Entry(NamedTuple):
    data: bytes
    scored: Scored


@dataclass(frozen=True, slots=True)
class CacheConfig:
    """Bounds of the cache.

    Attributes:
        max_bytes: of keys and answers together; 0 turns it off.
        min_hit_rate: below this, over `window` lookups, the next `bypass` lookups go straight to the model.
    """

    max_bytes: int = 16 << 20
    min_hit_rate: float = 0.02
    window: int = 1_000
    bypass: int = 40_000


class AnswerCache:
    """Answers by model digest and input bytes: the same bytes to the same model have the same answer.

    Entries are found by a sample of the bytes and compared in full. Inputs of one sample share a place, where the last
    one stays: a lookup can miss for it, and never finds another input's answer.

    Rows that want the model's outputs pass it by: outputs are not kept. Counts `cache.hits`, `cache.misses` and
    `cache.bypassed`.
    """

    def __init__(self, config: CacheConfig, counters: Counter[str]) -> None:
        self._config = config
        self._counters = counters
        self._entries: LRUCache[bytes, _Entry] = LRUCache(
            config.max_bytes, getsizeof=lambda entry: len(entry.data) + _OVERHEAD_BYTES
        )
        self._lookups = 0
        self._hits = 0
        self._bypass_left = 0

    @property
    def is_bypassed(self) -> bool:
        return self._config.max_bytes == 0 or self._bypass_left > 0

    def split(self, digest: bytes, rows: list[Row]) -> tuple[list[tuple[Row, Scored]], list[Row]]:
        """Split rows into those that are answered here and the rest; while bypassed, only count down."""
        if self.is_bypassed:
            self._bypass_left = max(0, self._bypass_left - len(rows))
            self._counters["cache.bypassed"] += len(rows)
            return [], rows
        hits: list[tuple[Row, Scored]] = []
        misses: list[Row] = []
        for row in rows:
            key = _key(digest, row)
            entry = None if row.request.wants_outputs else self._entries.get(key)
            if entry is None or entry.data != row.data:
                misses.append(row)
            else:
                hits.append((row, entry.scored))
        self._counters["cache.misses"] += len(misses)
        self._counters["cache.hits"] += len(hits)
        self._lookups += len(rows)
        self._hits += len(hits)
        if self._lookups >= self._config.window:
            self._judge()
        return hits, misses

    def put(self, digest: bytes, row: Row, scored: Scored) -> None:
        fits = len(row.data) + _OVERHEAD_BYTES <= self._config.max_bytes
        if fits and not self.is_bypassed and not row.request.wants_outputs:
            self._entries[_key(digest, row)] = _Entry(row.data, scored)

    def _judge(self) -> None:
        if self._hits < self._config.min_hit_rate * self._lookups:
            self._bypass_left = self._config.bypass
            self._entries.clear()
        self._lookups = self._hits = 0


def _key(digest: bytes, row: Row) -> bytes:
    """One string of bytes, because the cache asks for its hash five times and bytes remember theirs."""
    data = row.data
    size = len(data)
    # An odd step: an even one would only ever meet the same byte of each value, which may be 0 in all of them.
    sample = data if size <= _SAMPLE_BYTES else data[:: size // _SAMPLE_BYTES | 1]
    return b"".join((digest, bytes((row.dtype.num,)), size.to_bytes(4, "big"), sample))
