"""What stage 2 is asked to do: rates, schedule, a target of a bank, and what comes out of it."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import numpy as np

from cache import Bank, Split, Target
from cache.place import place
from pipeline import metrics
from pipeline.batches import Feeds, Labelled, load
from pipeline.errors import PipelineError, nearest
from pipeline.head import Head, HeadSpec, build_head, plan_head
from pipeline.optimizer import linear_schedule
from pipeline.transfer import take_sources

Precision = Literal["float32", "bfloat16"]

MAX_SEED = 2**32 - 1
"""The largest seed of heads and of the order, as numpy and torch both take it."""


@dataclass(frozen=True, kw_only=True)
class HeadRates:
    """What may differ between the heads of one stack."""

    seed: int = 0  # of the starting weights and of dropout
    lr: float = 1e-3  # AdamW's learning rate at its highest
    weight_decay: float = 0.01
    dropout: float | None = None  # of the decoder; None leaves what the parts' options say

    def __post_init__(self) -> None:
        """Checks the ranges."""
        check_seed("--seed", self.seed)
        if not (math.isfinite(self.lr) and self.lr > 0):
            raise PipelineError(f"--lr {self.lr}: give a number above 0")
        if not (math.isfinite(self.weight_decay) and self.weight_decay >= 0):
            raise PipelineError(f"--weight-decay {self.weight_decay}: give 0 or more")


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """What all heads of a stack share."""

    epochs: int = 10
    batch_size: int = 32  # examples
    warmup_frac: float = 0.1  # share of all steps in which the learning rate rises
    warmup_steps: int | None = None  # how many steps those are; None leaves it to the share
    decay: bool = True  # whether the learning rate falls to 0 after that, or stays as it is
    dev_epochs: tuple[int, ...] = ()  # epochs after which dev is scored; () for all
    patience: int | None = None  # epochs without a better dev score after which training ends
    data_seed: int = 0  # of the order of the examples
    precision: Precision = "float32"  # of the products; weights and losses are float32
    rungs: tuple[int, ...] = ()  # epochs after which the worse half of a stack leaves

    def __post_init__(self) -> None:
        """Checks the ranges."""
        check_seed("--data-seed", self.data_seed)
        for name in ("epochs", "batch_size"):
            if getattr(self, name) < 1:
                raise PipelineError(f"--{name.replace('_', '-')} {getattr(self, name)}: give 1 or more")
        if not 0 <= self.warmup_frac <= 1:
            raise PipelineError(f"--warmup-frac {self.warmup_frac}: give a share between 0 and 1")
        if self.warmup_steps is not None and self.warmup_steps < 0:
            raise PipelineError(f"warmup_steps {self.warmup_steps}: give 0 or more")
        if self.patience is not None and self.patience < 1:
            raise PipelineError(f"--patience {self.patience}: give 1 or more epochs")
        self._check_dev_epochs()
        if list(self.rungs) != sorted({r for r in self.rungs if 1 <= r < self.epochs}):
            asked = ",".join(map(str, self.rungs))
            raise PipelineError(f"--rungs {asked}: give ascending epochs from 1 to {self.epochs - 1}")

    def _check_dev_epochs(self) -> None:
        asked = ",".join(map(str, self.dev_epochs))
        if list(self.dev_epochs) != sorted({e for e in self.dev_epochs if 1 <= e <= self.epochs}):
            raise PipelineError(f"dev_epochs {asked}: give ascending epochs from 1 to {self.epochs}")
        if self.dev_epochs and (self.patience is not None or self.rungs):
            raise PipelineError(f"dev_epochs {asked}: patience and rungs need the dev score of every epoch")

    def scores_dev(self, epoch: int) -> bool:
        """Whether dev is scored after an epoch, counted from 1."""
        return not self.dev_epochs or epoch in self.dev_epochs

    def scale(self, step: int, *, steps: int) -> float:
        """Factor on the learning rate at a step counted from 0: linear warm-up, then linear decay or none.

        Without decay, and with the warm-up in steps, a run of some epochs is the start of every longer one.

        Args:
            step: among those of all epochs.
            steps: of an epoch.
        """
        n_steps = steps * self.epochs
        warmup = self.warmup_steps
        warmup = round(self.warmup_frac * n_steps) if warmup is None else warmup
        if not self.decay and step >= warmup:
            return 1.0
        return linear_schedule(step, n_steps=n_steps, warmup_steps=warmup)


def check_seed(flag: str, seed: int) -> None:
    """Checks the range of a seed.

    Raises:
        PipelineError: it is out of it.
    """
    if not 0 <= seed <= MAX_SEED:
        raise PipelineError(f"{flag} {seed}: give 0 to {MAX_SEED}")


@dataclass(frozen=True, kw_only=True)
class Epoch:
    """One line of ``metrics.jsonl``; every score in percent, as `pipeline.metrics` gives it."""

    epoch: int  # from 1
    loss: float  # mean training loss of a batch
    dev: dict[str, float]  # empty where dev was not scored
    seconds: float  # training alone; of a stack, the head's share
    lr: float  # at the last step


@dataclass(frozen=True, kw_only=True)
class Trained:
    """A trained head: the weights of its best epoch."""

    head: Head
    best_epoch: int
    metric: str
    epochs: list[Epoch]
    failed_step: int | None = None  # step, from 1, at which the loss was first NaN or infinite
    left_epoch: int | None = None  # rung at which the head was among the worse half of its stack

    @property
    def status(self) -> str:
        """How the training ended: ok, or why it ended early."""
        if self.failed_step is not None:
            return f"failed at step {self.failed_step}"
        return "ok" if self.left_epoch is None else f"left after epoch {self.left_epoch}"

    @property
    def dev(self) -> float:
        """The dev score of the best epoch; NaN for a head that failed before it had one."""
        return self.epochs[self.best_epoch - 1].dev[self.metric] if self.best_epoch else math.nan

    @property
    def seconds(self) -> float:
        """What its epochs took, training alone."""
        return sum(line.seconds for line in self.epochs)

    def check(self) -> None:
        """Refuses a head that failed.

        Raises:
            PipelineError: its loss became NaN or infinite.
        """
        if self.failed_step is not None:
            raise PipelineError(f"the loss became NaN or infinite at step {self.failed_step}: lower --lr")


@dataclass(frozen=True, kw_only=True)
class Goal:
    """What a head is to learn, and of which shape it is."""

    target: Target
    spec: HeadSpec
    metric: str


@dataclass(frozen=True, kw_only=True)
class Job(Goal):
    """A goal with the data to reach it: what `fit` trains on."""

    train: Labelled = field(repr=False)
    dev: Labelled = field(repr=False)


def open_target(bank: Bank, name: str, split: str) -> tuple[Split, Target]:
    """One split of a bank with one of its targets.

    Raises:
        PipelineError: the split or the target is not there, or without a label; says why a column is no
            target.
    """
    if split not in bank.splits:
        raise PipelineError(
            f"{bank.path} has no split {split!r}: {nearest(split, bank.splits)}; name another with "
            f"--train-split, --dev-split or --split, or add a file {split!r} to the data and extract again"
        )
    part = bank.split(split)
    known = part.target_names()
    if name not in known:
        reason = bank.attrs.get("skipped", {}).get(name)
        if reason:
            raise PipelineError(
                f"column {name!r} was not taken as a target: {reason}. If it is one, "
                f"'layerbank label {bank.path} DATA --target {name}' adds it"
            )
        raise PipelineError(
            f"{bank.path} has no target {name!r} on split {split}: {nearest(name, known)}. "
            f"Add one with 'layerbank label {bank.path} DATA --target {name}'"
        )
    target = part.target(name)
    if not (target.values >= 0 if target.kind != "float" else ~np.isnan(target.values)).any():
        raise PipelineError(
            f"split {split} of {bank.path} has no label of target {name!r}: name another split"
        )
    if "output_layer" in target.settings:
        file = f"{place(bank.path).absolute}/{target.settings['output_layer']}"
        target = replace(target, settings={**target.settings, "output_layer": file})
    return part, target


def plan_goal(
    bank: Bank,
    target: str,
    *,
    fusion: str,
    decoder: str | None = None,
    options: Mapping[str, Any] | None = None,
    metric: str | None = None,
    train_split: str = "train",
    dev_split: str = "dev",
    depth: int | None = None,
) -> Goal:
    """Checks every choice against the bank; reads no states.

    Args:
        bank: holds the states.
        target: what to learn.
        fusion: name or dotted path.
        decoder: name or dotted path; by the target's kind if None.
        options: hyper-parameters of the parts.
        metric: the dev score that picks the epoch; by the target if None.
        train_split: the split to learn from.
        dev_split: the split to choose the epoch by.
        depth: number of the layer after which the encoder is taken to end; its last if None.

    Raises:
        PipelineError: something does not fit.
        CacheError: the bank is damaged.
    """
    _, labels = open_target(bank, target, train_split)
    _, dev_labels = open_target(bank, target, dev_split)
    if labels.names != dev_labels.names:
        raise PipelineError(
            f"target {target!r} has not the same classes on {train_split} and {dev_split}: "
            "write both with one 'layerbank label'"
        )
    last = bank.recipe.encoder.n_layers - 1
    if depth is not None and not 1 <= depth <= last:
        raise PipelineError(f"depth {depth}: the encoder of {bank.path} has the layers 1 to {last}")
    last = depth or last
    spec = plan_head(
        fusion=fusion,
        decoder=decoder,
        target=labels,
        kept=[layer for layer in bank.recipe.layers if layer <= last],
        last=last,
        width=bank.recipe.encoder.width,
        options=options,
    )
    chosen = metrics.resolve(metric or labels.metric, labels.kind, labels.names)
    return Goal(target=labels, spec=take_sources(spec, bank.recipe.encoder), metric=chosen)


def prepare(
    bank: Bank,
    target: str,
    *,
    train_split: str = "train",
    dev_split: str = "dev",
    feeds: Feeds | None = None,
    **choices: Any,
) -> Job:
    """Checks every choice against the bank, then opens what the head reads.

    Args:
        bank: holds the states.
        target: what to learn.
        train_split: the split to learn from.
        dev_split: the split to choose the epoch by.
        feeds: hold the states, on the device that computes; by default on the CPU.
        choices: fusion, decoder, options, metric and depth, as for `plan_goal`.

    Raises:
        PipelineError: something does not fit; said before the first step.
        CacheError: the bank is damaged.
    """
    goal = plan_goal(bank, target, train_split=train_split, dev_split=dev_split, **choices)
    feeds = feeds or Feeds()
    shape = build_head(goal.spec, seed=0)
    data = {}
    for role, name in (("train", train_split), ("dev", dev_split)):
        split, labels = open_target(bank, target, name)
        data[role] = load(split, shape, goal.spec.layers, labels, feeds, scored=role == "dev")
    return Job(target=goal.target, spec=goal.spec, metric=goal.metric, train=data["train"], dev=data["dev"])


def build_one(spec: HeadSpec, rate: HeadRates) -> Head:
    """Builds one head of a stack, with the seed and the dropout of its rates."""
    if rate.dropout is not None:
        spec = replace(spec, decoder_options={**spec.decoder_options, "dropout": rate.dropout})
    return build_head(spec, seed=rate.seed)
