"""Which source prompts each target task attends to."""

import time
from dataclasses import asdict
from typing import Any, ClassVar

from pipeline.analysis._matrix import matrix_figure, matrix_table, row_of, uniform_note
from pipeline.attentions import read_shares
from pipeline.experiments._base import Lab
from pipeline.experiments._sources import FromSources
from pipeline.findings import Findings


class AttentionMatrix(FromSources):
    """Mean attention a_j of each target over the source prompts and its own prompt (ATTEMPT, Figure 5).

    The mean is over the dev examples. The first `sources` data are source tasks, each of which gets a
    prompt; the others are targets. The options are those of `FromSources`.
    """

    title: ClassVar[str] = "Attention of target tasks over source prompts"
    paper: ClassVar[str] = "ATTEMPT, Figure 5"

    def run(self, lab: Lab) -> Findings:
        """Sources, then ATTEMPT on each target alone; its runs have noted their attentions."""
        began = time.perf_counter()
        bench = self.bench(lab)
        cells: list[dict[str, Any]] = []
        for target in bench.targets:
            runs = [bench.attempt([target], seed) for seed in range(self.seeds)]
            found = [shares for run in runs for shares in read_shares(run)]
            cells += row_of(target, [one.means for one in found], examples=len(found[0].known))
        return Findings(
            kind="experiment",
            name="attention-matrix",
            title=self.title,
            paper=self.paper,
            asked=asdict(self),
            seconds=time.perf_counter() - began,
            notes=(uniform_note(cells), f"means over dev examples and {self.seeds} seeds"),
            tables=(matrix_table(cells, "attention", self.title),),
            figures=(matrix_figure(cells, "attention", "Attention over source prompts"),),
        )


EXPERIMENT = AttentionMatrix
