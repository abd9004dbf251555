"""Flags of a command from a TOML file."""

import tomllib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import typer

from pipeline.errors import nearest, said_by


def defaults_of(path: str, parameters: Sequence[Any]) -> dict[str, Any]:
    """The values that a TOML file gives to a command's flags, by the flags' parameter names.

    Keys are the flags' names without the dashes in front (``lr``, ``batch-size`` or ``batch_size``). A list
    becomes what the flag takes on the command line; ``[set]`` holds the hyper-parameters of the parts.

    Args:
        path: of the file.
        parameters: of the command.

    Raises:
        typer.BadParameter: the file cannot be read, or a key is no flag.
    """
    try:
        values = tomllib.loads(Path(path).read_text(encoding="utf-8-sig"))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise typer.BadParameter(f"--config {path}: {said_by(error)}") from error
    known = {_plain(flag): parameter for parameter in parameters for flag in parameter.opts}
    found: dict[str, Any] = {}
    for name, value in values.items():
        parameter = known.get(_plain(name))
        if parameter is None or parameter.name == "config":
            flags = [flag for flag in known if flag != "config"]
            raise typer.BadParameter(f"--config {path}: no flag {name!r}, {nearest(_plain(name), flags)}")
        found[parameter.name] = _given(value, f"--config {path}: {name}", repeats=parameter.multiple)
    return found


def _plain(name: str) -> str:
    return name.lstrip("-").replace("_", "-")


def _given(value: Any, where: str, *, repeats: bool) -> Any:
    """A TOML value as it would be given on the command line."""
    if repeats:
        if not isinstance(value, dict):
            raise typer.BadParameter(f"{where}: give a table of names and values")
        return [f"{name}={_text(one, f'{where}.{name}')}" for name, one in value.items()]
    return _text(value, where)


def _text(value: Any, where: str) -> str:
    if isinstance(value, list):
        if not value:
            raise typer.BadParameter(f"{where}: an empty list, give one or more values")
        return ",".join(_text(one, where) for one in value)
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, (str, int, float)):
        return str(value)
    raise typer.BadParameter(f"{where}: {value!r}, give a text, a number or a list of them")
