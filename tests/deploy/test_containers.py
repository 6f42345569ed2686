"""What can be checked of containers and units without an engine to run them."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "deploy" / "containers"
FILES = sorted(FOLDER.glob("*.Containerfile"))
BIN = Path(sys.executable).parent


def check(*command):
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_containerfile_is_clean_and_not_root(path):
    """By its linter; and the process is nobody who could change what it runs."""
    check(BIN / "hadolint", path)
    lines = path.read_text().splitlines()
    (user,) = [line for line in lines if line.startswith("USER ")]
    assert user in {"USER 10001", "USER mosquitto"}
    assert lines.index(user) < next(index for index, line in enumerate(lines) if line.startswith("ENTRYPOINT"))


def test_last_stage_has_no_compiler():
    """What is installed with pip is installed in the stage before; the device's image holds its own extra alone."""
    for path in FILES:
        last = path.read_text().rpartition("\nFROM ")[2]
        assert "pip install" not in last
    assert "'.[device]'" in (FOLDER / "device.Containerfile").read_text()


def test_compose_file_fits_its_schema_and_names_what_is_there():
    """Every image is built from a file of ours, and every volume is declared."""
    path = FOLDER / "compose.yaml"
    check(BIN / "check-jsonschema", "--builtin-schema", "vendor.compose-spec", path)
    document = yaml.safe_load(path.read_text())
    for name, service in document["services"].items():
        assert (ROOT / service["build"]["dockerfile"]).is_file(), name
        named = [volume.split(":")[0] for volume in service["volumes"] if re.match(r"\w+:", volume)]
        assert set(named) <= set(document["volumes"]), name


@pytest.mark.parametrize("path", sorted((ROOT / "deploy" / "systemd").glob("*.service")), ids=lambda path: path.name)
def test_unit_is_valid(path, tmp_path):
    """By systemd itself, with its program put in the place of ours, which is not installed here."""
    analyze = shutil.which("systemd-analyze")
    if analyze is None:
        pytest.skip("left out: needs systemd-analyze")
    copy = tmp_path / path.name.replace("@", "")
    copy.write_text(re.sub(r"/opt/shoal/bin/\S+", "/bin/true", path.read_text()).replace("User=shoal", "User=daemon"))
    done = subprocess.run([analyze, "verify", copy], capture_output=True, text=True, check=False)
    assert (done.returncode, copy.name in done.stderr) == (0, False), done.stderr
