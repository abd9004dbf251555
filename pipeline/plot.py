"""The figures of sweeps and comparisons: score against parameters, score by layer, loss against time."""

import json
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from statistics import mean, pstdev
from typing import Any

from pipeline import figures, metrics
from pipeline.findings import Figure, save_figure

Rows = Sequence[Mapping[str, Any]]


def save_pictures(drawn: Iterable[Figure], out: str) -> list[str]:
    """Writes figures as SVG and PNG into a folder, made where it is not there.

    Returns:
        The files written.

    Raises:
        PipelineError: the disk refuses.
    """
    return [path for figure in drawn for path in save_figure(figure, out)]


def sweep_figures(rows: Rows) -> list[Figure]:
    """What a sweep found, for each target: by parameters, and by layer where there are probes.

    Args:
        rows: of ``results.parquet``.
    """
    found = []
    for target in dict.fromkeys(row["target"] for row in rows):
        whole = [row for row in rows if row["target"] == target and row["status"] == "ok"]
        probes = [row for row in whole if row["fusion"] == "single_layer"]
        if len(whole) > len(probes):
            found.append(_score_by_parameters(whole, target))
        if probes:
            found.append(_score_by_layer(probes, target))
    return found


def loss_figure(curves: Sequence[Mapping[str, Any]], target: str) -> Figure:
    """Training loss against seconds of training.

    Args:
        curves: of `pipeline.compare.curves`; what goes through the encoder is dashed.
        target: what all of them learn.
    """
    rows = [
        {"run": curve["label"], "kind": curve["kind"], "seconds": seconds, "loss": loss}
        for curve in curves
        for seconds, loss in zip(curve["seconds"], curve["loss"], strict=True)
        if loss is not None and seconds > 0  # the axis is logarithmic
    ]
    dashed = "kind" if len({row["kind"] for row in rows}) > 1 else None
    chart = figures.lines(
        rows, x="seconds", y="loss", series="run", dashed=dashed, log_x=True,
        x_title="seconds of training, without extraction", y_title="training loss",
    )  # fmt: skip
    return Figure(
        name=f"{target}-loss",
        title=f"{target}: training loss against time",
        about="A line a run: its mean training loss after each epoch, by seconds of training.",
        chart=chart,
    )


def score_name(metric: str) -> str:
    """The title of an axis of dev scores."""
    return f"dev {metric}, %" if metrics.higher_is_better(metric) else f"dev {metric}"


def _score_by_parameters(rows: Rows, target: str) -> Figure:
    """Mean and spread over seeds of each fusion's best setting, against trainable parameters."""
    points = [
        {"fusion": fusion, "parameters": best[0]["parameters"], **_spread(best)}
        for fusion, best in best_settings(rows).items()
    ]
    chart = figures.points(
        points, x="parameters", y="dev", series="fusion", spread=("low", "high"), log_x=True,
        x_title="trainable parameters, decoder included", y_title=score_name(rows[0]["metric"]),
    )  # fmt: skip
    return Figure(
        name=f"{target}-parameters",
        title=f"{target}: dev score against trained parameters",
        about="A point a fusion: the mean of its best setting, and one standard deviation over seeds.",
        chart=chart,
    )


def _score_by_layer(rows: Rows, target: str) -> Figure:
    """Mean and spread over seeds of the probe on each layer."""
    by_layer: dict[int, list[Any]] = defaultdict(list)
    for row in rows:
        by_layer[int(json.loads(row["options"])["layer"])].append(row)
    points = [
        {"layer": layer, **_spread(next(iter(best_settings(by_layer[layer]).values())))}
        for layer in sorted(by_layer)
    ]
    chart = figures.lines(
        points, x="layer", y="dev", band=("low", "high"),
        x_title="layer (0: embeddings)", y_title=score_name(rows[0]["metric"]),
    )  # fmt: skip
    return Figure(
        name=f"{target}-layers",
        title=f"{target}: dev score of a probe on each layer",
        about="The mean of each layer's best setting, with one standard deviation over seeds as a band.",
        chart=chart,
    )


def _spread(rows: Rows) -> dict[str, float]:
    scores = [row["dev"] for row in rows]
    middle, sd = mean(scores), pstdev(scores)
    return {"dev": middle, "low": middle - sd, "high": middle + sd}


def best_settings(rows: Rows) -> dict[str, list[Mapping[str, Any]]]:
    """For each fusion, the rows (one a seed) of its setting with the best mean dev score."""
    settings: dict[tuple[Any, ...], list[Mapping[str, Any]]] = defaultdict(list)
    for row in rows:
        names = ("fusion", "decoder", "options", "batch_size", "lr", "weight_decay", "dropout")
        settings[tuple(row[name] for name in names)].append(row)
    sign = 1.0 if metrics.higher_is_better(rows[0]["metric"]) else -1.0
    best: dict[str, list[Mapping[str, Any]]] = {}
    for (fusion, *_), group in settings.items():
        score = sign * mean(row["dev"] for row in group)
        if fusion not in best or score > sign * mean(row["dev"] for row in best[fusion]):
            best[fusion] = group
    return best
