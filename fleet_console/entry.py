"""The `shoal` script. On a device, where the console's own dependencies are missing, `shoal device` still works."""

import sys
from typing import NoReturn


def main() -> NoReturn:
    """Hand over to the device's commands or to the console."""
    if sys.argv[1:2] == ["device"]:
        from device_agent.commands import main as device  # noqa: PLC0415

        try:
            sys.exit(device(sys.argv[2:]))
        except KeyboardInterrupt:
            sys.exit(130)
    try:
        from fleet_console.cli import main as console  # noqa: PLC0415
    except ModuleNotFoundError as exc:
        sys.exit(f"shoal: {exc.name} is not installed: pip install 'shoal[console]'; here only `shoal device` works")
    console()
