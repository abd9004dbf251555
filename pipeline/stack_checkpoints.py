"""The state of every stack in training, in a file of its own, so that a sweep that was cut off goes on."""

from collections.abc import Callable, Mapping
from pathlib import Path

from pipeline.fitting import Fitting
from pipeline.grid import Stack
from pipeline.unfinished import load_checkpoint, now_and_then, save_checkpoint


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
        """Writes the state of a stack.

        Raises:
            PipelineError: the disk refuses.
        """
        path = self._path(stack)
        if path is not None:
            save_checkpoint(path, fitting)

    def load(self, stack: Stack, fitting: Fitting) -> None:
        """Puts a stack to where its checkpoint has it; one that is damaged is as good as none."""
        path = self._path(stack)
        if path is not None:
            load_checkpoint(path, fitting)

    def keeper(self, fittings: Mapping[Stack, Fitting]) -> Callable[[], None]:
        """What saves stacks that train together when it is called, from time to time."""

        def keep() -> None:
            for stack, fitting in fittings.items():
                self.save(stack, fitting)

        return now_and_then(keep)

    def forget(self, stack: Stack) -> None:
        """Removes the checkpoint of a stack that is done, and what a killed process left of one."""
        path = self._path(stack)
        for file in path.parent.glob(f"{path.name}*") if path is not None else ():
            file.unlink(missing_ok=True)
