"""Removes each check that trust rests on, one at a time, and shows that a test then fails.

    python tests/campaigns/mutation_trust.py [--only NAME] [--jobs N]

A mutant is a copy of the source tree with one check taken out, or a check of python-tuf switched off by a patch that is
loaded before the tests. `survived` counts mutants that no test noticed. Prints one JSON object last.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parent.parent.parent
TREES = ("proto", "cloud", "fleet_console", "tests")
RELEASE = "proto/shoal/release/"
TRUST, DELIVERY = "tests/shoal/release/test_trust.py", "tests/shoal/release/test_delivery.py"
TRANSFER, CHUNKS, SLOTS = (f"tests/shoal/release/test_{name}.py" for name in ("transfer", "chunks", "slots"))
ATTACKS, ROTATION = "tests/shoal/release/test_attacks.py", "tests/cloud/test_rotation.py"
OFFER, SELFTEST = (f"tests/shoal/release/test_{name}.py" for name in ("offer", "selftest"))
TIMEOUT_S = 300


@dataclass(frozen=True)
class Mutant:
    """A check by name: where it stands, what stands there without it, and the tests that must notice.

    `file` None means a check of python-tuf: `new` is the patch that switches it off.
    """

    name: str
    file: str | None
    old: str
    new: str
    tests: tuple[str, ...]


def root_step(
    by="self.root", version="self.root.version + 1", itself="root.verify_delegate(Root.type, body, signatures)"
):
    return UPDATE_ROOT.format(by=by, version=version, itself=itself)


def source(name, file, old, new, *tests):
    return Mutant(name, RELEASE + file, old, new, tests)


def cloud(name, file, old, new):
    """A check of a change of keys."""
    return Mutant(name, "cloud/" + file, old, new, (ROTATION,))


def library(name, patch, *tests):
    return Mutant(name, None, "", patch, tests)


NO_SIGNATURES = """
from tuf.api import metadata
from tuf.ngclient._internal import trusted_metadata_set as trusted
metadata.Root.verify_delegate = metadata.Targets.verify_delegate = lambda *a, **k: None
"""
NO_EXPIRY = """
from tuf.api.metadata import Signed
Signed.is_expired = lambda *a, **k: False
"""
NO_ROOT_SIGNATURES = """
from tuf.api.metadata import Root
whole = Root.verify_delegate
Root.verify_delegate = lambda self, role, *a, **k: None if role == "root" else whole(self, role, *a, **k)
"""
# python-tuf's step from one root to the next, in which a check can be left out.
UPDATE_ROOT = """
from tuf.api.exceptions import BadVersionNumberError
from tuf.api.metadata import Root
from tuf.ngclient._internal.trusted_metadata_set import TrustedMetadataSet

def update_root(self, data):
    root, body, signatures = self._load_data(Root, data, {by})
    if root.version != {version}:
        raise BadVersionNumberError(f"Expected root version {{self.root.version + 1}} instead got version {{root.version}}")
    {itself}
    self._add(Root.type, root, Root.type)
    return root

TrustedMetadataSet.update_root = update_root
"""
NO_META_HASH = """
from tuf.api.metadata import MetaFile
MetaFile.verify_length_and_hashes = lambda *a, **k: None
"""

MUTANTS = (
    source("digest of a chunk", "transfer.py", " or digest(payload) != sha256", "", TRANSFER, ATTACKS),
    source("length of a chunk", "transfer.py", "len(payload) != want.length_bytes or ", "", TRANSFER),
    source(
        "cleared topic is no chunk", "transfer.py", "want is None or not payload", "want is None", DELIVERY, TRANSFER
    ),
    source("window of exact topics", "transfer.py", " and len(self._asked) < self._window", "", DELIVERY, TRANSFER),
    source(
        "chunk belongs to the file",
        "chunks.py",
        "if places is None or",
        "if places is None:\n            places = [0]\n        if",
        CHUNKS,
    ),
    source(
        "staging is hashed again",
        "chunks.py",
        "if digest(data[start : start + self.manifest.length_of(index)]) == item:",
        "if True:",
        CHUNKS,
        DELIVERY,
    ),
    source(
        "chunks explain the length",
        "chunks.py",
        "self.length_bytes <= 0 or len(self.digests) != expected",
        "False",
        CHUNKS,
    ),
    source(
        "whole file is what was signed",
        "slot_store.py",
        "if _digest_file(self.path) != self.sha256:",
        "if False:",
        SLOTS,
    ),
    source(
        "artefact is hashed at each start",
        "slot_store.py",
        "if _digest_file(self.path(sha256)) != sha256:",
        "if False:",
        SLOTS,
    ),
    source(
        "stored file is undamaged",
        "slot_store.py",
        "return data if digest(data) == sha256 else None",
        "return data",
        SLOTS,
        DELIVERY,
    ),
    source(
        "size allowed on this node",
        "offer.py",
        "if artefact.length_bytes > node.max_artefact_bytes:",
        "if False:",
        OFFER,
    ),
    source(
        "artefact is in signed metadata",
        "offer.py",
        "if signed is None or (signed.sha256, signed.length_bytes) != (artefact.sha256, artefact.length_bytes):",
        "if False:",
        OFFER,
    ),
    source(
        "spec is of the planned release",
        "offer.py",
        "if spec.model != node.model or spec.release != trusted.plan.release:",
        "if False:",
        OFFER,
    ),
    source("bundle is bounded", "client.py", "if len(bundle.entries) > MAX_ENTRIES:", "if False:", ATTACKS),
    source("version floor", "trust.py", "if versions.get(role, 0) < least:", "if False:", TRUST),
    source(
        "floor is saved",
        "trust.py",
        "if new.versions != old.versions or new.clock_at - old.clock_at >= _HOUR_S:",
        "if False:",
        TRUST,
    ),
    source("clock floor", "trust.py", "max(system_at, floor.clock_at)", "system_at", TRUST),
    source(
        "trust starts from the provisioned root",
        "trust.py",
        "            bootstrap=self._bootstrap_root,\n",
        "            bootstrap=None,\n",
        TRUST,
    ),
    source("limit of a timestamp", "trust.py", "timestamp_max_length=16_384", "timestamp_max_length=1 << 40", TRUST),
    source(
        "plan is for its model",
        "trust.py",
        "if plan.model != model or plan.spec_path != spec_path(model, plan.release):",
        "if False:",
        TRUST,
    ),
    source(
        "floor's checksum",
        "durable.py",
        "if hashlib.sha256(signed).hexdigest().encode() != checksum:",
        "if False:",
        TRUST,
        SLOTS,
    ),
    source("golden vectors", "selftest.py", "if not worst <= artefact.golden.tolerance:", "if False:", SELFTEST),
    source(
        "self-tested file is what was signed",
        "selftest.py",
        "if digest(path.read_bytes()) != artefact.sha256:",
        "if False:",
        SELFTEST,
    ),
    source(
        "refused digest is not tried again",
        "slots.py",
        "        if self.is_refused(content):\n            raise RuntimeError",
        "        if False:\n            raise RuntimeError",
        SLOTS,
    ),
    source("tries run out", "slots.py", "replace(slot, tries_left=slot.tries_left - 1)", "slot", SLOTS, DELIVERY),
    source(
        "news that never come are noticed", "client.py", "        self._refresh_at = now + _RECHECK_S\n", "", ATTACKS
    ),
    source("limit of a root", "trust.py", "root_max_length=65_536", "root_max_length=1 << 40", ROTATION),
    source("root that is named is waited for", "trust.py", " and name not in self._digests", "", TRUST),
    cloud(
        "root is signed by the root before it",
        "rotation_check.py",
        """((before, f"root {expected - 1}"), (new.signed, "its own"))""",
        """((new.signed, "its own"),)""",
    ),
    cloud(
        "root is signed by itself",
        "rotation_check.py",
        """((before, f"root {expected - 1}"), (new.signed, "its own"))""",
        """((before, f"root {expected - 1}"),)""",
    ),
    cloud("root counts up by one", "rotation_check.py", "if new.signed.version != expected:", "if False:"),
    cloud(
        "root has not expired",
        "rotation_check.py",
        "root.is_expired(now) or not root.consistent_snapshot",
        "not root.consistent_snapshot",
    ),
    cloud(
        "root names files by version",
        "rotation_check.py",
        "root.is_expired(now) or not root.consistent_snapshot",
        "root.is_expired(now)",
    ),
    cloud(
        "targets are signed by the new root",
        "rotation_check.py",
        'yield f"role targets: {fault}"',
        "pass",
    ),
    cloud("targets deliver nothing", "rotation_check.py", "    if top.signed.targets:", "    if False:"),
    cloud("no role is lost", "rotation_check.py", "sorted(delegated.keys() ^ metadata.keys())", "()"),
    cloud(
        "role keeps to its paths",
        "rotation_check.py",
        "    if (delegated.paths, delegated.terminating, delegated.threshold)"
        " != (ours.paths, ours.terminating, ours.threshold):",
        "    if False:",
    ),
    cloud(
        "role is signed by its new key",
        "rotation_check.py",
        'yield f"role {role}: {fault}"',
        "pass",
    ),
    cloud(
        "role delegates no further",
        "rotation_check.py",
        "    if metadata.signed.delegations is not None:",
        "    if False:",
    ),
    cloud(
        "role delivers under its paths only",
        "rotation_check.py",
        "if not delegated.is_delegated_path(path):",
        "if False:",
    ),
    cloud("role counts up", "rotation_check.py", "        if new.version <= version:", "        if False:"),
    cloud("role has not expired", "rotation_check.py", "        if new.is_expired(now):", "        if False:"),
    cloud(
        "keys change and nothing else", "rotation_check.py", "        if new.targets != targets:", "        if False:"
    ),
    cloud("publisher has the keys to go on", "rotation_check.py", "    check_signers(changed, keys)\n", ""),
    cloud(
        "rotation takes enough root keys",
        "rotation.py",
        """authorised(keys.signers("root"), "root", root.roles["root"])""",
        """keys.signers("root")""",
    ),
    cloud("new root keys sign too", "rotation.py", """[*old, *added] if role == "root" else old""", "old"),
    cloud("old root keys sign too", "rotation.py", """[*old, *added] if role == "root" else old""", "added"),
    cloud("old keys are revoked", "rotation.py", "        root.revoke_key(keyid, role)", "        pass"),
    cloud(
        "threshold stays",
        "rotation.py",
        "root.roles[role].threshold = majority(len(added))",
        "root.roles[role].threshold = 1",
    ),
    library("signatures and thresholds", NO_SIGNATURES, TRUST),
    library("two of three keys for a root", NO_ROOT_SIGNATURES, ROTATION),
    library("node: root is signed by the root before it", root_step(by="None"), ROTATION),
    library("node: root is signed by itself", root_step(itself="pass"), ROTATION),
    library("node: root counts up by one", root_step(version="root.version"), ROTATION),
    library("expiry", NO_EXPIRY, TRUST),
    library("snapshot and targets are those of the timestamp", NO_META_HASH, TRUST),
)


def run_mutant(mutant):
    """Return whether some test failed, as it must."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for tree in TREES:
            shutil.copytree(ROOT / tree, folder / tree, ignore=shutil.ignore_patterns("__pycache__", "campaigns"))
        shutil.copy(ROOT / "pyproject.toml", folder)
        patch = "\n"
        if mutant.file is None:
            patch = mutant.new
        else:
            path = folder / mutant.file
            text = path.read_text()
            if text.count(mutant.old) != 1:
                sys.exit(f"{mutant.name}: {mutant.file} has the check {text.count(mutant.old)} times, expected once")
            path.write_text(text.replace(mutant.old, mutant.new))
        (folder / "mutant_patch.py").write_text(patch)
        done = subprocess.run(
            [sys.executable, "-m", "pytest", "-x", "-q", "-p", "mutant_patch", "-p", "no:cacheprovider", *mutant.tests],
            cwd=folder,
            env={**os.environ, "PYTHONPATH": f"{folder}:{folder / 'proto'}", "PYTHONDONTWRITEBYTECODE": "1"},
            capture_output=True,
            text=True,
            timeout=TIMEOUT_S,
            check=False,
        )
    # 1: tests ran and some failed. Anything else is no answer.
    if done.returncode not in (0, 1):
        sys.exit(f"{mutant.name}: pytest ended with {done.returncode}\n{done.stdout[-2000:]}{done.stderr[-500:]}")
    failed = next((line for line in done.stdout.splitlines() if line.startswith("FAILED")), "")
    print(f"{'killed  ' if done.returncode else 'SURVIVED'} {mutant.name:48} {failed[7:90]}", flush=True)
    return bool(done.returncode)


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--only", default="", help="mutants whose name contains this")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="mutants at a time (default: %(default)s)")
    arguments = parser.parse_args()
    chosen = [mutant for mutant in MUTANTS if arguments.only in mutant.name]
    with ThreadPoolExecutor(arguments.jobs) as pool:
        killed = sum(pool.map(run_mutant, chosen))
    print(json.dumps({"checks": len(chosen), "survived": len(chosen) - killed}))
    return int(killed != len(chosen))


if __name__ == "__main__":
    sys.exit(main())
