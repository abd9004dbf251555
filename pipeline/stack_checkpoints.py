"""The state of every stack in training, in a file of its own, so that a sweep that was cut off goes on."""

import json
import os
import platform
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import safetensors

from pipeline.errors import PipelineError
from pipeline.fitting import Fitting
from pipeline.folders import write_tensors
from pipeline.grid import Stack

CHECKPOINT_S = 20.0
"""Seconds between two checkpoints of a stack; one is written after an epoch."""


class StackCheckpoints:
    """Where the states of stacks in training are kept.

    Args:
        folder: of the files; None keeps nothing.
    """

    def __init__(self, folder: Path | None) -> None:
        self._folder = folder

    def _path(self, stack: Stack) -> Path | None:
        return None if self._folder is None else self._folder / f"{stack.digest}.safetensors"

    def save(self, stack: Stack, fitting: Fitting) -> None:
        """Writes the state of a stack: under another name first, then renamed.

        Raises:
            PipelineError: the disk refuses.
        """
        path = self._path(stack)
        if path is None:
            return
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
            raise PipelineError(f"{path} cannot be written: {error}") from error

    def load(self, stack: Stack, fitting: Fitting) -> None:
        """Puts a stack to where its checkpoint has it; one that is damaged is as good as none."""
        path = self._path(stack)
        if path is None or not path.is_file():
            return
        try:
            with safetensors.safe_open(str(path), framework="pt") as file:
                values = json.loads(file.metadata()["values"])
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        except (OSError, ValueError, KeyError, TypeError, safetensors.SafetensorError):
            return
        fitting.resume(tensors, values)

    def keeper(self, fittings: Mapping[Stack, Fitting]) -> Callable[[], None]:
        """What saves stacks that train together when it is called, from time to time."""
        last = time.monotonic()

        def keep() -> None:
            nonlocal last
            if time.monotonic() - last < CHECKPOINT_S:
                return
            for stack, fitting in fittings.items():
                self.save(stack, fitting)
            last = time.monotonic()

        return keep

    def forget(self, stack: Stack) -> None:
        """Removes the checkpoint of a stack that is done, and what a killed process left of one."""
        path = self._path(stack)
        for file in path.parent.glob(f"{path.name}*") if path is not None else ():
            file.unlink(missing_ok=True)
