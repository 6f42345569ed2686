"""What the documentation says of every kind."""

from pathlib import Path
from typing import get_args

import msgspec
import pytest

from device_agent.sources.host import HostValue
from device_agent.sources.settings import SourceSettings

pytestmark = pytest.mark.device

PAGE = (Path(__file__).parents[3] / "docs" / "devices.md").read_text()


def test_every_kind_and_setting_is_documented():
    """Pins the table: kinds, settings and host values as the code knows them."""
    section = PAGE.partition("## Sources")[2].partition("\n## ")[0]
    for kind in get_args(SourceSettings):
        rows = section.partition(f"| `{kind.__struct_config__.tag}` |")[2].partition("\n| `")[0]
        assert rows
        assert [name for name in kind.__struct_fields__ if f"`{name}`" not in rows] == []
    assert [name for name in get_args(HostValue) if f"`{name}`" not in section] == []


def test_every_example_is_valid():
    """Pins that what the page shows can be pasted."""
    blocks = PAGE.partition("## Sources")[2].partition("```toml")[2].partition("```")[0].split("[source]")[1:]
    assert len(blocks) == 5
    for block in blocks:
        msgspec.toml.decode(f"[source]{block}", type=dict[str, SourceSettings])
