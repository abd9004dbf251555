"""Which sources runs mix, task by task: prompts as `tune` has noted it, heads as their bank tells it."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
import torch
from jaxtyping import Int
from numpy import ndarray

from cache import Split
from pipeline import batches, parts
from pipeline.analysis._material import Material, labels
from pipeline.analysis._tasks import settings_of, telling
from pipeline.attentions import ATTENTIONS, Shares, read_shares, told_apart
from pipeline.corpus import load_corpus
from pipeline.errors import PipelineError
from pipeline.evaluate import check_encoder
from pipeline.labels import read_labels
from pipeline.records import Record
from pipeline.results import Run, load_run

Classes = tuple[tuple[str, ...], Int[ndarray, " example"]]
"""The names of a target's classes, and each example's place among them; -1 for none."""

_BATCH = 256


@dataclass(frozen=True, kw_only=True)
class Key:
    """What runs of one task have in common; they differ by their seeds and rates."""

    method: str
    together: int  # tasks that were learned together
    data: str  # a data set, or a bank
    target: str
    split: str
    settings: tuple[tuple[str, Any], ...] = ()  # of a head

    @property
    def marks(self) -> dict[str, str]:
        """What may tell it from others of its data and target."""
        company = "alone" if self.together == 1 else f"one of {self.together} tasks"
        return {"method": self.method, "together": company, "split": self.split}


@dataclass(frozen=True, kw_only=True)
class Group:
    """The examples of one class."""

    name: str
    examples: int
    shares: Mapping[str, float]  # of each source, mean over runs of the means over examples


@dataclass(frozen=True, kw_only=True)
class Mixed:
    """What one run mixes on one split."""

    key: Key
    path: str
    shares: Shares
    classes: Callable[[], Classes] | None  # of those examples; None where the target has none


@dataclass(frozen=True, kw_only=True, eq=False)
class Task:
    """The runs of one task."""

    name: str
    key: Key
    runs: tuple[Mixed, ...]

    @property
    def shares(self) -> list[Shares]:
        """Of each run."""
        return [run.shares for run in self.runs]

    @property
    def sources(self) -> tuple[str, ...]:
        """The same of all runs."""
        return self.shares[0].sources

    @property
    def examples(self) -> int:
        """That each mean is over."""
        return len(self.shares[0].known)

    def by_class(self) -> list[Group]:
        """Its examples by their gold class, most examples first; none where the target has no classes.

        Raises:
            PipelineError: the labels are gone or have changed.
            CacheError: the bank has no such labels, or they are damaged.
        """
        first = self.runs[0]
        if first.classes is None:
            return []
        names, code = first.classes()
        if len(code) != len(first.shares.weights):
            raise PipelineError(f"{self.key.data} has other rows than when {first.path} was trained on it")
        groups = []
        for number, name in enumerate(names):
            here = [replace(one, weights=one.weights[code == number]) for one in self.shares]
            if len(here[0].known):
                means = [one.means for one in here]
                shares = {source: fmean(mean[source] for mean in means) for source in self.sources}
                groups.append(Group(name=name, examples=len(here[0].known), shares=shares))
        return sorted(groups, key=lambda group: -group.examples)


def noting(material: Material) -> list[Record]:
    """The runs of `tune` that have noted shares of sources, task by task."""
    return [record for record in material.tuned if (Path(record.path) / ATTENTIONS).is_file()]


def mixing(material: Material) -> list[Record]:
    """The heads whose fusion mixes sources."""
    return [r for r in material.records if hasattr(parts.load("fusion", r.method), "shares")]


def tasks_of(material: Material) -> Iterator[Task]:
    """The tasks of the runs that mix sources.

    Raises:
        PipelineError: runs of one task mix different sources, what a run noted cannot be read, or a bank
            is gone or does not fit.
        CacheError: a bank is damaged.
    """
    found: dict[Key, list[Mixed]] = {}
    for one in (*map(_noted, noting(material)), *_on_banks(material)):
        found.setdefault(one.key, []).append(one)
    shown = labels(dict.fromkeys(key.data for key in found))
    for key, runs in found.items():
        first, *others = runs
        for other in others:
            if other.shares.sources != first.shares.sources:
                raise PipelineError(
                    f"{first.path} and {other.path} mix other sources for one task: analyze each alone"
                )
        yield Task(name=f"{shown[key.data]}.{key.target}{_mark(key, found)}", key=key, runs=tuple(runs))


def _mark(key: Key, keys: Iterable[Key]) -> str:
    """What tells a task from others of its data and target."""
    same = [one for one in keys if (one.data, one.target) == (key.data, key.target)]
    marks = [text for part, text in key.marks.items() if any(one.marks[part] != text for one in same)]
    alike = [dict(one.settings) for one in same if one.method == key.method]
    marks += telling(dict(key.settings), alike)
    return f" ({', '.join(marks)})" if marks else ""


def _noted(record: Record) -> Mixed:
    """What a run of `tune` has noted of its dev examples for one of its tasks."""
    noted = {shares.task: shares for shares in read_shares(Path(record.path))}
    if record.task not in noted:
        raise PipelineError(f"{record.path} has noted no shares of {record.task}: train it again")
    task = next(task for task in record.config["tasks"] if task["name"] == record.task)
    key = Key(
        method=record.method, together=record.together, data=task["data"], target=record.target,
        split=task["splits"]["dev"],
    )  # fmt: skip
    classes = partial(_classes_of_data, task) if record.kind_of_target == "class" else None
    return Mixed(key=key, path=record.path, shares=noted[record.task], classes=classes)


def _classes_of_data(task: Mapping[str, Any]) -> Classes:
    """The classes of the rows that a run of `tune` was scored on.

    Args:
        task: as the run was asked to learn it.
    """
    columns = {role: column for role, column in task["columns"].items() if column is not None}
    corpus = load_corpus(task["data"], revision=task["revision"], **columns)
    found, split = read_labels(corpus, task["target"]), task["splits"]["dev"]
    if split not in found.values:
        raise PipelineError(f"{task['data']} has no split {split!r} any more")
    return found.names, found.values[split].astype(np.int64)


def _on_banks(material: Material) -> Iterator[Mixed]:
    """What every head mixes on every bank that it is looked at on."""
    heads = [(record, load_run(record.path)) for record in mixing(material)]
    for bank in material.banks if heads else ():
        feeds = batches.Feeds(memory_bytes=material.memory_bytes, device=material.device)
        recipe, split = bank.recipe, material.split_of(bank)
        for record, run in heads:
            if bank not in material.banks_of(run):
                continue
            check_encoder(
                run, recipe.encoder.weights_sha256, recipe.tokenizer_sha256, what=f"bank {bank.path}"
            )
            key = Key(
                method=record.method, together=record.together, data=bank.path, target=record.target,
                split=split.name, settings=tuple(settings_of(run.spec).items()),
            )  # fmt: skip
            classes = partial(_classes_of_bank, split, record.target)
            yield Mixed(
                key=key,
                path=record.path,
                shares=_shares(run, split, feeds),
                classes=classes if record.kind_of_target == "class" else None,
            )


def _classes_of_bank(split: Split, target: str) -> Classes:
    found = split.target(target)
    return found.names, found.values.astype(np.int64)


@torch.inference_mode()
def _shares(run: Run, split: Split, feeds: batches.Feeds) -> Shares:
    """The share of each source for each example of a split, in the split's order."""
    head = run.head.to(feeds.device)
    feed = feeds.open(split, head, run.spec.layers)
    fusion: Any = head.fusion  # only those that mix sources have `shares`
    found, examples = [], []
    for batch in feed.batches(np.arange(feed.n_examples), batch_size=_BATCH):
        inputs = batch.inputs(batches.places(feed.layers, run.spec.layers))
        found.append(fusion.shares(inputs.states, inputs.lengths)[0].float().cpu().numpy())
        examples.append(batch.examples)
    read = np.concatenate(found)
    weights = np.empty_like(read)
    weights[np.concatenate(examples)] = read
    return Shares(run.target.name, _sources_of(run, read.shape[1]), weights)


def _sources_of(run: Run, count: int) -> tuple[str, ...]:
    """Names of the sources: those of their runs, or random-0, random-1 and so on."""
    given = run.spec.fusion_options.get("sources")
    names = (
        [Path(path).name for path in given.split(",")] if given else [f"random-{k}" for k in range(count)]
    )
    return told_apart(names)
