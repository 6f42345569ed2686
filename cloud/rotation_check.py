"""What makes a change of keys acceptable, and whether all of a generation's signatures hold. Pure.

Invariants:
- a root is signed by the threshold of the root before it and by its own (TUF 5.3), and counts up by one;
- after a change everything that nodes verify still verifies, from the newest root to the last role;
- a change of keys changes keys: no role delivers anything else after it, and none is lost.
"""

import datetime as dt
from collections.abc import Iterator
from dataclasses import replace
from typing import Protocol

from tuf.api.exceptions import RepositoryError
from tuf.api.metadata import Metadata, Root, Signature, Snapshot, TargetFile, Targets, Timestamp

from cloud.keys import KeyStore
from cloud.release_store import Order
from cloud.repository import (
    Generation,
    check_signers,
    delegated_role,
    delegations_of,
    parse_metadata,
    parse_role,
    parse_root,
    root_of,
)
from shoal.errors import TrustError

# Their orders change keys; every other role's deliver.
DELEGATORS = frozenset({"root", "targets"})


class _Delegator(Protocol):
    def verify_delegate(self, delegated_role: str, payload: bytes, signatures: dict[str, Signature]) -> None: ...


def checked_change(order: Order, generation: Generation, keys: KeyStore, now: dt.datetime) -> Generation:
    """Check an order that changes keys against what is published.

    Args:
        order: of a role in `DELEGATORS`.
        generation: what is published.
        keys: the publisher's.
        now: the time to check expiry against.

    Returns the roots and roles as they would be; snapshot and timestamp are still those of `generation`.

    Raises:
        TrustError: it must not be published; the message says why.
        ConfigError: the publisher lacks a key that it would have to sign with from then on.
    """
    roots, roles = generation.roots, {**generation.roles, **order.resigned}
    if order.role == "root":
        root = verify_root(root_of(generation), order.metadata)
        if root.is_expired(now) or not root.consistent_snapshot:
            raise TrustError(f"root {root.version}: expired, or without consistent snapshots")
        roots = (*roots, order.metadata)
    else:
        roles[order.role] = order.metadata
    changed = replace(generation, roots=roots, roles=roles)
    for fault in role_faults(changed):
        raise TrustError(fault)
    _check_only_keys_changed(generation, changed, now)
    check_signers(changed, keys)
    return changed


def verify_root(before: Root | None, data: bytes) -> Root:
    """Check a root against the one before it and against itself. Expiry is not looked at: only the newest one's counts.

    Args:
        before: None for the first.
        data: signed.

    Raises:
        TrustError: too few signatures of either, or not the next version.
    """
    new = parse_root(data)
    expected = before.version + 1 if before is not None else 1
    if new.signed.version != expected:
        raise TrustError(f"root {new.signed.version}, expected {expected}")
    for delegator, whose in ((before, f"root {expected - 1}"), (new.signed, "its own")):
        fault = signature_fault(delegator, "root", new) if delegator is not None else ""
        if fault:
            raise TrustError(f"root {expected}, by the keys of {whose}: {fault}")
    return new.signed


def role_faults(generation: Generation) -> Iterator[str]:
    """Say which roles a node could not verify from the newest root on. Expiry is not looked at.

    Raises:
        TrustError: something is no metadata at all.
    """
    metadata = {role: parse_metadata(Targets, data) for role, data in generation.roles.items()}
    top = metadata.pop("targets", None)
    if top is None:
        yield "role targets: there is no metadata of it"
        return
    fault = signature_fault(root_of(generation), "targets", top)
    if fault:
        yield f"role targets: {fault}"
    if top.signed.targets:
        yield "role targets: delivers something itself"
    delegated = delegations_of(top.signed)
    for role in sorted(delegated.keys() ^ metadata.keys()):
        yield f"role {role}: {'delegated to, but without metadata' if role in delegated else 'not delegated to'}"
    for role in sorted(delegated.keys() & metadata.keys()):
        yield from _delegate_faults(top.signed, role, metadata[role])


def _delegate_faults(delegator: Targets, role: str, metadata: Metadata[Targets]) -> Iterator[str]:
    delegated, ours = delegations_of(delegator)[role], delegated_role(role)
    if (delegated.paths, delegated.terminating, delegated.threshold) != (ours.paths, ours.terminating, ours.threshold):
        yield f"role {role}: delegated to for {delegated.paths}, expected {ours.paths}"
    fault = signature_fault(delegator, role, metadata)
    if fault:
        yield f"role {role}: {fault}"
    if metadata.signed.delegations is not None:
        yield f"role {role}: delegates further"
    for path in sorted(metadata.signed.targets):
        if not delegated.is_delegated_path(path):
            yield f"role {role} may not deliver {path}"


def _check_only_keys_changed(before: Generation, after: Generation, now: dt.datetime) -> None:
    for role, data in after.roles.items():
        if data == before.roles.get(role):
            continue
        new, published = parse_role(data), before.roles.get(role)
        version, targets = (0, {}) if published is None else _said(published)
        if new.version <= version:
            raise TrustError(f"role {role}: version {new.version}, {version} is published")
        if new.is_expired(now):
            raise TrustError(f"role {role}: expired")
        if new.targets != targets:
            raise TrustError(f"role {role}: keys are to change, and what it delivers did")


def _said(data: bytes) -> tuple[int, dict[str, TargetFile]]:
    role = parse_role(data)
    return role.version, role.targets


def signature_fault(
    delegator: _Delegator,
    role: str,
    metadata: Metadata[Root] | Metadata[Targets] | Metadata[Snapshot] | Metadata[Timestamp],
) -> str:
    """Say what is wrong with the signatures of a role's metadata; nothing when enough of them hold."""
    try:
        delegator.verify_delegate(role, metadata.signed_bytes, metadata.signatures)
    except RepositoryError as exc:
        return str(exc)
    return ""
