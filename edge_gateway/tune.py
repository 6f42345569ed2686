"""Which settings would have answered a trace soonest. Pure."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from edge_gateway.replay import Costs, Replayed, Setting, replay
from edge_gateway.trace import Asked

# More would take minutes and teach nothing.
MAX_REQUESTS = 50_000
DELAYS_S = (0.0, 0.001, 0.002, 0.005)
# What is within this share of the best 99th percentile is as good, for the measurement is no finer.
_AS_GOOD = 0.02


@dataclass(frozen=True, slots=True)
class Advice:
    """All candidates in order, and the best of those that keep up; None where none does."""

    tried: Sequence[Replayed]
    best: Replayed | None


def candidates(costs: Costs) -> Iterator[Setting]:
    """Every size that was measured, with and without waiting; workers where the model is slow enough to have them."""
    for size in costs.sizes:
        workers = range(1, costs.workers + 1) if costs.is_slow(size) else (1,)
        for delay_s in DELAYS_S if size > 1 else DELAYS_S[:1]:
            yield from (Setting(size, delay_s, count) for count in workers)


def advise(trace: Sequence[Asked], costs: Costs, *, window: int) -> Advice:
    """Replay the trace with each candidate and choose by p99, then by how much is left to do other things."""
    tried = [replay(trace, setting, costs, window=window) for setting in candidates(costs)]
    able = [each for each in tried if each.keeps_up]
    if not able:
        return Advice(tried, None)
    soonest_s = min(each.quantile_s(0.99) for each in able)
    as_good = [each for each in able if each.quantile_s(0.99) <= soonest_s * (1 + _AS_GOOD)]
    return Advice(tried, min(as_good, key=lambda each: (round(each.utilisation, 2), each.setting.max_batch_size)))
