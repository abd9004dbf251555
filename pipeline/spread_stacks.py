"""Stage 2 on several processes or machines: stacks are trained by the workers of a cluster.

The process that was asked checks every stack, sends one at a time to each worker, and keeps what comes
back. A worker opens the bank by its folder or URL, and holds its states for the stacks that come after.
Where it sees the sweep's folder too, a stack that was cut off goes on from its checkpoint, whoever has it
next.
"""

import hashlib
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from cache.place import place
from pipeline import cluster
from pipeline.device import pick_device, pick_precision
from pipeline.grid import Stack
from pipeline.job import Precision
from pipeline.results import SWEEP
from pipeline.rungs import lots_of
from pipeline.runner import STACKS, Note, Outcome, Plan, Runner, Train
from pipeline.worker import address, at_work, check_wanted, see_bank

if TYPE_CHECKING:
    from distributed import Client


@dataclass(frozen=True, kw_only=True)
class Setting:
    """What all stacks of a sweep share, in a form that another machine can use."""

    plan: Plan  # its paths absolute
    fingerprint: str  # of the bank
    folder: str  # of the sweep, absolute
    claim: str | None  # SHA-256 of what is asked, as the folder holds it; None where nothing is kept
    threads: int | None  # of a worker; as many as Dask gave it if None


@dataclass(frozen=True, kw_only=True)
class Done:
    """A trained stack, or the pieces of one, and what a worker has to say of it."""

    outcomes: list[Outcome]
    worker: str
    notes: list[str]


def on_cluster(client: "Client", *, threads: int | None = None) -> Callable[[Runner], Train]:
    """How a sweep runs on a cluster; to be given to `pipeline.sweep.sweep`.

    Args:
        client: see `pipeline.cluster.connect`.
        threads: CPU threads of each worker; as many as its Dask threads by default.
    """
    return lambda runner: partial(_train, client, runner, threads, _once(runner.note))


def common_precision(
    client: "Client", asked: Literal["auto", "float32", "bfloat16"], device: str
) -> Precision:
    """The precision of heads' products: ``auto`` takes bfloat16 where every worker has units for it.

    Args:
        client: of the cluster.
        asked: ``auto`` or a precision.
        device: where the workers compute; ``auto`` is picked by each of them.

    Raises:
        PipelineError: a worker does not have the device.
    """
    cluster.check_versions(client)
    found = cluster.on_every_worker(client, partial(_precision, asked, device))
    if asked != "auto":
        return asked
    return "bfloat16" if set(found.values()) == {"bfloat16"} else "float32"


def _once(note: Note) -> Note:
    """Says a line the first time alone: several workers have the same to say."""
    said = set[str]()

    def say(text: str) -> None:
        if text not in said:
            said.add(text)
            note(text)

    return say


def _train(
    client: "Client", runner: Runner, threads: int | None, say: Note, stacks: Sequence[Stack]
) -> Iterator[Outcome]:
    """Has stacks trained, one at a time at each worker."""
    cluster.check_versions(client)
    setting = _setting(runner, threads)
    _greet(cluster.on_every_worker(client, partial(prepare, setting)), setting, say)
    sent = {_absolute(stack): stack for stack in stacks}
    lots = lots_of(list(sent), runner.plan.schedule)
    trained = cluster.run(client, partial(train_lot, setting), lots, ahead=1)
    for number, (lot, done) in enumerate(trained, 1):
        for note in done.notes:
            say(note)
        heads = [head for outcome in done.outcomes for head in outcome.trained]
        say(
            f"stack {number} of {len(lots)}: {lot[0].shape.name}, heads: {len(heads)}, "
            f"{sum(head.seconds for head in heads):.1f} s at {done.worker}"
        )
        for outcome in done.outcomes:
            yield replace(outcome, stack=sent[outcome.stack])
        for wire in (stack for stack in lot if stack != sent[stack]):
            runner.forget(wire)


def _setting(runner: Runner, threads: int | None) -> Setting:
    plan, folder = runner.plan, runner.checkpoints
    pieces = tuple(replace(piece, store=place(piece.store).absolute) for piece in plan.train_on)
    return Setting(
        plan=replace(plan, store=place(plan.store).absolute, train_on=pieces),
        fingerprint=runner.bank.fingerprint,
        folder="" if folder is None else str(folder.parent.resolve()),
        claim=None if folder is None else _claim(folder.parent),
        threads=threads,
    )


def _absolute(stack: Stack) -> Stack:
    """The stack with the runs that its option `sources` names found from any folder."""

    def found(name: str, value: Any) -> Any:
        if name != "sources":
            return value
        # Joined and no more: what differs as it was given stays different.
        runs = [run.strip() for run in str(value).split(",") if run.strip()]
        return ",".join(os.path.join(os.getcwd(), run) for run in runs)

    options = tuple((name, found(name, value)) for name, value in stack.shape.options)
    return replace(stack, shape=replace(stack.shape, options=options))


def _claim(folder: Path) -> str | None:
    """What tells a sweep's folder from any other of that name; None where there is none."""
    try:
        return hashlib.sha256((folder / SWEEP).read_bytes()).hexdigest()
    except OSError:
        return None


def _greet(found: dict[str, tuple[str, bool]], setting: Setting, say: Note) -> None:
    """Says what the user should know of the workers before they begin."""
    blind = sorted(worker for worker, (_, sees) in found.items() if not sees)
    if blind and setting.claim is not None:
        say(
            f"worker {blind[0]}{f' and {len(blind) - 1} more' if blind[1:] else ''} cannot write to "
            f"{setting.folder}: a stack that is cut off there starts anew. Checkpoints need an --out that "
            "all workers see under that name"
        )
    devices = sorted({device for device, _ in found.values()})
    if len(devices) > 1:
        say(f"workers compute on {' and '.join(devices)}: their heads differ by rounding")


# What runs in a worker.

_held: list[tuple[Setting, Runner]] = []
"""The runner of the last task, with its bank's states; one at a time, as a cluster outlives many sweeps."""


def prepare(setting: Setting) -> tuple[str, bool]:
    """Opens the bank; returns the type of the device, and whether checkpoints can be kept.

    Raises:
        PipelineError: the worker cannot do its part; it is named with the reason.
    """
    with at_work(setting.threads):
        runner = _runner(setting)
        return runner.device.type, runner.checkpoints is not None


def train_lot(setting: Setting, lot: Sequence[Stack]) -> Done:
    """Trains a stack, or the pieces of one.

    Raises:
        PipelineError: it cannot be done; the worker is named with the reason.
    """
    notes: list[str] = []
    with at_work(setting.threads):
        runner = _runner(setting)
        runner.tell(notes.append)
        # A device of this machine is none of the one that asks.
        outcomes = [
            replace(outcome, trained=[replace(one, head=one.head.cpu()) for one in outcome.trained])
            for outcome in runner.train(lot)
        ]
        return Done(outcomes=outcomes, worker=address(), notes=notes)


def _runner(setting: Setting) -> Runner:
    """The process's runner, made when it is first asked for."""
    if not _held or _held[0][0] != setting:
        _held.clear()
        checkpoints = Path(setting.folder, STACKS) if _sees_folder(setting) else None
        runner = Runner(setting.plan, checkpoints=checkpoints, progress=lambda *_: check_wanted())
        see_bank(setting.plan.store, setting.fingerprint, lambda: runner.bank)
        _held.append((setting, runner))
    return _held[0][1]


def _sees_folder(setting: Setting) -> bool:
    """Whether the sweep's folder is this machine's too: it holds the same claim and can be written to."""
    folder = Path(setting.folder)
    return setting.claim is not None and _claim(folder) == setting.claim and os.access(folder, os.W_OK)


def _precision(asked: Literal["auto", "float32", "bfloat16"], device: str) -> Precision:
    with at_work(None):
        return pick_precision(asked, pick_device(device))
