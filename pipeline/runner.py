"""Trains stacks of one bank: those that read the same tokens together, as far as memory goes."""

import itertools
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from cache import Bank, JoinedBank, Piece, open_bank
from pipeline import batches, metrics
from pipeline.batches import Feeds, Key, feed_key
from pipeline.device import pick_device
from pipeline.errors import PipelineError
from pipeline.fitting import GROUP, Fitting, group_size
from pipeline.grid import Shape, Stack
from pipeline.head import Head, build_head
from pipeline.job import Goal, HeadRates, Job, Schedule, Trained, build_one, open_target, plan_goal, prepare
from pipeline.rungs import climb, lots_of
from pipeline.selection import select
from pipeline.stack import stack as join
from pipeline.stack_checkpoints import StackCheckpoints
from pipeline.train import Progress, fit_together, predictions
from pipeline.waves import Need, stack_size, vector_bytes, waves, weight_bytes

STACKS = "stacks"
"""Folder, in a sweep's, of the stacks that are done and of the checkpoints of the others."""

Note = Callable[[str], None]


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What the stacks of a sweep share. Can be sent to another machine."""

    store: str
    schedule: Schedule
    metric: str | None = None
    splits: Mapping[str, str] = field(
        default_factory=lambda: {"train": "train", "dev": "dev", "test": "test"}
    )
    memory_bytes: int | None = None  # for states and heads, half each; by the device if None
    device: str = "cpu"  # as it is asked for: ``auto`` is picked where the heads train
    train_on: tuple[Piece, ...] = ()  # takes the place of the train split
    depth: int | None = None  # number of the layer that stands for the encoder's last


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """A trained stack."""

    stack: Stack
    goal: Goal  # its target without values
    trained: list[Trained]
    test: list[dict[str, float]]  # all scores of each head; empty where there is no test split


Train = Callable[[Sequence[Stack]], Iterator[Outcome]]
"""What trains stacks, here or elsewhere."""


class Runner:
    """Trains stacks of one bank on this machine.

    Args:
        plan: what they share.
        checkpoints: folder for the state of stacks in training; None keeps none.
        note: takes a line of text for the user.
        progress: called after every epoch of the stacks that train together.

    Raises:
        CacheError: the bank is not there or damaged.
    """

    def __init__(
        self,
        plan: Plan,
        *,
        checkpoints: Path | None = None,
        note: Note = lambda _: None,
        progress: Progress = lambda *_: None,
    ) -> None:
        self.plan, self.note, self.progress = plan, note, progress
        self.checkpoints = checkpoints
        self._kept = StackCheckpoints(checkpoints)

    @cached_property
    def device(self) -> torch.device:
        """Where the heads compute; asked for only where they do, which may be elsewhere.

        Raises:
            PipelineError: it is not there.
        """
        return pick_device(self.plan.device)

    @cached_property
    def _planned(self) -> tuple[str, int]:
        """Type of the device that pieces are planned for, and bytes for their heads.

        Those of a CPU where the device is not here: workers elsewhere may have it.
        """
        try:
            return self.device.type, self._feeds.budget_bytes // 2  # the other half is for states
        except PipelineError:
            return "cpu", batches.memory_budget(torch.device("cpu"), self.plan.memory_bytes) // 2

    @cached_property
    def _feeds(self) -> Feeds:
        # The note itself: what led back to the runner would hold the states until the garbage is collected.
        return Feeds(memory_bytes=self.plan.memory_bytes, device=self.device, note=self.note)

    def tell(self, note: Note) -> None:
        """Has another hear what there is to say from now on."""
        self.note = note
        if "_feeds" in self.__dict__:
            self._feeds.note = note

    @cached_property
    def bank(self) -> Bank:
        """The bank, its train split made of the pieces to train on where there are any."""
        bank, pieces = open_bank(self.plan.store), self.plan.train_on
        return JoinedBank(bank, self.plan.splits["train"], pieces) if pieces else bank

    def check(self, stack: Stack) -> Goal:
        """Refuses a stack that does not fit the bank or the target, before anything is trained.

        Raises:
            PipelineError: what does not fit.
        """
        goal = plan_goal(self.bank, stack.shape.target, **self._choices(stack.shape))
        split = self.bank.split(self.plan.splits["train"])
        for dropout in dict.fromkeys(rate.dropout for rate in stack.rates):
            select(split, build_one(goal.spec, HeadRates(dropout=dropout)))
        return goal

    def fitting(self, stack: Stack) -> list[Stack]:
        """The stack in pieces that fit the memory, said where it is more than one.

        Raises:
            PipelineError: not even one head fits.
        """
        goal = self.check(stack)
        head = build_head(goal.spec, seed=0)
        device, memory_bytes = self._planned
        size = stack_size(goal, head, self._batch_tokens(stack, head), memory_bytes)
        if size < len(stack.rates):
            if device == "cpu" and size > GROUP:
                size -= size % GROUP  # computed in the groups of the whole stack: the same bit for bit
            self.note(f"{stack.shape.name}: {len(stack.rates)} heads do not fit --memory, {size} at a time")
        return stack.split(size)

    def train(self, stacks: Sequence[Stack]) -> Iterator[Outcome]:
        """Trains stacks; each outcome comes when the stacks that train together are done.

        Args:
            stacks: pieces that `fitting` gave.
        """
        goals = {stack: self.check(stack) for stack in stacks}
        heads = {stack: build_head(goals[stack].spec, seed=0) for stack in stacks}
        self._feeds.layers = self._layers(goals, heads)
        train = self.bank.split(self.plan.splits["train"])

        def stream(stack: Stack) -> tuple[Key, int]:
            return feed_key(train, heads[stack]), stack.shape.batch_size

        lots = lots_of(stacks, self.plan.schedule)
        whole = sorted((lot[0] for lot in lots if len(lot) == 1), key=stream)
        at_work = torch.get_num_threads() if self.device.type == "cpu" else 1
        for _, same in itertools.groupby(whole, key=stream):
            needs = [self._need(stack, goals[stack], heads[stack]) for stack in same]
            for wave in waves(needs, self._feeds.budget_bytes // 2, at_work=at_work):
                yield from self._train_wave(wave)
        for lot in lots:
            if len(lot) > 1:
                yield from self._train_by_rungs(lot)

    def _need(self, stack: Stack, goal: Goal, head: Head) -> Need:
        n_heads = len(stack.rates)
        vectors = vector_bytes(goal, self._batch_tokens(stack, head))
        return Need(
            stack=stack, weights=n_heads * weight_bytes(head), vectors=min(n_heads, GROUP) * vectors
        )

    def _batch_tokens(self, stack: Stack, head: Head) -> float:
        """Tokens of a batch, on average."""
        split = self.bank.split(self.plan.splits["train"])
        return stack.shape.batch_size * len(select(split, head).read.position) / max(1, split.n_examples)

    def _train_wave(self, stacks: Sequence[Stack]) -> Iterator[Outcome]:
        fittings = {stack: self._open(stack, self._kept) for stack in stacks}

        def epoch(one: tuple[Stack, Fitting]) -> int:
            return one[1].epoch

        for _, group in itertools.groupby(sorted(fittings.items(), key=epoch), key=epoch):
            together = dict(group)
            fit_together(list(together.values()), self.progress, self._kept.keeper(together))
        for stack, fitting in fittings.items():
            yield self._outcome(stack, fitting)

    def _train_by_rungs(self, pieces: Sequence[Stack]) -> Iterator[Outcome]:
        """The pieces of one stack, one after the other up to each rung, where they are ranked as one.

        Meanwhile each waits on disk. Nothing is kept of a ranking: it follows from what the pieces have
        behind them, and one that went on to a later rung before a kill is ranked as it was.
        """
        with tempfile.TemporaryDirectory(prefix="layerbank-") as scratch:
            waiting = StackCheckpoints(self.checkpoints or Path(scratch))

            def standings(piece: Stack, left: Mapping[int, int], epoch: int) -> dict[int, float]:
                fitting = self._train_piece(piece, waiting, left, epoch)
                waiting.save(piece, fitting)
                return fitting.record.standings(epoch)

            left_of = climb(pieces, self.plan.schedule.rungs, standings)
            for piece, left in zip(pieces, left_of, strict=True):
                yield self._outcome(piece, self._train_piece(piece, waiting, left))

    def _train_piece(
        self, piece: Stack, waiting: StackCheckpoints, left: Mapping[int, int], until: int | None = None
    ) -> Fitting:
        fitting = self._open(piece, waiting)
        fitting.leave(left)
        fit_together([fitting], self.progress, self._kept.keeper({piece: fitting}), until)
        return fitting

    def _outcome(self, stack: Stack, fitting: Fitting) -> Outcome:
        trained, job = fitting.trained(), fitting.job
        target = replace(job.target, values=job.target.values[:0])
        goal = Goal(target=target, spec=job.spec, metric=job.metric)
        return Outcome(stack=stack, goal=goal, trained=trained, test=self._test(job, trained))

    def _open(self, stack: Stack, kept: StackCheckpoints) -> Fitting:
        """A stack before its first epoch, or after the last that a checkpoint has."""
        job = prepare(self.bank, stack.shape.target, feeds=self._feeds, **self._choices(stack.shape))
        schedule = replace(self.plan.schedule, batch_size=stack.shape.batch_size)
        fitting = Fitting(job, stack.rates, schedule)
        kept.load(stack, fitting)
        return fitting

    def forget(self, stack: Stack) -> None:
        """Removes the checkpoint of a stack that is done, and what a killed process left of one."""
        self._kept.forget(stack)

    def _test(self, job: Job, trained: Sequence[Trained]) -> list[dict[str, float]]:
        """All scores of every head on the test split; none where there is no such split or target."""
        name = self.plan.splits.get("test")
        if name not in self.bank.splits:
            return [{} for _ in trained]
        try:
            split, target = open_target(self.bank, job.target.name, str(name))
        except PipelineError as error:
            self.note(f"no test scores: {error}")
            return [{} for _ in trained]
        data = batches.load(split, trained[0].head, job.spec.layers, target, self._feeds)
        found: list[dict[str, float]] = []
        size = group_size(job)
        for first in range(0, len(trained), size):
            some = trained[first : first + size]
            guesses = predictions(
                join([one.head for one in some]), data, precision=self.plan.schedule.precision
            )
            scores = metrics.report(**guesses, names=target.names)
            found += [{name: float(values[k]) for name, values in scores.items()} for k in range(len(some))]
        return [{} if one.failed_step else s for one, s in zip(trained, found, strict=True)]

    def _layers(self, goals: Mapping[Stack, Goal], heads: Mapping[Stack, Head]) -> dict[Key, Sequence[int]]:
        """The layers that all heads of a feed read together."""
        found: dict[Key, set[int]] = {}
        for stack, goal in goals.items():
            for name in self.plan.splits.values():
                if name in self.bank.splits:
                    key = feed_key(self.bank.split(name), heads[stack])
                    found.setdefault(key, set()).update(goal.spec.layers)
        return {key: sorted(layers) for key, layers in found.items()}

    def _choices(self, shape: Shape) -> dict[str, Any]:
        return {
            "fusion": shape.fusion,
            "decoder": shape.decoder,
            "options": dict(shape.options),
            "metric": self.plan.metric,
            "train_split": self.plan.splits["train"],
            "dev_split": self.plan.splits["dev"],
            "depth": self.plan.depth,
        }
