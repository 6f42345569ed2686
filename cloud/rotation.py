"""Changing keys, as an operator orders it: new keys, and everything signed again that names them or needs them.

An order names one role that delegates (`root` or `targets`) and brings with it what must be signed with the new keys.
A root is signed with the keys of the root before it and with its own (TUF 5.3). What makes an order acceptable is
in `rotation_check`.

The publisher signs snapshot and timestamp itself, so their new keys must be where it runs before the order is taken.
"""

import datetime as dt
from dataclasses import dataclass, field

from securesystemslib.signer import Signer

from cloud.keys import ROOT_KEYS, FileKeyStore, KeyMaker, authorised
from cloud.release_store import Newest, ReleaseStore
from cloud.repository import (
    TOP_LEVEL,
    delegate,
    delegations_of,
    expiry,
    majority,
    parse_role,
    parse_root,
    root_of,
    sign,
    sign_role,
)
from shoal.errors import ConfigError, PayloadError
from shoal.ids import parse_id
from shoal.release.trust import model_role


@dataclass(frozen=True, slots=True)
class KeyChange:
    """What was queued.

    Attributes:
        delegator: the role whose metadata names the new keys.
        version: of that metadata.
        keyids: of the new keys.
    """

    role: str
    delegator: str
    version: int
    keyids: tuple[str, ...]


@dataclass(slots=True)
class _Draft:
    """An order before it is queued."""

    delegator: str
    metadata: bytes
    version: int
    resigned: dict[str, bytes] = field(default_factory=dict)


def rotate(store: ReleaseStore, role: str, keys: KeyMaker, now: dt.datetime) -> KeyChange:
    """Make new keys for a role, sign everything that names them or is signed with them, and queue it.

    Args:
        store: the publisher's directory.
        role: `root`, `targets`, `snapshot`, `timestamp`, `rollout` or `model-NAME`.
        keys: must have the delegator's keys: a threshold of root's for a top-level role, else targets'.
        now: the time to sign with.

    Raises:
        ConfigError: there is no such role, or too few keys are here; then no key was made.
    """
    with store.submitting():
        newest = store.newest()
        if role in TOP_LEVEL:
            added, draft = _rotate_top_level(newest, role, keys, now)
        elif role in delegations_of(parse_role(newest.roles["targets"])):
            added, draft = _delegate_anew(newest, role, keys, now)
        else:
            raise ConfigError(f"no role {role!r}: one of {[*TOP_LEVEL, *_delegated(newest)]}")
        return _submit(store, role, added, draft)


def add_model(store: ReleaseStore, model: str, keys: KeyMaker, now: dt.datetime) -> KeyChange:
    """Make a key and a role for a model, and queue it.

    Raises:
        ConfigError: the name is no id, the model has a role, or the key of `targets` is not here.
    """
    try:
        role = model_role(parse_id(model, "model"))
    except PayloadError as exc:
        raise ConfigError(str(exc)) from exc
    with store.submitting():
        newest = store.newest()
        if role in newest.roles:
            raise ConfigError(f"model {model!r} has a role already")
        added, draft = _delegate_anew(newest, role, keys, now)
        return _submit(store, role, added, draft)


def retire(store: ReleaseStore, keys: FileKeyStore) -> list[str]:
    """Move key files that nothing published or waiting names out of the way; return where they are."""
    with store.submitting():
        published, newest = store.load(), store.newest()
        named: dict[str, set[str]] = {}
        for root in (root_of(published), parse_root(newest.root).signed):
            for role, listed in root.roles.items():
                named.setdefault(role, set()).update(listed.keyids)
        for data in (published.roles["targets"], newest.roles["targets"]):
            for role, delegated in delegations_of(parse_role(data)).items():
                named.setdefault(role, set()).update(delegated.keyids)
        return [str(path) for role, keyids in sorted(named.items()) for path in keys.retire(role, keyids)]


def _rotate_top_level(newest: Newest, role: str, keys: KeyMaker, now: dt.datetime) -> tuple[list[Signer], _Draft]:
    root = parse_root(newest.root).signed
    old = authorised(keys.signers("root"), "root", root.roles["root"])
    added = keys.add(role, ROOT_KEYS if role == "root" else 1)
    for keyid in list(root.roles[role].keyids):
        root.revoke_key(keyid, role)
    for signer in added:
        root.add_key(signer.public_key, role)
    root.roles[role].threshold = majority(len(added))
    root.version += 1
    root.expires = expiry("root", now)
    draft = _Draft("root", sign(root, [*old, *added] if role == "root" else old), root.version)
    if role == "targets":
        draft.resigned["targets"] = _again(newest.roles["targets"], added, now)
    return added, draft


def _delegate_anew(newest: Newest, role: str, keys: KeyMaker, now: dt.datetime) -> tuple[list[Signer], _Draft]:
    root, targets = parse_root(newest.root).signed, parse_role(newest.roles["targets"])
    delegators = authorised(keys.signers("targets"), "targets", root.roles["targets"])
    added = keys.add(role)
    delegate(targets, role, [signer.public_key for signer in added])
    targets.version += 1
    targets.expires = expiry("targets", now)
    published = newest.roles.get(role)
    again = _again(published, added, now) if published is not None else sign_role(added, 1, {}, now)
    return added, _Draft("targets", sign(targets, delegators), targets.version, {role: again})


def _again(data: bytes, signers: list[Signer], now: dt.datetime) -> bytes:
    """Sign what a role says once more, as its next version."""
    targets = parse_role(data)
    targets.version += 1
    targets.expires = expiry("targets", now)
    return sign(targets, signers)


def _submit(store: ReleaseStore, role: str, added: list[Signer], draft: _Draft) -> KeyChange:
    store.submit(draft.delegator, draft.metadata, {}, draft.resigned)
    return KeyChange(role, draft.delegator, draft.version, tuple(signer.public_key.keyid for signer in added))


def _delegated(newest: Newest) -> list[str]:
    return sorted(delegations_of(parse_role(newest.roles["targets"])))
