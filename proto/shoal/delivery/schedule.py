"""When each item is due, and which makes way for which. Pure."""

import heapq
from collections import Counter, OrderedDict

from shoal.delivery.items import Key, Priority

# Entries of a heap for each item that waits; a peer that asks for patience again and again leaves old ones behind.
_LARGEST_HEAP = 8


class Schedule:
    """Due times by lane: one for each link that items leave through, so that one which is down holds up nobody else."""

    def __init__(self) -> None:
        self._heaps: dict[str, list[tuple[float, int, Key]]] = {}
        # The one entry of each key that still counts; older ones are skipped.
        self._tickets: dict[Key, int] = {}
        self._last_ticket = 0

    def plan(self, key: Key, lane: str, when: float) -> None:
        """Have `key` due at `when`, and at no other time."""
        self._last_ticket += 1
        self._tickets[key] = self._last_ticket
        heap = self._heaps.setdefault(lane, [])
        if len(heap) > _LARGEST_HEAP * (len(self._tickets) + 1):
            heap[:] = [entry for entry in heap if self._counts_still(entry)]
            heapq.heapify(heap)
        heapq.heappush(heap, (when, self._last_ticket, key))

    def cancel(self, key: Key) -> None:
        self._tickets.pop(key, None)

    def next_due(self, lane: str) -> float | None:
        """When `pop` has something next; None when nothing is planned."""
        heap = self._heaps.get(lane, [])
        while heap:
            if self._counts_still(heap[0]):
                return heap[0][0]
            heapq.heappop(heap)
        return None

    def pop(self, lane: str) -> Key:
        """The key that `next_due` spoke of."""
        return heapq.heappop(self._heaps[lane])[2]

    def _counts_still(self, entry: tuple[float, int, Key]) -> bool:
        return self._tickets.get(entry[2]) == entry[1]


class Ranks:
    """Who makes way: the oldest of the lowest priority, for a higher one alone."""

    def __init__(self) -> None:
        # Linked lists: the first of a dict that is emptied from its front takes longer and longer to find.
        self._queues: dict[Priority, OrderedDict[Key, int]] = {rank: OrderedDict() for rank in sorted(Priority)}
        self._bytes: Counter[Priority] = Counter()

    def add(self, key: Key, priority: Priority, size_bytes: int) -> None:
        self._queues[priority][key] = size_bytes
        self._bytes[priority] += size_bytes

    def remove(self, key: Key, priority: Priority) -> None:
        self._bytes[priority] -= self._queues[priority].pop(key)

    def victims(self, priority: Priority, items: int, size_bytes: int) -> list[Key]:
        """Whom to drop so that so many items and bytes become free for `priority`; nobody where that is not enough."""
        lower = [rank for rank in self._queues if rank < priority]
        if sum(len(self._queues[rank]) for rank in lower) < items or sum(self._bytes[r] for r in lower) < size_bytes:
            return []
        found: list[Key] = []
        for rank in lower:
            for key, size in self._queues[rank].items():
                if items <= 0 and size_bytes <= 0:
                    return found
                found.append(key)
                items -= 1
                size_bytes -= size
        return found
