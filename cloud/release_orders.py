"""Orders to the publisher: how trainer and controller make them, and what makes one acceptable.

Invariants:
- a role's metadata keeps the newest release, those that live plans name, and the parents of these to go back to;
- no order takes away what a live plan names;
- a release that there is no room for on the broker is refused before it is signed;
- the publisher trusts no submitter: signatures, paths, digests, specs and plans are all checked again.
"""

import datetime as dt
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

from securesystemslib.signer import Signer
from tuf.api.metadata import TargetFile, Targets

from cloud.keys import KeyStore, authorised
from cloud.release_store import Newest, Order, ReleaseStore
from cloud.repository import ROLLOUT, Generation, delegations_of, parse_role, sign_role, target_file, verify_role
from cloud.retained import RETAINED_BUDGET_BYTES, LoadFile, check_budget, live_set
from shoal.codec import decode, encode
from shoal.errors import ConfigError, ModelError, TrustError
from shoal.input_schema import check_input_schema
from shoal.release.chunks import CHUNK_BYTES, digest, manifest_of
from shoal.release.plan import PERMILLE
from shoal.release.trust import model_role, parse_target, plan_path, spec_path
from shoal.scoring import Scaler
from shoal.v1.release_pb2 import Artefact, ModelFormat, ReleaseSpec, RolloutPlan, Tier

_RELEASE_PATH = re.compile(r"(?:releases|models)/[^/]+/(\d+)[.-][^/]*")
_PLAN_PATH = re.compile(r"plans/([^/]+)\.plan")
_SUFFIXES = {ModelFormat.MODEL_FORMAT_TFLITE: "tflite", ModelFormat.MODEL_FORMAT_ONNX: "onnx"}
_TIERS = {Tier.TIER_DEVICE: "device", Tier.TIER_GATEWAY: "gateway"}
_MICROSECONDS = 1_000_000


def submit_release(
    store: ReleaseStore,
    spec: ReleaseSpec,
    files: Sequence[bytes],
    keys: KeyStore,
    now: dt.datetime,
    *,
    budget_bytes: int = RETAINED_BUDGET_BYTES,
) -> ReleaseSpec:
    """Sign a release and queue it.

    Args:
        store: the publisher's directory.
        spec: complete but for what this fills in: release number, creation time, and each artefact's path, digest,
            length and chunks.
        files: the artefacts themselves, in the order of `spec.artefacts`.
        keys: must have the model's role.
        now: the time to sign with.
        budget_bytes: the publisher's, so that a release that it would refuse is refused here, where somebody reads it.

    Returns the spec as released.

    Raises:
        ConfigError: the model has no role here, or no key.
        ModelError: the spec cannot be released, or there is no room for it.
    """
    role = model_role(spec.model)
    with store.submitting():
        newest = store.newest()
        if role not in newest.roles:
            raise ConfigError(f"model {spec.model!r} has no role: only {sorted(newest.roles)}")
        published = parse_role(newest.roles[role])
        number = 1 + max((release_number(path) for path in published.targets), default=0)
        released = _complete(spec, number, files, now)
        added = _release_files(released, files)
        keep = live_releases(newest.roles[ROLLOUT], published, spec.model, newest.file)
        targets = {path: info for path, info in published.targets.items() if release_number(path) in keep}
        targets |= {path: target_file(path, data) for path, data in added.items()}
        brought = {digest(data): data for data in added.values()}
        unsigned = sign_role([], published.version + 1, targets, now)
        _check_room(store, newest, released, unsigned, brought=brought, budget_bytes=budget_bytes)
        metadata = sign_role(_signers(newest, role, keys), published.version + 1, targets, now)
        store.submit(role, metadata, brought)
    return released


def submit_plan(store: ReleaseStore, plan: RolloutPlan, keys: KeyStore, now: dt.datetime) -> RolloutPlan:
    """Sign a plan and queue it; it takes the place of the model's last plan. Returns it with its `spec_path`.

    Raises:
        ConfigError: no key of the rollout role.
        ModelError: the plan is malformed, or names a release that is neither published nor waiting.
    """
    complete = RolloutPlan()
    complete.CopyFrom(plan)
    complete.spec_path = spec_path(plan.model, plan.release)
    with store.submitting():
        newest = store.newest()
        _check_plan(complete, _targets_of(newest.roles, plan.model))
        published = parse_role(newest.roles[ROLLOUT])
        path, data = plan_path(plan.model), encode(complete)
        targets = {**published.targets, path: target_file(path, data)}
        metadata = sign_role(_signers(newest, ROLLOUT, keys), published.version + 1, targets, now)
        store.submit(ROLLOUT, metadata, {digest(data): data})
    return complete


def checked_files(order: Order, generation: Generation, store: ReleaseStore, now: dt.datetime) -> dict[bytes, bytes]:
    """Check an order against what is published, and return the files that it brings.

    Raises:
        ShoalError: it must not be published; the message says why.
    """
    targets = verify_role(generation, order.role, order.metadata, now)

    def load(sha256: bytes) -> bytes | None:
        return order.file(sha256) or store.file(sha256)

    files = {path: _load_target(path, info, load) for path, info in targets.targets.items()}
    check_content(order.role, files, generation.roles)
    if order.role != ROLLOUT:
        _check_live_plans(order.role, generation, targets, store.file)
    return {digest(data): data for data in files.values()}


def check_content(role: str, files: Mapping[str, bytes], roles: Mapping[str, bytes]) -> None:
    """Check that the plans or releases that a role delivers are what their paths say, and complete.

    Args:
        role: `rollout` or a model's.
        files: everything that it delivers, by path.
        roles: metadata of the models' roles, for the releases that plans name.

    Raises:
        ShoalError: something is not.
    """
    if role != ROLLOUT:
        _check_releases(role, files)
        return
    for path, data in files.items():
        plan = decode(RolloutPlan, data)
        if path != plan_path(plan.model):
            raise TrustError(f"{path} holds a plan of {plan.model!r}")
        _check_plan(plan, _targets_of(roles, plan.model))


def plans_of(rollout: bytes, load: LoadFile) -> Iterator[RolloutPlan]:
    """The live plans of a rollout role's metadata."""
    for path, info in parse_role(rollout).targets.items():
        yield decode(RolloutPlan, _load_target(path, info, load))


def live_releases(rollout: bytes, published: Targets, model: str, load: LoadFile) -> set[int]:
    """The releases of a model that must stay: those that live plans name, and their parents."""
    live = set()
    for plan in plans_of(rollout, load):
        info = published.targets.get(plan.spec_path)
        if plan.model == model and info is not None:
            live |= {plan.release, decode(ReleaseSpec, _load_target(plan.spec_path, info, load)).parent}
    return live


def _check_room(
    store: ReleaseStore,
    newest: Newest,
    released: ReleaseSpec,
    unsigned: bytes,
    *,
    brought: Mapping[bytes, bytes],
    budget_bytes: int,
) -> None:
    """Look ahead at what the publisher will say, who counts the few bytes of a signature too."""
    published = store.load()

    def size_bytes(roles: Mapping[str, bytes]) -> int:
        generation = replace(published, roles=roles)
        return live_set(generation, store, lambda sha256: brought.get(sha256) or newest.file(sha256)).size_bytes

    check_budget(
        f"release {released.release} of {released.model!r}",
        present_bytes=size_bytes(newest.roles),
        next_bytes=size_bytes({**newest.roles, model_role(released.model): unsigned}),
        budget_bytes=budget_bytes,
    )


def _signers(newest: Newest, role: str, keys: KeyStore) -> list[Signer]:
    """The keys that the newest metadata names: others may lie there from before a rotation."""
    return authorised(keys.signers(role), role, delegations_of(parse_role(newest.roles["targets"]))[role])


def release_number(path: str) -> int:
    match = _RELEASE_PATH.fullmatch(path)
    return int(match[1]) if match else 0


def _targets_of(roles: Mapping[str, bytes], model: str) -> Targets:
    if model_role(model) not in roles:
        raise ModelError(f"model {model!r} has no role")
    return parse_role(roles[model_role(model)])


def _complete(spec: ReleaseSpec, number: int, files: Sequence[bytes], now: dt.datetime) -> ReleaseSpec:
    if len(files) != len(spec.artefacts) or not files:
        raise ModelError(f"{len(spec.artefacts)} artefacts described, {len(files)} files")
    check_input_schema(spec.input)
    Scaler(spec.input)
    released = ReleaseSpec()
    released.CopyFrom(spec)
    released.release = number
    released.created_at_us = int(now.timestamp() * _MICROSECONDS)
    for artefact, data in zip(released.artefacts, files, strict=True):
        if artefact.tier not in _TIERS or artefact.format not in _SUFFIXES:
            raise ModelError(f"artefact with tier {artefact.tier} and format {artefact.format}")
        name = f"{number}-{_TIERS[artefact.tier]}.{_SUFFIXES[artefact.format]}"
        artefact.path = f"models/{spec.model}/{name}"
        artefact.sha256 = digest(data)
        artefact.length_bytes = len(data)
        artefact.chunk_bytes = CHUNK_BYTES
        del artefact.chunks[:]
        artefact.chunks.extend(manifest_of(data).digests)
    return released


def _release_files(released: ReleaseSpec, files: Sequence[bytes]) -> dict[str, bytes]:
    added = {artefact.path: data for artefact, data in zip(released.artefacts, files, strict=True)}
    if len(added) != len(files):
        raise ModelError("two artefacts for one tier and format")
    try:
        added[spec_path(released.model, released.release)] = encode(released)
    except ValueError as exc:
        raise ModelError(f"{exc}: use fewer golden vectors") from exc
    return added


def _load_target(path: str, info: TargetFile, load: LoadFile) -> bytes:
    target = parse_target(path, info)
    data = load(target.sha256)
    if data is None or len(data) != target.length_bytes or digest(data) != target.sha256:
        raise TrustError(f"{path}: the file that was signed is not here")
    return data


def _check_plan(plan: RolloutPlan, releases: Targets) -> None:
    if plan.spec_path != spec_path(plan.model, plan.release) or plan.spec_path not in releases.targets:
        raise ModelError(f"plan {plan.rollout_id!r} names release {plan.release} of {plan.model!r}, which is not here")
    if not plan.rollout_id or not plan.targets or plan.share_permille > PERMILLE:
        raise ModelError(f"plan {plan.rollout_id!r} of {plan.model!r}: no id, no targets, or a share above {PERMILLE}")


def _check_releases(role: str, files: Mapping[str, bytes]) -> None:
    for path, data in files.items():
        if not path.startswith("releases/"):
            continue
        spec = decode(ReleaseSpec, data)
        if role != model_role(spec.model) or path != spec_path(spec.model, spec.release):
            raise TrustError(f"{path} holds release {spec.release} of {spec.model!r}")
        check_input_schema(spec.input)
        for artefact in spec.artefacts:
            _check_artefact(artefact, files.get(artefact.path))


def _check_artefact(artefact: Artefact, data: bytes | None) -> None:
    if data is None or digest(data) != artefact.sha256:
        raise TrustError(f"{artefact.path} is not the artefact that its spec describes")
    if artefact.chunk_bytes != CHUNK_BYTES or tuple(artefact.chunks) != manifest_of(data).digests:
        raise TrustError(f"{artefact.path}: the spec's chunks make another file")


def _check_live_plans(role: str, generation: Generation, targets: Targets, load: LoadFile) -> None:
    for plan in plans_of(generation.roles[ROLLOUT], load):
        if model_role(plan.model) == role and plan.spec_path not in targets.targets:
            raise TrustError(f"release {plan.release} of {plan.model!r} is named by a live plan")
