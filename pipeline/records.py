"""What run folders of `layerbank train` and of `layerbank tune` say of themselves; no weights."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pipeline.errors import PipelineError
from pipeline.folders import CONFIG, METRICS, RESULT, runs_at

_RESULT_HAS = ("fusion", "decoder", "metric", "dev", "epochs", "parameters", "seconds", "seconds_per_epoch")
_LINE_HAS = ("loss", "dev", "seconds")


@dataclass(frozen=True, kw_only=True)
class Record:
    """One run folder of either kind."""

    path: str
    kind: Literal["train", "tune"]
    method: str  # the fusion of a head on a bank; the method of `tune`, with its fusion if it has one
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
    def stacked(self) -> bool:
        """Whether it was one of the heads of a sweep, whose peak of memory is not known."""
        return self.kind == "train" and self.result.get("peak_memory_bytes", 0) is None


def find_runs(paths: Sequence[str]) -> list[Path]:
    """The runs at some paths: each is a run, or a folder with runs right below it.

    Raises:
        PipelineError: a path has no run.
    """
    return [run for path in paths for run in _runs_at(Path(path))]


def _runs_at(path: Path) -> list[Path]:
    if not path.is_dir():
        raise PipelineError(f"no run at {path}: make one with 'layerbank train ... --out {path}'")
    found = runs_at(path)
    if not found:
        raise PipelineError(f"{path} holds no run: make one with 'layerbank train ... --out {path}/NAME'")
    return found


def read_record(path: Path) -> Record:
    """Reads a run folder of either kind.

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
        return _record(str(path), config, result, lines)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
        said = " ".join(str(error).split())
        raise PipelineError(f"{path} cannot be read as a run ({said}): train it again") from error


def _check(values: Mapping[str, Any], names: Sequence[str]) -> None:
    lacking = [name for name in names if name not in values]
    if lacking:
        raise ValueError(f"no {lacking[0]}")


def _record(
    path: str, config: Mapping[str, Any], result: dict[str, Any], lines: list[dict[str, Any]]
) -> Record:
    tuned = "tasks" in config
    task = config["tasks"][0] if tuned else config["target"]
    method = fusion = result["fusion"]
    if tuned:
        method = config["method"] if fusion in ("last_layer", "none") else f"{config['method']}+{fusion}"
    source = config["source"]
    if tuned and len(config["tasks"]) > 1:
        result, lines = _of_first(config["tasks"][0], result, lines)
    return Record(
        path=path,
        kind="tune" if tuned else "train",
        method=method,
        target=task["target"] if tuned else task["name"],
        kind_of_target=task["kind"],
        classes=tuple(task["names"]),
        encoder=source["encoder"]["name"],
        store=source.get("store"),
        bank=source.get("fingerprint"),
        config=dict(config),
        result=result,
        lines=lines,
    )


def _of_first(
    task: Mapping[str, Any], result: dict[str, Any], lines: list[dict[str, Any]]
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """The scores of the first of several tasks that were learned together, under its metric's name."""
    metric, name = task["metric"], f"{task['name']}.{task['metric']}"
    result = {**result, "metric": metric, "dev": result["dev_metrics"][name]}
    return result, [{**line, "dev": {metric: line["dev"][name]}} for line in lines]
