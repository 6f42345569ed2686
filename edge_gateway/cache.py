"""An LRU cache of answers, which steps aside where it does not pay."""

from collections import Counter
from dataclasses import dataclass
from typing import NamedTuple

from cachetools import LRUCache

from edge_gateway.inference import Scored
from edge_gateway.requests import Row

# What CPython spends on an entry beside the input's bytes: key tuple, digest reference, answer, the cache's links.
_OVERHEAD_BYTES = 400


class _Entry(NamedTuple):
    scored: Scored
    size_bytes: int


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

    Rows that want the model's outputs pass it by: outputs are not kept. Counts `cache.hits`, `cache.misses` and
    `cache.bypassed`.
    """

    def __init__(self, config: CacheConfig, counters: Counter[str]) -> None:
        self._config = config
        self._counters = counters
        self._entries: LRUCache[tuple[bytes, str, bytes], _Entry] = LRUCache(
            config.max_bytes, getsizeof=lambda entry: entry.size_bytes
        )
        self._lookups = 0
        self._hits = 0
        self._bypass_left = 0

    @property
    def is_bypassed(self) -> bool:
        return self._config.max_bytes == 0 or self._bypass_left > 0

    def lookup(self, digest: bytes, rows: list[Row]) -> tuple[list[tuple[Row, Scored]], list[Row]]:
        """Split rows into those that are answered here and the rest; while bypassed, only count down."""
        if self.is_bypassed:
            self._bypass_left = max(0, self._bypass_left - len(rows))
            self._counters["cache.bypassed"] += len(rows)
            return [], rows
        hits: list[tuple[Row, Scored]] = []
        misses: list[Row] = []
        for row in rows:
            entry = None if row.request.wants_outputs else self._entries.get((digest, row.dtype.str, row.data))
            if entry is None:
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
        size = len(row.data) + _OVERHEAD_BYTES
        if not self.is_bypassed and not row.request.wants_outputs and size <= self._config.max_bytes:
            self._entries[digest, row.dtype.str, row.data] = _Entry(scored, size)

    def _judge(self) -> None:
        if self._hits < self._config.min_hit_rate * self._lookups:
            self._bypass_left = self._config.bypass
            self._entries.clear()
        self._lookups = self._hits = 0
