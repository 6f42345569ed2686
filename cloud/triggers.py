"""When to run a pipeline. Pure: the time, and what is known of the model, are passed in."""

import datetime as dt
from dataclasses import dataclass

from cloud.pipelines.file import Triggers


@dataclass(frozen=True, slots=True)
class TriggerState:
    """What is known of one model.

    Attributes:
        releases: made so far.
        ran: a run has said yes or no.
        labelled: samples that have a label now.
        labelled_at_last: the same when the last such run was begun.
        drifted: the scores that come up have changed since then.
        asked: somebody asked for a run by hand.
    """

    releases: int
    ran: bool
    labelled: int
    labelled_at_last: int
    drifted: bool
    asked: bool


def why_run(triggers: Triggers, state: TriggerState, now: dt.datetime) -> str | None:
    """Say why a run is due; None when it is not.

    Args:
        triggers: of the pipeline file.
        state: of its model.
        now: aware of its time zone.
    """
    if triggers.max_releases and state.releases >= triggers.max_releases:
        return None
    if state.asked:
        return "asked for"
    if not state.ran:
        return "first release"
    fresh = state.labelled - state.labelled_at_last
    reason = f"{fresh} new labels" if fresh >= triggers.new_labels else None
    if reason is None and triggers.drift is not None and state.drifted and fresh >= triggers.drift.new_labels:
        reason = f"drift, {fresh} new labels"
    return reason if reason is not None and in_hours(triggers.hours, now) else None


def in_hours(hours: list[str], now: dt.datetime) -> bool:
    """Whether a time lies in one of these UTC windows, such as "22:00-06:00"; always, where there are none.

    A window holds its first minute and not its last; one that begins where it ends is the whole day.
    """
    minute = now.astimezone(dt.UTC).strftime("%H:%M")
    return not hours or any(_within(window, minute) for window in hours)


def _within(window: str, minute: str) -> bool:
    start, _, end = window.partition("-")
    return start <= minute < end if start < end else minute >= start or minute < end
