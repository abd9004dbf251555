"""What an analysis looks at: run folders, sweeps and banks, told apart and checked."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import pyarrow.parquet
import torch

from cache import Bank, Split, open_bank
from cache.bank import is_bank
from cache.store import local_path
from pipeline import parts
from pipeline.errors import PipelineError, nearest
from pipeline.folders import HEADS
from pipeline.fusions._base import Fusion
from pipeline.records import Record, find_runs, read_records
from pipeline.results import SWEEP, Run, load_run
from pipeline.sweep import RESULTS


@dataclass(frozen=True, kw_only=True)
class Material:
    """What was named, and how to look at it."""

    records: tuple[Record, ...] = ()  # of heads on banks
    tuned: tuple[Record, ...] = ()  # of runs of `tune`, task by task; they read no bank
    sweeps: Mapping[str, Sequence[Mapping[str, Any]]] = field(default_factory=dict)  # rows by folder
    named_banks: tuple[Bank, ...] = ()  # looked at in place of those that the heads were trained on
    split: str = "dev"
    by: str | None = None  # all groups of tokens if None
    sentence: str | None = None  # number of a row, or a text; row 0 if None
    tokens: int = 0  # of a bank; at least so many are compared, by whole blocks; 0 for all
    encoder: str | None = None  # where it is now
    trust_remote_code: bool = False
    memory_bytes: int | None = None
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    note: Callable[[str], None] = lambda _: None

    @cached_property
    def banks(self) -> tuple[Bank, ...]:
        """The banks named, or those that the heads were trained on.

        Raises:
            PipelineError: one of those is no longer where it was.
            CacheError: a bank is not complete.
        """
        if self.named_banks:
            return self.named_banks
        stores = {record.store: record for record in self.records if record.store is not None}
        return tuple(_open(store, record) for store, record in stores.items())

    def banks_of(self, run: Run) -> tuple[Bank, ...]:
        """The banks that a head is looked at on."""
        return self.named_banks or tuple(bank for bank in self.banks if bank.path == run.source.store)

    def split_of(self, bank: Bank) -> Split:
        """The split asked for.

        Raises:
            PipelineError: the bank has none of that name.
        """
        if self.split not in bank.splits:
            raise PipelineError(
                f"{bank.path} has no split {self.split!r}: {nearest(self.split, bank.splits)}"
            )
        return bank.split(self.split)

    @cached_property
    def runs(self) -> tuple[Run, ...]:
        """The heads whose fusion has weights over layers.

        Raises:
            PipelineError: they are of different encoders.
        """
        runs = [load_run(record.path) for record in self.records if has_weights(record.method)]
        for run in runs[1:]:
            first = runs[0]
            if run.source.encoder.weights_sha256 != first.source.encoder.weights_sha256:
                raise PipelineError(
                    f"{first.path} is of the encoder {first.source.encoder.name}, {run.path} of "
                    f"{run.source.encoder.name}: layer 1 of one is not layer 1 of the other, analyze each "
                    "encoder alone"
                )
        return tuple(runs)


def has_weights(fusion: str) -> bool:
    """Whether a fusion has weights over layers.

    >>> has_weights("attention"), has_weights("concat")
    (True, False)
    """
    return parts.load("fusion", fusion).weights is not Fusion.weights


def weightless(records: Sequence[Record]) -> str:
    """Says which heads have no weights over layers, and what has.

    >>> weightless([])
    ''
    """
    found: dict[str, list[str]] = {}
    for record in records:
        if not has_weights(record.method):
            found.setdefault(record.method, []).append(record.path)
    if not found:
        return ""
    named = "; ".join(
        f"{paths[0]}{f' and {len(paths) - 1} more' if len(paths) > 1 else ''} of fusion {fusion}"
        for fusion, paths in found.items()
    )
    having = ", ".join(name for name in parts.names("fusion") if has_weights(name))
    return f"no weights over layers in {named}: train heads of {having}"


def through_encoder(tuned: Sequence[Record]) -> str:
    """Says of runs of `layerbank tune` why a question about layers is not asked of them.

    >>> through_encoder([])
    ''
    """
    if not tuned:
        return ""
    paths = list(dict.fromkeys(record.path for record in tuned))
    more = f" and {len(paths) - 1} more were" if len(paths) > 1 else " was"
    return (
        f"{paths[0]}{more} trained through the encoder by 'layerbank tune': layers are asked of heads "
        "that 'layerbank train' or 'sweep' trained on a bank"
    )


def gather(paths: Sequence[str], **choices: Any) -> Material:
    """Tells apart what was named.

    Args:
        paths: banks, run folders, folders of runs, and folders of sweeps.
        choices: the other fields of `Material`.

    Raises:
        PipelineError: a path is none of these, a run is not whole, a sweep has not ended.
        CacheError: a bank is not complete.
    """
    if not paths:
        raise PipelineError("nothing to analyze: name runs, sweeps or banks")
    banks, sweeps = list[Bank](), dict[str, Any]()
    folders: list[Path] = []
    for path in dict.fromkeys(paths):
        if is_bank(path) or local_path(path) is None:  # runs lie on a disk
            banks.append(open_bank(path))
        elif (Path(path) / SWEEP).is_file():
            sweeps[str(Path(path))] = _rows(path)
            kept = Path(path) / HEADS
            folders += find_runs([str(kept)]) if kept.is_dir() else []
        else:
            folders += find_runs([path])
    records = [record for folder in dict.fromkeys(folders) for record in read_records(folder)]
    heads = tuple(record for record in records if record.kind == "train")
    tuned = tuple(record for record in records if record.kind == "tune")
    return Material(records=heads, tuned=tuned, sweeps=sweeps, named_banks=tuple(banks), **choices)


def _rows(path: str) -> list[dict[str, Any]]:
    file = Path(path) / RESULTS
    if not file.is_file():
        raise PipelineError(f"the sweep at {path} has not ended: run the same 'layerbank sweep' again")
    try:
        return list(pyarrow.parquet.read_table(file).to_pylist())
    except (OSError, ValueError) as error:
        raise PipelineError(f"{file} is damaged: run the same 'layerbank sweep' again") from error


def _open(store: str, record: Record) -> Bank:
    local = local_path(store)
    if local is not None and not local.exists():
        raise PipelineError(
            f"the bank of {record.path} is no longer at {store}: name where it is now beside the run"
        )
    return open_bank(store)


def labels(paths: Iterable[str]) -> dict[str, str]:
    """A short label for each path: its last part, or all of it where two end alike.

    >>> labels(["a/bank", "b/bank", "b/other"])
    {'a/bank': 'a/bank', 'b/bank': 'b/bank', 'b/other': 'other'}
    """
    short = {path: name_of(path) for path in paths}
    ends = list(short.values())
    return {path: name if ends.count(name) == 1 else path for path, name in short.items()}


def name_of(path: str) -> str:
    """The last part of a path, which names a bank or a run.

    >>> name_of("s3://bucket/banks/en/")
    'en'
    """
    return path.rstrip("/").rpartition("/")[2]
