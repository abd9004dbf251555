"""The sections of a report: what was run, as tables and figures of `pipeline.findings`."""

import json
from collections import defaultdict
from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from pipeline import figures, metrics, plot
from pipeline.compare import compare_records, curves_of, of_one_target
from pipeline.findings import Column, Figure, Findings, Table
from pipeline.records import Record
from pipeline.report import commands
from pipeline.report.sources import Found, Sweep

MAX_ROWS = 500
"""Rows of a table that the page shows: the best ones. The files have all."""

_Goal = tuple[str, str, frozenset[str], str]
"""What runs must share to stand in one table: target, kind, classes, metric."""

COMMAND, VERSIONS = "command", "versions"
"""Columns that say how to make a row again; the page shows them as one cell."""


@dataclass(frozen=True, kw_only=True)
class Section:
    """One part of the page."""

    title: str
    kind: str
    facts: Mapping[str, str]  # by name, for people
    notes: tuple[str, ...] = ()
    command: str = ""  # that made all of it
    versions: str = ""
    tables: tuple[Table, ...] = ()
    figures: tuple[Figure, ...] = ()


def sections(found: Found, *, one_table: bool = False) -> list[Section]:
    """The page's sections: experiments and analyses, then sweeps, then runs, then what all of it cost.

    Args:
        found: what lies at the paths asked of.
        one_table: put all runs into one table.

    Raises:
        PipelineError: runs that are to share a table learn different targets.
    """
    made = [_findings(*one) for one in found.findings]
    made += [_sweep(one) for one in found.sweeps]
    groups = _grouped(found.runs, _goal)
    if one_table and found.runs:
        groups = [of_one_target(found.runs, cure="leave out --one-table")]
    made += [_runs(group) for group in groups]
    return made + _costs(found)


def _findings(path: str, findings: Findings, made_by: Mapping[str, Any]) -> Section:
    asked = ", ".join(
        f"{name} {_plain(value)}" for name, value in findings.asked.items() if value is not None
    )
    facts = {"folder": path, "asked": asked, "time": f"{findings.seconds:,.1f} s", "paper": findings.paper}
    facts = {name: text for name, text in facts.items() if text}
    return Section(
        title=findings.title, kind=findings.kind, facts=facts,
        notes=findings.notes, command=made_by["command"], versions=_versions(made_by["versions"]),
        tables=findings.tables, figures=findings.figures,
    )  # fmt: skip


def _plain(value: Any) -> str:
    return ",".join(map(str, value)) if isinstance(value, list) else str(value)


def _versions(versions: Mapping[str, str] | None) -> str:
    return ", ".join(f"{name} {number}" for name, number in (versions or {}).items()) or "not recorded"


# Sweeps


def _sweep(found: Sweep) -> Section:
    targets = list(dict.fromkeys(row["target"] for row in found.rows))
    failed = sum(row["status"].startswith("failed") for row in found.rows)
    schedule = found.asked.get("schedule", {})
    facts = {
        "folder": found.path,
        "bank": _store(found) or "not recorded",
        "heads": f"{len(found.rows):,}, {schedule.get('epochs', '?')} epochs each",
        "targets": ", ".join(targets),
    }
    notes = [f"{failed} heads failed: their loss became NaN or infinite"] if failed else []
    notes += [
        f"{target}: the table of heads has the best {MAX_ROWS:,}, {found.path}/results.parquet has all"
        for target in targets
        if sum(row["target"] == target for row in found.rows) > MAX_ROWS
    ]
    made = [one for target in targets for one in _sweep_tables(found, target)]
    title = f"Sweep of {', '.join(targets)} ({Path(found.path).name})"
    return Section(
        title=title, kind="sweep", facts=facts, notes=tuple(notes),
        command=found.asked.get("command", ""), versions=_versions(found.asked.get("versions")),
        tables=tuple(made), figures=tuple(plot.sweep_figures(found.rows)),
    )  # fmt: skip


def _store(found: Sweep) -> str:
    kept = [head["source"]["store"] for head in found.heads]
    return str(found.asked.get("store") or next(iter(kept), ""))


def _sweep_tables(found: Sweep, target: str) -> list[Table]:
    """The settings of a target, and its heads."""
    rows = [row for row in found.rows if row["target"] == target]
    metric = rows[0]["metric"]
    rows = _best_first(rows, metric)
    names = ("fusion", "decoder", "options", "batch_size", "lr", "weight_decay", "dropout")
    settings = _grouped(rows, lambda row: tuple(row[name] for name in names))
    return [
        Table(
            name=f"{target}-settings",
            title=f"{target}: settings, over seeds",
            columns=_columns(_SETTING, metric),
            rows=tuple(_best_first([_setting(group) for group in settings], metric)),
        ),
        Table(
            name=f"{target}-heads",
            title=f"{target}: every head",
            columns=_columns((*_HEAD, *_HOW), metric),
            rows=tuple(_head(found, row) for row in rows[:MAX_ROWS]),
        ),
    ]


_HEAD = (
    ("fusion", "fusion"),
    ("setting", "setting"),
    ("lr", "learning rate"),
    ("seed", "seed"),
    ("dev", "dev"),
    ("test", "test"),
    ("best_epoch", "best epoch"),
    ("parameters", "parameters"),
    ("seconds", "seconds"),
    ("status", "status"),
)
_SETTING = (
    ("fusion", "fusion"),
    ("setting", "setting"),
    ("lr", "learning rate"),
    ("heads", "heads"),
    ("dev", "dev"),
    ("dev_sd", "± sd"),
    ("test", "test, mean"),
    ("parameters", "parameters"),
    ("seconds", "seconds a head"),
)
_RUN = (
    ("run", "run"),
    ("kind", "command"),
    ("method", "method"),
    ("decoder", "decoder"),
    ("dev", "dev"),
    ("epochs", "epochs"),
    ("parameters", "parameters"),
    ("seconds", "seconds"),
    ("seconds_per_epoch", "s an epoch"),
    ("seconds_to_95", "s to 95 % of the best"),
    ("peak_memory_bytes", "peak memory, MB"),
    ("bytes", "folder, MB"),
)
_HOW = ((COMMAND, "to reproduce"), (VERSIONS, "versions"))
_DIGITS = {
    "dev": 2,
    "dev_sd": 2,
    "test": 2,
    "lr": 5,
    "seconds": 2,
    "seconds_per_epoch": 3,
    "seconds_to_95": 2,
    "peak_memory_bytes": 1,
    "bytes": 2,
}


def _columns(names: Iterable[tuple[str, str]], metric: str) -> tuple[Column, ...]:
    unit = f" {metric}, %" if metrics.higher_is_better(metric) else f" {metric}"
    return tuple(
        Column(name=name, title=title + unit if name == "dev" else title, digits=_DIGITS.get(name))
        for name, title in names
    )


def _setting_text(row: Mapping[str, Any]) -> str:
    """What differs from the usual beside fusion and learning rate."""
    options = json.loads(row["options"])
    for name, usual in (("weight_decay", 0.01), ("dropout", None), ("batch_size", 32)):
        if row[name] != usual:
            options[name] = row[name]
    return " ".join(f"{name}={value}" for name, value in options.items())


def _setting(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    scores, tests = (_there(row[name] for row in rows) for name in ("dev", "test"))
    return {
        **{name: rows[0][name] for name in ("fusion", "lr", "parameters", "seconds")},
        "setting": _setting_text(rows[0]),
        "heads": len(rows),
        "dev": mean(scores) if scores else None,
        "dev_sd": stdev(scores) if len(scores) > 1 else None,
        "test": mean(tests) if tests else None,
    }


def _head(found: Sweep, row: Mapping[str, Any]) -> dict[str, Any]:
    store = _store(found)
    out = f"{row['target']}-{row['fusion']}-seed{row['seed']}"
    how = commands.of_head(row, found.asked, store, out) if store else "not recorded: the bank's place"
    kept = {name: row.get(name) for name, _ in _HEAD if name != "setting"}
    versions = _versions(
        found.asked.get("versions") or next((h.get("versions") for h in found.heads), None)
    )
    return {**kept, "setting": _setting_text(row), COMMAND: how, VERSIONS: versions}


# Runs


def _goal(record: Record) -> _Goal:
    """What a run was to learn."""
    return record.target, record.kind_of_target, frozenset(record.classes), str(record.result["metric"])


def _runs(records: Sequence[Record]) -> Section:
    compared = compare_records(records)
    known = {(record.path, record.part): record for record in records}
    rows = [_run(known[row["run"], row["task"]], row) for row in compared["runs"]]
    target, metric = compared["target"], compared["metric"]
    return Section(
        title=f"Runs on {target}",
        kind="runs",
        facts={
            "runs": f"{len(rows)}",
            "scored by": metric,
            "encoders": ", ".join(dict.fromkeys(Path(r.encoder).name or r.encoder for r in records)),
        },
        notes=tuple(compared["notes"]),
        tables=(
            Table(
                name=f"{target}-runs",
                title=f"Runs on {target}, best first",
                columns=_columns((*_RUN, *_HOW), metric),
                rows=tuple(rows),
            ),
        ),
        figures=(plot.loss_figure(curves_of(records), target),),
    )


def _run(record: Record, row: Mapping[str, Any]) -> dict[str, Any]:
    sizes = {
        name: None if row[name] is None else row[name] / 1e6 for name in ("peak_memory_bytes", "bytes")
    }
    how = {COMMAND: commands.of_run(record), VERSIONS: _versions(record.config.get("versions"))}
    return {**{name: row[name] for name, _ in _RUN}, "run": _run_name(record), **sizes, **how}


def _run_name(record: Record) -> str:
    return f"{record.path}, {record.part}" if record.part else record.path


# Cost against score


def _costs(found: Found) -> list[Section]:
    """All heads and runs of one target: what they took, and what they score."""
    points: dict[_Goal, list[dict[str, Any]]] = defaultdict(list)
    for record in found.runs:
        points[_goal(record)].append(_point(_run_name(record), record.method, record.result))
    for one in found.sweeps:
        classes = {
            h["target"]["name"]: (h["target"]["kind"], frozenset(h["target"]["names"])) for h in one.heads
        }
        for row in _of_best_settings(one.rows):
            kind, names = classes.get(row["target"], ("", frozenset()))
            goal = (row["target"], kind, names, row["metric"])
            points[goal].append(_point(f"{one.path}, seed {row['seed']}", row["fusion"], row))
    return [_cost(goal[0], goal[3], rows) for goal, rows in points.items() if _worth(rows)]


def _of_best_settings(rows: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """Every seed of each fusion's best setting: a figure of all heads would not be read at a glance."""
    whole = [row for row in rows if row["status"] == "ok"]
    best = [plot.best_settings(group) for group in _grouped(whole, lambda row: row["target"])]
    return [row for fusions in best for group in fusions.values() for row in group]


def _worth(rows: Sequence[Mapping[str, Any]]) -> bool:
    return sum(row["dev"] is not None for row in rows) > 1


def _point(run: str, method: str, result: Mapping[str, Any]) -> dict[str, Any]:
    costs = {name: result[name] for name in ("dev", "parameters", "seconds")}
    return {"run": run, "method": method, **costs}


def _cost(target: str, metric: str, points: Sequence[Mapping[str, Any]]) -> Section:
    rows = sorted((row for row in points if row["dev"] is not None), key=lambda row: row["method"])
    titles = {"parameters": "trained parameters", "seconds": "seconds of training, of one head"}
    drawn = [
        Figure(
            name=f"{target}-{name}-cost",
            title=f"{target}: dev score against {title}",
            about=f"A point a run, or a seed of the best setting of a sweep: dev score by {title}.",
            chart=figures.points(
                [row for row in rows if row[name]], x=name, y="dev", series="method", log_x=True,
                x_title=title, y_title=plot.score_name(metric), tips=("run",),
            ),
        )
        for name, title in titles.items()
    ]  # fmt: skip
    return Section(
        title=f"Cost against score: {target}", kind="cost", facts={"heads and runs": f"{len(rows)}"},
        figures=tuple(drawn),
    )  # fmt: skip


def _best_first(rows: Sequence[dict[str, Any]], metric: str) -> list[dict[str, Any]]:
    sign = 1.0 if metrics.higher_is_better(metric) else -1.0
    return sorted(rows, key=lambda row: (row["dev"] is None, -sign * (row["dev"] or 0.0)))


def _there(values: Iterable[Any]) -> list[Any]:
    return [value for value in values if value is not None]


def _grouped(rows: Iterable[Any], key: Any) -> list[list[Any]]:
    groups: dict[Hashable, list[Any]] = defaultdict(list)
    for row in rows:
        groups[key(row)].append(row)
    return list(groups.values())
