"""What an error message tells people to install must exist."""

import re
import tomllib
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_every_extra_that_is_named_can_be_installed():
    """In messages, in the Makefile and in the docs."""
    extras = set(tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"])
    texts = [path.read_text() for folder in ("device_agent", "docs") for path in (ROOT / folder).rglob("*.[pm][yd]")]
    texts.append((ROOT / "README.md").read_text())
    found = [match for text in texts for match in re.findall(r"shoal\[([a-z,-]+)\]", text)]
    named = {extra for match in found for extra in match.split(",")}
    in_makefile = re.search(r"^EXTRAS := (.*)$", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert in_makefile is not None
    assert {"sensors", "camera", "device"} <= named
    assert named | set(in_makefile[1].split(",")) <= extras
