"""What runs have noted of the sources that they mix: their tasks, the shares, the gold classes."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
from jaxtyping import Int
from numpy import ndarray

from cache import open_bank
from pipeline.analysis._material import Material, labels
from pipeline.attentions import ATTENTIONS, Shares, read_shares
from pipeline.corpus import load_corpus
from pipeline.errors import PipelineError
from pipeline.labels import read_labels
from pipeline.records import Record

Classes = tuple[tuple[str, ...], Int[ndarray, " row"]]
"""The names of a target's classes, and each row's place among them; -1 for none."""


@dataclass(frozen=True, kw_only=True)
class Key:
    """What runs of one task have in common; they differ by their seeds."""

    method: str
    together: int  # tasks that were learned together
    data: str  # a data set, or a bank
    target: str
    split: str


@dataclass(frozen=True, kw_only=True)
class Group:
    """The examples of one class."""

    name: str
    examples: int
    shares: Mapping[str, float]  # of each source, mean over runs of the means over examples


@dataclass(frozen=True, kw_only=True, eq=False)
class Task:
    """The runs of one task, and what each has noted."""

    name: str
    key: Key
    records: tuple[Record, ...]
    shares: tuple[Shares, ...]

    @property
    def sources(self) -> tuple[str, ...]:
        """The same of all runs."""
        return self.shares[0].sources

    @property
    def examples(self) -> int:
        """That each mean is over."""
        return len(self.shares[0].known)

    def by_class(self, material: Material) -> list[Group]:
        """Its examples by their gold class, most examples first; none where the target has no classes.

        Raises:
            PipelineError: the labels are gone or have changed.
            CacheError: the bank is gone or damaged.
        """
        record = self.records[0]
        if record.kind_of_target != "class":
            return []
        names, code = _of_data(record) if record.kind == "tune" else _of_bank(material, record)
        if len(code) != len(self.shares[0].weights):
            raise PipelineError(f"{self.key.data} has other rows than when {record.path} was trained on it")
        groups = []
        for number, name in enumerate(names):
            here = [replace(one, weights=one.weights[code == number]) for one in self.shares]
            if len(here[0].known):
                means = [one.means for one in here]
                shares = {source: fmean(mean[source] for mean in means) for source in self.sources}
                groups.append(Group(name=name, examples=len(here[0].known), shares=shares))
        return sorted(groups, key=lambda group: -group.examples)


def noting(material: Material) -> list[Record]:
    """The runs that have noted shares of sources, task by task."""
    return [r for r in (*material.tuned, *material.records) if (Path(r.path) / ATTENTIONS).is_file()]


def tasks_of(records: Sequence[Record]) -> Iterator[Task]:
    """The tasks of some runs that have noted shares.

    Raises:
        PipelineError: runs of one task mix different sources, or what a run noted cannot be read.
    """
    found: dict[Key, list[tuple[Record, Shares]]] = {}
    for record in records:
        noted = {shares.task: shares for shares in read_shares(Path(record.path))}
        if record.task not in noted:
            raise PipelineError(f"{record.path} has noted no shares of {record.task}: train it again")
        found.setdefault(_key(record), []).append((record, noted[record.task]))
    shown = labels(dict.fromkeys(key.data for key in found))
    for key, pairs in found.items():
        (first, shares), *others = pairs
        for record, other in others:
            if other.sources != shares.sources:
                raise PipelineError(
                    f"{first.path} and {record.path} mix other sources for one task: analyze each alone"
                )
        runs, noted_of = zip(*pairs, strict=True)
        name = f"{shown[key.data]}.{key.target}{_mark(key, list(found))}"
        yield Task(name=name, key=key, records=runs, shares=noted_of)


def _key(record: Record) -> Key:
    if record.kind == "tune":
        task = _asked(record)
        data, split = task["data"], task["splits"]["dev"]
    else:
        data, split = str(record.store), record.config["source"]["splits"]["dev"]
    return Key(method=record.method, together=record.together, data=data, target=record.target, split=split)


def _asked(record: Record) -> Mapping[str, Any]:
    """A task as a run of `tune` was asked to learn it."""
    return next(task for task in record.config["tasks"] if task["name"] == record.task)


def _mark(key: Key, keys: Sequence[Key]) -> str:
    """What tells a task from others of its data and target."""
    same = [one for one in keys if (one.data, one.target) == (key.data, key.target)]
    company = "alone" if key.together == 1 else f"one of {key.together} tasks"
    marks = {"method": key.method, "together": company, "split": key.split}
    telling = [mark for part, mark in marks.items() if len({getattr(one, part) for one in same}) > 1]
    return f" ({', '.join(telling)})" if telling else ""


def _of_data(record: Record) -> Classes:
    """The classes of the rows that a run of `tune` was scored on."""
    task = _asked(record)
    columns = {role: column for role, column in task["columns"].items() if column is not None}
    found = read_labels(load_corpus(task["data"], revision=task["revision"], **columns), record.target)
    if task["splits"]["dev"] not in found.values:
        raise PipelineError(f"{task['data']} has no split {task['splits']['dev']!r} any more")
    return found.names, found.values[task["splits"]["dev"]].astype(np.int64)


def _of_bank(material: Material, record: Record) -> Classes:
    """The classes of the rows that a head was scored on; a row that the bank left out has none."""
    moved = [bank for bank in material.named_banks if bank.fingerprint == record.bank]
    bank = moved[0] if moved else open_bank(str(record.store))
    split = bank.split(record.config["source"]["splits"]["dev"])
    target = split.target(record.target)
    code = np.full(int(split.row.max(initial=-1)) + 1, -1)
    code[split.row] = target.values
    return target.names, code
