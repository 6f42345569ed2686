"""The step `deploy_to_edge`: a release gets its number, its signature and a plan, and goes to the publisher's queue.

Done twice it does nothing new: the newest release is taken for this one if it says the same, and so is its plan.
"""

import datetime as dt
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

import msgspec

from cloud.keys import KeyStore
from cloud.pipelines.evaluate import read_spec
from cloud.pipelines.file import DeployToEdge, Kind
from cloud.pipelines.snapshot import PublishedRelease
from cloud.pipelines.work import TIERS, Made
from cloud.release_orders import plans_of, release_number, submit_plan, submit_release
from cloud.release_store import Newest, ReleaseStore
from cloud.repository import ROLLOUT, parse_role
from shoal.codec import decode
from shoal.release.chunks import digest
from shoal.release.plan import PERMILLE
from shoal.release.trust import model_role, spec_path
from shoal.v1.release_pb2 import ReleaseSpec, RolloutPlan

DEPLOYMENT = "deployment.json"


class Deployment(msgspec.Struct, frozen=True):
    """What a deployment leaves as its output; when it was signed is among the figures."""

    model: str
    release: int
    rollout_id: str
    targets: list[str]


@dataclass(frozen=True, slots=True)
class Depot:
    """Where releases go, and what they are signed with."""

    store: ReleaseStore
    keys: KeyStore
    budget_bytes: int


def newest_release(store: ReleaseStore, model: str) -> PublishedRelease | None:
    """Read a model's newest release, published or waiting; None when there is none, or not all of it is here.

    Raises:
        ConfigError: the store was never created.
    """
    newest = store.newest()
    role = newest.roles.get(model_role(model))
    if role is None:
        return None
    targets = parse_role(role).targets
    number = max(map(release_number, targets), default=0)
    info = targets.get(spec_path(model, number))
    data = newest.file(bytes.fromhex(info.hashes["sha256"])) if info is not None else None
    if data is None:
        return None
    spec = decode(ReleaseSpec, data)
    files = {item.path: newest.file(item.sha256) for item in spec.artefacts}
    present = {path: content for path, content in files.items() if content is not None}
    return PublishedRelease(spec, MappingProxyType(present)) if len(present) == len(files) else None


def deploy_to_edge(
    step: DeployToEdge, inputs: Mapping[Kind, Mapping[str, bytes]], depot: Depot, now: dt.datetime
) -> Made:
    """Sign and queue a release and the plan that brings it to its targets.

    Raises:
        ConfigError: a key or the store is missing.
        ModelError: there is no room for the release.
    """
    release = inputs[Kind.RELEASE]
    wanted = read_spec(release)
    files = [release[f"{tier.name}.{tier.suffix}"] for tier in TIERS]
    before = newest_release(depot.store, wanted.model)
    if before is not None and _says_the_same(before.spec, wanted, files):
        released = before.spec
    else:
        released = submit_release(depot.store, wanted, files, depot.keys, now, budget_bytes=depot.budget_bytes)
    plan = RolloutPlan(
        rollout_id=f"{released.model}-{released.release}",
        model=released.model,
        release=released.release,
        spec_path=spec_path(released.model, released.release),
        targets=step.target_patterns,
        share_permille=PERMILLE,
    )
    if plan not in _plans(depot.store.newest()):
        submit_plan(depot.store, plan, depot.keys, now)
    deployment = Deployment(released.model, released.release, plan.rollout_id, step.target_patterns)
    return Made(
        {DEPLOYMENT: msgspec.json.encode(deployment)},
        {"created_at_us": released.created_at_us, "parent": released.parent},
    )


def read_deployment(files: Mapping[str, bytes]) -> Deployment:
    return msgspec.json.decode(files[DEPLOYMENT], type=Deployment)


def _plans(newest: Newest) -> list[RolloutPlan]:
    return list(plans_of(newest.roles[ROLLOUT], newest.file))


def _says_the_same(present: ReleaseSpec, wanted: ReleaseSpec, files: Sequence[bytes]) -> bool:
    """Whether a release's artefacts, thresholds, golden vectors and schema are those that are wanted.

    Whose child it is says nothing of it, and what was measured follows from the rest.
    """
    if [item.sha256 for item in present.artefacts] != [digest(data) for data in files]:
        return False
    return _bare(present) == _bare(wanted)


def _bare(spec: ReleaseSpec) -> ReleaseSpec:
    bare = ReleaseSpec(model=spec.model, input=spec.input, score=spec.score)
    for item in spec.artefacts:
        artefact = bare.artefacts.add()
        artefact.CopyFrom(item)
        for name in ("path", "sha256", "length_bytes", "chunks", "chunk_bytes"):
            artefact.ClearField(name)
    return bare
