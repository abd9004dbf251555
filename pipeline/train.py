"""Stage 2: trains a stack of heads on a bank. One head is a stack of one.

Build, epoch, evaluation and the choice of the best epoch are functions of their own; nothing here
touches the encoder.
"""

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch

from cache import Bank, Split, Target
from pipeline import batches, metrics
from pipeline.batches import Labelled
from pipeline.errors import PipelineError, nearest
from pipeline.head import Head, HeadSpec, build_head, plan_head
from pipeline.optimizer import StackedAdamW, linear_schedule
from pipeline.stack import stack, unstack

EVALUATION_EXAMPLES = 256
"""Examples scored at once outside training."""


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
        _check_seed("--seed", self.seed)
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
    patience: int | None = None  # epochs without a better dev score after which training ends
    data_seed: int = 0  # of the order of the examples

    def __post_init__(self) -> None:
        """Checks the ranges."""
        _check_seed("--data-seed", self.data_seed)
        for name in ("epochs", "batch_size"):
            if getattr(self, name) < 1:
                raise PipelineError(f"--{name.replace('_', '-')} {getattr(self, name)}: give 1 or more")
        if not 0 <= self.warmup_frac <= 1:
            raise PipelineError(f"--warmup-frac {self.warmup_frac}: give a share between 0 and 1")
        if self.patience is not None and self.patience < 1:
            raise PipelineError(f"--patience {self.patience}: give 1 or more epochs")


def _check_seed(flag: str, seed: int) -> None:
    if not 0 <= seed <= MAX_SEED:
        raise PipelineError(f"{flag} {seed}: give 0 to {MAX_SEED}")


@dataclass(frozen=True, kw_only=True)
class Epoch:
    """One line of ``metrics.jsonl``; every score in percent, as `pipeline.metrics` gives it."""

    epoch: int  # from 1
    loss: float  # mean training loss of a batch
    dev: dict[str, float]
    seconds: float  # training alone
    lr: float  # at the last step


@dataclass(frozen=True, kw_only=True)
class Trained:
    """A trained head: the weights of its best epoch."""

    head: Head
    best_epoch: int
    metric: str
    epochs: list[Epoch]
    failed_step: int | None = None  # step, from 1, at which the loss was first NaN or infinite

    @property
    def dev(self) -> float:
        """The dev score of the best epoch; NaN for a head that failed before it had one."""
        return self.epochs[self.best_epoch - 1].dev[self.metric] if self.best_epoch else math.nan

    def check(self) -> None:
        """Refuses a head that failed.

        Raises:
            PipelineError: its loss became NaN or infinite.
        """
        if self.failed_step is not None:
            raise PipelineError(f"the loss became NaN or infinite at step {self.failed_step}: lower --lr")


@dataclass(frozen=True, kw_only=True)
class Job:
    """A target of a bank, checked and read: what `fit` trains on."""

    target: Target
    spec: HeadSpec
    metric: str
    train: Labelled = field(repr=False)
    dev: Labelled = field(repr=False)


def open_target(bank: Bank, name: str, split: str) -> tuple[Split, Target]:
    """One split of a bank with one of its targets.

    Raises:
        PipelineError: the split or the target is not there, or without a label; says why a column is no
            target.
    """
    if split not in bank.splits:
        raise PipelineError(f"{bank.path} has no split {split!r}: {nearest(split, bank.splits)}")
    part = bank.split(split)
    known = part.target_names()
    if name not in known:
        reason = bank.attrs.get("skipped", {}).get(name)
        if reason:
            raise PipelineError(f"column {name!r} was not taken as a target: {reason}")
        raise PipelineError(
            f"{bank.path} has no target {name!r} on split {split}: {nearest(name, known)}. "
            f"Add one with 'layerbank label {bank.path} DATA --target {name}'"
        )
    target = part.target(name)
    if not (target.values >= 0 if target.kind != "float" else ~np.isnan(target.values)).any():
        raise PipelineError(
            f"split {split} of {bank.path} has no label of target {name!r}: name another split"
        )
    return part, target


def prepare(
    bank: Bank,
    target: str,
    *,
    fusion: str,
    decoder: str | None = None,
    options: Mapping[str, Any] | None = None,
    metric: str | None = None,
    train_split: str = "train",
    dev_split: str = "dev",
    device: torch.device | None = None,
    load: Callable[..., Labelled] = batches.load,
) -> Job:
    """Checks every choice against the bank, then reads what the head needs, by `load`.

    Raises:
        PipelineError: something does not fit; said before the first step.
        CacheError: the bank is damaged.
    """
    split, labels = open_target(bank, target, train_split)
    dev, dev_labels = open_target(bank, target, dev_split)
    if labels.names != dev_labels.names:
        raise PipelineError(
            f"target {target!r} has not the same classes on {train_split} and {dev_split}: "
            "write both with one 'layerbank label'"
        )
    spec = plan_head(
        fusion=fusion,
        decoder=decoder,
        target=labels,
        kept=bank.recipe.layers,
        last=bank.recipe.encoder.n_layers - 1,
        width=bank.recipe.encoder.width,
        options=options,
    )
    chosen = metrics.resolve(metric or labels.metric, labels.kind, labels.names)
    shape = build_head(spec, seed=0)
    where = device or torch.device("cpu")
    return Job(
        target=labels,
        spec=spec,
        metric=chosen,
        train=load(split, shape, spec.layers, labels, where),
        dev=load(dev, shape, spec.layers, dev_labels, where),
    )


def fit(
    job: Job,
    rates: Sequence[HeadRates],
    schedule: Schedule,
    progress: Callable[[int, Sequence[Epoch]], None] = lambda *_: None,
) -> list[Trained]:
    """Trains a stack of heads, one for each entry of `rates`, over one stream of batches.

    AdamW, linear warm-up and decay; each head keeps the weights of its epoch with the best dev score
    (the first of several that are equal). A head never depends on the others: one that fails, or whose
    patience ends, leaves them as they are. On a CPU the result is a function of the arguments, bit for
    bit.

    Args:
        job: what to learn from.
        rates: seed, learning rate, weight decay and dropout of each head.
        schedule: epochs and batches.
        progress: called after every epoch with its number and each head's last line.
    """
    heads = stack([build_one(job.spec, rate) for rate in rates]).to(job.train.states.device)
    optimizer = StackedAdamW(
        heads, lr=[rate.lr for rate in rates], weight_decay=[rate.weight_decay for rate in rates]
    )
    record = _Record(job.metric, optimizer, schedule.patience)
    for epoch in range(1, schedule.epochs + 1):
        began = time.perf_counter()
        passed = train_epoch(heads, optimizer, job, schedule, epoch)
        seconds = time.perf_counter() - began
        scores = metrics.report(**predictions(heads, job.dev), names=job.target.names)
        for k, rate in enumerate(rates):
            dev = {name: float(values[k]) for name, values in scores.items()}
            lr = rate.lr * passed.scale
            line = Epoch(epoch=epoch, loss=passed.losses[k], dev=dev, seconds=seconds, lr=lr)
            record.add(k, line, passed.failed_steps[k])
        progress(epoch, [lines[-1] for lines in record.lines])
        if all(record.ended):
            break
    record.restore()
    return [
        Trained(
            head=unstack(heads, k),
            best_epoch=record.best_epochs[k],
            metric=job.metric,
            epochs=record.lines[k],
            failed_step=record.failed_steps[k],
        )
        for k in range(len(rates))
    ]


def build_one(spec: HeadSpec, rate: HeadRates) -> Head:
    """Builds one head of a stack, with the seed and the dropout of its rates."""
    if rate.dropout is not None:
        spec = replace(spec, decoder_options={**spec.decoder_options, "dropout": rate.dropout})
    return build_head(spec, seed=rate.seed)


@dataclass(frozen=True, kw_only=True)
class Pass:
    """One pass over the training examples; lists have an entry a head."""

    losses: list[float]  # mean of the batches
    failed_steps: list[int]  # first step, from 1, with a loss that is not finite; 0 where there is none
    scale: float  # last factor on the learning rates


def train_epoch(heads: Head, optimizer: StackedAdamW, job: Job, schedule: Schedule, epoch: int) -> Pass:
    """One pass over the training examples, every head stepping on the same batches."""
    heads.train()
    data = job.train
    steps = math.ceil(data.n_examples / schedule.batch_size)
    n_steps = steps * schedule.epochs
    warmup_steps = round(schedule.warmup_frac * n_steps)
    sequence = batches.order(data.n_examples, seed=schedule.data_seed, epoch=epoch)
    total, scale = torch.zeros(optimizer.n_heads, device=data.states.device), 0.0
    failed = torch.zeros(optimizer.n_heads, dtype=torch.long, device=data.states.device)
    stream = batches.batches(data, sequence, batch_size=schedule.batch_size)
    for step, (inputs, labels, _) in enumerate(stream, start=steps * (epoch - 1)):
        optimizer.zero_grad()
        loss = heads.decoder.loss(heads(inputs), labels, inputs.decoded_lengths)
        if loss.requires_grad:
            loss.sum().backward()  # type: ignore[no-untyped-call]
        scale = linear_schedule(step, n_steps=n_steps, warmup_steps=warmup_steps)
        optimizer.step(scale)
        loss = loss.detach()
        total += loss
        # On the device, without a look at it: a look would wait for the step.
        failed = torch.where((failed == 0) & ~loss.isfinite(), step + 1, failed)
    return Pass(losses=(total / steps).tolist(), failed_steps=failed.tolist(), scale=scale)


@torch.inference_mode()
def predictions(heads: Head, data: Labelled) -> dict[str, Any]:
    """Predictions for every unit of a split, as `pipeline.metrics.report` takes them.

    A word that got no token (cut off, or made of nothing the tokenizer knows) has no prediction: -1,
    which counts as wrong.
    """
    heads.eval()
    n_heads = next((p.shape[0] for p in heads.parameters()), 1)
    floats = data.gold.dtype.kind == "f"
    out = np.full(
        (n_heads, len(data.gold)), np.nan if floats else -1, dtype=np.float64 if floats else np.int64
    )
    for inputs, _, units in batches.batches(
        data, np.arange(data.n_examples), batch_size=EVALUATION_EXAMPLES
    ):
        guess = heads.decoder.predict(heads(inputs), inputs.decoded_lengths)
        out[:, data.unit[units]] = guess.cpu().numpy()
    return {"predictions": out, "gold": data.gold, "lengths": data.gold_lengths}


class _Record:
    """Each head's lines, and the weights of its best epoch so far."""

    def __init__(self, metric: str, optimizer: StackedAdamW, patience: int | None) -> None:
        n_heads = optimizer.n_heads
        self.lines: list[list[Epoch]] = [[] for _ in range(n_heads)]
        self.best_epochs = [0] * n_heads
        self.failed_steps: list[int | None] = [None] * n_heads
        self.ended = [False] * n_heads
        self._metric, self._patience = metric, patience
        self._sign = 1.0 if metrics.higher_is_better(metric) else -1.0
        self._scores = [-math.inf] * n_heads
        self._current = [p.detach() for p in optimizer.parameters]
        self._kept = [p.clone() for p in self._current]

    def add(self, head: int, line: Epoch, failed_step: int) -> None:
        """Takes note of an epoch of one head, unless the head has ended already."""
        if self.ended[head]:
            return
        self.lines[head].append(line)
        if failed_step:
            self.failed_steps[head], self.ended[head] = failed_step, True
            return
        score = self._sign * line.dev[self._metric]
        if not self.best_epochs[head] or score > self._scores[head]:
            self.best_epochs[head], self._scores[head] = line.epoch, score
            for kept, current in zip(self._kept, self._current, strict=True):
                kept[head] = current[head]
        waited = line.epoch - self.best_epochs[head]
        self.ended[head] = self._patience is not None and waited >= self._patience

    def restore(self) -> None:
        """Puts the best weights back into the stack."""
        for kept, current in zip(self._kept, self._current, strict=True):
            current.copy_(kept)
