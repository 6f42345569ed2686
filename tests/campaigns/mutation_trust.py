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


def source(name, file, old, new, *tests):
    return Mutant(name, RELEASE + file, old, new, tests)


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
NO_META_HASH = """
from tuf.api.metadata import MetaFile
MetaFile.verify_length_and_hashes = lambda *a, **k: None
"""

MUTANTS = (
    source("digest of a chunk", "transfer.py", " or digest(payload) != sha256", "", TRANSFER, DELIVERY),
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
    source("bundle is bounded", "client.py", "if len(bundle.entries) > MAX_ENTRIES:", "if False:", DELIVERY),
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
    library("signatures and thresholds", NO_SIGNATURES, TRUST),
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
