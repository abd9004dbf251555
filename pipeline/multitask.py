"""Heads of several tasks, trained together in mixed batches, with one submodule of their fusions in common.

The tasks are targets of one bank or of several banks of one encoder. The head axis is no use here: heads of
a stack read the same batch and learn apart, these read different examples and learn one thing together.
Nothing here touches the encoder.
"""

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from numpy import ndarray
from torch import Tensor, nn

from pipeline import metrics
from pipeline.feed import Batch
from pipeline.fitting import Record, restore, scores_of, tensors_of
from pipeline.head import Head
from pipeline.job import MAX_SEED, Epoch, HeadRates, Job, Schedule, Trained, build_one
from pipeline.memory import keep_freed
from pipeline.optimizer import StackedAdamW
from pipeline.train import Progress, predictions

MEAN = "mean"
"""The dev score that picks the epoch: the mean over the tasks."""


@dataclass(frozen=True, kw_only=True)
class TrainedTogether:
    """A head for each task, with the weights of one epoch, the best on average."""

    tasks: dict[str, Trained]  # `epochs` of each has its own loss and dev scores
    epochs: list[Epoch]  # of all together; dev scores are ``mean`` and ``TASK.METRIC``
    best_epoch: int
    shared_parameters: int

    @property
    def dev(self) -> float:
        """The mean of the tasks' dev scores in the best epoch."""
        return self.epochs[self.best_epoch - 1].dev[MEAN]


def fit_tasks(
    jobs: Mapping[str, Job],
    rates: HeadRates,
    schedule: Schedule,
    progress: Progress = lambda *_: None,
) -> TrainedTogether:
    """Trains a head for each task.

    A batch holds examples of all tasks, dealt at random; each task goes through its training examples once
    an epoch. The loss of a batch of n is Σ_k n_k/n L_k, with L_k the mean loss of the n_k examples of task
    k. AdamW, linear warm-up and decay. All heads keep the weights of one epoch, that with the best
    mean dev score.

    Args:
        jobs: what to learn, by the names of the tasks.
        rates: of every head and of what they share; all start from one seed.
        schedule: epochs and batches; `batch_size` counts the examples of all tasks.
        progress: called after every epoch with its number and one line.

    Raises:
        PipelineError: the loss is not finite.
    """
    fitting = TaskFitting(jobs, rates, schedule)
    fit_mixed(fitting, progress)
    return fitting.trained()


def fit_mixed(
    fitting: "TaskFitting",
    progress: Progress = lambda *_: None,
    after_epoch: Callable[[], None] = lambda: None,
) -> None:
    """Trains until there is nothing left to do.

    Args:
        fitting: the heads, before any epoch.
        progress: called after every epoch with its number and one line.
        after_epoch: called after every epoch, to keep a checkpoint.
    """
    keep_freed()
    while not fitting.ended:
        line = fitting.run_epoch()
        after_epoch()
        progress(fitting.epoch, [line])


class TaskFitting:
    """The heads of several tasks in training.

    Args:
        jobs: what to learn, by the names of the tasks.
        rates: of every head and of what they share.
        schedule: epochs and batches.
    """

    def __init__(self, jobs: Mapping[str, Job], rates: HeadRates, schedule: Schedule) -> None:
        self.names, self.jobs = list(jobs), list(jobs.values())
        self.rates, self.schedule = rates, schedule
        self.device = self.jobs[0].train.feed.device
        self.heads = tie([build_one(job.spec, rates) for job in self.jobs])
        # A module list counts what its modules share once, so it gets one update a step.
        self.whole = nn.ModuleList(self.heads).to(self.device)
        self.optimizer = StackedAdamW(self.whole, lr=[rates.lr], weight_decay=[rates.weight_decay])
        self.counts = [job.train.n_examples for job in self.jobs]
        self.steps = math.ceil(sum(self.counts) / schedule.batch_size)  # of an epoch
        self.epoch = 0  # epochs done
        self.lines: list[list[Epoch]] = [[] for _ in jobs]  # of each task
        self.record = Record(MEAN, 1, schedule.patience)

    @property
    def ended(self) -> bool:
        """Whether there is nothing left to do."""
        return self.record.ended[0] or self.epoch == self.schedule.epochs

    @property
    def failed(self) -> bool:
        """Whether the loss was not finite."""
        return self.record.failed_steps[0] is not None

    def run_epoch(self) -> Epoch:
        """One pass over the training examples of all tasks, then their dev scores."""
        began = time.perf_counter()
        of_tasks, loss, failed = self._train_epoch()
        seconds = time.perf_counter() - began
        self.epoch += 1
        found = self._dev_scores() if self.schedule.scores_dev(self.epoch) else [{} for _ in self.jobs]
        lr = self.rates.lr * self.schedule.scale(self.steps * self.epoch - 1, steps=self.steps)
        for lines, own, dev in zip(self.lines, of_tasks, found, strict=True):
            lines.append(Epoch(epoch=self.epoch, loss=own, dev=dev, seconds=seconds, lr=lr))
        line = Epoch(epoch=self.epoch, loss=loss, dev=self._summary(found), seconds=seconds, lr=lr)
        self.record.add(0, line, failed, [p.detach() for p in self.optimizer.parameters])
        return line

    def _train_epoch(self) -> tuple[list[float], float, int]:
        """The mean loss of a batch, of each task and in all, and the first step without a finite one."""
        for head in self.heads:
            head.train()
        seed, epoch = self.schedule.data_seed, self.epoch + 1
        sizes = deal(self.counts, self.schedule.batch_size, seed=seed, epoch=epoch)
        streams = [self._stream(task, sizes[:, task]) for task in range(len(self.jobs))]
        total = torch.zeros(len(self.jobs) + 1, device=self.device)
        failed = torch.zeros((), dtype=torch.long, device=self.device)
        for number, row in enumerate(sizes, start=self.steps * self.epoch):
            batches = [next(stream) if count else None for stream, count in zip(streams, row, strict=True)]
            losses, loss = self.step(batches, self.schedule.scale(number, steps=self.steps))
            total += torch.cat([losses, loss[None]])
            # On the device, without a look at it: a look would wait for the step.
            failed = torch.where((failed == 0) & ~loss.isfinite(), number + 1, failed)
        *of_tasks, loss_sum = total.tolist()
        taken = np.count_nonzero(sizes, axis=0).tolist()
        return [a / b for a, b in zip(of_tasks, taken, strict=True)], loss_sum / len(sizes), int(failed)

    def _stream(self, task: int, sizes: Int[ndarray, " step"]) -> Iterator[Batch]:
        """The batches of one task in an epoch, in an order of its own."""
        feed = self.jobs[task].train.feed
        seed = (self.schedule.data_seed + task) % (MAX_SEED + 1)
        return feed.batches(
            feed.order(seed=seed, epoch=self.epoch + 1),
            batch_size=sizes[sizes > 0].tolist(),
            dtype=getattr(torch, self.schedule.precision),
        )

    def step(
        self, batches: Sequence[Batch | None], scale: float
    ) -> tuple[Float[Tensor, " task"], Float[Tensor, ""]]:
        """One update of all that is trained.

        Args:
            batches: of each task its examples of one mixed batch; None for none.
            scale: factor on the learning rate.

        Returns:
            What `losses` gave, before the update.
        """
        self.optimizer.zero_grad()
        losses, loss = self.losses(batches)
        if loss.requires_grad:
            loss.backward()  # type: ignore[no-untyped-call]
        self.optimizer.step(scale)
        return losses.detach(), loss.detach()

    def losses(self, batches: Sequence[Batch | None]) -> tuple[Float[Tensor, " task"], Float[Tensor, ""]]:
        """L_k of each task, 0 for one without examples, and Σ_k n_k/n L_k."""
        counts = [0 if batch is None else len(batch.lengths) for batch in batches]
        losses = torch.stack(
            [
                self._loss(head, job, batch)
                for head, job, batch in zip(self.heads, self.jobs, batches, strict=True)
            ]
        )
        shares = torch.tensor([count / sum(counts) for count in counts], device=self.device)
        return losses, (losses * shares).sum()

    def _loss(self, head: Head, job: Job, batch: Batch | None) -> Float[Tensor, ""]:
        if batch is None:
            return torch.zeros((), device=self.device)
        inputs, labels, _ = job.train.of(batch)
        scores = scores_of(head, inputs, self.schedule.precision)
        return head.decoder.loss(scores, labels, inputs.decoded_lengths)[0]

    def _dev_scores(self) -> list[dict[str, float]]:
        """All dev scores of each task."""
        found = []
        for head, job in zip(self.heads, self.jobs, strict=True):
            guesses = predictions(head, job.dev, self.schedule.precision)
            scores = metrics.report(**guesses, names=job.target.names)
            found.append({name: float(values[0]) for name, values in scores.items()})
        return found

    def _summary(self, found: Sequence[Mapping[str, float]]) -> dict[str, float]:
        """The tasks' scores and their mean."""
        if not found[0]:
            return {}
        scores = [dev[job.metric] for dev, job in zip(found, self.jobs, strict=True)]
        named = {
            f"{name}.{job.metric}": s for name, job, s in zip(self.names, self.jobs, scores, strict=True)
        }
        return {MEAN: metrics.mean_score([job.metric for job in self.jobs], scores), **named}

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """All that `resume` needs after an epoch: tensors by name, and plain values."""
        lines = [[asdict(line) for line in lines] for lines in self.lines]
        values = {"epoch": self.epoch, "lines": lines, "record": self.record.to_json()}
        return self.record.tensors() | tensors_of(self.whole, self.optimizer), values

    def resume(self, tensors: Mapping[str, Tensor], values: Mapping[str, Any]) -> None:
        """Goes on after the epoch at which `state` was taken, as if nothing had happened."""
        self.epoch = values["epoch"]
        self.lines = [[Epoch(**line) for line in lines] for lines in values["lines"]]
        self.record.restore(values["record"], tensors, self.device)
        restore(self.whole, self.optimizer, tensors)

    def trained(self) -> TrainedTogether:
        """The heads with the weights of the best epoch.

        Raises:
            PipelineError: the loss was not finite.
        """
        best, [failed] = self.record.best_epochs[0], self.record.failed_steps
        for parameter, kept in zip(self.optimizer.parameters, self.record.kept.get(0, []), strict=False):
            parameter.data.copy_(kept)
        tasks = {
            name: Trained(head=head, best_epoch=best, metric=job.metric, epochs=lines, failed_step=failed)
            for name, head, job, lines in zip(self.names, self.heads, self.jobs, self.lines, strict=True)
        }
        tasks[self.names[0]].check()
        return TrainedTogether(
            tasks=tasks,
            epochs=self.record.lines[0],
            best_epoch=best,
            shared_parameters=shared_parameters(self.heads[0]),
        )


def tie(heads: Sequence[Head]) -> list[Head]:
    """Gives all heads the first one's submodule of the name that their fusion says is shared."""
    name = heads[0].fusion.shared
    for head in heads[1:]:
        if name is not None:
            setattr(head.fusion, name, getattr(heads[0].fusion, name))
    return list(heads)


def shared_parameters(head: Head) -> int:
    """Trainable parameters of what a head has in common with those trained with it."""
    part = getattr(head.fusion, head.fusion.shared) if head.fusion.shared else None
    return 0 if part is None else sum(p.numel() for p in part.parameters())


def deal(counts: Sequence[int], batch_size: int, *, seed: int, epoch: int) -> Int[ndarray, "step task"]:
    """How many examples of each task every batch of an epoch has: all of them, shuffled together.

    Args:
        counts: training examples of each task.
        batch_size: examples in a batch; the last may be smaller.
        seed: of the order.
        epoch: from 1.
    """
    tasks = np.random.default_rng([seed, epoch, len(counts)]).permutation(
        np.repeat(np.arange(len(counts)), counts)
    )
    pieces = [tasks[i : i + batch_size] for i in range(0, len(tasks), batch_size)]
    return np.stack([np.bincount(piece, minlength=len(counts)) for piece in pieces])
