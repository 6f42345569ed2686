"""Compiles the C programs beside this file: the fleet that asks and the echo that answers."""

import shutil
import subprocess
from pathlib import Path

_SOURCES = Path(__file__).parent
_PROGRAMS = ("mqtt_load", "mqtt_echo")
_FLAGS = ("-std=gnu17", "-O2", "-Wall", "-Wextra", "-Wconversion", "-Werror")


def find_compiler() -> str | None:
    return shutil.which("gcc") or shutil.which("cc")


def build(directory: Path) -> Path:
    """Compile into `directory` and return it.

    Raises:
        RuntimeError: no compiler, or it has complaints; they are in the message.
    """
    compiler = find_compiler()
    if compiler is None:
        raise RuntimeError("a C compiler is needed: apt-get install gcc libc6-dev")
    directory.mkdir(parents=True, exist_ok=True)
    for program in _PROGRAMS:
        sources = [str(_SOURCES / f"{program}.c"), str(_SOURCES / "mqtt.c")]
        command = [compiler, *_FLAGS, "-o", str(directory / program), *sources]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode != 0:
            raise RuntimeError(f"{' '.join(command)}: {done.stderr}")
    return directory
