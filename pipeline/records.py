"""What run folders of `layerbank train` and of `layerbank tune` say of themselves; no weights."""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pipeline.errors import PipelineError
from pipeline.folders import CONFIG, HEADS, METRICS, RESULT, runs_at

_RESULT_HAS = ("fusion", "decoder", "metric", "dev", "epochs", "parameters", "seconds", "seconds_per_epoch")
_LINE_HAS = ("loss", "dev", "seconds")


@dataclass(frozen=True, kw_only=True)
class Record:
    """One run folder of either kind; of several tasks that one run of `tune` learned, one of them."""

    path: str
    kind: Literal["train", "tune"]
    method: str  # the fusion of a head on a bank; the method of `tune`, with its fusion if it has one
    task: str  # DATA.TARGET of a run of `tune`; the target of a head
    together: int  # tasks that were learned together
    target: str
    kind_of_target: str
    classes: tuple[str, ...]
    encoder: str
    store: str | None  # bank that a head reads
    bank: str | None  # its fingerprint
    config: dict[str, Any]  # of ``config.json``
    result: dict[str, Any]  # of ``result.json``
    lines: list[dict[str, Any]]  # of ``metrics.jsonl``, one an epoch

    @property
    def part(self) -> str | None:
        """Its task, where the run folder has several; a head on a bank has a folder of its own."""
        return self.task if self.kind == "tune" and self.together > 1 else None

    @property
    def stacked(self) -> bool:
        """Whether it was one of the heads of a sweep, whose peak of memory is not known."""
        return self.kind == "train" and self.result.get("peak_memory_bytes", 0) is None


def find_runs(paths: Sequence[str]) -> list[Path]:
    """The runs at some paths: each is a run, a folder with runs right below it, or a sweep's.

    Raises:
        PipelineError: a path has no run.
    """
    return [run for path in paths for run in _runs_at(Path(path))]


def _runs_at(path: Path) -> list[Path]:
    if not path.is_dir():
        raise PipelineError(f"no run at {path}: make one with 'layerbank train ... --out {path}'")
    kept = path / HEADS
    found = runs_at(path) or (runs_at(kept) if kept.is_dir() else [])
    if not found:
        raise PipelineError(f"{path} holds no run: make one with 'layerbank train ... --out {path}/NAME'")
    return found


def read_record(path: Path) -> Record:
    """Reads a run folder of either kind; of several tasks the first.

    Raises:
        PipelineError: it is one that was cut off or changed.
    """
    return read_records(path)[0]


def read_records(path: Path) -> list[Record]:
    """Reads a run folder of either kind, task by task.

    Raises:
        PipelineError: it is one that was cut off or changed.
    """
    lacking = [name for name in (CONFIG, METRICS, RESULT) if not (path / name).is_file()]
    if lacking:
        raise PipelineError(f"{path} is no whole run folder, it lacks {lacking[0]}: train it again")
    try:
        config, result = (json.loads((path / n).read_text(encoding="utf-8")) for n in (CONFIG, RESULT))
        text = (path / METRICS).read_text(encoding="utf-8")
        lines = [json.loads(line) for line in text.splitlines()]
        _check(result, _RESULT_HAS)
        for line in lines:
            _check(line, _LINE_HAS)
        if "tasks" not in config:
            return [_trained(str(path), config, result, lines)]
        return [_tuned(str(path), config, *one) for one in _each_task(config, result, lines)]
    except (OSError, ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
        said = " ".join(str(error).split())
        raise PipelineError(f"{path} cannot be read as a run ({said}): train it again") from error


def _check(values: Mapping[str, Any], names: Sequence[str]) -> None:
    lacking = [name for name in names if name not in values]
    if lacking:
        raise ValueError(f"no {lacking[0]}")


def _trained(
    path: str, config: Mapping[str, Any], result: dict[str, Any], lines: list[dict[str, Any]]
) -> Record:
    source, target = config["source"], config["target"]
    return Record(
        path=path,
        kind="train",
        method=result["fusion"],
        task=target["name"],
        together=len(config["joint"]["tasks"]) if "joint" in config else 1,
        target=target["name"],
        kind_of_target=target["kind"],
        classes=tuple(target["names"]),
        encoder=source["encoder"]["name"],
        store=source.get("store"),
        bank=source.get("fingerprint"),
        config=dict(config),
        result=result,
        lines=lines,
    )


def _tuned(
    path: str,
    config: Mapping[str, Any],
    task: Mapping[str, Any],
    result: dict[str, Any],
    lines: list[dict[str, Any]],
) -> Record:
    method, fusion = config["method"], result["fusion"]
    return Record(
        path=path,
        kind="tune",
        method=method if fusion in ("last_layer", "none") else f"{method}+{fusion}",
        task=task["name"],
        together=len(config["tasks"]),
        target=task["target"],
        kind_of_target=task["kind"],
        classes=tuple(task["names"]),
        encoder=config["source"]["encoder"]["name"],
        store=None,
        bank=None,
        config=dict(config),
        result=result,
        lines=lines,
    )


def _each_task(
    config: Mapping[str, Any], result: dict[str, Any], lines: list[dict[str, Any]]
) -> Iterator[tuple[Mapping[str, Any], dict[str, Any], list[dict[str, Any]]]]:
    """Every task of a run of `tune`; of several that were learned together each with its own scores.

    Their scores are noted as TASK.METRIC; they become METRIC, as in a run of one task.
    """
    tasks = config["tasks"]
    if not tasks:
        raise ValueError("no task")
    for task in tasks:
        if len(tasks) == 1:
            yield task, result, lines
            continue
        metric, prefix = task["metric"], f"{task['name']}."
        own = [{**line, "dev": _under(prefix, line["dev"])} for line in lines]
        dev = _under(prefix, result["dev_metrics"])
        told = {"target": task["target"], "metric": metric, "dev": dev[metric], "dev_metrics": dev}
        decoder = (task.get("head") or result)["decoder"]
        yield task, {**result, **told, "decoder": decoder}, own


def _under(prefix: str, scores: Mapping[str, Any]) -> dict[str, Any]:
    return {name.removeprefix(prefix): v for name, v in scores.items() if name.startswith(prefix)}
