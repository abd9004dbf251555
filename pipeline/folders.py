"""Run folders on the disk, whatever is in them: written whole or not at all, and found again."""

import glob
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import safetensors.torch
from safetensors import SafetensorError
from torch import Tensor

from pipeline.errors import PipelineError, said_by

CONFIG, METRICS, RESULT = "config.json", "metrics.jsonl", "result.json"
"""Files that every run has."""

HEADS = "heads"
"""Folder of a sweep's best heads, each a run."""

_PARTIAL, _ASIDE = ".partial-", ".aside-"
"""What follows a run's name, before a process id, in the folder it is made in and in that of the run it
replaces."""


@contextmanager
def making(out: str) -> Iterator[Path]:
    """A folder to be filled, which then takes the place of `out`: a run is there whole or not at all.

    Raises:
        PipelineError: the disk refuses.
    """
    path = Path(out).absolute()
    partial = path.with_name(f"{path.name}{_PARTIAL}{os.getpid()}")
    try:
        clear_partials(path)
        partial.mkdir(parents=True)
        yield partial
        put(partial, path)
    except OSError as error:
        shutil.rmtree(partial, ignore_errors=True)
        raise PipelineError(f"--out {out} cannot be written: {said_by(error)}") from error


def put(partial: Path, path: Path) -> None:
    """Renames a whole folder into place; one that is there goes only then."""
    aside = path.with_name(f"{path.name}{_ASIDE}{os.getpid()}")
    if path.exists():
        path.rename(aside)
    partial.rename(path)
    shutil.rmtree(aside, ignore_errors=True)


def clear_partials(path: Path) -> None:
    """Removes what processes that died left beside a run; brings back a run that one had put aside."""
    for mark in (_ASIDE, _PARTIAL):
        for left in path.parent.glob(f"{glob.escape(path.name + mark)}*"):
            owner = left.name.removeprefix(path.name + mark)
            if not owner.isdecimal() or _is_alive(int(owner)):
                continue
            if mark == _ASIDE and not path.exists():
                left.rename(path)
            else:
                shutil.rmtree(left)


def _is_alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # another user's
        return True
    return process != os.getpid()


def runs_at(path: Path) -> list[Path]:
    """The run that a folder is, be it cut off, or the runs right below it; none where it has none."""
    if any((path / name).is_file() for name in (CONFIG, METRICS, RESULT)):
        return [path]
    children = [child for child in sorted(path.iterdir()) if (child / CONFIG).is_file()]
    return [child for child in children if not in_the_making(child.name)]


def in_the_making(name: str) -> bool:
    """Whether a name is that of a run being written or replaced, or of what is left of one cut off."""
    return re.search(rf"({re.escape(_PARTIAL)}|{re.escape(_ASIDE)})\d+$", name) is not None


def write_tensors(
    path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None
) -> None:
    """Writes a safetensors file.

    Raises:
        OSError: the disk refuses, which the library tells by an error of its own.
    """
    try:
        safetensors.torch.save_file(dict(tensors), str(path), metadata=dict(metadata) if metadata else None)
    except SafetensorError as error:
        number = re.search(r"\(os error (\d+)\)", str(error))
        if number is None:
            raise OSError(" ".join(str(error).split())) from error
        raise OSError(int(number[1]), os.strerror(int(number[1]))) from error
