"""One training run of several tasks, whole: open their banks, train the heads, leave a run folder for each.

``NAME.TARGET/``  a run as `pipeline.results` writes it, with its own copy of what was shared
``joint.json``    what the runs have in common, and the epochs of all together; written last
"""

import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from cache import Bank, open_bank
from cache.targets import TargetKind
from pipeline import memory, parts
from pipeline.batches import Feeds, memory_budget
from pipeline.content import read_by
from pipeline.errors import PipelineError, nearest
from pipeline.head import option_names
from pipeline.job import HeadRates, Job, Schedule, open_target, prepare
from pipeline.multitask import MEAN, TaskFitting, TrainedTogether, fit_mixed
from pipeline.results import Joint, check_free, finite, save_run, write_whole
from pipeline.train import Progress
from pipeline.unfinished import (
    drop_partial,
    earlier_seconds,
    open_partial,
    options_asked,
    partial_of,
    take_up,
)
from pipeline.versions import made_by

JOINT = "joint.json"


@dataclass(frozen=True, kw_only=True)
class BankTarget:
    """A target of a bank."""

    store: str
    target: str

    @property
    def name(self) -> str:
        """What the task is called, and its run folder."""
        return f"{Path(self.store).absolute().name}.{self.target}"


def train_tasks_run(
    asked: Sequence[BankTarget],
    *,
    out: str,
    fusion: str = "mixture",
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
    """Trains a head for each task and writes their run folders below one folder.

    Runs that were killed go on from their last checkpoint, when they are asked for again.

    Args:
        asked: the tasks; their banks are of one encoder.
        out: folder of the runs.
        fusion: name or dotted path; one that shares a submodule.
        decoder: name or dotted path; by each target's kind if None.
        options: hyper-parameters of the parts; each goes to the heads that have it.
        rates: seed, learning rate, weight decay, the same for all.
        schedule: epochs and batches; `batch_size` counts the examples of all tasks.
        metric: a dev score that applies to all; each target's own if None.
        splits: the splits in the roles of train and dev.
        overwrite: whether runs that are there may be replaced.
        device: where the heads compute, the CPU by default.
        memory_bytes: for states and heads, parted between the banks; by the device if None.
        note: takes a line of text for the user.
        progress: called after every epoch.

    Returns:
        `run`, `fusion`, `tasks` (the content of each ``result.json``, by name), `dev` (the mean of the
        tasks' scores), `best_epoch`, `epochs`, `seconds`, `parameters` (of all together),
        `shared_parameters`.

    Raises:
        PipelineError: a choice does not fit, the loss is not finite, or other runs were begun there.
        CacheError: a bank is not there or damaged.
    """
    rates, schedule = rates or HeadRates(), schedule or Schedule()
    splits = dict(splits or {"train": "train", "dev": "dev"})
    device = device or torch.device("cpu")
    began = time.perf_counter()
    _check(asked, fusion)
    _check_free(out, [task.name for task in asked], overwrite=overwrite)
    memory.start(device)
    banks = _open_banks(asked)
    each = memory_budget(device, memory_bytes) // len(banks)
    feeds = {store: Feeds(memory_bytes=each, device=device, note=note) for store in banks}
    kinds = [open_target(banks[task.store], task.target, splits["train"])[1].kind for task in asked]
    own = _options_of(options or {}, kinds, fusion=fusion, decoder=decoder)
    jobs = {
        task.name: _job(
            task,
            banks[task.store],
            fusion=fusion,
            decoder=decoder,
            options=some,
            metric=metric,
            train_split=splits["train"],
            dev_split=splits["dev"],
            feeds=feeds[task.store],
        )
        for task, some in zip(asked, own, strict=True)
    }
    fitting = TaskFitting(jobs, rates, schedule)
    choices: dict[str, Any] = {"tasks": list(jobs), "fusion": fusion, "decoder": decoder, "metric": metric}
    choices |= {"splits": splits, **options_asked(options), **asdict(rates), **asdict(schedule)}
    content = read_by((banks[task.store], jobs[task.name]) for task in asked)
    keep = take_up(out, fitting, choices, content, overwrite=overwrite, note=note)
    earlier = earlier_seconds(fitting.record.lines[0])
    # The folder says that run folders which a kill leaves without the others may be replaced.
    open_partial(out, choices, content)
    fit_mixed(fitting, progress, keep)
    if fitting.failed:
        drop_partial(out)
    found = fitting.trained()
    saved = {"rates": rates, "schedule": schedule, "splits": splits}
    saved |= {
        "seconds": earlier + time.perf_counter() - began,
        "peak_memory_bytes": memory.peak_bytes(device),
    }
    result = _save(out, asked, found, banks, jobs, **saved)
    drop_partial(out)
    return result


def _job(task: BankTarget, bank: Bank, **choices: Any) -> Job:
    """What one task is to learn; an error says of which task it is."""
    try:
        return prepare(bank, task.target, **choices)
    except PipelineError as error:
        raise PipelineError(f"{task.name}: {error}") from error


def _save(
    out: str,
    asked: Sequence[BankTarget],
    found: TrainedTogether,
    banks: Mapping[str, Bank],
    jobs: Mapping[str, Job],
    **saved: Any,
) -> dict[str, Any]:
    """Writes every task's run, then what they have in common, which it returns with their results."""
    spec = next(iter(jobs.values())).spec
    shared = str(parts.load("fusion", spec.fusion).shared)
    joint = Joint(tasks=[task.name for task in asked], shared=shared, parameters=found.shared_parameters)
    results = {}
    for task in asked:
        job, trained, bank = jobs[task.name], found.tasks[task.name], banks[task.store]
        results[task.name] = save_run(
            str(Path(out) / task.name), trained, job=job, bank=bank, joint=joint, **saved
        )
    own = [result["parameters"] - joint.parameters for result in results.values()]
    common = {
        "run": out,
        "fusion": spec.fusion,
        "shared": shared,
        "metric": MEAN,
        "dev": found.dev,
        "best_epoch": found.best_epoch,
        "epochs": len(found.epochs),
        "seconds": saved["seconds"],
        "parameters": sum(own) + joint.parameters,
        "shared_parameters": joint.parameters,
    }
    lines = [asdict(line) for line in found.epochs]
    record = finite({**common, "tasks": list(results), "lines": lines, **made_by()})
    write_whole(Path(out) / JOINT, json.dumps(record, indent=2, ensure_ascii=False) + "\n")
    return {**finite(common), "tasks": results}


def _check(asked: Sequence[BankTarget], fusion: str) -> None:
    """Refuses a task that is there twice, and a fusion that has nothing for tasks to share."""
    names = [task.name for task in asked]
    for task in asked:
        same = {one.store.rstrip("/") for one in asked if one.name == task.name}
        if len(same) > 1:
            raise PipelineError(
                f"two tasks would be called {task.name}, of {' and '.join(sorted(same))}: rename a bank's "
                "folder"
            )
        if names.count(task.name) > 1:
            raise PipelineError(f"{task.name} is there twice: name every bank and target once")
    if parts.load("fusion", fusion).shared is None:
        sharing = [name for name in parts.names("fusion") if parts.load("fusion", name).shared]
        raise PipelineError(
            f"--fusion {fusion} has nothing that tasks could share: train each by itself, or take --fusion "
            f"{' or '.join(sharing)}"
        )


def _check_free(out: str, names: Sequence[str], *, overwrite: bool) -> None:
    """Refuses a folder that holds anything but runs of these tasks, which may be replaced.

    Those that a kill left without the others may be too: what is needed to go on lies beside them.
    """
    folder = Path(out)
    overwrite = overwrite or (partial_of(out).is_dir() and not (folder / JOINT).exists())
    found = {path.name for path in folder.iterdir()} if folder.is_dir() else set()
    if not (overwrite and found <= {*names, JOINT}):
        check_free(out, overwrite=False)
    for name in names:
        check_free(str(folder / name), overwrite=overwrite)


def _open_banks(asked: Sequence[BankTarget]) -> dict[str, Bank]:
    """The tasks' banks, by where they are."""
    banks = {task.store: open_bank(task.store) for task in asked}
    first, *others = banks.values()
    for other in others:
        ours, theirs = first.recipe.encoder, other.recipe.encoder
        if ours.weights_sha256 != theirs.weights_sha256:
            raise PipelineError(
                f"{other.path} has states of another encoder ({theirs.name}, sha256 "
                f"{theirs.weights_sha256[:12]}) than {first.path} ({ours.name}): tasks that are trained "
                "together need banks of one encoder"
            )
    return banks


def _options_of(
    options: Mapping[str, Any], kinds: Sequence[TargetKind], *, fusion: str, decoder: str | None
) -> list[dict[str, Any]]:
    """For each kind of target the options that its head has; every one must be some head's."""
    known = [option_names(kind, fusion=fusion, decoder=decoder) for kind in kinds]
    everything = set().union(*known)
    for name in options:
        if name not in everything:
            raise PipelineError(f"no task's head has an option {name!r}: {nearest(name, everything)}")
    return [{name: value for name, value in options.items() if name in own} for own in known]
