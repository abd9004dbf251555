"""A full source language and a little of the target language, evaluated on the target: every pair."""

import time
from collections.abc import Sequence
from typing import Any, ClassVar

from cache import Piece
from pipeline import figures
from pipeline.errors import PipelineError
from pipeline.experiments._base import Data, Experiment, Lab
from pipeline.experiments._languages import check_languages, open_banks, score_of, summary, sweep_on
from pipeline.experiments._tables import Row, average, groups
from pipeline.findings import Column, Figure, Findings, Table
from pipeline.grid import Grid
from pipeline.job import check_seed

FEW, ALL = "a share of it alone", "all of it"


class Transfer(Experiment):
    """Every pair of languages (attention-fusion paper, Table 3), between two ends.

    A head learns from all training examples of the source and a seeded share of those of the target; dev
    and test are the target's. The ends are the share of the target alone, and all of the target.

    Args:
        fusion: late fusion of all heads.
        share: of the target language's training examples.
        draw: seed of the share.
        seeds: heads of each pair.
        epochs: of each head.
        lr: learning rate.
    """

    title: ClassVar[str] = "Transfer between languages"
    paper: ClassVar[str] = "Attention Fusion, Table 3"

    def __init__(
        self,
        *,
        fusion: str = "attention",
        share: float = 0.05,
        draw: int = 0,
        seeds: int = 3,
        epochs: int = 10,
        lr: float = 2e-3,
    ) -> None:
        self.fusion, self.share, self.draw = fusion, share, draw
        self.seeds, self.epochs, self.lr = seeds, epochs, lr
        if not 0 < share < 1:
            raise PipelineError(f"--set share={share}: give a share between 0 and 1")
        check_seed("--set draw", draw)

    def run(self, lab: Lab) -> Findings:
        """One sweep a pair, on banks that are joined and not extracted again."""
        began = time.perf_counter()
        check_languages(lab.data, least=2)
        stores = open_banks(lab)
        rows = [row for target in lab.data for row in self._to(lab, target, stores)]
        lines = summary(rows, "target", "source", "language")
        return Findings(
            kind="experiment",
            name="transfer",
            title=self.title,
            paper=self.paper,
            asked={name: getattr(self, name) for name in
                   ("fusion", "share", "draw", "seeds", "epochs", "lr")},
            seconds=time.perf_counter() - began,
            notes=tuple(note for some in groups(lines, "target") for note in _notes(some)),
            tables=(Table(name="scores", title=self.title, columns=_COLUMNS, rows=tuple(lines)),),
            figures=tuple(_figure(some) for some in groups(lines, "target")),
        )  # fmt: skip

    def _to(self, lab: Lab, target: Data, stores: dict[str, str]) -> list[dict[str, Any]]:
        """The rows of all heads whose target is one language."""
        grid = Grid(targets=target.targets, fusions=(self.fusion,), lr=(self.lr,), seeds=self.seeds)
        own = stores[target.name]
        some = Piece(store=own, share=self.share, seed=self.draw)
        others = [name for name in stores if name != target.name]
        work = {
            FEW: (f"few-{target.name}", (some,)),
            **{name: (f"{name}-to-{target.name}", (Piece(store=stores[name]), some)) for name in others},
            ALL: (f"all-{target.name}", ()),
        }
        rows = []
        for source, (name, pieces) in work.items():
            shared = {"source": source, "language": target.name}
            rows += sweep_on(lab, name, own, grid, self.epochs, shared, train_on=pieces)
        return rows


_COLUMNS = (
    Column(name="target", title="target"),
    Column(name="source", title="trained on"),
    Column(name="language", title="evaluated on"),
    Column(name="metric", title="metric"),
    Column(name="dev", title="dev, mean", digits=2),
    Column(name="dev_sd", title="± sd", digits=2),
    Column(name="test", title="test, mean", digits=2),
    Column(name="test_sd", title="± sd", digits=2),
)


def _figure(lines: Sequence[Row]) -> Figure:
    target = lines[0]["target"]
    cells = [{**line, "score": score_of(line)} for line in lines]
    sources = dict.fromkeys([FEW, *dict.fromkeys(line["language"] for line in lines), ALL])
    cells.sort(key=lambda cell: list(sources).index(cell["source"]))
    chart = figures.heat(
        cells, x="language", y="source", value="score", x_title="evaluated on", y_title="trained on",
        value_title="score, %", digits=1,
    )  # fmt: skip
    about = (
        f"Cells: score on {target} of the language below, after training on a share of it and all of the "
        "language of the row; above and below, the share alone and all of the language itself."
    )
    return Figure(name=f"pairs-{target}", title=f"{target}: transfer", about=about, chart=chart)


def _notes(lines: Sequence[Row]) -> list[str]:
    """For each language, whether a second language helps a share of it, and what is left to all of it."""
    notes = []
    for some in groups(lines, "language"):
        scores = {line["source"]: score_of(line) for line in some}
        few, whole = scores.pop(FEW), scores.pop(ALL)
        pairs = {name: score for name, score in scores.items() if score is not None}
        if few is None or whole is None or not pairs:
            continue
        best = max(pairs, key=lambda name: pairs[name])
        mean = average(list(pairs.values()))
        notes.append(
            f"{some[0]['target']} of {some[0]['language']}: {few:.2f} from the share alone, {mean:.2f} "
            f"with a source on average ({pairs[best]:.2f} with {best}), {whole:.2f} from all of it"
        )
    return notes


EXPERIMENT = Transfer
