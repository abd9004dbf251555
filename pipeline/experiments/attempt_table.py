"""Prompts transferred from source tasks: ATTEMPT beside prompt tuning, SPoT and other early methods."""

import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from statistics import mean
from typing import Any, ClassVar

from pipeline import figures
from pipeline.experiments._base import Lab
from pipeline.experiments._sources import Bench, FromSources, facts_of, mean_sd, score_of
from pipeline.experiments._tables import words
from pipeline.findings import Column, Figure, Findings, Table

MULTI = "attempt, multi-task"


@dataclass(kw_only=True)
class AttemptTable(FromSources):
    """Score of each method on each target (ATTEMPT, Tables 2 and 3).

    The first `sources` data are source tasks, each of which gets a prompt; the others are targets.

    The options of `FromSources` are options here too.

    Args:
        methods: with commas between; `spot` is the generic one, `spot-targeted` the other.
        multi: whether ATTEMPT learns all targets together as well, with one network.
    """

    title: ClassVar[str] = "Methods that transfer prompts, and those that do not"
    paper: ClassVar[str] = "ATTEMPT, Tables 2 and 3"

    methods: str = "prompt_tuning,spot,attempt"
    multi: bool = True

    def run(self, lab: Lab) -> Findings:
        """Sources, then each method on each target, then all targets together."""
        began = time.perf_counter()
        bench = self.bench(lab)
        rows = [
            self._row(bench, method, target) for method in words(self.methods) for target in bench.targets
        ]
        if self.multi and len(bench.targets) > 1:
            rows += self._together(bench)
        return Findings(
            kind="experiment",
            name="attempt-table",
            title=self.title,
            paper=self.paper,
            asked=asdict(self),
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
