"""ATTEMPT without its target prompt, its attention, its several sources, or any transfer."""

import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, ClassVar

from pipeline import figures
from pipeline.errors import PipelineError, nearest
from pipeline.experiments._base import Lab
from pipeline.experiments._sources import ABLATIONS, FromSources, facts_of, mean_sd, score_of
from pipeline.findings import Column, Figure, Findings, Table


@dataclass(kw_only=True)
class Ablations(FromSources):
    """What each piece of ATTEMPT is worth on each target (ATTEMPT, Table 4).

    The first `sources` data are source tasks, each of which gets a prompt; the others are targets.

    The options of `FromSources` are options here too.

    Args:
        single: source of the single prompt; the first if not given.
    """

    title: ClassVar[str] = "ATTEMPT without one of its pieces"
    paper: ClassVar[str] = "ATTEMPT, Table 4"

    single: str | None = None

    def run(self, lab: Lab) -> Findings:
        """Sources, then each variant on each target."""
        began = time.perf_counter()
        bench = self.bench(lab)
        single = self.single or next(iter(bench.sources))
        if single not in bench.sources:
            raise PipelineError(f"--set single={single}: no such source: {nearest(single, bench.sources)}")
        rows = []
        for variant, options in ABLATIONS.items():
            given = {name: value or single for name, value in options.items()}
            for target in bench.targets:
                runs = [bench.attempt([target], seed, **given) for seed in range(self.seeds)]
                scores = mean_sd([score_of(run) for run in runs])
                rows.append({"variant": variant, "target": target, **facts_of(runs[0]), **scores})
        _add_losses(rows)
        return Findings(
            kind="experiment",
            name="ablations",
            title=self.title,
            paper=self.paper,
            asked=asdict(self),
            seconds=time.perf_counter() - began,
            notes=(f"sources: {', '.join(bench.sources)}", f"the single prompt is that of {single}"),
            tables=(Table(name="scores", title=self.title, columns=_COLUMNS, rows=tuple(rows)),),
            figures=(_figure(rows),),
        )


def _add_losses(rows: Sequence[dict[str, Any]]) -> None:
    """What each variant scores more or less than the whole method."""
    whole = {row["target"]: row["dev"] for row in rows if row["variant"] == "attempt"}
    for row in rows:
        row["difference"] = row["dev"] - whole[row["target"]]


def _figure(rows: Sequence[Mapping[str, Any]]) -> Figure:
    chart = figures.bars(rows, x="target", y="dev", series="variant", x_title="", y_title="dev score, %")
    return Figure(
        name="scores", title="Dev score of each variant", about="Bars: dev score by target and variant.",
        chart=chart,
    )  # fmt: skip


_COLUMNS = (
    Column(name="variant", title="variant"),
    Column(name="target", title="target"),
    Column(name="metric", title="metric"),
    Column(name="dev", title="dev, mean", digits=2),
    Column(name="dev_sd", title="± sd", digits=2),
    Column(name="difference", title="against attempt", digits=2),
    Column(name="parameters", title="trained parameters"),
)

EXPERIMENT = Ablations
