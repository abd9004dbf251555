"""Prompts transferred from source tasks: ATTEMPT beside prompt tuning, SPoT and other early methods."""

import time
from collections.abc import Mapping, Sequence
from statistics import mean
from typing import Any, ClassVar

from pipeline import figures
from pipeline.experiments._base import Lab
from pipeline.experiments._sources import Bench, FromSources, facts_of, mean_sd, score_of
from pipeline.findings import Column, Figure, Findings, Table

MULTI = "attempt, multi-task"


class AttemptTable(FromSources):
    """Score of each method on each target (ATTEMPT, Tables 2 and 3).

    The first `sources` data are source tasks, each of which gets a prompt; the others are targets.

    Args:
        sources: how many of the data are sources.
        methods: with commas between; `spot` is the generic one, `spot-targeted` the other.
        multi: whether ATTEMPT learns all targets together as well, with one network.
        length: soft tokens of a prompt.
        epochs: on a target.
        source_epochs: on a source.
        seeds: runs of each method on each target.
        batch_size: examples of a step.
        max_length: longest example in tokens; the encoder's own bound if not given.
        runs: folder of runs, shared with other experiments that are given it; OUT/runs if not given.
    """

    title: ClassVar[str] = "Methods that transfer prompts, and those that do not"
    paper: ClassVar[str] = "ATTEMPT, Tables 2 and 3"

    def __init__(
        self,
        *,
        sources: int = 0,
        methods: str = "prompt_tuning,spot,attempt",
        multi: bool = True,
        length: int = 20,
        epochs: int = 10,
        source_epochs: int = 10,
        seeds: int = 3,
        batch_size: int = 32,
        max_length: int | None = None,
        runs: str | None = None,
    ) -> None:
        super().__init__(
            sources=sources, length=length, epochs=epochs, source_epochs=source_epochs, seeds=seeds,
            batch_size=batch_size, max_length=max_length, runs=runs,
        )  # fmt: skip
        self.methods, self.multi = methods.split(","), multi

    def run(self, lab: Lab) -> Findings:
        """Sources, then each method on each target, then all targets together."""
        began = time.perf_counter()
        bench = self.bench(lab)
        rows = [self._row(bench, method, target) for method in self.methods for target in bench.targets]
        if self.multi and len(bench.targets) > 1:
            rows += self._together(bench)
        return Findings(
            kind="experiment",
            name="attempt-table",
            title=self.title,
            paper=self.paper,
            asked=dict(vars(self)),
            seconds=time.perf_counter() - began,
            notes=(
                f"sources: {', '.join(bench.sources)}",
                "parameters are those of a task, without its head; what several tasks share is divided",
            ),
            tables=(
                Table(name="scores", title=self.title, columns=_COLUMNS, rows=tuple(rows)),
                _wide(rows, list(bench.targets)),
            ),
            figures=(_figure(rows),),
        )

    def _row(self, bench: Bench, method: str, target: str) -> dict[str, Any]:
        runs = [bench.run(method, target, seed) for seed in range(self.seeds)]
        scores = mean_sd([score_of(run) for run in runs])
        return {"method": method, "target": target, **facts_of(runs[0]), **scores}

    def _together(self, bench: Bench) -> list[dict[str, Any]]:
        """ATTEMPT in mixed batches of all targets."""
        runs = [bench.attempt(list(bench.targets), seed) for seed in range(self.seeds)]
        return [
            {
                "method": MULTI,
                "target": target,
                **facts_of(runs[0], task),
                **mean_sd([score_of(run, task) for run in runs]),
            }
            for target, task in bench.targets.items()
        ]


def _wide(rows: Sequence[Mapping[str, Any]], targets: Sequence[str]) -> Table:
    """The table in the paper's form: a line a method, a column a target."""
    lines = []
    for method in dict.fromkeys(row["method"] for row in rows):
        own = {row["target"]: row for row in rows if row["method"] == method}
        scores = {target: own[target]["dev"] for target in targets}
        first = own[targets[0]]
        lines.append(
            {
                "method": method,
                "parameters": first["parameters"],
                **scores,
                "average": mean(scores.values()),
            }
        )
    columns = (
        Column(name="method", title="method"),
        Column(name="parameters", title="parameters a task"),
        *(Column(name=target, title=target, digits=2) for target in targets),
        Column(name="average", title="average", digits=2),
    )
    return Table(name="by-target", title="Dev score by target", columns=columns, rows=tuple(lines))


def _figure(rows: Sequence[Mapping[str, Any]]) -> Figure:
    chart = figures.bars(rows, x="target", y="dev", series="method", x_title="", y_title="dev score, %")
    return Figure(
        name="scores", title="Dev score of each method", about="Bars: dev score by target and method.",
        chart=chart,
    )  # fmt: skip


_COLUMNS = (
    Column(name="method", title="method"),
    Column(name="target", title="target"),
    Column(name="metric", title="metric"),
    Column(name="dev", title="dev, mean", digits=2),
    Column(name="dev_sd", title="± sd", digits=2),
    Column(name="parameters", title="parameters a task"),
)

EXPERIMENT = AttemptTable
