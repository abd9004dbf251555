"""Late fusions on several targets: the score of each, and how little is trained for it."""

import time
from collections.abc import Sequence
from typing import Any, ClassVar

from pipeline import figures
from pipeline.experiments._base import Experiment, Lab
from pipeline.experiments._tables import Row, average, groups, known, spread, words
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
        self.fusions = words(fusions)
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
        found = [_line(group, lab.encoder_parameters) for group in groups(rows, "data", "target", "fusion")]
        means = [_mean(group) for group in groups(found, "target", "fusion")]
        means += [_mean(group, target="all") for group in groups(found, "fusion")]
        return Findings(
            kind="experiment",
            name="fusion-table",
            title=self.title,
            paper=self.paper,
            asked={"fusions": self.fusions, "seeds": self.seeds, "epochs": self.epochs, "lr": self.lr},
            seconds=time.perf_counter() - began,
            notes=tuple(_notes(means)),
            tables=(
                Table(name="scores", title=self.title, columns=_COLUMNS, rows=tuple(found)),
                Table(name="means", title="Means over the data sets", columns=_MEANS, rows=tuple(means)),
            ),
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
    Column(name="test_sd", title="± sd", digits=2),
    Column(name="parameters", title="trained parameters"),
    Column(name="fusion_parameters", title="of the fusion"),
    Column(name="trained_percent", title="trained, % of encoder and head", digits=4),
    Column(name="fusion_percent", title="fusion, %", digits=4),
)
_MEANS = (
    Column(name="target", title="target"),
    Column(name="fusion", title="fusion"),
    Column(name="scores", title="data sets and targets"),
    Column(name="dev", title="dev, mean", digits=2),
    Column(name="test", title="test, mean", digits=2),
)

_ABOVE = (("attention", "linear"), ("concat", "linear"), ("linear", "last_layer"))
"""Fusions of which the paper finds the first above the second."""


def _line(rows: Sequence[Row], encoder_parameters: int) -> dict[str, Any]:
    dev, test = known(rows, "dev"), known(rows, "test")
    kept = ("data", "target", "fusion", "metric", "parameters", "fusion_parameters")
    line = {name: rows[0][name] for name in kept}
    whole = (encoder_parameters + line["parameters"]) / 100
    return {
        **line,
        "dev": average(dev),
        "dev_sd": spread(dev),
        "test": average(test),
        "test_sd": spread(test),
        "trained_percent": line["parameters"] / whole,
        "fusion_percent": line["fusion_parameters"] / whole,
    }


def _mean(lines: Sequence[Row], target: str | None = None) -> dict[str, Any]:
    """One fusion's mean over data sets, of one target or of all."""
    return {
        "target": target or lines[0]["target"],
        "fusion": lines[0]["fusion"],
        "scores": len(lines),
        **{name: average(known(lines, name)) for name in ("dev", "test")},
    }


def _notes(means: Sequence[Row]) -> list[str]:
    """Whether the fusions stand in the paper's order on average."""
    dev = {line["fusion"]: line["dev"] for line in means if line["target"] == "all"}
    notes = []
    for upper, lower in _ABOVE:
        high, low = dev.get(upper), dev.get(lower)
        if high is not None and low is not None:
            verdict = "as in the paper" if high > low else "unlike the paper"
            way = "above" if high > low else "not above"
            notes.append(f"{upper} is {way} {lower} on average, {verdict}: dev {high:.2f} and {low:.2f}")
    return notes


def _figure(rows: Sequence[Row]) -> Figure:
    named = [{**row, "on": f"{row['data']} {row['target']}"} for row in rows]
    chart = figures.bars(named, x="on", y="dev", series="fusion", x_title="", y_title="dev score, %")
    return Figure(
        name="scores", title="Dev score of each fusion", about="Bars: dev score by target and fusion.",
        chart=chart,
    )  # fmt: skip


EXPERIMENT = FusionTable
