"""What a release offers to a node, once everything that names it agrees. Pure."""

from dataclasses import dataclass
from typing import Protocol

from shoal.codec import decode
from shoal.errors import ModelError
from shoal.release.trust import Target, TrustedPlan
from shoal.v1.release_pb2 import Artefact, ReleaseSpec, Tier


class Lookup(Protocol):
    """What signed metadata says about a path; `TrustedView.target` is one."""

    def __call__(self, path: str) -> Target | None: ...


@dataclass(frozen=True, slots=True)
class NodeModel:
    """What an installer must know of its node.

    Attributes:
        probation_s: how long a new model is watched at least; see `shoal.release.probation`.
        max_artefact_bytes: larger ones are refused before anything is fetched.
    """

    model: str
    tier: Tier
    runtime: str
    probation_s: float = 10.0
    max_artefact_bytes: int = 64 << 20


def find_artefact(spec_data: bytes, trusted: TrustedPlan, node: NodeModel, lookup: Lookup) -> Artefact | None:
    """The artefact of the node's tier; None when the release has none.

    Args:
        spec_data: the file that `trusted.spec` describes, its digest checked.
        trusted: the plan that led here.
        node: who asks.
        lookup: what the signed metadata says about a path.

    Raises:
        ModelError, PayloadError: the spec is for something else, the signed metadata knows the artefact otherwise,
            or it is too large for this node.
    """
    spec = decode(ReleaseSpec, spec_data)
    if spec.model != node.model or spec.release != trusted.plan.release:
        raise ModelError(f"{trusted.spec.path} is release {spec.release} of {spec.model!r}")
    artefact = next((item for item in spec.artefacts if item.tier == node.tier), None)
    if artefact is None:
        return None
    signed = lookup(artefact.path)
    if signed is None or (signed.sha256, signed.length_bytes) != (artefact.sha256, artefact.length_bytes):
        raise ModelError(f"{artefact.path} is not what the signed metadata says")
    if artefact.length_bytes > node.max_artefact_bytes:
        raise ModelError(f"{artefact.path}: {artefact.length_bytes} bytes, at most {node.max_artefact_bytes}")
    return artefact
