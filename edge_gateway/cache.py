"""An LRU cache of answers, which steps aside where it does not pay."""

from collections import Counter
from dataclasses import dataclass

from cachetools import LRUCache

# What CPython spends on an entry beside the input's bytes: key tuple, digest reference, this object, the cache's links.
_OVERHEAD_BYTES = 400


@dataclass(frozen=True, slots=True)
class CachedAnswer:
    score: float
    label: int | None
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
    window: int = 2_000
    bypass: int = 20_000


class AnswerCache:
    """Answers by model digest and input bytes: the same bytes to the same model have the same answer.

    Counts `cache.hits`, `cache.misses` and `cache.bypassed`.
    """

    def __init__(self, config: CacheConfig, counters: Counter[str]) -> None:
        self._config = config
        self._counters = counters
        self._entries: LRUCache[tuple[bytes, bytes], CachedAnswer] = LRUCache(
            config.max_bytes, getsizeof=lambda entry: entry.size_bytes
        )
        self._lookups = 0
        self._hits = 0
        self._bypass_left = 0

    @property
    def is_bypassed(self) -> bool:
        return self._config.max_bytes == 0 or self._bypass_left > 0

    def get(self, digest: bytes, data: bytes) -> CachedAnswer | None:
        """Look up; while bypassed, only count down to the next trial."""
        if self.is_bypassed:
            self._bypass_left = max(0, self._bypass_left - 1)
            self._counters["cache.bypassed"] += 1
            return None
        found = self._entries.get((digest, data))
        self._lookups += 1
        self._hits += found is not None
        self._counters["cache.misses" if found is None else "cache.hits"] += 1
        if self._lookups >= self._config.window:
            self._judge()
        return found

    def put(self, digest: bytes, data: bytes, score: float, label: int | None) -> None:
        size = len(data) + _OVERHEAD_BYTES
        if not self.is_bypassed and size <= self._config.max_bytes:
            self._entries[digest, data] = CachedAnswer(score, label, size)

    def _judge(self) -> None:
        if self._hits < self._config.min_hit_rate * self._lookups:
            self._bypass_left = self._config.bypass
            self._entries.clear()
        self._lookups = self._hits = 0
