"""Training that was cut off, on the disk: its state after an epoch, and what it was asked for.

``OUT.partial/`` lies beside the folder of a run until that is whole:

``asked.json``         the run's choices, and fingerprints of what it reads
``state.safetensors``  where training on a bank was; `pipeline.tuning.saved` has that of early fusion
"""

import json
import os
import platform
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import safetensors
from torch import Tensor

from pipeline.errors import PipelineError, said_by
from pipeline.folders import write_tensors
from pipeline.job import Epoch

CHECKPOINT_S = 20.0
"""Seconds between two checkpoints on a bank; one is written after an epoch."""

ASKED, STATE = "asked.json", "state.safetensors"
CONTENT = "content"


@runtime_checkable
class Resumable(Protocol):
    """Training that can be taken up after any of its epochs."""

    epoch: int  # epochs done

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """All that `resume` needs: tensors by name, and plain values."""

    def resume(self, tensors: Mapping[str, Tensor], values: Mapping[str, Any]) -> None:
        """Goes on after the epoch at which `state` was taken, as if nothing had happened."""


def open_partial(out: str, asked: Mapping[str, Any], content: Mapping[str, Any]) -> Path:
    """The folder of an unfinished run, beside the one of the run: a new one, or that of the same run.

    Args:
        out: folder of the run.
        asked: its choices, by name.
        content: fingerprints of what was read for them, by what it is: files change under their names.

    Raises:
        PipelineError: it holds an unfinished run that was asked for otherwise or began with other content,
            or the disk refuses.
    """
    folder = partial_of(out)
    text = json.dumps({**asked, CONTENT: dict(content)}, indent=2, sort_keys=True)
    try:
        if is_begun(out):
            found = json.loads((folder / ASKED).read_text(encoding="utf-8"))
            _check_same(out, found, json.loads(text))
        else:  # nothing is lost, whatever was asked for before
            folder.mkdir(parents=True, exist_ok=True)
            (folder / ASKED).write_text(text, encoding="utf-8")
    except (OSError, ValueError) as error:
        raise PipelineError(
            f"--out {out}: {folder} cannot be used ({said_by(error)}): remove it"
        ) from error
    return folder


def _check_same(out: str, found: dict[str, Any], now: dict[str, Any]) -> None:
    folder = partial_of(out)
    had, has = found.pop(CONTENT, {}), now.pop(CONTENT)
    differing = sorted(name for name in {*now, *found} if found.get(name) != now.get(name))
    if differing:
        raise PipelineError(
            f"--out {out}: {folder} holds an unfinished run that differs in {differing[0]}: ask for the "
            "same to go on with it, or remove it"
        )
    changed = sorted(name for name in has if had.get(name) != has[name])
    if changed:
        raise PipelineError(
            f"--out {out}: the {changed[0]} changed since the unfinished run in {folder} began: "
            "remove it to begin anew, or bring back what it began with"
        )


def is_begun(out: str) -> bool:
    """Whether an unfinished run of that folder has an epoch to go on from."""
    folder = partial_of(out)
    return (folder / STATE).is_file() or any(folder.glob("epoch-*"))


def partial_of(out: str) -> Path:
    """The folder of an unfinished run."""
    path = Path(out).absolute()
    return path.with_name(f"{path.name}.partial")


def drop_partial(out: str) -> None:
    """Removes the folder of a run that is whole, or that nothing can come of."""
    shutil.rmtree(partial_of(out), ignore_errors=True)


def take_up(
    out: str,
    fitting: Resumable,
    asked: Mapping[str, Any],
    content: Mapping[str, Any],
    *,
    overwrite: bool = False,
    note: Callable[[str], None] = lambda _: None,
) -> Callable[[], None]:
    """Puts training on a bank to where the unfinished run of a folder has it, if there is one.

    Args:
        out: folder of the run.
        fitting: before its first epoch.
        asked: as for `open_partial`.
        content: as for `open_partial`.
        overwrite: whether an unfinished run that cannot be gone on with is dropped.
        note: takes a line of text for the user.

    Returns:
        To be called after every epoch: keeps the state for the next time. Where that cannot be written it
        says so once, and training goes on.

    Raises:
        PipelineError: as for `open_partial`.
    """
    try:
        if is_begun(out):
            load_checkpoint(open_partial(out, asked, content) / STATE, fitting)
    except PipelineError:
        if not overwrite:
            raise
        drop_partial(out)
    if fitting.epoch:
        note(f"{out}: goes on after epoch {fitting.epoch}")
    told = False

    def keep() -> None:
        nonlocal told
        try:
            save_checkpoint(open_partial(out, asked, content) / STATE, fitting)
        except PipelineError as error:
            if not told:
                note(f"{error}; training goes on, and begins anew if it is killed")
            told = True

    return now_and_then(keep)


def options_asked(options: Mapping[str, Any] | None) -> dict[str, Any]:
    """Options of the parts as choices of a run: by name and spelling, whatever is given."""
    return {"options": {name: str(value) for name, value in (options or {}).items()}}


def earlier_seconds(lines: Sequence[Epoch]) -> float:
    """What an unfinished run had trained for already, by the lines of its epochs."""
    return sum((line.seconds for line in lines), 0.0)


def now_and_then(keep: Callable[[], None]) -> Callable[[], None]:
    """Does something when called, but not within `CHECKPOINT_S` after the last time."""
    last = time.monotonic()

    def keep_if_due() -> None:
        nonlocal last
        if time.monotonic() - last >= CHECKPOINT_S:
            keep()
            last = time.monotonic()

    return keep_if_due


def save_checkpoint(path: Path, fitting: Resumable) -> None:
    """Writes the state of training: under another name first, then renamed.

    Raises:
        PipelineError: the disk refuses.
    """
    tensors, values = fitting.state()
    # A name of its own: a worker that was given up for dead may still be writing the same one.
    partial = path.with_name(f"{path.name}.{platform.node()}-{os.getpid()}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        whole = {name: value.detach().cpu().contiguous() for name, value in tensors.items()}
        write_tensors(partial, whole, {"values": json.dumps(values)})
        partial.replace(path)
    except OSError as error:
        partial.unlink(missing_ok=True)
        raise PipelineError(f"{path} cannot be written: {said_by(error)}") from error


def load_checkpoint(path: Path, fitting: Resumable) -> None:
    """Puts training to where a checkpoint has it; one that is not there or damaged changes nothing."""
    try:
        with safetensors.safe_open(str(path), framework="pt") as file:
            values = json.loads(file.metadata()["values"])
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (OSError, ValueError, KeyError, TypeError, safetensors.SafetensorError):
        return
    fitting.resume(tensors, values)
