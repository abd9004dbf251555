"""Tables and figures of weights over layers: by task, and by groups of tokens.

A *task* is a target, a fusion and its settings; its *heads* differ by their seeds, and by their banks where
there are several. A mean is the mean over heads of their means over tokens; ± sd is the spread over heads.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations, product

import numpy as np
from jaxtyping import Float64
from numpy import ndarray

from pipeline import figures
from pipeline.analysis._base import Answer, file_name
from pipeline.analysis._material import Material, labels
from pipeline.analysis._tasks import task_names
from pipeline.analysis._weights import GROUPINGS, Mean, Reading, read
from pipeline.errors import PipelineError
from pipeline.findings import Cell, Column, Figure, Table
from pipeline.results import Run

DRAWN = 30
"""Groups that a figure shows, those of the most tokens; the table has all."""

_TITLES = {"class": "class", "language": "language (bank)", "position": "place", "kind": "kind of word"}
_LAYER, _WEIGHT = "layer (0: embeddings)", "weight, mean over tokens"


@dataclass(frozen=True)
class Share:
    """The weights of one group over several heads."""

    tokens: int
    heads: int
    mean: Float64[ndarray, " layer"]
    sd: Float64[ndarray, " layer"]

    @classmethod
    def of(cls, means: Sequence[tuple[str, Mean]]) -> "Share":
        """Of the heads' own means, each with its bank: the tokens of a bank count once."""
        weights = np.array([mean.weights for _, mean in means])
        return cls(
            tokens=sum({bank: mean.tokens for bank, mean in means}.values()),
            heads=len(means),
            mean=weights.mean(0),
            sd=weights.std(0, ddof=1) if len(means) > 1 else np.zeros(weights.shape[1]),
        )


@dataclass(frozen=True, eq=False)
class Task:
    """The heads of one target, fusion and settings."""

    name: str
    layers: tuple[int, ...]
    readings: tuple[Reading, ...]

    def shares(self, grouping: str) -> dict[str, Share]:
        """The weights of each group: most tokens first, places ascending, languages as they were named."""
        found: dict[str, list[tuple[str, Mean]]] = {}
        for reading in self.readings:
            means = reading.means.get("all" if grouping == "language" else grouping, {})
            for group, mean in means.items():
                found.setdefault(reading.bank if grouping == "language" else group, []).append(
                    (reading.bank, mean)
                )
        shown = labels(found) if grouping == "language" else {name: name for name in found}
        shares = {shown[name]: Share.of(means) for name, means in found.items()}
        if grouping in ("class", "kind"):
            return dict(sorted(shares.items(), key=lambda pair: -pair[1].tokens))
        if grouping == "position":
            return dict(sorted(shares.items(), key=lambda pair: int(pair[0].split()[0])))
        return shares


def share_answer(material: Material, runs: Sequence[Run], *, name: str, title: str) -> Answer:
    """All that is told of the weights of some heads.

    Args:
        material: how to look.
        runs: the heads.
        name: of the files.
        title: of what is weighed, for tables and figures.

    Raises:
        PipelineError: a grouping does not fit.
    """
    tasks = list(_tasks(read(material, runs)))
    tables, drawn = [_overall(tasks, name, title)], [_lines(tasks, name, title)]
    if distances := _distances(tasks):
        tables.append(_distance_table(distances, name))
    for by in GROUPINGS if material.by is None else (material.by,):
        grouped = {task: task.shares(by) for task in tasks}
        grouped = {task: shares for task, shares in grouped.items() if len(shares) > 1}
        if not grouped:
            if material.by is not None:
                raise PipelineError(f"--by {by}: {_ONE_GROUP[by]}")
            continue
        tables.append(_grouped(grouped, by, name, title))
        drawn += _drawings(grouped, by, name, title)
    return Answer(tables=tuple(tables), figures=tuple(drawn))


_ONE_GROUP = {
    "class": "the targets have no classes; group by kind or position",
    "language": "all heads read one bank; name runs on several, or several banks beside the runs",
    "position": "these heads decode one token of an example; name runs of a tagger, or of --pooling mean",
    "kind": "these heads decode one kind of token; name runs of a tagger, or of --pooling mean",
}


def _tasks(readings: Sequence[Reading]) -> Iterator[Task]:
    by_task: dict[str, list[Reading]] = {}
    names = task_names([reading.run for reading in readings])
    for name, reading in zip(names, readings, strict=True):
        by_task.setdefault(name, []).append(reading)
    for name, alike in by_task.items():
        yield Task(name=name, layers=alike[0].layers, readings=tuple(alike))


def _overall(tasks: Sequence[Task], name: str, title: str) -> Table:
    return Table(
        name=name,
        title=title,
        columns=(
            Column(name="task", title="task"),
            Column(name="layer", title="layer"),
            Column(name="weight", title="weight", digits=4),
            Column(name="sd", title="± sd", digits=4),
            Column(name="heads", title="heads"),
            Column(name="tokens", title="tokens"),
        ),
        rows=tuple(_points({task.name: (task, task.shares("all")["all"]) for task in tasks}, "task")),
    )


def _points(shares: Mapping[str, tuple[Task, Share]], key: str) -> Iterator[dict[str, Cell]]:
    """A row for each name and layer; ``low`` and ``high`` are one sd below and above."""
    for name, (task, share) in shares.items():
        for layer, mean, sd in zip(task.layers, share.mean.tolist(), share.sd.tolist(), strict=True):
            ends = {"low": max(0.0, mean - sd), "high": mean + sd}
            counts = {"heads": share.heads, "tokens": share.tokens}
            yield {key: name, "layer": layer, "weight": mean, "sd": sd, **ends, **counts}


def _lines(tasks: Sequence[Task], name: str, title: str) -> Figure:
    rows = list(_points({task.name: (task, task.shares("all")["all"]) for task in tasks}, "task"))
    return Figure(
        name=name,
        title=title,
        about="Lines: weight of each layer, one line a task, averaged over tokens and heads. Bands: one "
        "standard deviation over heads of different seeds.",
        chart=_line_chart(rows, "task"),
    )


def _line_chart(rows: Sequence[Mapping[str, Cell]], series: str) -> dict[str, object]:
    return figures.lines(
        rows, x="layer", y="weight", series=series, band=("low", "high"), x_title=_LAYER, y_title=_WEIGHT
    )


def _distances(tasks: Sequence[Task]) -> list[dict[str, Cell]]:
    """How far the weights of heads are apart, within a task and between two."""
    rows = list[dict[str, Cell]]()
    for one, other in [*((task, task) for task in tasks), *combinations(tasks, 2)]:
        if one.layers != other.layers:
            continue
        means = [[r.means["all"]["all"].weights for r in task.readings] for task in (one, other)]
        pairs = list(combinations(means[0], 2) if one is other else product(*means))
        apart = [distance(a, b) for a, b in pairs]
        if apart:
            spread: dict[str, Cell] = {"mean": float(np.mean(apart)), "min": min(apart), "max": max(apart)}
            rows.append({"one": one.name, "other": other.name, **spread, "pairs": len(apart)})
    return rows


def distance(one: Float64[ndarray, " layer"], other: Float64[ndarray, " layer"]) -> float:
    """Total variation: the share of weight that lies on other layers, 0 to 1.

    >>> distance(np.array([0.5, 0.5]), np.array([0.25, 0.75]))
    0.25
    """
    return float(np.abs(one - other).sum() / 2)


def _distance_table(rows: Sequence[Mapping[str, Cell]], name: str) -> Table:
    return Table(
        name=f"{name}-distance",
        title="Distance of the heads' mean weights: share of weight on other layers, 0 to 1",
        columns=(
            Column(name="one", title="heads of"),
            Column(name="other", title="against heads of"),
            Column(name="mean", title="mean", digits=3),
            Column(name="min", title="min", digits=3),
            Column(name="max", title="max", digits=3),
            Column(name="pairs", title="pairs"),
        ),
        rows=tuple(rows),
    )


def _grouped(grouped: Mapping[Task, Mapping[str, Share]], by: str, name: str, title: str) -> Table:
    """A row a group, a column a layer. The mean layer is Σ n·weight_n."""
    layers = sorted({layer for task in grouped for layer in task.layers})
    rows = [
        _group_row(task, by, group, share)
        for task, found in grouped.items()
        for group, share in found.items()
    ]
    return Table(
        name=file_name(name, "by", by),
        title=f"{title}, by {_TITLES[by]}",
        columns=(
            Column(name="task", title="task"),
            Column(name=by, title=_TITLES[by]),
            Column(name="tokens", title="tokens"),
            *(Column(name=f"layer_{n}", title=str(n), digits=3) for n in layers),
            Column(name="mean_layer", title="mean layer", digits=2),
        ),
        rows=tuple(rows),
    )


def _group_row(task: Task, by: str, group: str, share: Share) -> dict[str, Cell]:
    weights = dict(zip((f"layer_{n}" for n in task.layers), share.mean.tolist(), strict=True))
    centre = float(share.mean @ np.array(task.layers))
    return {"task": task.name, by: group, "tokens": share.tokens, **weights, "mean_layer": centre}


def _drawings(
    grouped: Mapping[Task, Mapping[str, Share]], by: str, name: str, title: str
) -> Iterator[Figure]:
    """One figure a task: lines with bands for languages, else a grid of groups and layers."""
    for task, shares in grouped.items():
        shown = dict(sorted(shares.items(), key=lambda pair: -pair[1].tokens)[:DRAWN])
        shown = {group: share for group, share in shares.items() if group in shown}
        rows = list(_points({group: (task, share) for group, share in shown.items()}, by))
        chart: dict[str, object]
        if by == "language":
            chart = _line_chart(rows, by)
        else:
            chart = figures.heat(
                rows,
                x="layer",
                y=by,
                value="weight",
                x_title=_LAYER,
                y_title=_TITLES[by],
                value_title="weight",
            )
        most = f" The {DRAWN} of the most tokens; the table has all." if len(shown) < len(shares) else ""
        yield Figure(
            name=file_name(name, "by", by, task.name),
            title=f"{title}: {task.name}, by {_TITLES[by]}",
            about=f"Weight of each layer in each group of tokens, averaged over tokens and heads.{most}",
            chart=chart,
        )
