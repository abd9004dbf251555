"""The loop of early fusion: through the backbone, epoch by epoch, resumable, on one device or several.

`accelerate` brings mixed precision and data-parallel processes (`torchrun`); what is random is a function
of the seed, the epoch and the process, so that an epoch that is begun again is the same epoch.
"""

import math
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Int
from numpy import ndarray
from torch import Tensor

from pipeline import metrics
from pipeline.errors import PipelineError
from pipeline.optimizer import linear_schedule
from pipeline.stack import Dropout
from pipeline.tuning import saved
from pipeline.tuning.batches import Batch, Picked, deal, in_order, make_batch
from pipeline.tuning.examples import Examples
from pipeline.tuning.model import Tuned

MIXED = {"float32": "no", "bfloat16": "bf16", "float16": "fp16"}
"""What `accelerate` calls the precisions."""


@dataclass(frozen=True, kw_only=True)
class Plan:
    """How long, how fast and in which pieces."""

    epochs: int = 10
    batch_size: int = 32  # examples a step, of all processes together
    lr: float | None = None  # of the method; None is what it usually takes on the backbone
    head_lr: float = 1e-3
    weight_decay: float = 0.01
    warmup_steps: int | None = None  # None is a tenth of all steps
    patience: int | None = None  # epochs without a better dev score after which training ends
    seed: int = 0  # of the starting weights and of dropout
    data_seed: int = 0  # of the order of the examples
    precision: str = "float32"  # of the products, a key of `MIXED`; weights are float32
    accumulation: int = 1  # pieces of a step, each with a forward of its own
    checkpointing: bool = False  # recompute states in the backward pass

    def __post_init__(self) -> None:
        """Checks the ranges."""
        if self.precision not in MIXED:
            raise PipelineError(f"--precision {self.precision}: give {', '.join(MIXED)}")
        for name in ("epochs", "batch_size", "accumulation"):
            if getattr(self, name) < 1:
                raise PipelineError(f"--{name.replace('_', '-')} {getattr(self, name)}: give 1 or more")
        for name in ("lr", "head_lr"):
            value = getattr(self, name)
            if value is not None and not (math.isfinite(value) and value > 0):
                raise PipelineError(f"--{name.replace('_', '-')} {value}: give a number above 0")
        if not (math.isfinite(self.weight_decay) and self.weight_decay >= 0):
            raise PipelineError(f"--weight-decay {self.weight_decay}: give 0 or more")
        if self.warmup_steps is not None and self.warmup_steps < 0:
            raise PipelineError(f"--warmup-steps {self.warmup_steps}: give 0 or more")
        if self.patience is not None and self.patience < 1:
            raise PipelineError(f"--patience {self.patience}: give 1 or more epochs")
        for name in ("seed", "data_seed"):
            if not 0 <= getattr(self, name) < 2**32:
                raise PipelineError(
                    f"--{name.replace('_', '-')} {getattr(self, name)}: give 0 to 4294967295"
                )


@dataclass(frozen=True, kw_only=True)
class Epoch:
    """One line of ``metrics.jsonl``; scores in percent."""

    epoch: int  # from 1
    loss: float  # mean training loss of a step
    dev: dict[str, float]
    seconds: float  # training alone
    lr: float  # the method's, at the last step


@dataclass(kw_only=True)
class Progress:
    """What is known of a run so far."""

    lines: list[Epoch] = field(default_factory=list)
    best_epoch: int = 0
    best: dict[str, Tensor] = field(default_factory=dict)
    steps: int = 0  # of the optimizer
    facts: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Job:
    """What is learned: each task's rows and the score it is judged by."""

    train: Sequence[Examples]
    dev: Sequence[Examples]
    metrics: Sequence[str]
    tasks: Sequence[str]

    @property
    def metric(self) -> str:
        """The score that picks the epoch: the task's own, or the mean over several tasks."""
        return self.metrics[0] if len(self.tasks) == 1 else "mean"


def make_accelerator(device: torch.device, precision: str) -> Any:
    """`accelerate` on one device, or on the process's own under `torchrun`.

    Raises:
        PipelineError: it is not installed, or the precision cannot be had.
    """
    try:
        from accelerate import Accelerator
        from accelerate.state import AcceleratorState
        from accelerate.utils import DistributedDataParallelKwargs
    except ImportError as error:
        raise PipelineError(
            "layerbank tune needs the package accelerate: pip install 'layerbank[tune]'"
        ) from error
    if device.type == "cuda":
        torch.cuda.set_device(device)
    # Its settings are one process's; a second run in this process may ask for others.
    AcceleratorState._reset_state(reset_partial_state=False)
    try:
        return Accelerator(
            mixed_precision=MIXED[precision],
            cpu=device.type == "cpu",
            # A batch need not hold every task, and a task's prompt or head then gets no gradient.
            kwargs_handlers=[DistributedDataParallelKwargs(find_unused_parameters=True)],
        )
    except (ValueError, RuntimeError, NotImplementedError) as error:
        said = " ".join(str(error).split())
        raise PipelineError(
            f"--precision {precision} on {device}: {said}: use --precision float32"
        ) from error


def fit(
    tuned: Tuned,
    job: Job,
    plan: Plan,
    accelerator: Any,
    folder: Path,
    progress: Callable[[int, Sequence[Epoch]], None] = lambda *_: None,
) -> Progress:
    """Trains, and leaves the weights of the best epoch in the model.

    AdamW, linear warm-up and decay. An epoch that was whole before a kill is not done again. Every process
    of a data-parallel run takes its share of each step; all of them score the whole dev split.

    Raises:
        PipelineError: the loss is not finite, or the disk refuses.
    """
    tuned.to(accelerator.device)
    optimizer = make_optimizer(tuned, plan)
    record = _resume(tuned, optimizer, folder)
    wrapped, prepared = accelerator.prepare(tuned, optimizer)
    trainer = _Trainer(wrapped, tuned, prepared, job, plan, accelerator, record)
    for epoch in range(len(record.lines) + 1, plan.epochs + 1):
        if plan.patience and record.best_epoch and epoch - 1 - record.best_epoch >= plan.patience:
            break
        if epoch > 1 and tuned.method.start_epoch(epoch, plan.epochs):
            tuned.method.note_score(record.lines[-1].dev[job.metric], trainer.score()[job.metric])
        line = trainer.epoch(epoch)
        trainer.note(line)
        accelerator.wait_for_everyone()
        if accelerator.is_main_process:
            _write(folder, tuned, optimizer, record)
            progress(epoch, [line])
        accelerator.wait_for_everyone()
    if tuned.method.start_epoch(len(record.lines) + 1, plan.epochs):
        trainer.replace_last()
    load_learned(tuned, record.best)
    return record


def make_optimizer(tuned: Tuned, plan: Plan) -> torch.optim.AdamW:
    """AdamW over what the method trains, by its rates, and over the heads."""
    lr = tuned.method.usual_lr() if plan.lr is None else plan.lr
    groups = [*tuned.method.rates(lr), {"params": list(tuned.heads.parameters()), "lr": plan.head_lr}]
    groups = [{**group, "full_lr": group["lr"]} for group in groups if group["params"]]
    # On a CPU one pass over each tensor instead of ten; elsewhere torch's own choice is as fast.
    fused = tuned.device.type == "cpu"
    return torch.optim.AdamW(groups, weight_decay=plan.weight_decay, fused=fused or None)


def learned(tuned: Tuned) -> dict[str, Tensor]:
    """All that training changes, by name."""
    heads = {f"heads.{name}": value for name, value in tuned.heads.state_dict().items()}
    return {**tuned.method.everything(), **heads}


def load_learned(tuned: Tuned, state: dict[str, Tensor]) -> None:
    """Puts back what `learned` gave."""
    tuned.method.load_everything(state)
    heads = {n.removeprefix("heads."): v for n, v in state.items() if n.startswith("heads.")}
    tuned.heads.load_state_dict(heads)


def _resume(tuned: Tuned, optimizer: torch.optim.Optimizer, folder: Path) -> Progress:
    found = saved.last_epoch(folder)
    if found is None:
        return Progress()
    tensors, record = found
    load_learned(tuned, _under("now.", tensors))
    saved.restore_optimizer(optimizer, tensors)
    return Progress(
        lines=[Epoch(**line) for line in record["lines"]],
        best_epoch=record["best_epoch"],
        best=_under("best.", tensors),
        steps=record["steps"],
        facts=record["facts"],
    )


def _under(prefix: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {n.removeprefix(prefix): v for n, v in tensors.items() if n.startswith(prefix)}


def _write(folder: Path, tuned: Tuned, optimizer: torch.optim.Optimizer, record: Progress) -> None:
    tensors = {f"now.{name}": value for name, value in learned(tuned).items()}
    tensors |= {f"best.{name}": value for name, value in record.best.items()}
    tensors |= saved.optimizer_tensors(optimizer)
    lines = {
        "lines": [asdict(line) for line in record.lines],
        "best_epoch": record.best_epoch,
        "steps": record.steps,
        "facts": tuned.method.facts(),
    }
    saved.write_epoch(folder, len(record.lines), tensors, lines)


class _Trainer:
    """One epoch at a time."""

    def __init__(
        self,
        wrapped: Any,
        tuned: Tuned,
        optimizer: Any,
        job: Job,
        plan: Plan,
        accelerator: Any,
        record: Progress,
    ) -> None:
        self.wrapped, self.tuned, self.optimizer = wrapped, tuned, optimizer
        self.job, self.plan, self.accelerator, self.record = job, plan, accelerator, record
        self._task = np.concatenate([np.full(len(e.trainable), e.task) for e in job.train])
        self._row = np.concatenate([e.trainable for e in job.train])
        self._length = np.concatenate([e.tokens.length[e.trainable] for e in job.train])
        self._units = np.concatenate([e.labelled[e.trainable] for e in job.train])
        steps = math.ceil(len(self._row) / plan.batch_size)
        self.n_steps = steps * plan.epochs
        warmup = round(0.1 * self.n_steps) if plan.warmup_steps is None else plan.warmup_steps
        self.warmup_steps = min(warmup, self.n_steps // 2)

    def epoch(self, epoch: int) -> Epoch:
        """One pass over the training rows, then the dev scores."""
        began = time.perf_counter()
        self._seed(epoch)
        self.tuned.train()
        dealt = deal(self._length, batch_size=self.plan.batch_size, seed=self.plan.data_seed, epoch=epoch)
        total, lr = torch.zeros((), device=self.tuned.device), 0.0
        bad = torch.zeros((), dtype=torch.long, device=self.tuned.device)
        for chosen in dealt:
            loss, lr = self._step(chosen)
            total += loss
            self.record.steps += 1
            # On the device, without a look at it: a look would wait for the step.
            bad = torch.where((bad == 0) & ~loss.isfinite(), self.record.steps, bad)
        failed = int(self.accelerator.reduce(bad, reduction="sum").item())
        if failed:
            raise PipelineError(f"the loss became NaN or infinite at step {int(bad) or failed}: lower --lr")
        mean = float(self.accelerator.reduce(total, reduction="mean").item()) / len(dealt)
        seconds = time.perf_counter() - began
        return Epoch(epoch=epoch, loss=mean, dev=self.score(), seconds=seconds, lr=lr)

    def _seed(self, epoch: int) -> None:
        """Every random stream starts anew with each epoch, in each process another one."""
        rank = int(self.accelerator.process_index)
        state = np.random.SeedSequence([self.plan.seed, epoch, rank]).generate_state(1)
        torch.manual_seed(int(state[0]))
        for k, module in enumerate(m for m in self.tuned.heads.modules() if isinstance(m, Dropout)):
            module.restart(module.rates, [int(state[0]) + k])

    def _step(self, chosen: Int[ndarray, " example"]) -> tuple[Tensor, float]:
        """One step of the optimizer: this process's pieces of a batch, one after the other."""
        scale = linear_schedule(self.record.steps, n_steps=self.n_steps, warmup_steps=self.warmup_steps)
        for group in self.optimizer.param_groups:
            group["lr"] = group["full_lr"] * scale
        self.optimizer.zero_grad()
        world, pieces = self.accelerator.num_processes, self.plan.accumulation
        mine = np.array_split(chosen, world * pieces)[self.accelerator.process_index :: world]
        total = torch.zeros((), device=self.tuned.device)
        for number, piece in enumerate(mine, start=1):
            batch = self._batch(chosen, piece)
            waits = number < len(mine)
            with self.accelerator.no_sync(self.wrapped) if waits else nullcontext():
                loss = self.wrapped(batch)
                self.accelerator.backward(loss)
            total += loss.detach()
        self.optimizer.step()
        return total, self.optimizer.param_groups[0]["lr"]

    def _batch(self, whole: Int[ndarray, " example"], piece: Int[ndarray, " one"]) -> Batch:
        """A piece of a step's batch; its tasks' shares make the pieces add up to the whole's mean loss."""
        rows = piece if len(piece) else whole[:1]  # every process takes part in every step
        picked: list[tuple[Examples, ndarray]] = []
        shares = {}
        for examples in self.job.train:
            here = rows[self._task[rows] == examples.task]
            if not len(here):
                continue
            all_of_task = whole[self._task[whole] == examples.task]
            units = self._units[here].sum() / self._units[all_of_task].sum()
            share = units * len(all_of_task) / len(whole) * self.accelerator.num_processes
            shares[examples.task] = float(share) if len(piece) else 0.0
            picked.append((examples, self._row[here]))
        return self._padded(picked, shares)

    def _padded(self, picked: Picked, shares: dict[int, float] | None = None) -> Batch:
        heads: Any = list(self.tuned.heads)
        return make_batch(
            picked,
            self.tuned.backbone,
            heads,
            n_slots=self.tuned.method.n_slots,
            shares=shares,
            penalty_share=1 / self.plan.accumulation,
        )

    def score(self) -> dict[str, float]:
        """The dev scores of every task, and their mean where there are several."""
        found: dict[str, float] = {}
        with self.accelerator.autocast():
            reports = [report(self.tuned, examples) for examples in self.job.dev]
        if len(reports) == 1:
            return reports[0]
        chosen = [scores[metric] for scores, metric in zip(reports, self.job.metrics, strict=True)]
        found["mean"] = metrics.mean_score(self.job.metrics, chosen)
        for name, scores in zip(self.job.tasks, reports, strict=True):
            found |= {f"{name}.{metric}": value for metric, value in scores.items()}
        return found

    def note(self, line: Epoch) -> None:
        """Takes note of an epoch, and of its weights if they are the best so far."""
        record, metric = self.record, self.job.metric
        record.lines.append(line)
        if not self.tuned.method.counts(line.epoch, self.plan.epochs):
            return
        sign = 1.0 if metrics.higher_is_better(metric) else -1.0
        best = sign * record.lines[record.best_epoch - 1].dev[metric] if record.best_epoch else -math.inf
        if not record.best_epoch or sign * line.dev[metric] > best:
            record.best_epoch = line.epoch
            record.best = {n: v.detach().cpu().clone() for n, v in learned(self.tuned).items()}

    def replace_last(self) -> None:
        """The method has changed what was learned after the last epoch: that epoch is scored again."""
        last = self.record.lines.pop()
        dev = self.score()
        self.tuned.method.note_score(last.dev[self.job.metric], dev[self.job.metric])
        self.record.best_epoch = 0
        self.note(replace(last, dev=dev))


def predictions(tuned: Tuned, examples: Examples) -> ndarray:
    """What the scores look at for every unit of a split; -1 (or NaN) where there is nothing."""
    tuned.eval()
    if tuned.backbone.text_to_text:
        return tuned.wordings[examples.task].read(_said(tuned, examples), examples)
    floats = examples.target.kind in ("float", "token")
    shape = examples.target.values.shape
    out = np.full(shape, np.nan if floats else -1, np.float64 if floats else np.int64)
    heads: Any = list(tuned.heads)
    at_once = heads[examples.task].decoder.evaluated_at_once
    with tuned.method.applied():
        for picked in in_order(examples, at_once):
            batch = make_batch(picked, tuned.backbone, heads, n_slots=tuned.method.n_slots)
            for part, guess in tuned.predict(batch):
                out[part.units] = guess.numpy()
    return out


def _said(tuned: Tuned, examples: Examples) -> list[str]:
    """What the model generates for each row of a split."""
    said = [""] * len(examples)
    with tuned.method.applied():
        for picked in in_order(examples):
            batch = make_batch(picked, tuned.backbone, [], n_slots=tuned.method.n_slots)
            for row, text in zip(picked[0][1], tuned.say(batch), strict=True):
                said[row] = text
    return said


def report(tuned: Tuned, examples: Examples) -> dict[str, float]:
    """All scores of a split that apply; from text to text also the share of outputs that cannot be read."""
    guess = predictions(tuned, examples)
    if tuned.backbone.text_to_text:
        return tuned.wordings[examples.task].report(guess, examples)
    return examples.scores(guess)
