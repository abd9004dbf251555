"""Runs of one target side by side: what they score and what they cost, heads on a bank and `tune` alike."""

from collections.abc import Mapping, Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any

from cache import CacheError, open_bank
from pipeline import metrics
from pipeline.errors import PipelineError, nearest
from pipeline.records import Record, find_runs, read_records
from pipeline.results import finite

REACHED_FRAC = 0.95
"""Share of the best score whose time is asked for."""


def compare(paths: Sequence[str], target: str | None = None) -> dict[str, Any]:
    """One row a run, best score first; of a run of several tasks a row for each that has the target.

    Args:
        paths: runs of one target, or folders that hold such runs.
        target: its name, or DATA.TARGET of one task; the one that all runs have if None.

    Returns:
        `target`, `metric`, `best` (score of the best run), `runs` (the rows), `notes` (what makes the runs
        less alike than they look). `task` of a row is DATA.TARGET where its run has several. Seconds are
        those of training alone, so the extraction of a bank is not among them. `seconds_to_95` is the time
        to 95 % of the best score of all runs, None for a run that never gets there; `seconds_to_own_95`
        that of the run's own best. `bytes` are those of the run folder, `bank_bytes` those of the bank
        that a head reads, which all heads share.

    Raises:
        PipelineError: no run is there, one is not whole, or they are of different targets.
    """
    records = _read(paths)
    chosen = of_one_target(records, target)
    found = compare_records(chosen)
    left = {record.path for record in records} - {record.path for record in chosen}
    if left:
        runs = "1 run has" if len(left) == 1 else f"{len(left)} runs have"
        found["notes"].append(f"{runs} not learned {target}: left out")
    return found


def _read(paths: Sequence[str]) -> list[Record]:
    records = [record for run in find_runs(paths) for record in read_records(run)]
    if not records:
        raise PipelineError("no run to compare: name run folders of 'layerbank train' or 'layerbank tune'")
    return records


def of_one_target(
    records: Sequence[Record], target: str | None = None, *, cure: str = "name one by --target"
) -> list[Record]:
    """Those of one target, of runs that may have learned several.

    Args:
        records: task by task, at least one.
        target: its name, or DATA.TARGET of one task; the one that all runs have if None.
        cure: what the user may do where that is none, or one of several.

    Raises:
        PipelineError: no run has the target, or no one target is that of all runs.
    """
    if target is not None:
        found = [record for record in records if target in (record.target, record.task)]
        if not found:
            known = nearest(target, {record.target for record in records})
            raise PipelineError(f"--target {target}: no run has learned it: {known}")
        return found
    runs: dict[str, list[Record]] = {}
    for record in records:
        runs.setdefault(record.path, []).append(record)
    common = set.intersection(*({record.target for record in run} for run in runs.values()))
    if len(common) > 1:
        names = ", ".join(sorted(common))
        raise PipelineError(f"all these runs have learned {names}: {cure}")
    if not common:
        one = records[0]
        other = next(run[0] for run in runs.values() if one.target not in {r.target for r in run})
        raise PipelineError(f"{_both(one, other)}: compare runs of one target, or {cure}")
    return [record for record in records if record.target in common]


def _both(one: Record, other: Record) -> str:
    return (
        f"{one.path} learns {one.target!r} ({one.kind_of_target}), {other.path} learns {other.target!r} "
        f"({other.kind_of_target})"
    )


def compare_records(records: Sequence[Record]) -> dict[str, Any]:
    """What `compare` gives of runs that were read, at least one.

    Raises:
        PipelineError: they are of different targets.
    """
    for record in records[1:]:
        _check_alike(records[0], record)
    metric = str(records[0].result["metric"])
    sign = 1.0 if metrics.higher_is_better(metric) else -1.0
    scores = [r.result["dev"] for r in records if r.result["dev"] is not None]
    best = max(scores, key=lambda score: sign * score, default=None)
    rows = [_row(record, metric, best) for record in records]
    rows.sort(key=lambda row: (row["dev"] is None, -sign * (row["dev"] or 0.0)))
    found = {"target": records[0].target, "metric": metric, "best": best, "runs": rows}
    return dict(finite({**found, "notes": _notes(records)}))


def curves(paths: Sequence[str], target: str | None = None) -> list[dict[str, Any]]:
    """Training loss against seconds of training, epoch by epoch, of each run.

    Returns:
        For each run `label`, `kind`, `seconds` and `loss`. The label is the method's name, with the run's
        folder where several runs have one method. Tasks that were learned together have one curve.

    Raises:
        PipelineError: as for `compare`.
    """
    return curves_of(of_one_target(_read(paths), target))


def curves_of(records: Sequence[Record]) -> list[dict[str, Any]]:
    """What `curves` gives of runs that were read."""
    records = list({record.path: record for record in records}.values())
    names = [record.method for record in records]
    return [
        {
            "label": name if names.count(name) == 1 else f"{name} ({Path(record.path).name})",
            "kind": record.kind,
            "seconds": list(accumulate(line["seconds"] for line in record.lines)),
            "loss": [line["loss"] for line in record.lines],
        }
        for name, record in zip(names, records, strict=True)
    ]


def _check_alike(one: Record, other: Record) -> None:
    if (one.target, one.kind_of_target) != (other.target, other.kind_of_target):
        raise PipelineError(f"{_both(one, other)}: compare runs of one target")
    if set(one.classes) != set(other.classes):
        odd = sorted(set(one.classes) ^ set(other.classes))[0]
        raise PipelineError(
            f"{one.path} and {other.path} learn {one.target!r} with other classes ({odd!r} is of one "
            "alone): compare runs on one data set"
        )
    metrics_of = [record.result["metric"] for record in (one, other)]
    if metrics_of[0] != metrics_of[1]:
        raise PipelineError(
            f"{one.path} is scored by {metrics_of[0]}, {other.path} by {metrics_of[1]}: train both with "
            "the same --metric"
        )


def _row(record: Record, metric: str, best: float | None) -> dict[str, Any]:
    result = record.result
    return {
        "run": record.path,
        "task": record.part,
        "kind": record.kind,
        "method": record.method,
        "decoder": result["decoder"],
        "dev": result["dev"],
        "epochs": result["epochs"],
        "parameters": result["parameters"],
        "seconds": result["seconds"],
        "seconds_per_epoch": result["seconds_per_epoch"],
        "seconds_to_95": seconds_to(record.lines, metric, best),
        "seconds_to_own_95": seconds_to(record.lines, metric, result["dev"]),
        "peak_memory_bytes": result.get("peak_memory_bytes"),  # runs before it was recorded lack it
        "bytes": sum(file.stat().st_size for file in Path(record.path).rglob("*") if file.is_file()),
        "bank_bytes": _bank_bytes(record),
    }


def seconds_to(lines: Sequence[Mapping[str, Any]], metric: str, best: float | None) -> float | None:
    """Seconds of training until the dev score has first reached 95 % of a score, by whole epochs.

    Args:
        lines: of ``metrics.jsonl``.
        metric: the score asked for; of an error (lower is better) it is the score over 0.95.
        best: the score.

    Returns:
        The seconds; None where the score was never reached, or has no share (it is not above 0).
    """
    if best is None or best <= 0:
        return None
    spent = 0.0
    for line in lines:
        spent += line["seconds"]
        score = line["dev"].get(metric)
        if score is None:
            continue
        higher = metrics.higher_is_better(metric)
        if score >= REACHED_FRAC * best if higher else score <= best / REACHED_FRAC:
            return spent
    return None


def _bank_bytes(record: Record) -> int | None:
    """The size of the bank that a head reads; None where it is gone, or the run has none."""
    if record.store is None:
        return None
    try:
        return open_bank(record.store).n_bytes
    except CacheError:
        return None


def _notes(records: Sequence[Record]) -> list[str]:
    """What makes the runs less alike than they look."""
    notes = []
    if len({r.bank for r in records if r.bank is not None}) > 1:
        notes.append("the heads read different banks")
    encoders = {record.encoder for record in records}
    if len(encoders) > 1:
        notes.append(f"the runs are of different encoders: {', '.join(sorted(encoders))}")
    if any(record.part for record in records):
        notes.append(
            "tasks that one run of tune learned together: parameters, seconds, memory and bytes are those "
            "of all of them"
        )
    if any(record.stacked for record in records):
        notes.append(
            "heads of a sweep trained in stacks: their seconds an epoch are those of the whole stack"
        )
    return notes
