"""Late fusions from few examples: how score grows with their number, over training and over depth."""

import json
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from cache import Bank, Piece, open_bank
from cache.layout import Keep
from pipeline import figures, metrics, parts
from pipeline.errors import PipelineError
from pipeline.experiments._base import Data, Experiment, Lab
from pipeline.experiments._tables import Row, average, band, groups, integers, known, rates, spread, words
from pipeline.findings import Column, Figure, Findings, Table
from pipeline.grid import Grid
from pipeline.job import Schedule, open_target
from pipeline.runner import Plan

BASE = "transformer"
"""The fusion that others are compared with: the paper's own base, "Base+n"."""

LR = {"transformer": 2e-4, "affine": 2e-4, "dwatt": 2e-4}
"""Learning rates at which each learns from few examples (docs/log.md); others take `lr`."""


class FewShot(Experiment):
    """N·C examples, C classes, drawn uniformly without replacement (DWAtt paper, Figures 2-4, 6 and 8).

    C is the number of classes, for tags that of entity types. A trial is one draw and one seed of the
    weights; a head's score is its best dev score over the epoch settings. With a constant learning rate
    after the warm-up, the longest run passes through the end of every shorter one, so it is the only one
    that is trained. Decoders are one linear layer, as in the paper. Every draw is a sweep of its own, for
    the heads of a stack read the same examples; draws train side by side.

    Args:
        fusions: late fusions, with commas between.
        sizes: values of N.
        epochs: the epoch settings.
        trials: draws, each with weights of its own.
        lr: learning rate of fusions that have none in `rates`.
        rates: learning rates of single fusions, as in ``attention=2e-3,dwatt=1e-4``.
        warmup_steps: in which the learning rate rises.
        batch_size: examples of a step.
        n: new layers of `transformer`; by default as many as have about the parameters of `affine`, L/12.
        depth: layers after which the bank is cut off too, with commas between, or all; at the largest N.
        curve: at the largest N, score after every so many epochs too, for the curve over steps; the best
            score stays that of the epoch settings. 0 scores at those alone.
    """

    title: ClassVar[str] = "Late fusions from few examples"
    paper: ClassVar[str] = "DWAtt, Figures 2 to 4, 6 and 8"

    def __init__(
        self,
        *,
        fusions: str = "transformer,affine,dwatt,attention",
        sizes: str = "8,16,32,64,128",
        epochs: str = "25,50,75,100",
        trials: int = 5,
        lr: float = 2e-3,
        rates: str = "",
        warmup_steps: int = 20,
        batch_size: int = 32,
        n: int | None = None,
        depth: str = "",
        curve: int = 0,
    ) -> None:
        self.fusions, self.n, self.depth, self.curve = words(fusions), n, depth, curve
        self.sizes, self.epochs = integers("sizes", sizes), integers("epochs", epochs)
        self.trials, self.lr, self.rates = trials, lr, _rates(rates)
        self.warmup_steps, self.batch_size = warmup_steps, batch_size
        if trials < 1 or not self.fusions:
            raise PipelineError(f"--set trials={trials} fusions={fusions}: give 1 or more of each")
        if curve < 0:
            raise PipelineError(f"--set curve={curve}: give a number of epochs, or 0")
        if n is not None and n < 1:
            raise PipelineError(f"--set n={n}: give 1 or more layers")

    def run(self, lab: Lab) -> Findings:
        """The tables and figures of every target."""
        began = time.perf_counter()
        rows: list[dict[str, Any]] = []
        notes: list[str] = []
        for data in lab.data:
            store = lab.bank(data, self._keep)
            for name in data.targets:
                work = _Work(lab=lab, data=data, store=store, target=name, bank=open_bank(store))
                rows += [self._at_settings(row) for row in self._of_target(work, notes)]
        return Findings(
            kind="experiment",
            name="few-shot",
            title=self.title,
            paper=self.paper,
            asked=self._asked(),
            seconds=time.perf_counter() - began,
            notes=(*notes, *_verdicts([row for row in rows if not row["cut"]])),
            tables=tuple(_tables(rows)),
            figures=tuple(self._figures(rows)),
        )

    @property
    def _keep(self) -> Keep:
        mixes = any(parts.load("fusion", fusion).mixes_tokens for fusion in self.fusions)
        return "all" if mixes else "words"

    def _asked(self) -> dict[str, Any]:
        names = ("fusions", "sizes", "epochs", "trials", "lr", "rates", "warmup_steps", "batch_size", "n")
        return {**{name: getattr(self, name) for name in names}, "depth": self.depth, "curve": self.curve}

    def _of_target(self, work: "_Work", notes: list[str]) -> list[dict[str, Any]]:
        """The rows of every size and trial; then those of the bank cut off after fewer layers."""
        n_classes, n_examples = _count(work.bank, work.target)
        sizes = [size for size in self.sizes if size * n_classes <= n_examples]
        if not sizes:
            raise PipelineError(
                f"{work.data.path}: {self.sizes[0]} times {n_classes} classes of {work.target!r} are more "
                f"than the {n_examples} training examples: give smaller --set sizes"
            )
        notes += [
            f"{work.on}: no N = {size}, {size * n_classes} of {n_examples} examples asked for"
            for size in self.sizes[len(sizes) :]
        ]
        wanted = [(size, None) for size in sizes] + [
            (sizes[-1], depth) for depth in self._depths(work.bank)
        ]
        draws = [
            _Draw(work, size, size * n_classes, depth, trial)
            for size, depth in wanted
            for trial in range(self.trials)
        ]
        return self._of_draws(work, draws)

    def _dev_epochs(self, draw: "_Draw") -> tuple[int, ...]:
        """The epochs that are scored: the settings, at the largest N those of the curve too."""
        n_classes, n_examples = _count(draw.work.bank, draw.work.target)
        largest = max(size for size in self.sizes if size * n_classes <= n_examples)
        if not self.curve or draw.depth is not None or draw.size != largest:
            return tuple(self.epochs)
        return tuple(sorted({*self.epochs, *range(self.curve, self.epochs[-1], self.curve)}))

    def _at_settings(self, row: dict[str, Any]) -> dict[str, Any]:
        """The row with the best score of the epoch settings, whatever else was scored for the curve."""
        settings = [
            line
            for line in json.loads(row["history"])
            if line["epoch"] in self.epochs and line["dev"] is not None
        ]
        if not settings:
            return row
        sign = 1.0 if metrics.higher_is_better(row["metric"]) else -1.0
        best = max(settings, key=lambda line: sign * line["dev"])
        return {**row, "dev": best["dev"], "best_epoch": best["epoch"]}

    def _depths(self, bank: Bank) -> list[int]:
        last = bank.recipe.encoder.n_layers - 1
        if self.depth == "all":
            return list(range(1, last + 1))
        return integers("depth", self.depth) if self.depth else []

    def _of_draws(self, work: "_Work", draws: Sequence["_Draw"]) -> list[dict[str, Any]]:
        """A sweep a draw, whose heads of all fusions train together; the rows in the order of the draws."""
        dearest_first = sorted(draws, key=lambda draw: -draw.n_examples)
        found = work.lab.sweeps({draw.name: (self._plan(draw), self._grid(draw)) for draw in dearest_first})
        rows = []
        for draw in draws:
            shared = {"data": work.data.name, "on": work.on, "size": draw.size, "trial": draw.trial}
            shared |= {"examples": draw.n_examples, "depth": draw.depth, "cut": draw.depth is not None}
            shared["steps"] = math.ceil(draw.n_examples / self.batch_size)
            rows += [{**row, **shared} for row in found[draw.name]]
        return rows

    def _plan(self, draw: "_Draw") -> Plan:
        lab, store = draw.work.lab, draw.work.store
        schedule = Schedule(
            epochs=self.epochs[-1], dev_epochs=self._dev_epochs(draw), decay=False,
            warmup_steps=self.warmup_steps, precision=lab.product_precision,
        )  # fmt: skip
        pieces = (Piece(store=store, n_examples=draw.n_examples, seed=draw.trial),)
        # The test set is left alone: the score is the best dev score.
        splits = {"train": "train", "dev": "dev"}
        return lab.plan(store, schedule, train_on=pieces, depth=draw.depth, splits=splits)

    def _grid(self, draw: "_Draw") -> Grid:
        options: dict[str, list[Any]] = {"layers": ["linear"]}
        if BASE in self.fusions:
            n_layers = draw.depth or draw.work.bank.recipe.encoder.n_layers - 1
            options["n"] = [self.n or max(1, round(n_layers / 12))]
        return Grid(
            targets=(draw.work.target,), fusions=self.fusions, options=options, lr=(self.lr,),
            lr_of={name: rate for name, rate in self.rates.items() if name in self.fusions},
            batch_size=(self.batch_size,), first_seed=draw.trial,
        )  # fmt: skip

    def _figures(self, rows: Sequence[Row]) -> list[Figure]:
        found = []
        for of_target in groups(rows, "on"):
            on = of_target[0]["on"]
            whole = [row for row in of_target if not row["cut"]]
            largest = [row for row in whole if row["size"] == max(r["size"] for r in whole)]
            found.append(_against_size(on, whole))
            found.append(_against_steps(on, largest))
            cut = [row for row in of_target if row["cut"]]
            if cut:
                found.append(_against_depth(on, cut))
        return found


@dataclass(frozen=True, kw_only=True)
class _Work:
    """One target of one bank."""

    lab: Lab
    data: Data
    store: str
    target: str
    bank: Bank

    @property
    def on(self) -> str:
        return f"{self.data.name} {self.target}"


@dataclass(frozen=True)
class _Draw:
    """Examples drawn for one trial."""

    work: _Work
    size: int  # N
    n_examples: int
    depth: int | None  # layers after which the bank is cut off
    trial: int

    @property
    def name(self) -> str:
        """That of its sweep."""
        cut = f"-depth{self.depth}" if self.depth else ""
        return f"{self.work.on}-{self.size}-{self.trial}".replace(" ", "-") + cut


def _rates(given: str) -> dict[str, float]:
    return {**LR, **rates("rates", given)}


def _count(bank: Bank, name: str) -> tuple[int, int]:
    """Classes of a target, and examples to draw from.

    Raises:
        PipelineError: the target has no classes.
    """
    split, target = open_target(bank, name, "train")
    if target.kind not in ("class", "tags"):
        raise PipelineError(
            f"few-shot counts examples by class, target {name!r} is {target.kind}: name one with classes"
        )
    return metrics.n_kinds(target.names), split.n_examples


_SCORES = (
    Column(name="data", title="data"),
    Column(name="target", title="target"),
    Column(name="fusion", title="fusion"),
    Column(name="size", title="N"),
    Column(name="examples", title="examples"),
    Column(name="metric", title="metric"),
    Column(name="dev", title="best dev, mean", digits=2),
    Column(name="dev_sd", title="± sd", digits=2),
    Column(name="low", title="95 %, from", digits=2),
    Column(name="high", title="to", digits=2),
    Column(name="best_epoch", title="best epoch, mean", digits=0),
    Column(name="parameters", title="trained parameters"),
)
_DEPTH = (*_SCORES[:3], Column(name="depth", title="layers"), *_SCORES[3:])


def _tables(rows: Sequence[Row]) -> list[Table]:
    whole = [_line(group) for group in groups([r for r in rows if not r["cut"]], "on", "fusion", "size")]
    cut = [_line(group) for group in groups([r for r in rows if r["cut"]], "on", "fusion", "depth")]
    tables = [Table(name="scores", title="Best dev score by N", columns=_SCORES, rows=tuple(whole))]
    if cut:
        tables.append(
            Table(name="depth", title="Best dev score by layers kept", columns=_DEPTH, rows=tuple(cut))
        )
    return tables


def _line(rows: Sequence[Row]) -> dict[str, Any]:
    kept = ("data", "target", "fusion", "size", "examples", "metric", "depth", "parameters")
    return {**{name: rows[0][name] for name in kept}, **_score(known(rows, "dev")),
            "best_epoch": average(known(rows, "best_epoch"))}  # fmt: skip


def _score(values: Sequence[float]) -> dict[str, float | None]:
    """Mean, spread and band of the trials that ended well."""
    low, high = band(values) if values else (None, None)
    return {"dev": average(values), "dev_sd": spread(values), "low": low, "high": high}


def _against_size(on: str, rows: Sequence[Row]) -> Figure:
    points = [
        {"fusion": group[0]["fusion"], "N": group[0]["size"], **_score(known(group, "dev"))}
        for group in groups(rows, "fusion", "size")
    ]
    return _lines(
        "scores", on, points, x="N", log_x=True, x_title="N, examples a class",
        title="best dev score by number of examples",
    )  # fmt: skip


def _against_steps(on: str, rows: Sequence[Row]) -> Figure:
    scored: list[dict[str, Any]] = []
    for row in rows:
        for line in json.loads(row["history"]):
            step = line["epoch"] * row["steps"]
            scored.append({"fusion": row["fusion"], "step": step, "dev": line["dev"]})
    points = [
        {"fusion": group[0]["fusion"], "step": group[0]["step"], **_score(known(group, "dev"))}
        for group in groups([point for point in scored if point["dev"] is not None], "fusion", "step")
    ]
    return _lines(
        "curve", on, points, x="step", x_title="steps",
        title=f"dev score over training, N = {rows[0]['size']}",
    )  # fmt: skip


def _against_depth(on: str, rows: Sequence[Row]) -> Figure:
    points = [
        {"fusion": group[0]["fusion"], "layers": group[0]["depth"], **_score(known(group, "dev"))}
        for group in groups(rows, "fusion", "depth")
    ]
    return _lines(
        "depth", on, points, x="layers", x_title="layers kept, from the first",
        title=f"best dev score by depth, N = {rows[0]['size']}",
    )  # fmt: skip


def _lines(name: str, on: str, points: Sequence[Row], *, title: str, **axes: Any) -> Figure:
    shown = [point for point in points if point["dev"] is not None]
    chart = figures.lines(
        shown, y="dev", series="fusion", band=("low", "high"), y_title="dev score, %", **axes
    )
    return Figure(
        name=f"{name}-{on}".replace(" ", "-"), title=f"{on}: {title}",
        about=f"A line a fusion with a 95 % band over trials: {title}, on {on}.", chart=chart,
    )  # fmt: skip


def _verdicts(rows: Sequence[Row]) -> list[str]:
    """For each fusion but the base: whether it beats it, size by size and on average."""
    notes = []
    for of_target in groups(rows, "on"):
        scores = {
            (group[0]["fusion"], group[0]["size"]): average(known(group, "dev"))
            for group in groups(of_target, "fusion", "size")
        }
        sizes = list(dict.fromkeys(row["size"] for row in of_target))
        others = dict.fromkeys(row["fusion"] for row in of_target if row["fusion"] != BASE)
        for fusion in others:
            pairs = [(scores.get((fusion, size)), scores.get((BASE, size))) for size in sizes]
            both = [(own, base) for own, base in pairs if own is not None and base is not None]
            if both:
                notes.append(_verdict(of_target[0], fusion, both))
    return notes


def _verdict(row: Row, fusion: str, pairs: Sequence[tuple[float, float]]) -> str:
    sign = 1 if metrics.higher_is_better(row["metric"]) else -1
    own, base = (average(values) or 0.0 for values in zip(*pairs, strict=True))
    better = sum(sign * a > sign * b for a, b in pairs)
    verb = "beats" if sign * own > sign * base else "does not beat"
    paper = {"affine": "; the paper says it does", "dwatt": "; the paper says it does"}.get(fusion, "")
    return (
        f"{row['on']}: {fusion} {verb} {BASE}, {own:.2f} against {base:.2f} on average over N, "
        f"better at {better} of {len(pairs)}{paper}"
    )


EXPERIMENT = FewShot
