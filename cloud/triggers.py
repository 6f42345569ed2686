"""When to make a release. Pure."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class TriggerState:
    """What is known of one model.

    Attributes:
        releases: made so far.
        labelled: samples that have a label now.
        labelled_at_last: the same when the last release was begun.
        asked: somebody asked for a run by hand.
    """

    releases: int
    labelled: int
    labelled_at_last: int
    asked: bool


def why_build(state: TriggerState, *, min_new_labels: int, max_releases: int) -> str | None:
    """Say why a release is due; None when it is not."""
    if max_releases and state.releases >= max_releases:
        return None
    if state.releases == 0:
        return "first release"
    if state.asked:
        return "asked for"
    fresh = state.labelled - state.labelled_at_last
    return f"{fresh} new labels" if fresh >= min_new_labels else None
