"""A masked language model: what its perplexity gains by a fusion of frozen layers, and by fine-tuning."""

import json
import time
from collections.abc import Mapping, Sequence
from statistics import mean, stdev
from typing import Any, ClassVar

from cache import open_bank
from pipeline import figures, metrics
from pipeline.errors import PipelineError
from pipeline.experiments._base import Data, Experiment, Lab
from pipeline.experiments._tables import words
from pipeline.findings import Column, Figure, Findings, Table
from pipeline.grid import Grid
from pipeline.job import Schedule, open_target
from pipeline.records import read_record

TARGET = "token"
UNTOUCHED = "untouched encoder"
CHUNK_TOKENS = 128


class MaskedLM(Experiment):
    """Perplexity with frozen features, and fine-tuned (DWAtt, Table 3). Give the data as ``DATA::token``.

    The text is masked several times and encoded once; of the states those of the predicted tokens are kept.
    The decoder starts as the encoder's own output layer.

    Args:
        fusions: late fusions, with commas between.
        learn: what is trained of the output layer, with commas between: none, transform, all.
        maskings: of each chunk of text.
        max_length: of a chunk, in tokens; that of ``--max-length`` or 128 if not given.
        epochs: of each head.
        lr: learning rates, with commas between; the best by its mean counts.
        seeds: heads of each setting.
        batch_size: chunks of a step.
        methods: of early fusion, on the same maskings, with commas between; ``none`` for none. They train
            the last of `learn` along.
        tune_epochs: of each method.
        tune_lr: learning rate of the methods; each one's own if not given.
        train: split to learn from.
        dev: split to score; the epoch is chosen on it too.
    """

    title: ClassVar[str] = "Masked language models, frozen and fine-tuned"
    paper: ClassVar[str] = "DWAtt, Table 3"

    def __init__(
        self,
        *,
        fusions: str = "last_layer,attention,affine,dwatt",
        learn: str = "none,transform",
        maskings: int = 3,
        max_length: int | None = None,
        epochs: int = 5,
        lr: str = "1e-3,1e-4",
        seeds: int = 1,
        batch_size: int = 16,
        methods: str = "fine_tune",
        tune_epochs: int = 1,
        tune_lr: float | None = None,
        train: str = "train",
        dev: str = "dev",
    ) -> None:
        self.fusions, self.learn = words(fusions), words(learn)
        unknown = set(self.learn) - {"none", "transform", "all"}
        if unknown:
            raise PipelineError(f"--set learn: {sorted(unknown)[0]!r} is none of none, transform, all")
        try:
            self.lr = tuple(float(value) for value in lr.split(","))
        except ValueError as error:
            raise PipelineError(f"--set lr={lr}: give numbers with commas between") from error
        self.maskings, self.max_length, self.seeds = maskings, max_length, seeds
        self.epochs, self.batch_size = epochs, batch_size
        self.methods = [] if methods == "none" else words(methods)
        self.tune_epochs, self.tune_lr = tune_epochs, tune_lr
        self.train, self.dev = train, dev

    def run(self, lab: Lab) -> Findings:
        """One bank a text, the untouched encoder, then a sweep."""
        began = time.perf_counter()
        if self.methods:
            lab.check_text(*lab.data, instead=", or --set methods=none")
        lines: list[dict[str, Any]] = []
        notes = [
            f"learned from split {self.train!r}, scored on split {self.dev!r}, which picks the epoch too",
        ]
        for data in lab.data:
            if data.targets != (TARGET,):
                raise PipelineError(f"masked-lm predicts tokens: give {data.path}::{TARGET}")
            length = self._length(lab)
            store = lab.bank(data, "masked", maskings=self.maskings, max_length=length)
            whole = open_target(open_bank(store), TARGET, self.train)[1].settings["learn"] == "none"
            if not whole:
                notes.append(
                    f"{lab.encoder} has no output layer of its own, its embeddings stand in: there is no "
                    "untouched encoder, and 'learn=none' is left out"
                )
            lines += self._lines(lab, data, store, whole=whole)
            lines += [self._tuned(lab, data, method) for method in self.methods]
        return Findings(
            kind="experiment",
            name="masked-lm",
            title=self.title,
            paper=self.paper,
            asked=dict(vars(self)),
            seconds=time.perf_counter() - began,
            notes=tuple(notes),
            tables=(Table(name="perplexity", title=self.title, columns=_COLUMNS, rows=tuple(lines)),),
            figures=tuple(
                _figure([line for line in lines if line["data"] == data.name]) for data in lab.data
            ),
        )

    def _length(self, lab: Lab) -> int:
        return self.max_length or lab.reading.max_length or CHUNK_TOKENS

    def _lines(self, lab: Lab, data: Data, store: str, *, whole: bool) -> list[dict[str, Any]]:
        rows: list[dict[str, Any]] = []
        if whole:
            untouched = Grid(targets=[TARGET], fusions=["last_layer"], options={"learn": ["none"]})
            found = self._sweep(lab, f"{data.name}-untouched", store, untouched, epochs=1)
            rows = [{**row, "fusion": UNTOUCHED} for row in found]
        learn = [one for one in self.learn if whole or one != "none"]
        if not learn:
            raise PipelineError(
                f"--set learn=none: {lab.encoder} has no output layer: give learn=transform"
            )
        grid = Grid(
            targets=[TARGET], fusions=self.fusions, lr=self.lr, seeds=self.seeds, options={"learn": learn},
            batch_size=(self.batch_size,),
        )  # fmt: skip
        found = self._sweep(lab, data.name, store, grid, epochs=self.epochs)
        # The last layer with nothing to learn is the untouched encoder again.
        rows += [row for row in found if row["parameters"] or row["fusion"] != "last_layer"]
        return [{"data": data.name, **line} for line in _best(rows)]

    def _tuned(self, lab: Lab, data: Data, method: str) -> dict[str, Any]:
        """The row of a method that trains through the encoder."""
        learn = self.learn[-1]
        plan = {"epochs": self.tune_epochs, "lr": self.tune_lr, "batch_size": self.batch_size}
        run = lab.tune(
            f"{data.name}-{method}",
            method,
            [(data, TARGET)],
            plan=plan,
            maskings=self.maskings,
            options={"learn": learn},
            max_length=self._length(lab),
            splits={"train": self.train, "dev": self.dev},
        )
        record = read_record(run)
        return {
            **{name: record.result[name] for name in ("metric", "parameters", "fusion_parameters", "dev")},
            "data": data.name,
            "fusion": method,
            "learn": learn,
            "lr": record.config["plan"]["lr"],
            "dev_sd": None,  # one seed
        }

    def _sweep(self, lab: Lab, name: str, store: str, grid: Grid, *, epochs: int) -> list[dict[str, Any]]:
        schedule = Schedule(epochs=epochs, precision=lab.product_precision)
        splits = {"train": self.train, "dev": self.dev, "test": self.dev}
        return lab.sweep(name, lab.plan(store, schedule, splits=splits), grid)


def _best(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """One line a fusion and form of the decoder: that of the learning rate with the best mean."""
    settings: dict[tuple[Any, ...], dict[float, list[Mapping[str, Any]]]] = {}
    for row in rows:
        key = (row["fusion"], row["options"])
        settings.setdefault(key, {}).setdefault(row["lr"], []).append(row)
    lines = []
    for by_rate in settings.values():
        whole = [_line(group) for group in by_rate.values() if all(row["status"] == "ok" for row in group)]
        if whole:
            sign = 1.0 if metrics.higher_is_better(whole[0]["metric"]) else -1.0
            lines.append(max(whole, key=lambda line: sign * line["dev"]))
    return lines


def _line(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    dev = [row["dev"] for row in rows]
    untouched = rows[0]["fusion"] == UNTOUCHED
    return {
        **{name: rows[0][name] for name in ("fusion", "metric", "parameters", "fusion_parameters")},
        "learn": "" if untouched else json.loads(rows[0]["options"])["learn"],
        "lr": rows[0]["lr"] if rows[0]["parameters"] else None,
        "dev": mean(dev),
        "dev_sd": stdev(dev) if len(dev) > 1 else 0.0,
    }


def _figure(lines: Sequence[Mapping[str, Any]]) -> Figure:
    named = [{**line, "decoder": _DECODER[line["learn"]]} for line in lines]
    chart = figures.bars(
        named, x="fusion", y="dev", series="decoder", x_title="", y_title="perplexity, less is better"
    )
    name = lines[0]["data"]
    return Figure(
        name=f"perplexity-{name}", title=f"Perplexity on {name}", chart=chart,
        about="Bars: perplexity of each fusion, by what is learned of the output layer.",
    )  # fmt: skip


_DECODER = {
    "": "as it came",
    "none": "output layer frozen",
    "transform": "its transform learned",
    "all": "all of it learned",
}
_COLUMNS = (
    Column(name="data", title="data"),
    Column(name="fusion", title="fusion or method"),
    Column(name="learn", title="learned of the decoder"),
    Column(name="lr", title="learning rate", digits=6),
    Column(name="dev", title="perplexity, mean", digits=2),
    Column(name="dev_sd", title="± sd", digits=2),
    Column(name="parameters", title="trained parameters"),
    Column(name="fusion_parameters", title="of the fusion"),
)

EXPERIMENT = MaskedLM
