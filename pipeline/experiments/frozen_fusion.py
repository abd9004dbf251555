"""The fusion of one language, frozen, with only the decoder trained on another."""

import time
from collections.abc import Sequence
from typing import Any, ClassVar

from pipeline import figures
from pipeline.errors import PipelineError, nearest
from pipeline.experiments._base import Data, Experiment, Lab
from pipeline.experiments._languages import check_languages, open_banks, score_of, summary, sweep_on
from pipeline.experiments._tables import Row, groups
from pipeline.findings import Column, Figure, Findings, Table
from pipeline.grid import Grid

BAR = 1.5
"""Points that the frozen fusion may be below training in the language (the paper's Table 4)."""

OWN, FROZEN, MEAN = "its own", "frozen", "none, the mean of the layers"


class FrozenFusion(Experiment):
    """The query of `attention` from a source language, frozen (attention-fusion paper, Table 4).

    The source's query is that of its best head by dev score. Beside it stand a query trained in the
    language itself, and no query at all: the mean of the layers, which tells what a query is worth.

    Args:
        source: name of the data set whose query is taken; the first by default.
        seeds: heads of each.
        epochs: of each head.
        lr: learning rate.
    """

    title: ClassVar[str] = "A frozen fusion in other languages"
    paper: ClassVar[str] = "Attention Fusion, Table 4"

    def __init__(
        self, *, source: str | None = None, seeds: int = 3, epochs: int = 10, lr: float = 2e-3
    ) -> None:
        self.source, self.seeds, self.epochs, self.lr = source, seeds, epochs, lr

    def run(self, lab: Lab) -> Findings:
        """Heads of the source language first, then three sweeps a language and target."""
        began = time.perf_counter()
        targets = check_languages(lab.data, least=2)
        names = [data.name for data in lab.data]
        source = self.source or names[0]
        if source not in names:
            raise PipelineError(
                f"--set source={source}: no data set has that name; {nearest(source, names)}"
            )
        stores = open_banks(lab)
        rows = []
        for target in targets:
            rows += self._trained(lab, source, stores[source], target)
            for data in lab.data:
                if data.name != source:
                    rows += self._in_language(lab, data, stores[data.name], target, source)
        lines = [line for some in groups(summary(rows, "target", "language", "query"), "target", "language")
                 for line in _with_difference(some)]  # fmt: skip
        return Findings(
            kind="experiment",
            name="frozen-fusion",
            title=self.title,
            paper=self.paper,
            asked={"source": source, "seeds": self.seeds, "epochs": self.epochs, "lr": self.lr},
            seconds=time.perf_counter() - began,
            notes=tuple(_note(line, source) for line in lines if line["query"] == FROZEN),
            tables=(Table(name="scores", title=self.title, columns=_COLUMNS, rows=tuple(lines)),),
            figures=tuple(_figure(some, source) for some in groups(lines, "target")),
        )

    def _grid(self, target: str, fusion: str, **options: str) -> Grid:
        return Grid(
            targets=(target,), fusions=(fusion,), lr=(self.lr,), seeds=self.seeds,
            options={name: (value,) for name, value in options.items()},
        )  # fmt: skip

    def _trained(self, lab: Lab, language: str, store: str, target: str) -> list[dict[str, Any]]:
        """Heads with a query of their own; the best stays as a run."""
        shared = {"language": language, "query": OWN}
        name = f"{language}-{target}"
        return sweep_on(lab, name, store, self._grid(target, "attention"), self.epochs, shared)

    def _in_language(
        self, lab: Lab, data: Data, store: str, target: str, source: str
    ) -> list[dict[str, Any]]:
        """Heads with the source's query, with their own, and with none."""
        rows = self._trained(lab, data.name, store, target)
        run = str((lab.folder(f"{source}-{target}") / "heads").resolve())
        work = {
            FROZEN: (f"{data.name}-{target}-from-{source}", self._grid(target, "attention", sources=run)),
            MEAN: (f"{data.name}-{target}-mean", self._grid(target, "average")),
        }
        for query, (name, grid) in work.items():
            shared = {"language": data.name, "query": query}
            rows += sweep_on(lab, name, store, grid, self.epochs, shared)
        return rows


_COLUMNS = (
    Column(name="target", title="target"),
    Column(name="language", title="language"),
    Column(name="query", title="query"),
    Column(name="metric", title="metric"),
    Column(name="dev", title="dev, mean", digits=2),
    Column(name="dev_sd", title="± sd", digits=2),
    Column(name="test", title="test, mean", digits=2),
    Column(name="test_sd", title="± sd", digits=2),
    Column(name="difference", title="from its own", digits=2),
)


def _with_difference(lines: Sequence[Row]) -> list[dict[str, Any]]:
    """The lines of one language, each with its difference from training in the language."""
    own = next(score_of(line) for line in lines if line["query"] == OWN)
    found = []
    for line in lines:
        score = score_of(line)
        found.append({**line, "difference": None if own is None or score is None else score - own})
    return found


def _note(line: Row, source: str) -> str:
    where = f"{line['target']} of {line['language']}"
    difference = line["difference"]
    if difference is None:
        return f"{where}: no score"
    verb = "within" if difference >= -BAR else "not within"
    return (
        f"{where}: with the query of {source} frozen {score_of(line):.2f}, {difference:+.2f} from training "
        f"its own, {verb} {BAR}"
    )


def _figure(lines: Sequence[Row], source: str) -> Figure:
    target = lines[0]["target"]
    bars = [{**line, "score": score_of(line)} for line in lines]
    chart = figures.bars(bars, x="language", y="score", series="query", x_title="", y_title="score, %")
    about = f"Bars: score on {target} with a query of its own, with that of {source} frozen, and with none."
    return Figure(name=f"scores-{target}", title=f"{target}: frozen fusion", about=about, chart=chart)


EXPERIMENT = FrozenFusion
