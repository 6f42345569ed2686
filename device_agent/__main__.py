"""Entry point: python -m device_agent run --config agent.toml, and whatever else `shoal device` takes."""

import sys

from device_agent.commands import main

if __name__ == "__main__":
    sys.exit(main(prog="python -m device_agent"))
