"""Stage 1 on several processes or machines: blocks are encoded and written by the workers of a cluster.

The process that was asked plans, makes the bank's skeleton, sends the tokens of a few blocks at a time and
marks the bank complete. A worker has the encoder's weights, once, and the bank's folder. A block is a pure
function of its tokens, so it is the same whoever makes it.
"""

import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Bool
from numpy import ndarray

from cache import CacheError, Recipe, Writer
from cache.plan import Part
from pipeline import cluster
from pipeline.encoder import Encoder
from pipeline.errors import PipelineError
from pipeline.stage import Stage
from pipeline.tokens import Tokens

if TYPE_CHECKING:
    from distributed import Client

Spread = Callable[[Stage], int]
"""How the missing blocks are made; returns how many that was."""

_TASK_BLOCKS = 4
"""Blocks in one task beside a GPU: one takes less time than sending it."""


@dataclass(frozen=True, kw_only=True)
class Setting:
    """What all tasks of an extraction share."""

    path: str  # of the bank, absolute
    recipe: Recipe
    opening: dict[str, Any] = field(hash=False)  # how the encoder is opened, see `Encoder.opening`
    threads: int


@dataclass(frozen=True, kw_only=True)
class Job:
    """Some blocks of a split, with all that a worker needs of their rows."""

    split: str
    blocks: tuple[int, ...]
    plan: Part
    tokens: Tokens
    kept: Bool[ndarray, " token"]


def on_cluster(client: "Client", *, threads: int | None = None) -> Spread:
    """How an extraction runs on a cluster; to be given to `pipeline.extract.extract`.

    Args:
        client: see `pipeline.cluster.connect`.
        threads: CPU threads of each worker; as many as its Dask threads by default.
    """
    return partial(_run, client, threads)


@contextmanager
def spread_over(scheduler: str | None, threads: int | None = None) -> Iterator[Spread | None]:
    """Joins or starts the cluster that ``--scheduler`` names; None where there is no such flag.

    Raises:
        PipelineError: it cannot be reached or started.
    """
    if scheduler is None:
        yield None
        return
    with cluster.connect(scheduler, threads=threads) as client:
        if threads is None and scheduler.startswith(cluster.LOCAL):
            threads = cluster.local_threads(len(cluster.workers_of(client)))
        yield on_cluster(client, threads=threads)


def _run(client: "Client", threads: int | None, stage: Stage) -> int:
    """Has the missing blocks made; returns how many that was."""
    if not stage.todo:
        return 0
    cluster.check_versions(client)
    encoder = stage.encoder
    setting = Setting(
        path=stage.writer.place.absolute,
        recipe=stage.writer.recipe,
        opening=encoder.opening,
        threads=threads or _dask_threads(client),
    )
    cluster.on_every_worker(client, partial(prepare, setting))
    stage.calibrate()
    jobs = _jobs(stage, setting.threads if encoder.device.type == "cpu" else _TASK_BLOCKS)
    try:
        for job, written_bytes in cluster.run(client, partial(make_blocks, setting), jobs):
            stage.note(job.split, job.blocks, written_bytes)
    except KeyboardInterrupt:
        raise stage.stopped() from None
    return len(stage.todo)


def _dask_threads(client: "Client") -> int:
    """Threads that a worker was given; the fewest, which all of them have."""
    return max(1, min(client.nthreads().values(), default=1))


def _jobs(stage: Stage, together: int) -> Iterator[Job]:
    """The missing blocks, some of one split at a time."""
    for split in stage.tokens:
        blocks = [block for name, block in stage.todo if name == split]
        for first in range(0, len(blocks), together):
            yield _job(stage, split, tuple(blocks[first : first + together]))


def _job(stage: Stage, split: str, blocks: tuple[int, ...]) -> Job:
    plan = stage.writer.plans[split].part(blocks)
    tokens, at = stage.tokens[split].of_rows(plan.source)
    return Job(split=split, blocks=blocks, plan=plan, tokens=tokens, kept=stage.kept[split][at])


# What runs in a worker.

_ENCODERS: dict[str, Encoder] = {}
_ONE = threading.Lock()
"""One task at a time in a process, however many threads Dask gives it: there is one encoder."""


def prepare(setting: Setting) -> None:
    """Loads the encoder and looks whether the bank can be written to.

    Raises:
        PipelineError: the worker cannot do its part; it is named with the reason.
    """
    with _named(), _ONE:
        _encoder(setting)
        if not Path(setting.path, "zarr.json").is_file():
            raise PipelineError(
                f"no bank at {setting.path}: the store must lie where every worker finds it under that name"
            )
        if not os.access(setting.path, os.W_OK):
            raise PipelineError(f"{setting.path} cannot be written to: give the worker's user the right")


def make_blocks(setting: Setting, job: Job) -> int:
    """Encodes and writes some blocks; returns the bytes written.

    Raises:
        PipelineError: it cannot be done; the worker is named with the reason.
    """
    with _named(), _ONE:
        torch.set_num_threads(setting.threads)
        writer = Writer.attached(setting.path, setting.recipe, {job.split: job.plan})
        stage = Stage(
            writer,
            _encoder(setting),
            {job.split: job.tokens},
            {job.split: job.kept},
            lambda _: None,
            todo=[(job.split, block) for block in job.blocks],
        )
        stage.run()
        return stage.written_bytes


def _encoder(setting: Setting) -> Encoder:
    """The process's encoder, loaded when it is first asked for."""
    torch.set_num_threads(setting.threads)
    key = repr(sorted(setting.opening.items()))
    if key not in _ENCODERS:
        _ENCODERS.clear()  # one at a time: a cluster outlives many extractions
        _ENCODERS[key] = Encoder(**setting.opening)
    encoder, asked = _ENCODERS[key], setting.recipe.encoder
    if encoder.record.weights_sha256 != asked.weights_sha256:
        raise PipelineError(f"--encoder {asked.name}: its weights there are others: give all the same")
    return encoder


@contextmanager
def _named() -> Iterator[None]:
    """Puts the worker's address before what it has to say."""
    try:
        yield
    except (PipelineError, CacheError, OSError) as error:
        raise PipelineError(f"worker {_address()}: {error}") from None


def _address() -> str:
    from distributed import get_worker

    try:
        return str(get_worker().address)
    except ValueError:  # called outside a worker
        return "here"
