"""What adaptation costs: an extraction once and cheap heads, or every run through the encoder."""

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

from pipeline import figures
from pipeline.errors import PipelineError
from pipeline.experiments._base import Data, Experiment, Lab
from pipeline.experiments._tables import words
from pipeline.findings import Column, Figure, Findings, Table
from pipeline.job import Schedule
from pipeline.records import read_record
from pipeline.results import read_json, write_whole

_FREE_OF_PROMPTS = {"attempt": {"transfer": "false"}}
"""Options that let a method be timed without prompts trained before; its steps cost the same."""


@dataclass(frozen=True, kw_only=True)
class Part:
    """Something that takes time."""

    data: str
    target: str
    name: str
    kind: str  # extraction, late, early
    seconds: float  # of an epoch; of the extraction, once


class Cost(Experiment):
    """Extraction once plus H heads × E epochs, against E epochs of H runs through the encoder.

    One epoch (or `measured_epochs`) of each is timed, each run alone, and multiplied: the epochs of a run
    cost the same.

    Args:
        methods: of early fusion, with commas between.
        fusions: late fusions, with commas between.
        heads: H, how many heads or runs: of targets, seeds and settings together.
        epochs: E, of each.
        measured_epochs: that are timed; the mean counts.
        batch_size: examples of a step.
    """

    title: ClassVar[str] = "Cost of late and of early fusion"
    paper: ClassVar[str] = ""

    def __init__(
        self,
        *,
        methods: str = "bitfit,adapter,prompt_tuning,fine_tune",
        fusions: str = "last_layer,attention,dwatt",
        heads: int = 30,
        epochs: int = 10,
        measured_epochs: int = 1,
        batch_size: int = 32,
    ) -> None:
        self.methods, self.fusions = words(methods), words(fusions)
        if "spot" in self.methods:
            raise PipelineError("--set methods: a step of spot is one of prompt_tuning: name that instead")
        for name, value in (("heads", heads), ("epochs", epochs), ("measured_epochs", measured_epochs)):
            if value < 1:
                raise PipelineError(f"--set {name}={value}: give 1 or more")
        self.heads, self.epochs = heads, epochs
        self.measured_epochs, self.batch_size = measured_epochs, batch_size

    def run(self, lab: Lab) -> Findings:
        """Times each part once, then multiplies."""
        began = time.perf_counter()
        parts = [part for data in lab.data for part in self._parts(lab, data)]
        groups = _by_target(parts)
        return Findings(
            kind="experiment",
            name="cost",
            title=self.title,
            paper=self.paper,
            asked=dict(vars(self)),
            seconds=time.perf_counter() - began,
            notes=(
                "measured: one extraction, and each head and method alone, epochs: "
                f"{self.measured_epochs}; "
                f"{self.heads} heads × {self.epochs} epochs are multiples of these",
                "heads are timed one at a time; a sweep trains them in stacks and takes less",
                "dev scores and the loading of data and encoder are not in the times of epochs",
            ),
            tables=(
                Table(name="parts", title="Seconds of each part", columns=_PARTS, rows=self._totals(parts)),
                Table(
                    name="break-even",
                    title="From where on late fusion costs less",
                    columns=_BREAK_EVEN,
                    rows=tuple(row for group in groups for row in self._break_even(group)),
                ),
            ),
            figures=tuple(self._figure(group) for group in groups),
        )

    def _parts(self, lab: Lab, data: Data) -> list[Part]:
        store, seconds = _timed_extraction(lab, data)
        found = []
        for target in data.targets:
            at = {"data": data.name, "target": target}
            found.append(Part(**at, name="extraction", kind="extraction", seconds=seconds))
            schedule = Schedule(
                epochs=self.measured_epochs, batch_size=self.batch_size, precision=lab.product_precision
            )
            for fusion in self.fusions:
                name = f"{data.name}-{target}-{fusion}"
                run = lab.train(name, store, target, fusion=fusion, schedule=schedule)
                found.append(Part(**at, name=fusion, kind="late", seconds=_epoch_seconds(run)))
            plan = {"epochs": self.measured_epochs, "batch_size": self.batch_size}
            for method in self.methods:
                name = f"{data.name}-{target}-{method}"
                options = _FREE_OF_PROMPTS.get(method, {})
                run = lab.tune(name, method, [(data, target)], plan=plan, options=options)
                found.append(Part(**at, name=method, kind="early", seconds=_epoch_seconds(run)))
        return found

    def seconds(self, part: Part, extraction: Part, heads: int, epochs: int) -> float:
        """Of so many heads of so many epochs, the extraction included where the part reads a bank."""
        once = extraction.seconds if part.kind == "late" else 0.0
        return once + heads * epochs * part.seconds

    def _totals(self, parts: Sequence[Part]) -> tuple[dict[str, Any], ...]:
        rows = []
        for group in _by_target(parts):
            for part in group:
                whole = part.seconds
                if part.kind != "extraction":
                    whole = self.seconds(part, group[0], self.heads, self.epochs)
                rows.append({**vars(part), "total": whole})
        return tuple(rows)

    def _break_even(self, group: Sequence[Part]) -> list[dict[str, Any]]:
        extraction, *rest = group
        rows = []
        for late in [part for part in rest if part.kind == "late"]:
            for early in [part for part in rest if part.kind == "early"]:
                saved = early.seconds - late.seconds
                totals = [self.seconds(p, extraction, self.heads, self.epochs) for p in (early, late)]
                rows.append(
                    {
                        "data": late.data,
                        "target": late.target,
                        "fusion": late.name,
                        "method": early.name,
                        "per_epoch": early.seconds / late.seconds,
                        "heads": break_even(extraction.seconds, self.epochs * saved),
                        "epochs": break_even(extraction.seconds, saved),
                        "whole": totals[0] / totals[1],
                    }
                )
        return rows

    def _figure(self, group: Sequence[Part]) -> Figure:
        extraction, *rest = group
        counts = sorted({1, *(round(self.heads ** (k / 8)) for k in range(9))})
        rows = [
            {
                "heads": heads,
                "minutes": self.seconds(part, extraction, heads, self.epochs) / 60,
                "part": part.name,
                "kind": "through the encoder"
                if part.kind == "early"
                else "on the bank, extraction included",
            }
            for part in rest
            for heads in counts
        ]
        on = f"{extraction.data} {extraction.target}"
        return Figure(
            name=f"cost-{extraction.data}-{extraction.target}",
            title=f"Time against number of heads, {on}",
            about=f"Lines: minutes for 1 to {self.heads} heads of {self.epochs} epochs on {on}.",
            chart=figures.lines(
                rows, x="heads", y="minutes", series="part", dashed="kind", log_x=True, log_y=True,
                x_title="heads", y_title=f"minutes, {self.epochs} epochs a head",
            ),
        )  # fmt: skip


def break_even(once: float, saved: float) -> int | None:
    """The first count at which what is saved each time has paid for what is spent once.

    >>> break_even(10.0, 3.0), break_even(10.0, 100.0), break_even(10.0, 0.0)
    (4, 1, None)
    """
    return max(1, math.ceil(once / saved)) if saved > 0 else None


def _timed_extraction(lab: Lab, data: Data) -> tuple[str, float]:
    """The bank of a data set, and the seconds of the one run that filled it here."""
    # A bank that another experiment filled has no note of its time, so this one fills its own.
    made = replace(lab, banks=lab.out / "banks").extract(data)
    noted = lab.out / "extraction" / f"{Path(made.store).name}.json"
    if made.blocks_encoded == made.blocks:
        write_whole(noted, f'{{"seconds": {made.seconds}}}\n')
    elif not noted.is_file():
        raise PipelineError(
            f"{made.store} was filled in several runs, its time is not known: remove it, it is made again"
        )
    return made.store, float(read_json(noted)["seconds"])


def _epoch_seconds(run: Path) -> float:
    return float(read_record(run).result["seconds_per_epoch"])


def _by_target(parts: Sequence[Part]) -> list[list[Part]]:
    """The parts of each data set's target, its extraction first."""
    groups: dict[tuple[str, str], list[Part]] = {}
    for part in parts:
        groups.setdefault((part.data, part.target), []).append(part)
    return list(groups.values())


_ON = (Column(name="data", title="data"), Column(name="target", title="target"))
_PARTS = (
    *_ON,
    Column(name="name", title="part"),
    Column(name="kind", title="kind"),
    Column(name="seconds", title="seconds, once or an epoch", digits=2),
    Column(name="total", title="seconds, all heads", digits=0),
)
_BREAK_EVEN = (
    *_ON,
    Column(name="fusion", title="late fusion"),
    Column(name="method", title="against"),
    Column(name="per_epoch", title="times as long an epoch", digits=1),
    Column(name="heads", title="heads to break even"),
    Column(name="epochs", title="epochs of one head to break even"),
    Column(name="whole", title="times as long in all", digits=1),
)

EXPERIMENT = Cost
