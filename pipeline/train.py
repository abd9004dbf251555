"""Stage 2: trains stacks of heads on a bank. One head is a stack of one.

Several stacks that read the same tokens step on the same batches, so one read of the bank feeds them all.
Nothing here touches the encoder.
"""

import itertools
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from jaxtyping import Int
from numpy import ndarray

from pipeline import metrics
from pipeline.batches import Labelled
from pipeline.device import side_by_side
from pipeline.fitting import Fitting, scores_of, worse_half
from pipeline.head import Head
from pipeline.job import Epoch, HeadRates, Job, Precision, Schedule, Trained
from pipeline.memory import keep_freed

Progress = Callable[[int, Sequence[Epoch]], None]
"""Called after every epoch with its number and the last line of each head."""


def fit(
    job: Job,
    rates: Sequence[HeadRates],
    schedule: Schedule,
    progress: Progress = lambda *_: None,
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
    fitting = Fitting(job, rates, schedule)
    fit_together([fitting], progress)
    return fitting.trained()


def fit_together(
    fittings: Sequence[Fitting],
    progress: Progress = lambda *_: None,
    after_epoch: Callable[[], None] = lambda: None,
    until: int | None = None,
) -> None:
    """Trains several stacks over one stream of batches, until every head has ended.

    After the epoch of a rung the worse half of each stack leaves.

    Args:
        fittings: stacks of one feed, one batch size and one order, with the same epochs behind them.
        progress: called after every epoch with its number and each head's last line.
        after_epoch: called after every epoch, to keep a checkpoint.
        until: the epoch to stop after, before its rung; None trains to the end.
    """
    keep_freed()
    schedule = fittings[0].schedule
    for epoch in range(fittings[0].epoch + 1, (until or schedule.epochs) + 1):
        alive = [fitting for fitting in fittings if fitting.groups]
        if not alive:
            return
        seconds = train_epoch(alive, epoch)
        lines: list[Epoch] = []
        found = dev_scores(alive) if schedule.scores_dev(epoch) else [{}] * len(alive)
        for fitting, scores, spent in zip(alive, found, seconds, strict=True):
            lines += fitting.end_epoch(scores, spent)
            if epoch in schedule.rungs and epoch != until:
                [leaving] = worse_half([fitting.record.standings(epoch)])
                fitting.leave(dict.fromkeys(leaving, epoch))
        after_epoch()
        progress(epoch, lines)


def train_epoch(fittings: Sequence[Fitting], epoch: int) -> list[float]:
    """One pass over the training examples, all stacks stepping on the same batches.

    Returns:
        Seconds of each stack: its share of the epoch's, by the time its own steps took.
    """
    feed, schedule = fittings[0].job.train.feed, fittings[0].schedule
    for fitting in fittings:
        fitting.begin_epoch()
    owners = [k for k, fitting in enumerate(fittings) for _ in fitting.groups]
    costs = np.zeros(len(owners))
    began = time.perf_counter()
    stream = feed.batches(
        feed.order(seed=schedule.data_seed, epoch=epoch),
        batch_size=schedule.batch_size,
        dtype=getattr(torch, schedule.precision),
    )
    products = sum(fitting.n_parameters * fitting.tokens_a_step for fitting in fittings)
    with side_by_side(feed.device, len(owners), products) as run:
        for step, batch in enumerate(stream):
            jobs = [job for fitting in fittings for job in fitting.steps_of(batch, step)]
            dearest_first = np.argsort(-costs)  # so that no thread has a dear one alone at the end
            costs[dearest_first] += run([jobs[job] for job in dearest_first])
    if feed.device.type == "cuda":
        torch.cuda.synchronize(feed.device)
    seconds = time.perf_counter() - began
    shares = np.bincount(owners, costs, minlength=len(fittings)) / max(costs.sum(), 1e-9)
    return [float(seconds * share) for share in shares]


def dev_scores(fittings: Sequence[Fitting]) -> list[dict[str, ndarray]]:
    """All dev scores of the heads of each stack, from one pass over the dev examples."""
    schedule = fittings[0].schedule
    dtype = getattr(torch, schedule.precision)
    found = [_Guesses(len(fitting.alive), fitting.job.dev) for fitting in fittings]
    feed = fittings[0].job.dev.feed
    everything = np.arange(feed.n_examples)
    size = min(fitting.groups[0].heads.decoder.evaluated_at_once for fitting in fittings)
    with torch.inference_mode(), side_by_side(feed.device, sum(len(f.groups) for f in fittings)) as run:
        for batch in feed.batches(everything, batch_size=size, dtype=dtype):
            made = iter(run([job for fitting in fittings for job in fitting.guesses_of(batch)]))
            for guesses, fitting in zip(found, fittings, strict=True):
                of_heads = torch.cat(list(itertools.islice(made, len(fitting.groups))))
                guesses.add(fitting.job.dev.units(batch), of_heads)
    return [
        metrics.report(**guesses.all(), names=fitting.job.target.names)
        for guesses, fitting in zip(found, fittings, strict=True)
    ]


@torch.inference_mode()
def predictions(heads: Head, data: Labelled, precision: Precision = "float32") -> dict[str, Any]:
    """Predictions for every unit of a split, as `pipeline.metrics.report` takes them.

    A word that got no token (cut off, or made of nothing the tokenizer knows) has no prediction: -1,
    which counts as wrong.
    """
    heads.eval()
    guesses = _Guesses(next((t.shape[0] for t in (*heads.parameters(), *heads.buffers())), 1), data)
    size, everything = heads.decoder.evaluated_at_once, np.arange(data.n_examples)
    for inputs, labels, units in data.batches(everything, batch_size=size, dtype=getattr(torch, precision)):
        scores = scores_of(heads, inputs, precision)
        guesses.add(units, heads.decoder.outcome(scores, labels, inputs.decoded_lengths))
    return guesses.all()


class _Guesses:
    """Predictions of some heads for the units of a split, as they come."""

    def __init__(self, n_heads: int, data: Labelled) -> None:
        self._data = data
        floats = data.gold.dtype.kind == "f" or data.kind == "token"
        nothing, dtype = (np.nan, np.float64) if floats else (-1, np.int64)
        self._out = np.full((n_heads, *data.gold.shape), nothing, dtype=dtype)

    def add(self, units: Int[ndarray, " unit"], guess: torch.Tensor) -> None:
        """Takes the predictions for some units."""
        self._out[:, self._data.unit[units]] = guess.cpu().numpy()

    def all(self) -> dict[str, Any]:
        """Predictions, labels, and what else `pipeline.metrics.report` asks for."""
        data = self._data
        return {
            "predictions": self._out,
            "gold": data.gold,
            "lengths": data.gold_lengths,
            "kind": data.kind,
            "answers": data.answers,
        }
