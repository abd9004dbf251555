"""One stack in training: N heads of one shape that step on the same batches until each has ended.

A head that has ended (its loss is not finite, its patience is over, or it left at a rung) is taken out of
the stack, so the time goes to the others.
"""

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from functools import partial
from typing import Any

import torch
from jaxtyping import Float, Float64, Shaped
from numpy import ndarray
from torch import Tensor

from pipeline import metrics
from pipeline.feed import Batch
from pipeline.head import Head, Inputs
from pipeline.job import Epoch, HeadRates, Job, Precision, Schedule, Trained, build_one
from pipeline.optimizer import StackedAdamW
from pipeline.stack import Dropout, stack, take

GROUP = 16
"""Heads computed at once on a CPU; one of the two best of 1 to 32 (docs/log.md)."""


def scores_of(heads: Head, inputs: Inputs, precision: Precision) -> Float[Tensor, "head unit score"]:
    """Scores of every unit in float32, the products computed in the precision asked for."""
    if precision == "float32":
        scores: Tensor = heads(inputs)
        return scores
    with torch.autocast(inputs.states.device.type, dtype=torch.bfloat16):
        return heads(inputs).float()


class Fitting:
    """A stack in training.

    Args:
        job: what to learn from.
        rates: seed, learning rate, weight decay and dropout of each head.
        schedule: epochs and batches.
        group: heads computed at once; by `group_size` if None. Has no bearing on the result but rounding.
    """

    def __init__(
        self, job: Job, rates: Sequence[HeadRates], schedule: Schedule, group: int | None = None
    ) -> None:
        self.job, self.rates, self.schedule = job, list(rates), schedule
        self.steps = math.ceil(job.train.n_examples / schedule.batch_size)  # of an epoch
        self.epoch = 0  # epochs done
        self.record = Record(job.metric, len(self.rates), schedule.patience)
        size = group or group_size(job)
        numbers = list(range(len(self.rates)))
        self.groups = [self._group(numbers[k : k + size]) for k in range(0, len(numbers), size)]

    def _group(self, numbers: list[int]) -> "_Group":
        rates = [self.rates[k] for k in numbers]
        heads = stack([build_one(self.job.spec, rate) for rate in rates])
        return _Group(heads.to(self.job.train.feed.device), numbers, rates)

    @property
    def alive(self) -> list[int]:
        """The heads that have not ended."""
        return [k for group in self.groups for k in group.numbers]

    @property
    def n_parameters(self) -> int:
        """Trained parameters of the heads that have not ended."""
        return sum(p.numel() for group in self.groups for p in group.optimizer.parameters)

    @property
    def tokens_a_step(self) -> float:
        """Tokens that a step reads on average."""
        return self.job.train.n_tokens / max(1, self.steps)

    def begin_epoch(self) -> None:
        """Makes ready for a pass over the training examples."""
        for group in self.groups:
            group.begin_epoch()

    def steps_of(self, batch: Batch, step: int) -> list[Callable[[], float]]:
        """One update of every head: a job for each group, which gives the seconds it took.

        Args:
            batch: some training examples.
            step: number of the update within the epoch, from 0.
        """
        inputs, labels, _ = self.job.train.of(batch)
        number = self.steps * self.epoch + step
        scale = self.schedule.scale(number, steps=self.steps)
        precision = self.schedule.precision
        return [partial(group.step, inputs, labels, scale, number, precision) for group in self.groups]

    def guesses_of(self, batch: Batch) -> list[Callable[[], Shaped[Tensor, "head unit ..."]]]:
        """What every head that is alive makes of the units of a dev batch: a job for each group.

        See `Decoder.outcome` for what a job gives.
        """
        inputs, labels, _ = self.job.dev.of(batch)
        return [partial(group.predict, inputs, labels, self.schedule.precision) for group in self.groups]

    def end_epoch(self, dev: Mapping[str, Float64[ndarray, " head"]], seconds: float) -> list[Epoch]:
        """Takes note of an epoch and lets go of the heads that have ended.

        Args:
            dev: for each metric, the dev score of every head that is alive; none where dev was not scored.
            seconds: of the training alone; every head that was in it took an equal share.

        Returns:
            Each head's last line, of all heads.
        """
        self.epoch += 1
        losses = [loss for group in self.groups for loss in (group.total / self.steps).tolist()]
        failed = [step for group in self.groups for step in group.failed.tolist()]
        scale = self.schedule.scale(self.steps * self.epoch - 1, steps=self.steps)
        parameters = [(group, row) for group in self.groups for row in range(len(group.numbers))]
        for place, (group, row) in enumerate(parameters):
            head = group.numbers[row]
            line = Epoch(
                epoch=self.epoch,
                loss=losses[place],
                dev={name: float(values[place]) for name, values in dev.items()},
                seconds=seconds / len(parameters),
                lr=self.rates[head].lr * scale,
            )
            current = [p.detach()[row] for p in group.optimizer.parameters]
            self.record.add(head, line, failed[place], current)
        self._let_go()
        return [lines[-1] for lines in self.record.lines]

    def leave(self, rung_of: Mapping[int, int]) -> None:
        """Ends heads that were among the worse half at a rung, each named with its rung's epoch."""
        for k, epoch in rung_of.items():
            self.record.left_epochs[k], self.record.ended[k] = epoch, True
        self._let_go()

    def _let_go(self) -> None:
        """Takes the heads that have ended out of their groups."""
        for group in self.groups:
            group.keep([k for k in group.numbers if not self.record.ended[k]], self.rates)
        self.groups = [group for group in self.groups if group.numbers]

    def trained(self) -> list[Trained]:
        """Every head with the weights of its best epoch."""
        return [self._trained(k) for k in range(len(self.rates))]

    def _trained(self, k: int) -> Trained:
        head = build_one(self.job.spec, self.rates[k]).to(self.job.train.feed.device)
        if self.record.best_epochs[k]:
            for parameter, kept in zip(
                (p for p in head.parameters() if p.requires_grad), self.record.kept[k], strict=True
            ):
                parameter.data.copy_(kept)
        return Trained(
            head=head,
            best_epoch=self.record.best_epochs[k],
            metric=self.job.metric,
            epochs=self.record.lines[k],
            failed_step=self.record.failed_steps[k],
            left_epoch=self.record.left_epochs[k],
        )

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """All that `resume` needs after an epoch: tensors by name, and plain values."""
        tensors: dict[str, Tensor] = {}
        for k, kept in self.record.kept.items():
            tensors |= {f"kept.{k}.{i}": value for i, value in enumerate(kept)}
        for g, group in enumerate(self.groups):
            tensors |= {f"group.{g}.{name}": value for name, value in group.tensors().items()}
        numbers = [group.numbers for group in self.groups]
        return tensors, {"epoch": self.epoch, "groups": numbers, "record": self.record.to_json()}

    def resume(self, tensors: Mapping[str, Tensor], values: Mapping[str, Any]) -> None:
        """Goes on after the epoch at which `state` was taken, as if nothing had happened."""
        self.epoch = values["epoch"]
        device = self.job.train.feed.device
        self.record.restore(values["record"], _numbered(tensors, "kept", device))
        self.groups = [self._group(numbers) for numbers in values["groups"]]
        for g, group in enumerate(self.groups):
            prefix = f"group.{g}."
            mine = {n.removeprefix(prefix): v for n, v in tensors.items() if n.startswith(prefix)}
            group.restore(mine, self.steps * self.epoch)


def _numbered(tensors: Mapping[str, Tensor], name: str, device: torch.device) -> dict[int, list[Tensor]]:
    """Lists of tensors by head, from names such as kept.3.0."""
    found: dict[int, list[Tensor]] = {}
    names = [key.split(".") for key in tensors if key.startswith(f"{name}.")]
    for k, i in sorted((int(head), int(place)) for _, head, place in names):
        found.setdefault(k, []).append(tensors[f"{name}.{k}.{i}"].to(device))
    return found


class _Group:
    """Heads of a stack that are computed at once."""

    def __init__(self, heads: Head, numbers: list[int], rates: Sequence[HeadRates]) -> None:
        self.heads, self.numbers = heads, numbers
        self.optimizer = _optimizer(heads, rates)
        self.begin_epoch()

    def begin_epoch(self) -> None:
        self.heads.train()
        device = next((t.device for t in (*self.heads.parameters(), *self.heads.buffers())), None)
        self.total = torch.zeros(len(self.numbers), device=device)
        self.failed = torch.zeros(len(self.numbers), dtype=torch.long, device=device)

    def step(
        self, inputs: Inputs, labels: Tensor, scale: float, number: int, precision: Precision
    ) -> float:
        began = time.perf_counter()
        self.optimizer.zero_grad()
        scores = scores_of(self.heads, inputs, precision)
        loss = self.heads.decoder.loss(scores, labels, inputs.decoded_lengths)
        if loss.requires_grad:
            loss.sum().backward()  # type: ignore[no-untyped-call]
        self.optimizer.step(scale)
        loss = loss.detach()
        self.total += loss
        # On the device, without a look at it: a look would wait for the step.
        self.failed = torch.where((self.failed == 0) & ~loss.isfinite(), number + 1, self.failed)
        return time.perf_counter() - began

    @torch.inference_mode()
    def predict(
        self, inputs: Inputs, labels: Tensor, precision: Precision
    ) -> Shaped[Tensor, "head unit ..."]:
        self.heads.eval()
        scores = scores_of(self.heads, inputs, precision)
        return self.heads.decoder.outcome(scores, labels, inputs.decoded_lengths)

    def keep(self, numbers: list[int], rates: Sequence[HeadRates]) -> None:
        """Lets go of all heads but some."""
        if numbers == self.numbers:
            return
        rows = [self.numbers.index(k) for k in numbers]
        moments = [(first[rows], second[rows]) for first, second in self.optimizer.moments]
        steps = self.optimizer.steps
        self.numbers = numbers
        if numbers:
            self.heads = take(self.heads, rows)
            self.optimizer = _optimizer(self.heads, [rates[k] for k in numbers])
            self.optimizer.resume(steps, moments)

    def tensors(self) -> dict[str, Tensor]:
        """Weights, moments and how far the dropout streams have run."""
        found: dict[str, Tensor] = {}
        pairs = zip(self.optimizer.parameters, self.optimizer.moments, strict=True)
        for i, (parameter, (first, second)) in enumerate(pairs):
            found |= {f"weight.{i}": parameter.detach(), f"first.{i}": first, f"second.{i}": second}
        for i, dropout in enumerate(_dropouts(self.heads)):
            found |= {f"dropout.{i}.{k}": state for k, state in enumerate(dropout.states())}
        return found

    def restore(self, tensors: Mapping[str, Tensor], steps: int) -> None:
        """The opposite of `tensors`."""
        moments = []
        for i, parameter in enumerate(self.optimizer.parameters):
            parameter.data.copy_(tensors[f"weight.{i}"])
            moments.append(
                (tensors[f"first.{i}"].to(parameter.device), tensors[f"second.{i}"].to(parameter.device))
            )
        self.optimizer.resume(steps, moments)
        for i, dropout in enumerate(_dropouts(self.heads)):
            names = [f"dropout.{i}.{k}" for k in range(len(self.numbers))]
            dropout.resume([tensors[name] for name in names if name in tensors])


def _optimizer(heads: Head, rates: Sequence[HeadRates]) -> StackedAdamW:
    return StackedAdamW(
        heads, lr=[rate.lr for rate in rates], weight_decay=[rate.weight_decay for rate in rates]
    )


def _dropouts(heads: Head) -> list[Dropout]:
    return [module for module in heads.modules() if isinstance(module, Dropout)]


class Record:
    """Each head's lines, and the weights of its best epoch so far.

    Args:
        metric: picks the best epoch.
        n_heads: of the stack.
        patience: epochs without a gain after which a head ends.
    """

    def __init__(self, metric: str, n_heads: int, patience: int | None) -> None:
        self.lines: list[list[Epoch]] = [[] for _ in range(n_heads)]
        self.best_epochs = [0] * n_heads
        self.failed_steps: list[int | None] = [None] * n_heads
        self.left_epochs: list[int | None] = [None] * n_heads
        self.ended = [False] * n_heads
        self.kept: dict[int, list[Tensor]] = {}
        self._metric, self._patience = metric, patience
        self._sign = 1.0 if metrics.higher_is_better(metric) else -1.0

    def score(self, head: int) -> float:
        """The dev score of a head's best epoch so far, higher for better; -inf where it has none."""
        best = self.best_epochs[head]
        return self._sign * self.lines[head][best - 1].dev[self._metric] if best else -math.inf

    def add(self, head: int, line: Epoch, failed_step: int, weights: Sequence[Tensor]) -> None:
        """Takes note of an epoch of one head."""
        before = self.score(head)
        self.lines[head].append(line)
        if failed_step:
            self.failed_steps[head], self.ended[head] = failed_step, True
            return
        if line.dev and (not self.best_epochs[head] or self._sign * line.dev[self._metric] > before):
            self.best_epochs[head] = line.epoch
            if head not in self.kept:
                self.kept[head] = [torch.empty_like(value) for value in weights]
            for kept, current in zip(self.kept[head], weights, strict=True):
                kept.copy_(current)
        # Only where every epoch has a dev score: see `Schedule`.
        waited = line.epoch - self.best_epochs[head]
        self.ended[head] = self._patience is not None and waited >= self._patience

    def standings(self, epoch: int) -> dict[int, float]:
        """The best dev score, higher for better, of each head that had not ended when an epoch was over.

        Those that left at that epoch's rung are among them, whatever has happened since: a stack in pieces
        is ranked again when it is taken up again.
        """
        found: dict[int, float] = {}
        for k, lines in enumerate(self.lines):
            ended = self.ended[k] and self.left_epochs[k] != epoch
            if len(lines) > epoch or (len(lines) == epoch and not ended):
                scores = [self._sign * line.dev[self._metric] for line in lines[:epoch]]
                found[k] = max((score for score in scores if not math.isnan(score)), default=-math.inf)
        return found

    def to_json(self) -> dict[str, Any]:
        """All but the weights."""
        return {
            "lines": [[asdict(line) for line in lines] for lines in self.lines],
            "best_epochs": self.best_epochs,
            "failed_steps": self.failed_steps,
            "left_epochs": self.left_epochs,
            "ended": self.ended,
        }

    def restore(self, values: Mapping[str, Any], kept: dict[int, list[Tensor]]) -> None:
        """The opposite of `to_json`."""
        self.lines = [[Epoch(**line) for line in lines] for lines in values["lines"]]
        self.best_epochs, self.ended = list(values["best_epochs"]), list(values["ended"])
        self.failed_steps, self.left_epochs = list(values["failed_steps"]), list(values["left_epochs"])
        self.kept = kept


def worse_half(standings: Sequence[Mapping[int, float]]) -> list[list[int]]:
    """The heads that leave at a rung: the worse half of a whole stack; of equals the later ones.

    Args:
        standings: of each piece of the stack, see `Record.standings`.

    Returns:
        The heads of each piece.
    """
    running = [(piece, k) for piece, scores in enumerate(standings) for k in scores]
    ranked = sorted(running, key=lambda head: standings[head[0]][head[1]], reverse=True)
    leaving = set(ranked[math.ceil(len(ranked) / 2) :])
    return [[k for k in scores if (piece, k) in leaving] for piece, scores in enumerate(standings)]


def group_size(job: Job) -> int:
    """Heads computed at once: on a GPU all, on a CPU `GROUP`."""
    return GROUP if job.train.feed.device.type == "cpu" else 2**20
