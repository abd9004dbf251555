"""Late fusions on several targets: the score of each, and how little is trained for it."""

import time
from collections.abc import Mapping, Sequence
from statistics import mean, stdev
from typing import Any, ClassVar

from pipeline import figures
from pipeline.experiments._base import Experiment, Lab
from pipeline.findings import Column, Figure, Findings, Table
from pipeline.grid import Grid
from pipeline.job import Schedule


class FusionTable(Experiment):
    """Fusions × targets with the mean and the spread over seeds (attention-fusion paper, Tables 1 and 2).

    Args:
        fusions: late fusions, with commas between.
        seeds: heads of each.
        epochs: of each head.
        lr: learning rate.
    """

    title: ClassVar[str] = "Late fusions on every target"
    paper: ClassVar[str] = "Attention Fusion, Tables 1 and 2"

    def __init__(
        self,
        *,
        fusions: str = "last_layer,linear,concat,attention",
        seeds: int = 3,
        epochs: int = 10,
        lr: float = 2e-3,
    ) -> None:
        self.fusions = fusions.split(",")
        self.seeds, self.epochs, self.lr = seeds, epochs, lr

    def run(self, lab: Lab) -> Findings:
        """One sweep a data set, then one table of all."""
        began = time.perf_counter()
        rows: list[dict[str, Any]] = []
        for data in lab.data:
            store = lab.bank(data)
            schedule = Schedule(epochs=self.epochs, precision=lab.product_precision)
            grid = Grid(targets=data.targets, fusions=self.fusions, lr=(self.lr,), seeds=self.seeds)
            rows += [
                {"data": data.name, **r} for r in lab.sweep(data.name, lab.plan(store, schedule), grid)
            ]
        found = [_line(group) for group in _by(rows, "data", "target", "fusion")]
        return Findings(
            kind="experiment",
            name="fusion-table",
            title=self.title,
            paper=self.paper,
            asked={"fusions": self.fusions, "seeds": self.seeds, "epochs": self.epochs, "lr": self.lr},
            seconds=time.perf_counter() - began,
            tables=(Table(name="scores", title=self.title, columns=_COLUMNS, rows=tuple(found)),),
            figures=(_figure(found),),
        )


_COLUMNS = (
    Column(name="data", title="data"),
    Column(name="target", title="target"),
    Column(name="fusion", title="fusion"),
    Column(name="metric", title="metric"),
    Column(name="dev", title="dev, mean", digits=2),
    Column(name="dev_sd", title="± sd", digits=2),
    Column(name="test", title="test, mean", digits=2),
    Column(name="parameters", title="trained parameters"),
    Column(name="fusion_parameters", title="of the fusion"),
)


def _by(rows: Sequence[Mapping[str, Any]], *names: str) -> list[list[Mapping[str, Any]]]:
    groups: dict[tuple[Any, ...], list[Mapping[str, Any]]] = {}
    for row in rows:
        groups.setdefault(tuple(row[name] for name in names), []).append(row)
    return list(groups.values())


def _line(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    dev = [row["dev"] for row in rows if row["dev"] is not None]
    test = [row["test"] for row in rows if row["test"] is not None]
    kept = ("data", "target", "fusion", "metric", "parameters", "fusion_parameters")
    return {
        **{name: rows[0][name] for name in kept},
        "dev": mean(dev) if dev else None,
        "dev_sd": stdev(dev) if len(dev) > 1 else 0.0,
        "test": mean(test) if test else None,
    }


def _figure(rows: Sequence[Mapping[str, Any]]) -> Figure:
    named = [{**row, "on": f"{row['data']} {row['target']}"} for row in rows]
    chart = figures.bars(named, x="on", y="dev", series="fusion", x_title="", y_title="dev score, %")
    return Figure(
        name="scores", title="Dev score of each fusion", about="Bars: dev score by target and fusion.",
        chart=chart,
    )  # fmt: skip


EXPERIMENT = FusionTable
