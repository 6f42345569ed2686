"""What whoever writes to the broker does to a node that runs release 1 and is to get 2; docs/models.md lists all.

Whatever it is, release 1 goes on; and once the broker is honest again, release 2 comes by itself.
"""

import datetime as dt
import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from urllib.parse import quote

import pytest

from cloud import repository, rotation
from cloud.repository import ROLLOUT, Generation, delegate, parse_role, public_keys, resign, sign, timestamp_of
from shoal.release.chunks import CHUNK_BYTES, digest, split
from shoal.release.trust import model_role
from shoal.routes import Route, topic
from shoal.v1.release_pb2 import BundleEntry, TrustBundle

pytestmark = pytest.mark.device

BUNDLE, TIMESTAMP = topic(Route.TRUST_BUNDLE), topic(Route.TRUST_TIMESTAMP)
ONE, TWO = (random.Random(seed).randbytes(int(CHUNK_BYTES * 3.5)) for seed in (1, 2))
HOUR_S = 3600.0


class Siege:
    """A node on release 1, a broker that holds release 2, and what was on the broker before.

    Attributes:
        before, after: the cloud's generations with release 1 and with release 2.
    """

    def __init__(self, cloud, node) -> None:
        self.cloud, self.node, self.broker = cloud, node, cloud.broker
        self.before = cloud.store.load()
        self.past = dict(self.broker.retained)
        self.after = self.before
        self.honest = self.past

    def advance(self) -> None:
        """Publish release 2; the node is not looking."""
        self.node.link.connected = False
        self.cloud.ship(TWO, parent=1)
        self.after = self.cloud.store.load()
        self.honest = dict(self.broker.retained)

    def look(self, seconds: float = 5.0) -> None:
        """The node is started again, connected, and sees what is on the broker now."""
        self.node.client.close()
        self.node.boot()
        self.node.run(seconds)

    def holds(self, running: bytes = ONE) -> None:
        """Nothing else ever ran, before or after another start."""
        assert {data for _, data in self.node.active} <= {ONE, running}
        assert self.node.active[-1][1] == running
        self.node.boot(connected=False)
        assert self.node.active[-1][1] == running

    def relents(self) -> None:
        """The broker is honest again."""
        self.broker.retained = dict(self.honest)
        self.look(40.0)
        assert self.node.active[-1] == (2, TWO)

    def serve(self, generation: Generation) -> None:
        """Put a generation on the broker under a bundle that points at it, beside every blob that there ever was."""
        files = {quote(name, ""): data for name, data in generation.files().items()}  # as python-tuf asks for them
        entries = [entry for entry in self.broker.bundle.entries if "/" in entry.path]
        entries += [BundleEntry(path=n, sha256=digest(d), length_bytes=len(d)) for n, d in files.items()]
        self.broker.retained |= self.past | {self.broker.blob(digest(data)): data for data in files.values()}
        self.broker.retained[BUNDLE] = TrustBundle(entries=entries).SerializeToString()
        self.broker.retained[TIMESTAMP] = generation.timestamp

    def lose_tuf_files(self) -> None:
        """What python-tuf keeps is not synced: a power cut may take all of it."""
        for path in (self.node.directory / "trust" / "tuf").rglob("*.json"):
            path.unlink()

    @property
    def chunks(self) -> list[str]:
        """Where release 2's artefact is."""
        return [self.broker.blob(digest(chunk)) for chunk in split(TWO)]


@pytest.fixture
def siege(cloud, make_node) -> Siege:
    cloud.ship(ONE)
    node = make_node()
    node.run(20)
    assert node.active == [(1, ONE)]
    return Siege(cloud, node)


# -- chunks -----------------------------------------------------------------------------------------------------------


def spoil_chunks(siege: Siege, spoil: Callable[[dict[str, bytes], list[str]], None]) -> None:
    """Release 2 with chunks that are not what was signed, then with those that are: only they are asked for again."""
    siege.advance()
    spoil(siege.broker.retained, siege.chunks)
    siege.look()
    siege.holds()
    siege.relents()


def test_tampered_chunk_is_refused(siege):
    """One byte is another."""

    def spoil(retained, chunks):
        retained[chunks[1]] = b"x" + retained[chunks[1]][1:]

    spoil_chunks(siege, spoil)


def test_truncated_chunk_is_refused(siege):
    """The end is missing, as after a cut; and one of no bytes at all, which is no message."""

    def spoil(retained, chunks):
        retained[chunks[1]] = retained[chunks[1]][:-1]
        retained[chunks[2]] = b""

    spoil_chunks(siege, spoil)


def test_oversized_chunk_is_refused(siege):
    """One byte too many."""

    def spoil(retained, chunks):
        retained[chunks[1]] += b"x"

    spoil_chunks(siege, spoil)


def test_missing_chunk_is_waited_for(siege):
    """Nothing is wrong yet: the others are kept."""
    spoil_chunks(siege, lambda retained, chunks: retained.pop(chunks[1]))


def test_swapped_chunks_are_refused(siege):
    """Two genuine chunks of one length under each other's topics; and one of release 1 under a topic of release 2."""

    def spoil(retained, chunks):
        retained[chunks[0]], retained[chunks[1]] = retained[chunks[1]], retained[chunks[0]]
        retained[chunks[2]] = split(ONE)[2]

    spoil_chunks(siege, spoil)


def test_attacked_chunk_costs_no_other_chunk(siege):
    """The good ones are on disk by then: a start after the attack fetches the one that was bad."""
    siege.advance()
    siege.broker.retained[siege.chunks[1]] = b"x" * CHUNK_BYTES
    siege.look()
    assert siege.node.counters["blobs_bad"] >= 1
    siege.relents()
    assert siege.node.counters["blobs_fetched"] <= len(siege.broker.bundle.entries) + 1


# -- the bundle, which is not signed ----------------------------------------------------------------------------------


def test_tampered_bundle_is_waited_out(siege):
    """An index that points elsewhere serves nothing."""
    siege.advance()
    bundle, evil = siege.broker.bundle, b'{"signed": {}, "signatures": []}'
    for entry in bundle.entries:
        if "rollout" in entry.path:
            entry.sha256, entry.length_bytes = digest(evil), len(evil)
    siege.broker.retained[siege.broker.blob(digest(evil))] = evil
    siege.broker.retained[BUNDLE] = bundle.SerializeToString()
    siege.look()
    siege.holds()
    siege.relents()


def test_endless_bundle_is_refused(siege):
    """More entries than any fleet needs: refused before one of them is fetched."""
    siege.advance()
    entries = [BundleEntry(path=f"{n}.root.json", sha256=digest(b"%d" % n), length_bytes=1) for n in range(1025)]
    siege.broker.retained[BUNDLE] = TrustBundle(entries=entries).SerializeToString()
    siege.look()
    assert siege.node.link.counters["bad_payloads"] == 1
    assert siege.node.link.most_subscribed == 2
    siege.holds()
    siege.relents()


@pytest.mark.parametrize("role", ["2.snapshot", "1.targets", "1.root"])
def test_endless_metadata_is_refused(siege, role):
    """An entry that says more than a message can hold, for any file of the set, costs no memory and no transfer."""
    siege.advance()
    bundle = siege.broker.bundle
    bundle.entries.append(BundleEntry(path=f"{role}.json", sha256=digest(b"x"), length_bytes=1 << 40))
    siege.broker.retained[BUNDLE] = bundle.SerializeToString()
    siege.look()
    assert siege.node.link.counters["bad_payloads"] == 1
    siege.holds()
    siege.relents()


def test_path_traversal_in_the_bundle_writes_nothing(siege, tmp_path):
    """Names out of the index never reach the disk."""
    siege.advance()
    before = outside(tmp_path, siege)
    bundle, evil = siege.broker.bundle, b"evil"
    siege.broker.retained[siege.broker.blob(digest(evil))] = evil
    for name in ("../../evil.json", "/tmp/evil.json", "..%2f..%2fevil.json", "plans/../../evil.plan", "..\\evil.json"):
        bundle.entries.append(BundleEntry(path=name, sha256=digest(evil), length_bytes=len(evil)))
    siege.broker.retained[BUNDLE] = bundle.SerializeToString()
    siege.look(40.0)
    assert siege.node.active[-1] == (2, TWO)
    assert outside(tmp_path, siege) == before


def test_path_traversal_in_a_role_name_writes_nothing(siege, tmp_path):
    """Who stole the keys of targets and of the publisher delegates to any name; python-tuf makes a file of it."""
    siege.advance()
    before = outside(tmp_path, siege)
    cloud, role = siege.cloud, "../../../../evil"
    targets = parse_role(siege.after.roles["targets"])
    delegate(targets, role, public_keys(cloud.keys, ROLLOUT))
    delegation = targets.delegations.roles.pop(role)
    delegation.paths, delegation.terminating = ["plans/*"], False
    targets.delegations.roles = {role: delegation, **targets.delegations.roles}  # asked before all others
    targets.version += 1
    roles = {
        **siege.after.roles,
        "targets": sign(targets, cloud.keys.signers("targets")),
        role: repository.sign_role(cloud.keys.signers(ROLLOUT), 1, {}, cloud.now),
    }
    siege.serve(resign(replace(siege.after, roles=roles), cloud.keys, cloud.now))
    siege.look(20.0)
    assert [path.name for path in siege.node.directory.rglob("*evil*")] == [f"{quote(role, '')}.json"]
    assert outside(tmp_path, siege) == before
    assert siege.node.active[-1] == (2, TWO)


def outside(directory: Path, siege: Siege) -> set[Path]:
    """Files that are neither the node's nor the cloud's own, here and further up."""
    mine = {siege.node.directory, directory / "cloud"}
    near = {path for path in directory.rglob("*") if not mine & {path, *path.parents}}
    return near | set(directory.parent.glob("*evil*")) | set(directory.parent.parent.glob("*evil*"))


# -- rollback: every message is genuine, or signed with stolen keys of the publisher ----------------------------------


@pytest.fixture(params=["whole", "lost"])
def caught_up(siege, request) -> Siege:
    """The node has release 2, and what python-tuf keeps is whole or was lost in a power cut."""
    rotation.add_model(siege.cloud.store, "valve", siege.cloud.keys, siege.cloud.now)  # targets move on as well
    siege.advance()
    siege.look(20.0)
    assert siege.node.active[-1] == (2, TWO)
    if request.param == "lost":
        siege.lose_tuf_files()
    return siege


def refuses(siege: Siege) -> None:
    """The node is offered what is on the broker, says that something is wrong, and stays."""
    siege.look()
    assert siege.node.counters["trust_errors"] >= 1
    assert siege.node.counters["trust_refreshes"] == 0
    siege.holds(TWO)


def test_rollback_of_everything_is_refused(caught_up):
    """The broker is set back to what it held with release 1."""
    caught_up.broker.retained = dict(caught_up.past)
    refuses(caught_up)
    caught_up.relents()


def test_rollback_of_the_timestamp_is_refused(caught_up):
    """An old timestamp among new files, and with the old files that it names."""
    caught_up.serve(caught_up.before)
    refuses(caught_up)
    caught_up.relents()


def test_rollback_of_the_snapshot_is_refused(caught_up):
    """A stolen timestamp key vouches for the snapshot of release 1, and for the bundle's files with it."""
    old, now = caught_up.before, caught_up.cloud.now
    version = timestamp_of(caught_up.after).version + 1
    snapshot = repository.snapshot_of(old).version
    timestamp = repository._sign_timestamp(old, snapshot, version, caught_up.cloud.keys, now)
    caught_up.serve(replace(old, timestamp=timestamp))
    refuses(caught_up)


@pytest.mark.parametrize("role", ["targets", ROLLOUT, model_role("digits")])
def test_rollback_of_a_role_is_refused(caught_up, role):
    """Stolen keys of the publisher vouch for targets, for the plan or for the releases of before."""
    old = caught_up.before.roles[role]
    assert old != caught_up.after.roles[role]
    roles = {**caught_up.after.roles, role: old}
    caught_up.serve(resign(replace(caught_up.after, roles=roles), caught_up.cloud.keys, caught_up.cloud.now))
    refuses(caught_up)


def test_rollback_to_a_lost_role_is_refused(caught_up):
    """A snapshot that no longer knows the rollout role at all."""
    roles = {name: data for name, data in caught_up.after.roles.items() if name != ROLLOUT}
    caught_up.serve(resign(replace(caught_up.after, roles=roles), caught_up.cloud.keys, caught_up.cloud.now))
    refuses(caught_up)


# -- freeze, mix, wrong keys ------------------------------------------------------------------------------------------


def test_freeze_stops_nothing_and_is_noticed(siege):
    """The broker shows no news, for longer than the timestamp lives: a node that never restarts notices by itself."""
    siege.cloud.now += dt.timedelta(days=31)
    siege.node.run(2 * HOUR_S)
    assert siege.node.counters["trust_errors"] >= 1
    siege.holds()


def test_mix_and_match_is_refused(siege):
    """A new timestamp and snapshot with an old plan's role under its new name."""
    siege.advance()
    bundle, old = siege.broker.bundle, siege.before.roles[ROLLOUT]
    siege.broker.retained |= siege.past | {name: siege.broker.retained[name] for name in (BUNDLE, TIMESTAMP)}
    for entry in bundle.entries:
        if entry.path.endswith(".rollout.json"):
            entry.sha256, entry.length_bytes = digest(old), len(old)
    siege.broker.retained[BUNDLE] = bundle.SerializeToString()
    siege.look()
    siege.holds()
    siege.relents()


@pytest.mark.parametrize("role", ["targets", ROLLOUT, model_role("digits")])
def test_wrong_key_is_refused(siege, role):
    """Stolen keys of the publisher around a role that another role's key has signed."""
    siege.advance()
    said = parse_role(siege.after.roles[role])
    said.version += 1
    roles = {**siege.after.roles, role: sign(said, siege.cloud.keys.signers("snapshot"))}
    siege.serve(resign(replace(siege.after, roles=roles), siege.cloud.keys, siege.cloud.now))
    siege.look()
    siege.holds()


# -- power loss and clocks --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("length", [0, 1, 100])
def test_truncated_local_metadata_heals(siege, length):
    """Every file of python-tuf's ends somewhere after a power cut: the node takes release 2 all the same."""
    siege.advance()
    torn = list((siege.node.directory / "trust" / "tuf").rglob("*.json"))
    assert len(torn) > 4
    for path in torn:
        path.write_bytes(path.read_bytes()[:length])
    siege.look(20.0)
    assert siege.node.active[-1] == (2, TWO)


def test_clock_at_1970_follows_and_says_so(siege):
    """A node without a battery gets release 2; rollback stays refused."""
    siege.advance()
    siege.node.clock = lambda: 0.0
    siege.look(20.0)
    assert siege.node.active[-1] == (2, TWO)
    assert siege.node.client.clock_suspect
    siege.broker.retained = dict(siege.past)
    refuses(siege)


def test_clock_at_2100_stops_nothing(siege):
    """Updates wait until the clock is right again, what runs goes on, and nothing of 2100 is kept."""
    siege.advance()
    right, siege.node.clock = siege.node.clock, dt.datetime(2100, 1, 1, tzinfo=dt.UTC).timestamp
    siege.look()
    assert siege.node.counters["trust_errors"] >= 1
    siege.holds()
    siege.node.clock = right
    siege.relents()
