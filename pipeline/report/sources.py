"""What lies at the paths that a report is asked of: findings, sweeps, runs."""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow.parquet

from pipeline.errors import PipelineError
from pipeline.findings import FINDINGS, Findings, load
from pipeline.records import Record, read_records
from pipeline.results import CONFIG, METRICS, RESULT, SWEEP, finite, read_json
from pipeline.sweep import RESULTS

_DEPTH = 4
"""How far below a path is looked."""


@dataclass(frozen=True, kw_only=True)
class Sweep:
    """A sweep folder."""

    path: str
    rows: list[dict[str, Any]]  # of ``results.parquet``
    asked: dict[str, Any]  # of ``sweep.json``
    heads: list[dict[str, Any]]  # ``config.json`` of the heads that were kept


@dataclass(frozen=True, kw_only=True)
class Found:
    """All that lies at some paths, in their order."""

    findings: list[tuple[str, Findings, Mapping[str, Any]]] = field(default_factory=list)
    sweeps: list[Sweep] = field(default_factory=list)
    runs: list[Record] = field(default_factory=list)  # of several tasks learned together one a task


def find(paths: Sequence[str]) -> Found:
    """Reads what lies at some paths; each is one of its kind or a folder with some below it.

    What an experiment or a sweep keeps below its own folder is not told of twice.

    Raises:
        PipelineError: no path is given, one holds nothing known, or something there is not whole.
    """
    if not paths:
        raise PipelineError(
            "nothing to report: name folders of 'layerbank train', 'tune', 'sweep', 'experiment' or "
            "'analyze'"
        )
    found = Found()
    for folder in dict.fromkeys(folder for path in paths for folder in _known(path)):
        if (folder / FINDINGS).exists():
            found.findings.append((str(folder), *load(str(folder))))
        elif (folder / SWEEP).exists():
            found.sweeps.append(_read_sweep(folder))
        else:
            found.runs.extend(read_records(folder))
    return found


def _known(path: str) -> list[Path]:
    folder = Path(path)
    if not folder.is_dir():
        raise PipelineError(
            f"{path} is no folder: name one of a run, a sweep, an experiment or an analysis"
        )
    known = list(_below(folder, _DEPTH))
    if known:
        return known
    if (folder / CONFIG).is_file() and not (folder / "tokenizer_config.json").exists():
        return [folder]  # a run cut off so early that `read_record` says what it lacks
    if (folder / "tables").is_dir() or (folder / "sweeps").is_dir():
        raise PipelineError(f"{path} holds findings that were cut off: run the same command to its end")
    raise PipelineError(
        f"{path} holds nothing known: name a folder of 'layerbank train', 'tune', 'sweep', 'experiment' or "
        "'analyze'"
    )


def _below(folder: Path, depth: int) -> Iterator[Path]:
    if any((folder / name).exists() for name in (FINDINGS, SWEEP, METRICS, RESULT)):
        yield folder
    elif depth and not (folder / "zarr.json").exists() and ".partial" not in folder.name:
        for child in sorted(folder.iterdir()):
            if child.is_dir():
                yield from _below(child, depth - 1)


def _read_sweep(folder: Path) -> Sweep:
    if not (folder / RESULTS).is_file():
        raise PipelineError(f"{folder} is a sweep that was cut off: run the same sweep again, it goes on")
    try:
        rows = [dict(finite(row)) for row in pyarrow.parquet.read_table(folder / RESULTS).to_pylist()]
        heads = [
            json.loads(file.read_text(encoding="utf-8"))
            for file in sorted(folder.glob("heads/*/config.json"))
        ]
    except (OSError, ValueError) as error:
        said = " ".join(str(error).split())
        raise PipelineError(f"{folder} cannot be read as a sweep ({said}): run it again") from error
    return Sweep(path=str(folder), rows=rows, asked=read_json(folder / SWEEP), heads=heads)
