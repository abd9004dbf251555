"""Sweeps: a grid of heads, grouped by shape into stacks, each trained in one pass over a resident bank.

A finished stack is kept on disk, so a sweep that was killed goes on with the next one.
"""

import hashlib
import itertools
import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet
import torch

from cache import Bank, Split, Target, open_bank
from pipeline import batches, metrics, parts
from pipeline.batches import Labelled
from pipeline.errors import PipelineError
from pipeline.head import DECODER_FOR, Head, build_head, plan_head
from pipeline.results import check_free_sweep, finite, save_run, write_whole
from pipeline.stack import stack
from pipeline.train import (
    Epoch,
    HeadRates,
    Job,
    Schedule,
    Trained,
    build_one,
    fit,
    open_target,
    predictions,
    prepare,
)

RESULTS = "results.parquet"
Note = Callable[[str], None]


@dataclass(frozen=True, kw_only=True)
class Shape:
    """What all heads of a stack share."""

    target: str
    fusion: str
    decoder: str | None
    options: tuple[tuple[str, Any], ...]  # hyper-parameters of the parts
    batch_size: int

    @property
    def name(self) -> str:
        """A name for tables and folders."""
        chosen = [f"{name}={value}" for name, value in self.options]
        given = [self.target, self.fusion, *([self.decoder] if self.decoder else []), *chosen]
        return "-".join([*given, f"batch={self.batch_size}"]).replace("/", "_")


@dataclass(frozen=True, kw_only=True)
class Grid:
    """The axes of a sweep; every combination is a head."""

    targets: Sequence[str]
    fusions: Sequence[str]
    decoders: Sequence[str | None] = (None,)
    options: Mapping[str, Sequence[Any]] = field(default_factory=dict)  # of the parts, where they have them
    lr: Sequence[float] = (1e-3,)
    weight_decay: Sequence[float] = (0.01,)
    dropout: Sequence[float | None] = (None,)
    batch_size: Sequence[int] = (32,)
    seeds: int = 1  # heads of each combination, with the seeds 0, 1, ...

    def __post_init__(self) -> None:
        """Checks that no axis is empty."""
        for name in ("targets", "fusions", "decoders", "lr", "weight_decay", "dropout", "batch_size"):
            if not getattr(self, name):
                raise PipelineError(
                    f"--{name.rstrip('s').replace('_', '-')} has no value: give one or more"
                )
        for name, values in self.options.items():
            if not values:
                raise PipelineError(f"--set {name} has no value: give one or more")
        if self.seeds < 1:
            raise PipelineError(f"--seeds {self.seeds}: give 1 or more")

    def rates(self) -> list[HeadRates]:
        """Seed, learning rate, weight decay and dropout of every head of a shape."""
        axes = itertools.product(self.lr, self.weight_decay, self.dropout, range(self.seeds))
        return [HeadRates(seed=s, lr=lr, weight_decay=wd, dropout=d) for lr, wd, d, s in axes]

    def shapes(self, bank: Bank, split: str) -> list[Shape]:
        """Every shape of head in the grid. `single_layer` without a layer is a head for every layer.

        Args:
            bank: has the targets and the layers.
            split: the one in the role of train.

        Raises:
            PipelineError: a target is missing, or an option belongs to no part of the grid.
        """
        found: list[Shape] = []
        used: set[str] = set()
        for target, fusion, decoder in itertools.product(self.targets, self.fusions, self.decoders):
            kind = open_target(bank, target, split)[1].kind
            axes = self._axes(bank, fusion, decoder or DECODER_FOR[kind])
            used |= set(axes)
            for values in itertools.product(*axes.values()):
                options = tuple(zip(axes, values, strict=True))
                shape = Shape(
                    target=target,
                    fusion=fusion,
                    decoder=decoder,
                    options=options,
                    batch_size=self.batch_size[0],
                )
                found += [replace(shape, batch_size=size) for size in self.batch_size]
        for name in self.options:
            if name not in used:
                raise PipelineError(f"--set {name}: no fusion and no decoder of the sweep has that option")
        return found

    def _axes(self, bank: Bank, fusion: str, decoder: str) -> dict[str, Sequence[Any]]:
        """The options that these two parts have, each with its values."""
        known = {
            *parts.hyper_parameters(parts.load("fusion", fusion)),
            *parts.hyper_parameters(parts.load("decoder", decoder)),
        }
        axes = {name: values for name, values in self.options.items() if name in known}
        if fusion == "single_layer" and "layer" not in axes:
            axes["layer"] = list(bank.recipe.layers)
        return axes


class Resident:
    """Reads each set of tokens of a bank once, all layers of it, for every stack that wants them."""

    def __init__(self) -> None:
        self._held: dict[tuple[str, ...], Labelled] = {}

    def load(
        self, split: Split, head: Head, layers: Sequence[int], target: Target, device: torch.device
    ) -> Labelled:
        """As `pipeline.batches.load`; layers that lie side by side are a view."""
        key = (split.name, target.name, head.reads, head.decoder.tokens)
        if key not in self._held:
            self._held[key] = batches.load(split, head, split.layers, target, device)
        whole = self._held[key]
        indices = split.layer_indices(layers)
        if indices == list(range(indices[0], indices[-1] + 1)):
            return replace(whole, states=whole.states[indices[0] : indices[-1] + 1])
        return replace(whole, states=whole.states[indices])


def sweep(
    store: str,
    grid: Grid,
    schedule: Schedule,
    *,
    out: str,
    memory_bytes: int,
    metric: str | None = None,
    splits: Mapping[str, str] | None = None,
    device: torch.device | None = None,
    note: Note = lambda _: None,
    progress: Callable[[int, Sequence[Epoch]], None] = lambda *_: None,
) -> dict[str, Any]:
    """Trains every head of a grid.

    Args:
        store: the bank.
        grid: the axes.
        schedule: epochs, warm-up, patience; its batch size is the grid's.
        out: folder of the sweep; one that was cut off is continued, if the grid is the same.
        memory_bytes: what a stack may take; a larger one is split.
        metric: the dev score that picks epochs and heads; by the target if None.
        splits: the splits in the roles of train, dev and test; a test split that is not there is left out.
        device: where the heads compute, the CPU by default.
        note: takes a line of text for the user.
        progress: called after every epoch of a stack.

    Returns:
        `run`, `heads`, `results`, `seconds`, `best` (the row of the best head of each target), `rows`.

    Raises:
        PipelineError: a choice does not fit, or the folder holds another sweep.
        CacheError: the bank is not there or damaged.
    """
    began = time.perf_counter()
    splits = splits or {"train": "train", "dev": "dev", "test": "test"}
    bank = open_bank(store)
    shapes, rates = grid.shapes(bank, splits["train"]), grid.rates()
    folder = Path(out)
    asked = {
        "grid": asdict(grid),
        "schedule": asdict(schedule),
        "bank": bank.fingerprint,
        "metric": metric,
        "splits": dict(splits),
    }
    runner = _Runner(bank, schedule, folder, metric, splits, device or torch.device("cpu"), note, progress)
    for shape in shapes:
        runner.check(shape, rates)
    check_free_sweep(out, json.loads(json.dumps(asked)))
    note(f"{len(shapes) * len(rates)} heads in {len(shapes)} stacks")
    rows = [row for shape in shapes for row in runner.stack(shape, rates, memory_bytes)]
    rows = [finite(row) for row in rows]
    columns = dict.fromkeys(name for row in rows for name in row)  # targets of other kinds have others
    table = pa.Table.from_pylist([{name: row.get(name) for name in columns} for row in rows])
    pyarrow.parquet.write_table(table, folder / RESULTS)
    return {
        "run": out,
        "heads": len(rows),
        "results": str(folder / RESULTS),
        "seconds": time.perf_counter() - began,
        "best": best_rows(rows),
        "rows": rows,
    }


@dataclass(frozen=True)
class _Runner:
    """Trains stacks of one bank and leaves their rows and best heads in the sweep's folder."""

    bank: Bank
    schedule: Schedule
    folder: Path
    metric: str | None
    splits: Mapping[str, str]
    device: torch.device
    note: Note
    progress: Callable[[int, Sequence[Epoch]], None]
    resident: Resident = field(default_factory=Resident)

    def check(self, shape: Shape, rates: Sequence[HeadRates]) -> None:
        """Refuses a shape that does not fit the bank or the target, before anything is trained.

        Raises:
            PipelineError: what does not fit.
        """
        split, target = open_target(self.bank, shape.target, self.splits["train"])
        open_target(self.bank, shape.target, self.splits["dev"])
        recipe = self.bank.recipe
        spec = plan_head(
            fusion=shape.fusion,
            decoder=shape.decoder,
            target=target,
            kept=recipe.layers,
            last=recipe.encoder.n_layers - 1,
            width=recipe.encoder.width,
            options=dict(shape.options),
        )
        metrics.resolve(self.metric or target.metric, target.kind, target.names)
        for dropout in dict.fromkeys(rate.dropout for rate in rates):
            head = build_one(spec, HeadRates(dropout=dropout))
            batches.select(split, head)

    def stack(self, shape: Shape, rates: Sequence[HeadRates], memory_bytes: int) -> list[dict[str, Any]]:
        """The rows of a shape's heads, from disk where they are finished."""
        done = self.folder / "stacks" / f"{_digest(shape)}.json"
        if done.exists():
            return list(json.loads(done.read_text(encoding="utf-8")))
        job = prepare(
            self.bank,
            shape.target,
            fusion=shape.fusion,
            decoder=shape.decoder,
            options=dict(shape.options),
            metric=self.metric,
            train_split=self.splits["train"],
            dev_split=self.splits["dev"],
            device=self.device,
            load=self.resident.load,
        )
        began = time.perf_counter()
        trained = self._fit(job, shape, rates, memory_bytes)
        seconds = (time.perf_counter() - began) / len(trained)
        scores = self._test(job, trained)
        rows = [_row(shape, job, *each, seconds) for each in zip(rates, trained, scores, strict=True)]
        self._keep_best(shape, job, rates, trained)
        write_whole(done, json.dumps([finite(row) for row in rows]))
        return rows

    def _fit(self, job: Job, shape: Shape, rates: Sequence[HeadRates], memory_bytes: int) -> list[Trained]:
        schedule = replace(self.schedule, batch_size=shape.batch_size)
        size = stack_size(job, shape.batch_size, memory_bytes)
        if size < len(rates):
            self.note(f"{shape.name}: {len(rates)} heads do not fit --memory, {size} at a time")
        found: list[Trained] = []
        for first in range(0, len(rates), size):
            found += fit(job, rates[first : first + size], schedule, self.progress)
        return found

    def _test(self, job: Job, trained: Sequence[Trained]) -> list[dict[str, float]]:
        """All scores of every head on the test split; none where there is no such split or target."""
        name = self.splits.get("test")
        if name not in self.bank.splits:
            return [{} for _ in trained]
        try:
            split, target = open_target(self.bank, job.target.name, str(name))
        except PipelineError as error:
            self.note(f"no test scores: {error}")
            return [{} for _ in trained]
        heads = stack([one.head for one in trained])
        data = self.resident.load(split, heads, job.spec.layers, target, self.device)
        scores = metrics.report(**predictions(heads, data), names=target.names)
        return [
            {} if one.failed_step else {name: float(values[k]) for name, values in scores.items()}
            for k, one in enumerate(trained)
        ]

    def _keep_best(
        self, shape: Shape, job: Job, rates: Sequence[HeadRates], trained: Sequence[Trained]
    ) -> None:
        sign = 1.0 if metrics.higher_is_better(job.metric) else -1.0
        whole = [k for k, one in enumerate(trained) if one.failed_step is None]
        if not whole:
            return
        best = max(whole, key=lambda k: sign * trained[k].dev)
        save_run(
            str(self.folder / "heads" / shape.name),
            trained[best],
            job=job,
            bank=self.bank,
            rates=rates[best],
            schedule=replace(self.schedule, batch_size=shape.batch_size),
            splits={role: self.splits[role] for role in ("train", "dev")},
            seconds=sum(epoch.seconds for epoch in trained[best].epochs) / len(rates),
        )


def stack_size(job: Job, batch_size: int, memory_bytes: int) -> int:
    """How many heads of a shape fit the memory: parameters, their optimizer state, and a batch's vectors.

    Raises:
        PipelineError: not even one fits.
    """
    head = build_head(job.spec, seed=0)
    parameters, _ = head.n_parameters()
    tokens = batch_size * job.train.n_tokens / max(1, job.train.n_examples)
    vectors = tokens * (len(job.spec.layers) + 8) * job.spec.width
    # Weights, gradient, two moments, the best epoch's copy; vectors of the forward and their gradients.
    each = 4 * (5 * parameters + 2 * vectors)
    if each > memory_bytes:
        raise PipelineError(
            f"--memory {memory_bytes / 2**30:.2g}GiB: one head of {job.spec.fusion} takes about "
            f"{each / 2**30:.2g}GiB, give that much or lower --batch-size"
        )
    return int(memory_bytes // each)


def best_rows(rows: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """The row of the best head of each target, by its dev score."""
    best: dict[str, dict[str, Any]] = {}
    for row in rows:
        sign = 1.0 if metrics.higher_is_better(row["metric"]) else -1.0
        found = best.get(row["target"])
        better = row["status"] == "ok" and (found is None or sign * row["dev"] > sign * found["dev"])
        if better:
            best[row["target"]] = dict(row)
    return best


def _row(
    shape: Shape, job: Job, rates: HeadRates, trained: Trained, test: Mapping[str, float], seconds: float
) -> dict[str, Any]:
    parameters, fusion_parameters = trained.head.n_parameters()
    best = trained.epochs[trained.best_epoch - 1].dev if trained.best_epoch else {}
    failed = trained.failed_step
    return {
        "target": shape.target,
        "fusion": shape.fusion,
        "decoder": job.spec.decoder,
        "options": json.dumps(dict(shape.options), sort_keys=True),
        "batch_size": shape.batch_size,
        **asdict(rates),
        "metric": job.metric,
        "dev": trained.dev,
        "test": test.get(job.metric),
        **{f"dev_{name}": value for name, value in best.items()},
        **{f"test_{name}": value for name, value in test.items()},
        "best_epoch": trained.best_epoch,
        "epochs": len(trained.epochs),
        "parameters": parameters,
        "fusion_parameters": fusion_parameters,
        "seconds": seconds,
        "status": "ok" if failed is None else f"failed at step {failed}",
    }


def _digest(shape: Shape) -> str:
    return hashlib.sha256(json.dumps(asdict(shape), sort_keys=True).encode()).hexdigest()[:16]
