"""Score over the size of the backbone."""

import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

from pipeline import figures
from pipeline.errors import PipelineError
from pipeline.experiments._base import Data, Lab
from pipeline.experiments._sources import Bench, FromSources, facts_of, mean_sd, score_of
from pipeline.experiments._tables import words
from pipeline.findings import Column, Figure, Findings, Table
from pipeline.grid import Grid
from pipeline.job import Schedule
from pipeline.tuning.backbone import load_backbone

EARLY, LATE = "through the encoder", "on the bank"


@dataclass(kw_only=True)
class Scaling(FromSources):
    """Dev score of late and early methods on backbones of several sizes (ATTEMPT, Figure 4).

    With `attempt` or `spot` among the methods the first `sources` data are source tasks; without, all data
    are targets.

    The options of `FromSources` are options here too.

    Args:
        encoders: Hub ids or folders beside that of ``--encoder``, with commas between.
        methods: of early fusion, with commas between; may be empty.
        fusions: late fusions, with commas between; may be empty.
        lr: learning rate of the heads on a bank.
    """

    title: ClassVar[str] = "Score over the size of the backbone"
    paper: ClassVar[str] = "ATTEMPT, Figure 4"

    encoders: str
    methods: str = "prompt_tuning,fine_tune"
    fusions: str = "last_layer,attention"
    lr: float = 2e-3

    def run(self, lab: Lab) -> Findings:
        """Every method on every target, backbone by backbone."""
        began = time.perf_counter()
        rows = [row for one in self._labs(lab) for row in self._rows(one)]
        rows.sort(key=lambda row: row["size"])
        targets = list(dict.fromkeys(row["target"] for row in rows))
        return Findings(
            kind="experiment",
            name="scaling",
            title=self.title,
            paper=self.paper,
            asked=asdict(self),
            seconds=time.perf_counter() - began,
            tables=(Table(name="scores", title=self.title, columns=_COLUMNS, rows=tuple(rows)),),
            figures=tuple(_figure([row for row in rows if row["target"] == target]) for target in targets),
        )

    def _labs(self, lab: Lab) -> list[Lab]:
        """A lab for each backbone, with banks of its own."""
        encoders = list(dict.fromkeys([lab.encoder, *words(self.encoders)]))
        names = [_short(encoder) for encoder in encoders]
        if len(encoders) < 2:
            raise PipelineError("--set encoders: give one or more beside --encoder, with commas between")
        for name in names:
            if names.count(name) > 1:
                raise PipelineError(
                    f"--set encoders: two are called {name}: give their folders other names"
                )
        return [
            replace(
                lab,
                encoder=one,
                banks=f"{lab.banks}/{name}",
                encoder_revision=lab.encoder_revision if one == lab.encoder else None,
            )
            for one, name in zip(encoders, names, strict=True)
        ]

    def _rows(self, lab: Lab) -> list[dict[str, Any]]:
        backbone = load_backbone(
            lab.encoder,
            revision=lab.encoder_revision,
            words=False,
            trust_remote_code=lab.trust_remote_code,
        )
        size = sum(p.numel() for p in backbone.model.parameters()) / 1e6
        del backbone
        bench = self.bench(lab, needed=any(m.startswith(("attempt", "spot")) for m in words(self.methods)))
        found = []
        for method in words(self.methods):
            for target in bench.targets:
                runs = [bench.run(method, target, seed) for seed in range(self.seeds)]
                line = {"method": method, "target": target, "metric": facts_of(runs[0])["metric"]}
                found.append({**line, "kind": EARLY, **mean_sd([score_of(run) for run in runs])})
        if words(self.fusions):
            found += [row for data in lab.data[self.sources :] for row in self._late(lab, data, bench)]
        return [{"encoder": _short(lab.encoder), "size": size, **row} for row in found]

    def _late(self, lab: Lab, data: Data, bench: Bench) -> list[dict[str, Any]]:
        """Heads on the bank of a data set, all seeds of a fusion as one stack."""
        grid = Grid(
            targets=data.targets, fusions=words(self.fusions), lr=(self.lr,), seeds=self.seeds,
            batch_size=(self.batch_size,),
        )  # fmt: skip
        schedule = Schedule(epochs=self.epochs, precision=lab.product_precision)
        heads = lab.sweep(f"{_short(lab.encoder)}-{data.name}", lab.plan(lab.bank(data), schedule), grid)
        names = {task: name for name, task in bench.targets.items()}
        rows = []
        for fusion in words(self.fusions):
            for target in data.targets:
                own = [head for head in heads if (head["fusion"], head["target"]) == (fusion, target)]
                line = {"method": fusion, "target": names[data, target], "metric": own[0]["metric"]}
                rows.append({**line, "kind": LATE, **mean_sd([head["dev"] for head in own])})
        return rows


def _short(encoder: str) -> str:
    return Path(encoder.rstrip("/")).name


def _figure(rows: Sequence[Mapping[str, Any]]) -> Figure:
    points = [
        {**row, "low": row["dev"] - row["dev_sd"], "high": row["dev"] + row["dev_sd"]} for row in rows
    ]
    chart = figures.lines(
        points, x="size", y="dev", series="method", band=("low", "high"), dashed="kind", log_x=True,
        tips=("encoder",),
        x_title="millions of parameters of the backbone", y_title=f"dev {rows[0]['metric']}",
    )  # fmt: skip
    name = rows[0]["target"]
    return Figure(
        name=f"scaling-{name}", title=f"Score over the size of the backbone, {name}", chart=chart,
        about=f"Lines: dev score on {name} of each method, by the number of the backbone's parameters.",
    )  # fmt: skip


_COLUMNS = (
    Column(name="encoder", title="backbone"),
    Column(name="size", title="its parameters, millions", digits=2),
    Column(name="method", title="fusion or method"),
    Column(name="kind", title="kind"),
    Column(name="target", title="target"),
    Column(name="metric", title="metric"),
    Column(name="dev", title="dev, mean", digits=2),
    Column(name="dev_sd", title="± sd", digits=2),
)

EXPERIMENT = Scaling
