"""Which nodes must stay float for int8 to be good enough: found by measuring, for any format. No I/O of its own."""

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True, slots=True)
class MixedModel:
    """What the search ended with.

    Attributes:
        model: the best artefact found; plain int8 where no exclusion helped.
        keep_float: nodes that it leaves alone.
        score: of it.
        tried: how many exclusions were measured.
    """

    model: bytes
    keep_float: tuple[str, ...]
    score: float
    tried: int


def signal_to_noise_db(exact: NDArray[np.float32], outputs: NDArray[np.float32]) -> float:
    """Return how far the error of outputs lies below what is exact, in decibels; infinite where there is no error."""
    noise = float(np.square(exact.astype(np.float64) - outputs).sum())
    signal = float(np.square(exact.astype(np.float64)).sum())
    return float(10 * np.log10(signal / noise)) if noise > 0 and signal > 0 else float("inf")


def rank_nodes(
    nodes: Sequence[str],
    quantize: Callable[[Collection[str]], bytes],
    run: Callable[[bytes], NDArray[np.float32]],
    exact: NDArray[np.float32],
) -> list[tuple[str, float]]:
    """Quantize one node at a time; return those that cost anything with their signal-to-noise ratio, the worst first.

    Args:
        nodes: all nodes of the model.
        quantize: all nodes but these.
        run: an artefact on rows of the caller's.
        exact: the float model's outputs on the same rows.
    """
    alone = {node: quantize([other for other in nodes if other != node]) for node in nodes}
    ranked = sorted(((node, signal_to_noise_db(exact, run(model))) for node, model in alone.items()), key=_by_ratio)
    return [(node, ratio) for node, ratio in ranked if np.isfinite(ratio)]


def _by_ratio(ranked: tuple[str, float]) -> float:
    return ranked[1]


def find_mixed(
    ranked: Sequence[str],
    quantize: Callable[[Collection[str]], bytes],
    score: Callable[[bytes], float],
    *,
    enough: float,
    max_tries: int,
) -> MixedModel:
    """Take nodes out of int8, the worst first, until the score is enough.

    An exclusion that does not raise the score is taken back: fewer int8 nodes can be worse, for neighbours then round
    at other places. The score must be of rows on which the result is not judged, or it would set its own examination.

    Args:
        ranked: nodes, the most sensitive first.
        quantize: all nodes but these.
        score: of an artefact, higher is better.
        enough: nothing is tried at or above it.
        max_tries: exclusions measured at most.
    """
    best = MixedModel(plain := quantize(()), (), score(plain), tried=0)
    for tried, node in enumerate(ranked[:max_tries], start=1):
        if best.score >= enough:
            return best
        keep_float = (*best.keep_float, node)
        found = MixedModel(model := quantize(keep_float), keep_float, score(model), tried)
        best = found if found.score > best.score else MixedModel(best.model, best.keep_float, best.score, tried)
    return best
