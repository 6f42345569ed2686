"""Where a file is: on which machine, as which file. A copy of it is elsewhere."""

import hashlib
from pathlib import Path

# What a machine says of itself. An image written to many machines brings its machine-id along; the others come with
# the hardware. Those that this user may not read, or that do not exist here, say nothing.
_MACHINE = (
    Path("/etc/machine-id"),
    Path("/sys/firmware/devicetree/base/serial-number"),
    Path("/sys/class/dmi/id/product_uuid"),
)


def place_of(path: Path) -> str:
    """A digest that a copy of the file does not share: one on another machine, or beside it.

    The number of the device that the file is on is left out, because it may change whenever a machine starts.
    """
    parts = [str(path.stat().st_ino).encode(), *(_read(source) for source in _MACHINE)]
    return hashlib.sha256(b"\n".join(parts)).hexdigest()


def _read(source: Path) -> bytes:
    try:
        return source.read_bytes().strip(b"\0\n ")
    except OSError:
        return b""
