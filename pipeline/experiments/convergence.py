"""Training loss and dev score against seconds, of heads on a bank and of methods through the encoder."""

import time
from collections.abc import Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any, ClassVar

from pipeline import figures
from pipeline.compare import compare
from pipeline.errors import PipelineError
from pipeline.experiments._base import Data, Experiment, Lab
from pipeline.experiments._tables import words
from pipeline.findings import Column, Figure, Findings, Table
from pipeline.job import Schedule
from pipeline.plot import score_name
from pipeline.records import read_record


class Convergence(Experiment):
    """How fast each way of adaptation learns (attention-fusion paper, Figure 3).

    Every run is trained alone. Its seconds are those of training; the extraction is not among them.

    Args:
        methods: of early fusion, with commas between; `name+fusion` trains that fusion on top; ``none``
            for none.
        fusions: late fusions, with commas between.
        epochs: of each head.
        early_epochs: of each run through the encoder.
        lr: learning rate of the heads.
        batch_size: examples of a step.
        seed: of the runs through the encoder.
    """

    title: ClassVar[str] = "Loss and score against time"
    paper: ClassVar[str] = "Attention Fusion, Figure 3"

    def __init__(
        self,
        *,
        methods: str = "bitfit,adapter,prompt_tuning,fine_tune",
        fusions: str = "last_layer,linear,concat,attention",
        epochs: int = 10,
        early_epochs: int = 10,
        lr: float = 2e-3,
        batch_size: int = 32,
        seed: int = 0,
    ) -> None:
        self.methods = [] if methods == "none" else words(methods)
        self.fusions = words(fusions)
        for method in self.methods:
            if method in ("spot", "attempt"):
                raise PipelineError(
                    f"--set methods: {method} needs prompts of other tasks: use attempt-table"
                )
        self.epochs, self.early_epochs, self.lr = epochs, early_epochs, lr
        self.batch_size, self.seed = batch_size, seed

    def run(self, lab: Lab) -> Findings:
        """Trains every run, then reads what each epoch noted."""
        began = time.perf_counter()
        if self.methods:
            lab.check_text(*lab.data, instead=", or --set methods=none")
        rows: list[dict[str, Any]] = []
        drawn: list[Figure] = []
        notes: list[str] = []
        for data in lab.data:
            store = lab.bank(data)
            for target in data.targets:
                runs = [*self._late(lab, data, store, target), *self._early(lab, data, target)]
                found = compare([str(run) for run in runs])
                on = {"data": data.name, "target": target, "metric": found["metric"]}
                rows += [{**on, **row} for row in found["runs"]]
                notes += [note for note in found["notes"] if note not in notes]
                drawn += _figures(runs, f"{data.name}-{target}", found["metric"])
        return Findings(
            kind="experiment",
            name="convergence",
            title=self.title,
            paper=self.paper,
            asked=dict(vars(self)),
            seconds=time.perf_counter() - began,
            notes=("seconds are of training alone, on a bank without its extraction", *notes),
            tables=(Table(name="runs", title=self.title, columns=_COLUMNS, rows=tuple(rows)),),
            figures=tuple(drawn),
        )

    def _late(self, lab: Lab, data: Data, store: str, target: str) -> list[Path]:
        schedule = Schedule(epochs=self.epochs, batch_size=self.batch_size, precision=lab.product_precision)
        return [
            lab.train(f"{data.name}-{target}-{f}", store, target, fusion=f, schedule=schedule, lr=self.lr)
            for f in self.fusions
        ]

    def _early(self, lab: Lab, data: Data, target: str) -> list[Path]:
        plan = {"epochs": self.early_epochs, "batch_size": self.batch_size, "seed": self.seed}
        runs = []
        for name in self.methods:
            method, _, fusion = name.partition("+")
            more = {"fusion": fusion} if fusion else {}
            runs.append(
                lab.tune(f"{data.name}-{target}-{name}", method, [(data, target)], plan=plan, **more)
            )
        return runs


def _figures(runs: Sequence[Path], on: str, metric: str) -> list[Figure]:
    rows = [row for run in runs for row in _curve(run, metric)]
    titles = {"loss": "training loss", "dev": f"dev {metric}"}
    found = []
    for name, title in titles.items():
        chart = figures.lines(
            [row for row in rows if row[name] is not None],
            x="seconds", y=name, series="run", dashed="kind", log_x=True,
            x_title="seconds of training", y_title=score_name(metric) if name == "dev" else title,
        )  # fmt: skip
        about = f"Lines: {title} of each run after each epoch, against its seconds of training."
        found.append(
            Figure(name=f"{name}-{on}", title=f"{title} against time, {on}", about=about, chart=chart)
        )
    return found


def _curve(run: Path, metric: str) -> list[dict[str, Any]]:
    """What a run noted after each epoch."""
    record = read_record(run)
    kinds = {"train": "on the bank", "tune": "through the encoder"}
    seconds = accumulate(line["seconds"] for line in record.lines)
    return [
        {
            "run": record.method,
            "kind": kinds[record.kind],
            "seconds": spent,
            "loss": line["loss"],
            "dev": line["dev"].get(metric),
        }
        for spent, line in zip(seconds, record.lines, strict=True)
    ]


_COLUMNS = (
    Column(name="data", title="data"),
    Column(name="target", title="target"),
    Column(name="method", title="fusion or method"),
    Column(name="metric", title="metric"),
    Column(name="dev", title="dev", digits=2),
    Column(name="epochs", title="epochs"),
    Column(name="parameters", title="trained parameters"),
    Column(name="seconds_per_epoch", title="seconds an epoch", digits=2),
    Column(name="seconds_to_own_95", title="seconds to 95 % of its best", digits=2),
    Column(name="seconds_to_95", title="seconds to 95 % of the best of all", digits=2),
)

EXPERIMENT = Convergence
