"""The command and the versions that make a result, for the record."""

import shlex
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

_PARTS = ("layerbank", "torch", "transformers", "tokenizers", "zarr", "numpy")


def versions() -> dict[str, str]:
    """Version of each package; ``source`` for one that runs without being installed."""
    return {name: _version(name) for name in _PARTS}


def made_by() -> dict[str, Any]:
    """What stands in the record of a run: `command` and `versions`."""
    return {"command": command_line(), "versions": versions()}


def command_line() -> str:
    """The command that is running, as one types it."""
    name = Path(sys.argv[0]).name
    return shlex.join(["layerbank" if name == "cli.py" else name, *sys.argv[1:]])


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "source"
