"""Pictures: score against trainable parameters, score by layer for probes, loss against time."""

import json
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import mean, pstdev
from typing import Any

from pipeline.errors import PipelineError

Rows = Sequence[Mapping[str, Any]]


def sweep_pictures(rows: Rows, out: str) -> list[str]:
    """Draws what a sweep found, for each target, as SVG and PNG.

    Args:
        rows: of ``results.parquet``.
        out: folder of the sweep.

    Returns:
        The files written.
    """
    files: list[str] = []
    for target in dict.fromkeys(row["target"] for row in rows):
        whole = [row for row in rows if row["target"] == target and row["status"] == "ok"]
        probes = [row for row in whole if row["fusion"] == "single_layer"]
        if len(whole) > len(probes):
            files += _save(_score_by_parameters(whole, target), Path(out) / f"{target}-parameters")
        if probes:
            files += _save(_score_by_layer(probes, target), Path(out) / f"{target}-layers")
    return files


def loss_pictures(curves: Sequence[Mapping[str, Any]], target: str, out: str) -> list[str]:
    """Draws training loss against seconds of training, as SVG and PNG.

    Args:
        curves: of `pipeline.compare.curves`; what goes through the encoder is dashed.
        target: what all of them learn.
        out: folder of the pictures, made where it is not there.

    Returns:
        The files written.

    Raises:
        PipelineError: the disk refuses.
    """
    figure, axes = _figure(target, "training loss")
    for curve in curves:
        points = [pair for pair in zip(curve["seconds"], curve["loss"], strict=True) if pair[1] is not None]
        style = "o--" if curve["kind"] == "tune" else "o-"
        seconds, losses = [pair[0] for pair in points], [pair[1] for pair in points]
        axes.plot(seconds, losses, style, markersize=3, label=curve["label"])
    axes.set_xscale("log")
    axes.set_xlabel("seconds of training, without extraction")
    axes.legend(frameon=False, fontsize="small")
    try:
        Path(out).mkdir(parents=True, exist_ok=True)
        return _save(figure, Path(out) / f"{target}-loss")
    except OSError as error:
        raise PipelineError(f"--out {out} cannot be written: {error}") from error


def _figure(target: str, ylabel: str) -> tuple[Any, Any]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.4, 4.0), layout="constrained")
    axes = figure.subplots()
    axes.set_ylabel(ylabel)
    axes.set_title(target, loc="left")
    axes.grid(visible=True, axis="y", alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    return figure, axes


def _score(metric: str) -> str:
    return f"dev {metric}, %" if metric != "mse" else "dev mse"


def _score_by_parameters(rows: Rows, target: str) -> Any:
    """Mean and spread over seeds of each fusion's best setting, against trainable parameters."""
    figure, axes = _figure(target, _score(rows[0]["metric"]))
    for fusion, best in best_settings(rows).items():
        scores = [row["dev"] for row in best]
        axes.errorbar(
            best[0]["parameters"], mean(scores), yerr=pstdev(scores), fmt="o", capsize=3, label=fusion
        )
    sizes = [row["parameters"] for row in rows]
    axes.set_xscale("log")
    axes.set_xlim(min(sizes) / 4, max(sizes) * 4)  # wide enough for a tick that is a power of ten
    axes.set_xlabel("trainable parameters, decoder included")
    axes.legend(frameon=False, fontsize="small")
    return figure


def _score_by_layer(rows: Rows, target: str) -> Any:
    """Mean and spread over seeds of the probe on each layer."""
    figure, axes = _figure(target, _score(rows[0]["metric"]))
    by_layer: dict[int, list[Any]] = defaultdict(list)
    for row in rows:
        by_layer[json.loads(row["options"])["layer"]].append(row)
    layers = sorted(by_layer, key=int)
    best = [next(iter(best_settings(by_layer[layer]).values())) for layer in layers]
    means = [mean(row["dev"] for row in group) for group in best]
    spread = [pstdev([row["dev"] for row in group]) for group in best]
    axes.errorbar([int(layer) for layer in layers], means, yerr=spread, fmt="o-", capsize=3)
    axes.set_xticks([int(layer) for layer in layers])
    axes.set_xlabel("layer (0: embeddings)")
    return figure


def best_settings(rows: Rows) -> dict[str, list[Mapping[str, Any]]]:
    """For each fusion, the rows (one a seed) of its setting with the best mean dev score."""
    settings: dict[tuple[Any, ...], list[Mapping[str, Any]]] = defaultdict(list)
    for row in rows:
        names = ("fusion", "decoder", "options", "batch_size", "lr", "weight_decay", "dropout")
        settings[tuple(row[name] for name in names)].append(row)
    sign = -1.0 if rows[0]["metric"] == "mse" else 1.0
    best: dict[str, list[Mapping[str, Any]]] = {}
    for (fusion, *_), group in settings.items():
        score = sign * mean(row["dev"] for row in group)
        if fusion not in best or score > sign * mean(row["dev"] for row in best[fusion]):
            best[fusion] = group
    return best


def _save(figure: Any, stem: Path) -> list[str]:
    paths = [str(stem.with_name(f"{stem.name}.{kind}")) for kind in ("svg", "png")]
    for path in paths:
        figure.savefig(path, dpi=150)
    return paths
