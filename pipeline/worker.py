"""What every task does at a worker of a cluster: it takes its turn, sets the threads, says where it is.

Knows no encoder and no head.
"""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

from cache import Bank, CacheError
from cache.errors import BankAbsent
from pipeline.errors import PipelineError

_ONE = threading.Lock()
"""One task at a time in a process, however many threads Dask gives it: there is one encoder, one held bank,
and one number of threads."""


@contextmanager
def at_work(threads: int | None) -> Iterator[None]:
    """Holds the process for one task; puts the worker's address before what it has to say.

    Args:
        threads: CPU threads of torch; as many as Dask gave the worker if None.

    Raises:
        PipelineError: the task cannot be done.
    """
    with _ONE:
        torch.set_num_threads(threads or _dask_threads())
        try:
            yield
        except (PipelineError, CacheError, OSError, MemoryError, torch.OutOfMemoryError) as error:
            raise PipelineError(f"worker {address()}: {str(error) or type(error).__name__}") from None


def address() -> str:
    """The worker's address, ``here`` outside of one."""
    from distributed import get_worker

    try:
        return str(get_worker().address)
    except ValueError:
        return "here"


def _dask_threads() -> int:
    from distributed import get_worker

    try:
        return int(get_worker().state.nthreads)
    except ValueError:  # called outside a worker
        return torch.get_num_threads()


def see_bank(path: str, fingerprint: str, open_it: Callable[[], Bank]) -> Bank:
    """Opens a bank that the process which sent the task has too.

    Args:
        path: where it lies, for the message.
        fingerprint: the one it must have.
        open_it: opens it.

    Raises:
        PipelineError: there is none, or another one.
    """
    cure = "the store must lie where every worker finds it under that name"
    try:
        bank = open_it()
    except BankAbsent as error:
        raise PipelineError(f"no bank at {path}: {cure}") from error
    if bank.fingerprint != fingerprint:
        raise PipelineError(f"the bank at {path} is another one there: {cure}")
    return bank


def check_wanted() -> None:
    """Ends a task that nobody waits for any more, so that it does not keep the worker from the next.

    Dask ends no thread: a task whose command was stopped would go on to its end.

    Raises:
        PipelineError: the task was given up.
    """
    from distributed import get_worker

    try:
        worker = get_worker()
        task = worker.state.tasks.get(worker.get_current_task())
    except ValueError:  # called outside a worker
        return
    if task is None or task.state == "cancelled":
        raise PipelineError("nobody waits for this task any more")
