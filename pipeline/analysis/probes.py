"""What each layer knows: the scores of heads that read one layer."""

import json
from collections.abc import Iterator, Mapping, Sequence
from statistics import mean, stdev
from typing import Any

from pipeline import figures, metrics
from pipeline.analysis._base import Answer, Question, file_name
from pipeline.analysis._material import Material, labels
from pipeline.findings import Cell, Column, Figure, Table
from pipeline.results import load_run

PROBE = "single_layer"


class Probes(Question):
    """Scores by layer of heads of `single_layer`, from a sweep or from runs: mean and spread over seeds.

    Where a layer has heads of several settings (learning rate, decay, ...), its best setting counts.
    """

    def lacks(self, material: Material) -> str:
        """Heads of `single_layer`."""
        swept = any(row["fusion"] == PROBE for rows in material.sweeps.values() for row in rows)
        if swept or any(record.method == PROBE for record in material.records):
            return ""
        return "no head of single_layer: sweep them with --fusion single_layer --seeds 3"

    def answer(self, material: Material) -> Answer:
        """Collects the scores."""
        # The best heads of a sweep are runs too, and are among its rows already.
        rows = list(_of_sweeps(material)) or list(_of_runs(material))
        by_metric: dict[str, list[dict[str, Cell]]] = {}
        for line in _lines(rows):
            by_metric.setdefault(str(line["metric"]), []).append(line)
        lines = [line for alike in by_metric.values() for line in alike]
        table = Table(name="probes", title="Score of each layer alone", columns=_COLUMNS, rows=tuple(lines))
        drawn = [_figure(alike, metric, len(by_metric)) for metric, alike in by_metric.items()]
        return Answer(tables=(table,), figures=tuple(drawn))


_COLUMNS = (
    Column(name="target", title="target"),
    Column(name="layer", title="layer"),
    Column(name="metric", title="metric"),
    Column(name="dev", title="dev, mean", digits=2),
    Column(name="dev_sd", title="± sd", digits=2),
    Column(name="test", title="test, mean", digits=2),
    Column(name="heads", title="heads"),
)


def _of_sweeps(material: Material) -> Iterator[dict[str, Any]]:
    varied = ("decoder", "options", "batch_size", "lr", "weight_decay", "dropout")
    shown = labels(material.sweeps)
    for path, rows in material.sweeps.items():
        for row in (row for row in rows if row["fusion"] == PROBE and row["status"] == "ok"):
            where = "" if len(material.sweeps) == 1 else f", {shown[path]}"
            yield {
                "target": f"{row['target']}{where}",
                "metric": row["metric"],
                "dev": row["dev"],
                "test": row["test"],
                "layer": json.loads(row["options"])["layer"],
                "setting": tuple(row[name] for name in varied),
            }


def _of_runs(material: Material) -> Iterator[dict[str, Any]]:
    probes = [record for record in material.records if record.method == PROBE]
    shown = labels(dict.fromkeys(str(record.store) for record in probes))
    for record in probes:
        run = load_run(record.path)
        where = "" if len(shown) == 1 else f", {shown[str(record.store)]}"
        rates = {name: value for name, value in record.config["rates"].items() if name != "seed"}
        schedule = {n: v for n, v in record.config["schedule"].items() if n != "data_seed"}
        score = {
            "target": f"{run.target.name}{where}",
            "metric": run.metric,
            "dev": run.result["dev"],
            "test": None,
        }
        setting = json.dumps([rates, schedule, run.spec.decoder, run.spec.decoder_options], default=str)
        yield {**score, "layer": run.spec.fusion_options["layer"], "setting": setting}


def _lines(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Cell]]:
    """A line for each target and layer, in their order."""
    settings: dict[tuple[Any, ...], list[Mapping[str, Any]]] = {}
    for row in rows:
        if row["dev"] is not None:
            settings.setdefault((row["target"], row["metric"], row["layer"], row["setting"]), []).append(
                row
            )
    best: dict[tuple[Any, ...], dict[str, Cell]] = {}
    for (target, metric, layer, _), heads in settings.items():
        line = _line(target, metric, layer, heads)
        sign = 1.0 if metrics.higher_is_better(metric) else -1.0
        known = best.setdefault((target, metric, layer), line)
        if sign * mean(h["dev"] for h in heads) > sign * float(known["dev"] or 0.0):
            best[target, metric, layer] = line
    targets = list(dict.fromkeys(row["target"] for row in rows))
    return [best[key] for key in sorted(best, key=lambda key: (targets.index(key[0]), key[2]))]


def _line(target: str, metric: str, layer: int, heads: Sequence[Mapping[str, Any]]) -> dict[str, Cell]:
    dev = [head["dev"] for head in heads]
    test = [head["test"] for head in heads if head["test"] is not None]
    centre, sd = mean(dev), stdev(dev) if len(dev) > 1 else 0.0
    return {
        "target": target,
        "layer": layer,
        "metric": metric,
        "dev": centre,
        "dev_sd": sd,
        "test": mean(test) if test else None,
        "heads": len(dev),
        "low": centre - sd,
        "high": centre + sd,
    }


def _figure(lines: Sequence[Mapping[str, Cell]], metric: str, of: int) -> Figure:
    chart = figures.lines(
        lines, x="layer", y="dev", series="target", band=("low", "high"),
        x_title="layer (0: embeddings)", y_title=f"dev {metric}",
    )  # fmt: skip
    return Figure(
        name="probes" if of == 1 else file_name("probes", metric),
        title="Score of each layer alone" + ("" if of == 1 else f": {metric}"),
        about="Lines: dev score of a head that reads one layer, by layer. Bands: one standard deviation "
        "over seeds.",
        chart=chart,
    )


QUESTION = Probes
