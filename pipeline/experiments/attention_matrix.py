"""Which source prompts each target task attends to."""

import json
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from statistics import mean, stdev
from typing import Any, ClassVar

from safetensors import SafetensorError, safe_open

from pipeline import figures
from pipeline.errors import PipelineError
from pipeline.experiments._base import Lab
from pipeline.experiments._sources import FromSources
from pipeline.findings import Column, Figure, Findings, Table
from pipeline.results import ATTENTIONS

OWN = "its own"


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
            found = [mean_attention(bench.attempt([target], seed)) for seed in range(self.seeds)]
            cells += [_cell(target, source, [one[source] for one in found]) for source in found[0]]
        return Findings(
            kind="experiment",
            name="attention-matrix",
            title=self.title,
            paper=self.paper,
            asked=asdict(self),
            seconds=time.perf_counter() - began,
            notes=(
                f"mean over dev examples and {self.seeds} seeds; a row adds up to 1, and "
                f"{1 / (1 + len(bench.sources)):.2f} is that of a target that attends to all alike",
            ),
            tables=(Table(name="attention", title=self.title, columns=_COLUMNS, rows=tuple(cells)),),
            figures=(_figure(cells),),
        )


def mean_attention(run: Path) -> dict[str, float]:
    """Mean weight of each source prompt, and of the target's own, over the dev examples of a run.

    Raises:
        PipelineError: the run has noted none.
    """
    try:
        with safe_open(str(run / ATTENTIONS), framework="numpy") as opened:
            (task,) = opened.keys()
            names = json.loads((opened.metadata() or {})[task])
            weights = opened.get_tensor(task)
    except (OSError, KeyError, ValueError, SafetensorError) as error:
        said = " ".join(str(error).split())
        raise PipelineError(f"{run} has no attentions that can be read ({said}): remove it") from error
    *sources, _ = names
    return dict(zip([*sources, OWN], weights.mean(0).tolist(), strict=True))


def _cell(target: str, source: str, found: Sequence[float]) -> dict[str, Any]:
    spread = stdev(found) if len(found) > 1 else 0.0
    return {"target": target, "source": source, "attention": mean(found), "attention_sd": spread}


def _figure(cells: Sequence[dict[str, Any]]) -> Figure:
    chart = figures.heat(
        cells, x="source", y="target", value="attention", x_title="prompt", y_title="target",
        value_title="mean attention", digits=2, from_zero=True,
    )  # fmt: skip
    return Figure(
        name="attention", title="Attention over source prompts", chart=chart,
        about="A grid: mean attention of each target task (rows) over the prompts (columns).",
    )  # fmt: skip


_COLUMNS = (
    Column(name="target", title="target"),
    Column(name="source", title="prompt"),
    Column(name="attention", title="attention, mean", digits=3),
    Column(name="attention_sd", title="± sd over seeds", digits=3),
)

EXPERIMENT = AttentionMatrix
