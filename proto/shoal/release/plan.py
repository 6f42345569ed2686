"""Does this node follow this plan? Pure, and the same on nodes, in the controller and in the console."""

import hashlib
import re

from shoal.v1.release_pb2 import RolloutPlan

PERMILLE = 1000


def matches(pattern: str, node: str) -> bool:
    """Match a node id against a pattern in which only `*` is special."""
    return re.fullmatch(".*".join(map(re.escape, pattern.split("*"))), node) is not None


def cohort(rollout_id: str, node: str) -> int:
    """The node's place in this rollout, 0 to 999: stable over its stages, independent between rollouts."""
    return int.from_bytes(hashlib.sha256(f"{rollout_id}/{node}".encode()).digest(), "big") % PERMILLE


def follows(plan: RolloutPlan, node: str) -> bool:
    """Whether `node` is one of the plan's targets and inside its share."""
    return cohort(plan.rollout_id, node) < plan.share_permille and any(matches(p, node) for p in plan.targets)
