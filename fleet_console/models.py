"""What is released on a broker, who signed it and who runs it: the fleet as its retained messages tell it."""

import re
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from tuf.api.metadata import Metadata, Targets

from shoal.codec import MAX_PAYLOAD_BYTES, decode
from shoal.errors import ConfigError, PayloadError, TrustError
from shoal.release.chunks import digest
from shoal.release.client import MAX_ENTRIES
from shoal.release.trust import TrustedView, TrustStore, Wait, model_role
from shoal.routes import Route, parse_topic, topic, topic_filter
from shoal.v1.node_pb2 import ModelState, NodeState, SlotPhase
from shoal.v1.release_pb2 import ModelFormat, ReleaseSpec, RolloutPlan, Tier, TrustBundle

_SPEC_PATH = re.compile(r"releases/([^/]+)/\d+\.spec")
_TIERS = {Tier.TIER_DEVICE: "device", Tier.TIER_GATEWAY: "gateway"}
_FORMATS = {ModelFormat.MODEL_FORMAT_TFLITE: "tflite", ModelFormat.MODEL_FORMAT_ONNX: "onnx"}


class Reader(Protocol):
    """Reads retained messages; `RetainedReader` is one."""

    def read_matching(self, filters: Sequence[str]) -> Mapping[str, bytes]: ...
    def read_exactly(self, topics: Sequence[str]) -> Mapping[str, bytes]: ...


@dataclass(frozen=True, slots=True)
class Runs:
    """One node that has a release active."""

    node: str
    site: str
    phase: str
    sha256: str


@dataclass(frozen=True, slots=True)
class Listed:
    """One artefact of a release.

    Attributes:
        signed_by: ids of the keys of the model's role that signed it.
        targets: node patterns of the plan that names the release; empty where none does.
        share_permille: of the plan.
        nodes: who has it active.
    """

    model: str
    release: int
    tier: str
    format: str
    bytes: int
    sha256: str
    signed_by: tuple[str, ...]
    targets: tuple[str, ...]
    share_permille: int
    nodes: tuple[Runs, ...]


@dataclass(frozen=True, slots=True)
class Room:
    """How much the publisher has retained, and may; its own word, which is not signed."""

    retained_bytes: int
    budget_bytes: int


@dataclass(frozen=True, slots=True)
class Listing:
    """Everything.

    Attributes:
        versions: by role, as verified.
        others: active models that no listed release explains, with the node.
        room: None while the publisher has said nothing.
    """

    versions: Mapping[str, int]
    models: tuple[Listed, ...]
    others: tuple[tuple[str, int, Runs], ...]
    room: Room | None


def read_listing(reader: Reader, root: bytes | None) -> Listing:
    """Read, verify and list what a broker holds.

    Args:
        reader: of its retained messages.
        root: what nodes were provisioned with; without it the broker's own first root is believed.

    Raises:
        ConfigError: nothing is published there, or not all of it yet.
        TrustError: what is published cannot be verified.
    """
    bundle_topic, timestamp_topic = topic(Route.TRUST_BUNDLE), topic(Route.TRUST_TIMESTAMP)
    publisher_topic = topic(Route.CLOUD_STATE, service="publisher")
    retained = reader.read_matching([bundle_topic, timestamp_topic, publisher_topic, topic_filter(Route.STATE)])
    if bundle_topic not in retained or timestamp_topic not in retained:
        raise ConfigError("no releases are published on this broker")
    try:
        bundle = decode(TrustBundle, retained[bundle_topic])
        files = _read_files(reader, bundle)
    except PayloadError as exc:
        raise TrustError(f"the bundle: {exc}") from exc
    paths = {entry.path: entry.sha256 for entry in bundle.entries}
    names = {match[1] for path in paths if (match := _SPEC_PATH.fullmatch(path))}
    bootstrap = root or files.get(paths.get("1.root.json", b""), b"")
    with tempfile.TemporaryDirectory(prefix="shoal-models-") as directory:
        view = TrustStore(Path(directory), bootstrap).refresh(
            bundle, retained[timestamp_topic], files, frozenset(names)
        )
        if isinstance(view, Wait):
            raise ConfigError(f"{view.missing} is not on the broker (yet): try again")
        specs = list(_specs(view, paths, files))
    running = list(_running(retained))
    listed = [row for spec in specs for row in _rows(spec, view, _signers(spec.model, view, paths, files), running)]
    known = {(row.model, row.release, run) for row in listed for run in row.nodes}
    others = tuple(found for found in running if found not in known)
    return Listing(view.versions, tuple(listed), others, _room(retained.get(publisher_topic, b"")))


def _read_files(reader: Reader, bundle: TrustBundle) -> dict[bytes, bytes]:
    """Fetch every file of a bundle; those that are missing or damaged are left out."""
    if len(bundle.entries) > MAX_ENTRIES:
        raise PayloadError(f"{len(bundle.entries)} entries, at most {MAX_ENTRIES}", field="entries")
    pieces = {entry.sha256: list(entry.chunks) or [entry.sha256] for entry in bundle.entries}
    topics = {item: topic(Route.BLOB, sha256=item.hex()) for chunks in pieces.values() for item in chunks}
    found = reader.read_exactly(list(topics.values()))
    files = {}
    for sha256, chunks in pieces.items():
        data = b"".join(found.get(topics[item], b"") for item in chunks)
        if len(data) <= MAX_PAYLOAD_BYTES and digest(data) == sha256:
            files[sha256] = data
    return files


def _specs(view: TrustedView, paths: Mapping[str, bytes], files: Mapping[bytes, bytes]) -> Iterator[ReleaseSpec]:
    for path, sha256 in sorted(paths.items()):
        if not _SPEC_PATH.fullmatch(path):
            continue
        signed = view.target(path)
        if signed is None or signed.sha256 != sha256 or sha256 not in files:
            raise TrustError(f"{path} on the broker is not what the signed metadata says")
        yield decode(ReleaseSpec, files[sha256])


def _running(retained: Mapping[str, bytes]) -> Iterator[tuple[str, int, Runs]]:
    for name, payload in sorted(retained.items()):
        address = parse_topic(name)
        if address.route is not Route.STATE:
            continue
        try:
            state = decode(NodeState, payload)
        except PayloadError:
            continue  # one node's nonsense hides no other node
        for item in state.models:
            if item.release:
                yield item.model, item.release, _runs(address.node, address.site, item)


def _room(payload: bytes) -> Room | None:
    try:
        counters = decode(NodeState, payload).counters
    except PayloadError:
        return None
    if "retained_budget_bytes" not in counters:
        return None
    return Room(counters.get("retained_bytes", 0), counters["retained_budget_bytes"])


def _runs(node: str, site: str, item: ModelState) -> Runs:
    phase = SlotPhase.Name(item.phase) if item.phase in SlotPhase.values() else str(item.phase)
    return Runs(node, site, phase.removeprefix("SLOT_PHASE_").lower(), item.sha256.hex())


def _rows(
    spec: ReleaseSpec, view: TrustedView, signed_by: tuple[str, ...], running: list[tuple[str, int, Runs]]
) -> Iterator[Listed]:
    trusted = view.plans.get(spec.model)
    plan = trusted.plan if trusted is not None and trusted.plan.release == spec.release else RolloutPlan()
    for artefact in spec.artefacts:
        sha256 = artefact.sha256.hex()
        this = (spec.model, spec.release, sha256)
        yield Listed(
            model=spec.model,
            release=spec.release,
            tier=_TIERS.get(artefact.tier, str(artefact.tier)),
            format=_FORMATS.get(artefact.format, str(artefact.format)),
            bytes=artefact.length_bytes,
            sha256=sha256,
            signed_by=signed_by,
            targets=tuple(plan.targets),
            share_permille=plan.share_permille,
            nodes=tuple(run for model, release, run in running if (model, release, run.sha256) == this),
        )


def _signers(
    model: str, view: TrustedView, paths: Mapping[str, bytes], files: Mapping[bytes, bytes]
) -> tuple[str, ...]:
    """Ids of the keys that signed a model's role, each signature checked."""
    role = model_role(model)
    delegator, metadata = (
        Metadata[Targets].from_bytes(files[paths[f"{view.versions[name]}.{name}.json"]]) for name in ("targets", role)
    )
    result = delegator.signed.get_verification_result(role, metadata.signed_bytes, metadata.signatures)
    return tuple(sorted(result.signed))
