"""What a node tells of one model: its slots, and what was seen of the release that runs. Pure."""

from shoal.release.offer import NodeModel
from shoal.release.probation import Watch
from shoal.release.slots import Phase, Slots
from shoal.v1.node_pb2 import ModelState, SlotPhase

_PHASES = {
    Phase.EMPTY: SlotPhase.SLOT_PHASE_EMPTY,
    Phase.WRITTEN: SlotPhase.SLOT_PHASE_WRITTEN,
    Phase.PROBATION: SlotPhase.SLOT_PHASE_PROBATION,
    Phase.CONFIRMED: SlotPhase.SLOT_PHASE_CONFIRMED,
    Phase.FAILED: SlotPhase.SLOT_PHASE_FAILED,
}


def model_state(node: NodeModel, slots: Slots, watch: Watch | None) -> ModelState:
    """Describe what runs, or what waits where nothing does; `watch` is of the running release."""
    slot = slots.running or slots.spare
    state = ModelState(
        model=node.model,
        release=slot.content.release,
        phase=_PHASES[slot.phase],
        sha256=slot.content.sha256,
        runtime=node.runtime,
    )
    if watch is not None and slots.running is not None:
        state.answers, state.errors = watch.answers, watch.errors
        diverged = watch.divergence_ppm
        if diverged is not None:
            state.divergence_ppm = diverged
    if slots.refusals:
        state.refused_release = slots.refusals[-1].content.release
        state.refused_reason = slots.refusals[-1].reason
    return state
