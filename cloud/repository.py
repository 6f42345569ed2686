"""TUF metadata as values: built, signed and verified. Pure but for the signers that are passed in.

Invariants:
- a `Generation` is complete and consistent: its timestamp names its snapshot, which names its role files, by digest;
- versions only go up;
- nothing is signed with fewer of a role's own keys than its threshold;
- a role delivers only under its own paths, and the top-level targets role delivers nothing itself.
"""

import datetime as dt
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import TypeVar

from securesystemslib.signer import Signer
from tuf.api.exceptions import RepositoryError
from tuf.api.metadata import (
    DelegatedRole,
    Delegations,
    Key,
    Metadata,
    MetaFile,
    Root,
    Snapshot,
    TargetFile,
    Targets,
    Timestamp,
)
from tuf.api.serialization.json import JSONSerializer

from cloud.keys import KeyStore, authorised, public_keys
from shoal.errors import TrustError
from shoal.release.trust import SIGNED_AT_FIELD, model_role

ROLLOUT = "rollout"
TOP_LEVEL = ("root", "targets", "snapshot", "timestamp")
# The timestamp is what a store commits by, so it says how many roots were committed with it. Nodes do not read this.
ROOT_VERSION_FIELD = "x-shoal-root-version"
S = TypeVar("S", Root, Targets, Snapshot, Timestamp)

_SERIALIZER = JSONSerializer(compact=True)

# How long a node that nobody reaches may still converge; see DESIGN section 4.5.
LIFETIMES = {
    "timestamp": dt.timedelta(days=30),
    "snapshot": dt.timedelta(days=90),
    "targets": dt.timedelta(days=365),
    "root": dt.timedelta(days=365),
}
_RENEW_AFTER = 3  # a third of its life


@dataclass(frozen=True, slots=True)
class Generation:
    """Everything that one timestamp vouches for, as signed bytes.

    Attributes:
        roots: every root since the first, in order, so that a node of any age can follow.
        roles: `targets` and what it delegates to.
    """

    roots: tuple[bytes, ...]
    roles: Mapping[str, bytes]
    snapshot: bytes
    timestamp: bytes

    def files(self) -> dict[str, bytes]:
        """Metadata files under the names that a TUF client asks for, without the timestamp."""
        named = {f"{number}.root.json": data for number, data in enumerate(self.roots, 1)}
        for role, data in self.roles.items():
            named[f"{parse_metadata(Targets, data).signed.version}.{role}.json"] = data
        named[f"{snapshot_of(self).version}.snapshot.json"] = self.snapshot
        return named

    def targets(self) -> dict[str, TargetFile]:
        """Every file that any role delivers."""
        return {path: info for data in self.roles.values() for path, info in parse_role(data).targets.items()}


def parse_role(data: bytes) -> Targets:
    """Read signed metadata of a targets role; signatures are not looked at.

    Raises:
        TrustError: it is something else.
    """
    return parse_metadata(Targets, data).signed


def snapshot_of(generation: Generation) -> Snapshot:
    return Metadata[Snapshot].from_bytes(generation.snapshot).signed


def timestamp_of(generation: Generation) -> Timestamp:
    return Metadata[Timestamp].from_bytes(generation.timestamp).signed


def root_of(generation: Generation) -> Root:
    """The newest root."""
    return parse_root(generation.roots[-1]).signed


def parse_root(data: bytes) -> Metadata[Root]:
    """Read signed root metadata; signatures are not looked at.

    Raises:
        TrustError: it is something else.
    """
    return parse_metadata(Root, data)


def parse_metadata(kind: type[S], data: bytes) -> Metadata[S]:
    """Read signed metadata of one type; signatures are not looked at.

    Raises:
        TrustError: it is something else.
    """
    try:
        metadata = Metadata[S].from_bytes(data)
    except RepositoryError as exc:
        raise TrustError(f"{len(data)} bytes are no metadata: {exc}") from exc
    if metadata.signed.type != kind.type:
        raise TrustError(f"metadata of type {metadata.signed.type}, expected {kind.type}")
    return metadata


def delegations_of(targets: Targets) -> Mapping[str, DelegatedRole]:
    return (targets.delegations.roles or {}) if targets.delegations is not None else {}


def delegated_paths(role: str) -> list[str]:
    """What a delegated role may deliver."""
    if role == ROLLOUT:
        return ["plans/*"]
    model = role.removeprefix(model_role(""))
    return [f"releases/{model}/*", f"models/{model}/*"]


def first_generation(
    keys: KeyStore, models: Iterable[str], now: dt.datetime, *, root_threshold: int | None = None
) -> Generation:
    """Sign version 1 of everything: no releases, no plans.

    Args:
        keys: has every role.
        models: get a role each.
        now: the time to sign with.
        root_threshold: signatures that a root needs; by default more than half of its keys, hence 2 of 3.

    Raises:
        ConfigError: a role has no key, or root fewer than its threshold.
    """
    root = Root(version=1, expires=expiry("root", now), consistent_snapshot=True)
    for role in TOP_LEVEL:
        for key in public_keys(keys, role):
            root.add_key(key, role)
    count = len(root.roles["root"].keyids)
    root.roles["root"].threshold = majority(count) if root_threshold is None else root_threshold
    root_signers = authorised(keys.signers("root"), "root", root.roles["root"])
    roles = {
        "targets": sign(_delegating_targets(keys, sorted(models), now), keys.signers("targets")),
        ROLLOUT: sign_role(keys.signers(ROLLOUT), 1, {}, now),
        **{model_role(model): sign_role(keys.signers(model_role(model)), 1, {}, now) for model in sorted(models)},
    }
    empty = Generation((sign(root, root_signers),), roles, b"", b"")
    return _resign(empty, keys, now, snapshot_version=1, timestamp_version=1)


def majority(count: int) -> int:
    return count // 2 + 1


def check_signers(generation: Generation, keys: KeyStore) -> None:
    """Make sure that `keys` can go on signing what a publisher signs.

    Raises:
        ConfigError: it has too few of the keys that the newest root names.
    """
    root = root_of(generation)
    for role in ("snapshot", "timestamp"):
        authorised(keys.signers(role), role, root.roles[role])


def sign_role(signers: list[Signer], version: int, targets: Mapping[str, TargetFile], now: dt.datetime) -> bytes:
    """Sign what a role delivers."""
    return sign(Targets(version=version, expires=expiry("targets", now), targets=dict(targets)), signers)


def target_file(path: str, data: bytes) -> TargetFile:
    return TargetFile.from_data(path, data, ["sha256"])


def verify_role(generation: Generation, role: str, data: bytes, now: dt.datetime) -> Targets:
    """Check a delegated role's new metadata against the delegation and what is published.

    Raises:
        TrustError: unknown role, bad signature, old version, expired, or a path that it may not deliver.
    """
    delegator = parse_role(generation.roles["targets"])
    signed = parse_metadata(Targets, data)
    delegated = delegations_of(delegator).get(role)
    if delegated is None:
        raise TrustError(f"role {role} is not delegated to")
    try:
        delegator.verify_delegate(role, signed.signed_bytes, signed.signatures)
    except RepositoryError as exc:
        raise TrustError(f"role {role}: {exc}") from exc
    published = parse_role(generation.roles[role]).version
    if signed.signed.version <= published:
        raise TrustError(f"role {role}: version {signed.signed.version}, {published} is published")
    if signed.signed.is_expired(now) or signed.signed.delegations is not None:
        raise TrustError(f"role {role}: expired, or delegates further")
    for path in signed.signed.targets:
        if not delegated.is_delegated_path(path):
            raise TrustError(f"role {role} may not deliver {path}")
    return signed.signed


def resign(generation: Generation, keys: KeyStore, now: dt.datetime) -> Generation:
    """Sign the next snapshot and timestamp over changed roots or roles.

    Raises:
        ConfigError: `keys` has too few of the keys that the newest root names.
    """
    return _resign(
        generation,
        keys,
        now,
        snapshot_version=snapshot_of(generation).version + 1,
        timestamp_version=timestamp_of(generation).version + 1,
    )


def renew(generation: Generation, keys: KeyStore, now: dt.datetime) -> Generation | None:
    """Sign snapshot and timestamp again when a third of the life of either is over; None when there is no need."""
    timestamp, snapshot = timestamp_of(generation), snapshot_of(generation)
    if not _is_due("snapshot", snapshot.expires, now):
        if not _is_due("timestamp", timestamp.expires, now):
            return None
        return replace(
            generation, timestamp=_sign_timestamp(generation, snapshot.version, timestamp.version + 1, keys, now)
        )
    return _resign(
        generation, keys, now, snapshot_version=snapshot.version + 1, timestamp_version=timestamp.version + 1
    )


def _is_due(role: str, expires: dt.datetime, now: dt.datetime) -> bool:
    return expires - now < LIFETIMES[role] * (_RENEW_AFTER - 1) / _RENEW_AFTER


def _delegating_targets(keys: KeyStore, models: list[str], now: dt.datetime) -> Targets:
    targets = Targets(version=1, expires=expiry("targets", now), delegations=Delegations(keys={}, roles={}))
    for role in (ROLLOUT, *map(model_role, models)):
        delegate(targets, role, public_keys(keys, role))
    return targets


def delegate(targets: Targets, role: str, keys: Iterable[Key]) -> None:
    """Let `targets` delegate `role`, under its own paths, to exactly `keys`, any one of which may sign."""
    if targets.delegations is None or targets.delegations.roles is None:
        raise ValueError("targets that delegate to nobody")
    known = targets.delegations.roles.get(role)
    for keyid in list(known.keyids) if known is not None else []:
        targets.revoke_key(keyid, role)
    targets.delegations.roles[role] = delegated_role(role)
    for key in keys:
        targets.add_key(key, role)


def delegated_role(role: str) -> DelegatedRole:
    """A delegation of ours, before it has keys."""
    return DelegatedRole(role, [], 1, terminating=True, paths=delegated_paths(role))


def _resign(
    generation: Generation, keys: KeyStore, now: dt.datetime, *, snapshot_version: int, timestamp_version: int
) -> Generation:
    meta = {f"{role}.json": _meta_file(parse_role(data).version, data) for role, data in generation.roles.items()}
    snapshot = Snapshot(version=snapshot_version, expires=expiry("snapshot", now), meta=meta)
    changed = replace(generation, snapshot=sign(snapshot, _top_signers(generation, keys, "snapshot")))
    return replace(changed, timestamp=_sign_timestamp(changed, snapshot_version, timestamp_version, keys, now))


def _sign_timestamp(
    generation: Generation, snapshot_version: int, version: int, keys: KeyStore, now: dt.datetime
) -> bytes:
    timestamp = Timestamp(
        version=version,
        expires=expiry("timestamp", now),
        snapshot_meta=_meta_file(snapshot_version, generation.snapshot),
        unrecognized_fields={
            SIGNED_AT_FIELD: int(now.timestamp()),
            ROOT_VERSION_FIELD: len(generation.roots),
        },
    )
    return sign(timestamp, _top_signers(generation, keys, "timestamp"))


def _top_signers(generation: Generation, keys: KeyStore, name: str) -> list[Signer]:
    return authorised(keys.signers(name), name, root_of(generation).roles[name])


def _meta_file(version: int, data: bytes) -> MetaFile:
    return MetaFile.from_data(version, data, ["sha256"])


def expiry(role: str, now: dt.datetime) -> dt.datetime:
    """When metadata of a role that is signed now expires."""
    return (now + LIFETIMES[role]).replace(microsecond=0)


def sign(signed: S, signers: Iterable[Signer]) -> bytes:
    """Sign with every signer, and serialise."""
    metadata: Metadata[S] = Metadata(signed)
    for signer in signers:
        metadata.sign(signer, append=True)
    return metadata.to_bytes(_SERIALIZER)
