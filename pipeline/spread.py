"""Stage 1 on several processes or machines: blocks are encoded and written by the workers of a cluster.

The process that was asked plans, makes the bank's skeleton, sends the tokens of a few blocks at a time and
marks the bank complete. A worker has the encoder's weights, once, and the bank's folder or URL. A block is
a pure function of its tokens, so it is the same whoever makes it.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jaxtyping import Bool
from numpy import ndarray

from cache import Recipe, Writer, open_bank
from cache.place import place
from cache.plan import Part
from pipeline import cluster
from pipeline.encoder import Encoder
from pipeline.errors import PipelineError
from pipeline.stage import Stage
from pipeline.tokens import Tokens
from pipeline.worker import at_work, see_bank

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
    fingerprint: str  # of the bank
    recipe: Recipe
    opening: dict[str, Any] = field(hash=False)  # how the encoder is opened, see `Encoder.opening`
    threads: int | None  # of a worker; as many as Dask gave it if None


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
        yield on_cluster(client, threads=threads)


def _run(client: "Client", threads: int | None, stage: Stage) -> int:
    """Has the missing blocks made; returns how many that was."""
    if not stage.todo:
        return 0
    cluster.check_versions(client)
    path = stage.writer.place.absolute
    setting = Setting(
        path=path,
        fingerprint=open_bank(path, allow_incomplete=True).fingerprint,
        recipe=stage.writer.recipe,
        opening=_found_anywhere(stage.encoder.opening),
        threads=threads,
    )
    devices = cluster.on_every_worker(client, partial(prepare, setting))
    stage.calibrate()
    jobs = _jobs(stage, _together(client, threads, set(devices.values())))
    try:
        for job, written_bytes in cluster.run(client, partial(make_blocks, setting), jobs):
            stage.note(job.split, job.blocks, written_bytes)
    except KeyboardInterrupt:
        raise stage.stopped() from None
    return len(stage.todo)


def _found_anywhere(opening: dict[str, Any]) -> dict[str, Any]:
    """How the encoder is opened from any folder."""
    name = Path(opening["name"])
    return {**opening, "name": str(name.resolve())} if name.is_dir() else opening


def _together(client: "Client", threads: int | None, devices: set[str]) -> int:
    """Blocks in one task: on a CPU one for each thread of the worker that has fewest."""
    fewest = threads or max(1, min(client.nthreads().values(), default=1))
    return fewest if devices <= {"cpu"} else max(fewest, _TASK_BLOCKS)


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


def prepare(setting: Setting) -> str:
    """Loads the encoder and looks whether the bank can be written to; returns the type of the device.

    Raises:
        PipelineError: the worker cannot do its part; it is named with the reason.
    """
    with at_work(setting.threads):
        encoder = _encoder(setting)
        see_bank(setting.path, setting.fingerprint, lambda: open_bank(setting.path, allow_incomplete=True))
        if not place(setting.path).is_writable():
            raise PipelineError(f"{setting.path} cannot be written to: give the worker's user the right")
        return encoder.device.type


def make_blocks(setting: Setting, job: Job) -> int:
    """Encodes and writes some blocks; returns the bytes written.

    Raises:
        PipelineError: it cannot be done; the worker is named with the reason.
    """
    with at_work(setting.threads):
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
    key = repr(sorted(setting.opening.items()))
    if key not in _ENCODERS:
        _ENCODERS.clear()  # one at a time: a cluster outlives many extractions
        _ENCODERS[key] = Encoder(**setting.opening)
    encoder, asked = _ENCODERS[key], setting.recipe.encoder
    if encoder.record.weights_sha256 != asked.weights_sha256:
        raise PipelineError(f"--encoder {asked.name}: its weights there are others: give all the same")
    return encoder
