"""What the experiments share when they make tables of rows: options that are lists, groups, means."""

import math
from collections.abc import Mapping, Sequence
from statistics import mean, stdev
from typing import Any

from pipeline.errors import PipelineError

Row = Mapping[str, Any]

_NORMAL_95 = 1.96


def words(text: str) -> list[str]:
    """The entries of an option that is a list.

    >>> words("a, b,")
    ['a', 'b']
    """
    return [word.strip() for word in text.split(",") if word.strip()]


def integers(option: str, text: str) -> list[int]:
    """The entries of an option that is a list of numbers, ascending.

    Raises:
        PipelineError: an entry is no number above 0.
    """
    try:
        found = sorted({int(word) for word in words(text)})
    except ValueError:
        found = []
    if not found or found[0] < 1:
        raise PipelineError(f"--set {option}={text}: give numbers from 1 on, with commas between")
    return found


def rates(option: str, text: str) -> dict[str, float]:
    """Learning rates by fusion, as in ``attention=2e-3,dwatt=1e-4``.

    Raises:
        PipelineError: an entry has no name or no number above 0.
    """
    found = {}
    for entry in words(text):
        name, _, value = entry.partition("=")
        try:
            found[name] = float(value)
        except ValueError:
            found[name] = 0.0
        if not (name and math.isfinite(found[name]) and found[name] > 0):
            raise PipelineError(f"--set {option}={text}: give NAME=RATE,NAME=RATE")
    return found


def groups(rows: Sequence[Row], *names: str) -> list[list[Row]]:
    """The rows that agree in some columns, in the order of their first."""
    found: dict[tuple[Any, ...], list[Row]] = {}
    for row in rows:
        found.setdefault(tuple(row[name] for name in names), []).append(row)
    return list(found.values())


def known(rows: Sequence[Row], name: str) -> list[float]:
    """The values of a column that are there."""
    return [float(row[name]) for row in rows if row.get(name) is not None]


def average(values: Sequence[float]) -> float | None:
    """The mean; None of nothing."""
    return mean(values) if values else None


def spread(values: Sequence[float]) -> float:
    """The standard deviation; 0 of a single value."""
    return stdev(values) if len(values) > 1 else 0.0


def band(values: Sequence[float]) -> tuple[float, float]:
    """The mean's 95 % confidence band, ± 1.96 standard errors."""
    half = _NORMAL_95 * spread(values) / math.sqrt(len(values))
    return mean(values) - half, mean(values) + half
