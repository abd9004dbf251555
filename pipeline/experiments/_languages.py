"""What the experiments over languages share: one data set a language, with the same targets on each."""

from collections.abc import Sequence
from typing import Any

from cache import open_bank
from pipeline.errors import PipelineError
from pipeline.experiments._base import Data, Lab
from pipeline.experiments._tables import Row, average, groups, known, spread
from pipeline.grid import Grid
from pipeline.job import Schedule, open_target


def check_languages(data: Sequence[Data], *, least: int) -> tuple[str, ...]:
    """The targets that every language has.

    Raises:
        PipelineError: there are too few data sets, two of one name, or other targets on one of them.
    """
    if len(data) < least:
        raise PipelineError(f"{len(data)} data sets: give {least} or more, one a language, as DATA::TARGET")
    names = [one.name for one in data]
    for name in names:
        if names.count(name) > 1:
            raise PipelineError(f"two data sets are called {name}: rename the folder of one")
    first = data[0]
    for other in data[1:]:
        if set(other.targets) != set(first.targets):
            raise PipelineError(
                f"{first.path} is asked for {','.join(first.targets)} and {other.path} for "
                f"{','.join(other.targets)}: ask for the same targets of each language"
            )
    return first.targets


def open_banks(lab: Lab) -> dict[str, str]:
    """The bank of every language, extracted where it is not there; its targets are looked at first.

    Raises:
        PipelineError: one cannot be made, or lacks a target.
    """
    stores = {data.name: lab.bank(data) for data in lab.data}
    for data in lab.data:
        bank = open_bank(stores[data.name])
        for target in data.targets:
            for split in ("train", "dev"):
                open_target(bank, target, split)
    return stores


def sweep_on(
    lab: Lab, name: str, store: str, grid: Grid, epochs: int, shared: Row, **choices: Any
) -> list[dict[str, Any]]:
    """The rows of a sweep on a language, with further columns.

    Args:
        lab: what the experiment works with.
        name: of the sweep.
        store: the language's bank.
        grid: the axes.
        epochs: of each head.
        shared: the further columns.
        choices: as for `Lab.plan`.
    """
    schedule = Schedule(epochs=epochs, precision=lab.product_precision)
    rows = lab.sweep(name, lab.plan(store, schedule, **choices), grid)
    return [{**row, **shared} for row in rows]


def summary(rows: Sequence[Row], *names: str) -> list[dict[str, Any]]:
    """A line a group of heads: the columns they are grouped by, mean and spread of dev and test."""
    found = []
    for group in groups(rows, *names):
        dev, test = known(group, "dev"), known(group, "test")
        found.append(
            {
                **{name: group[0][name] for name in names},
                "metric": group[0]["metric"],
                "dev": average(dev),
                "dev_sd": spread(dev),
                "test": average(test),
                "test_sd": spread(test),
            }
        )
    return found


def score_of(row: Row) -> float | None:
    """The test score of a line; the dev score where there is no test split."""
    found = row["dev"] if row["test"] is None else row["test"]
    return None if found is None else float(found)
