"""One training run, whole: open the bank, train a head, leave a run folder."""

import time
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from cache import open_bank
from pipeline import memory
from pipeline.batches import Feeds
from pipeline.content import read_by
from pipeline.fitting import Fitting
from pipeline.job import HeadRates, Schedule, prepare
from pipeline.results import check_free, save_run
from pipeline.train import Progress, fit_together
from pipeline.unfinished import drop_partial, earlier_seconds, options_asked, take_up


def train_run(
    store: str,
    *,
    target: str,
    out: str,
    fusion: str = "attention",
    decoder: str | None = None,
    options: Mapping[str, Any] | None = None,
    rates: HeadRates | None = None,
    schedule: Schedule | None = None,
    metric: str | None = None,
    splits: Mapping[str, str] | None = None,
    overwrite: bool = False,
    device: torch.device | None = None,
    memory_bytes: int | None = None,
    note: Callable[[str], None] = lambda _: None,
    progress: Progress = lambda *_: None,
) -> dict[str, Any]:
    """Trains one head on a bank and writes its run folder; one that was killed goes on from its checkpoint.

    Args:
        store: the bank.
        target: what to learn.
        out: folder of the run.
        fusion: name or dotted path.
        decoder: name or dotted path; by the target's kind if None.
        options: hyper-parameters of the parts.
        rates: seed, learning rate, weight decay.
        schedule: epochs and batches.
        metric: the dev score that picks the epoch; by the target if None.
        splits: the splits in the roles of train and dev.
        overwrite: whether a run that is there may be replaced.
        device: where the head computes, the CPU by default.
        memory_bytes: states that take more than half of it are streamed, block by block; by the device if
            None, see `pipeline.batches.memory_budget`.
        note: takes a line of text for the user.
        progress: called after every epoch.

    Returns:
        The content of ``result.json``.

    Raises:
        PipelineError: a choice does not fit, the loss is not finite, or another run was begun there.
        CacheError: the bank is not there or damaged.
    """
    check_free(out, overwrite=overwrite)
    rates, schedule = rates or HeadRates(), schedule or Schedule()
    splits = dict(splits or {"train": "train", "dev": "dev"})
    device = device or torch.device("cpu")
    began = time.perf_counter()
    memory.start(device)
    bank = open_bank(store)
    job = prepare(
        bank,
        target,
        fusion=fusion,
        decoder=decoder,
        options=options,
        metric=metric,
        train_split=splits["train"],
        dev_split=splits["dev"],
        feeds=Feeds(memory_bytes=memory_bytes, device=device, note=note),
    )
    fitting = Fitting(job, [rates], schedule)
    choices = {"target": target, "fusion": fusion, "decoder": decoder, "metric": metric, "splits": splits}
    asked = {**choices, **options_asked(options), **asdict(rates), **asdict(schedule)}
    keep = take_up(out, fitting, asked, read_by([(bank, job)]), overwrite=overwrite, note=note)
    earlier = earlier_seconds(fitting.record.lines[0])
    place = str(Path(out).absolute())  # "." is another folder once the run is there
    fit_together([fitting], progress, keep)
    [trained] = fitting.trained()
    if trained.failed_step:
        drop_partial(place)
    trained.check()
    result = save_run(
        out,
        trained,
        job=job,
        bank=bank,
        rates=rates,
        schedule=schedule,
        splits=splits,
        seconds=earlier + time.perf_counter() - began,
        peak_memory_bytes=memory.peak_bytes(device),
    )
    drop_partial(place)
    return result
