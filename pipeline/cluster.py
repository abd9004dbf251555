"""Work on a Dask cluster: joining one, starting one, sending it a bounded stream of tasks.

Knows `distributed`, which is imported when a cluster is asked for and not before. Knows nothing of what a
task does: functions and items come from the caller and must be picklable.
"""

import logging
import os
import signal
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from importlib import metadata
from typing import TYPE_CHECKING, Any, TypeVar

from cache.store import one_line
from pipeline.device import asked_threads, usable_cores
from pipeline.errors import PipelineError
from pipeline.versions import versions

if TYPE_CHECKING:
    from distributed import Client, Future

Item = TypeVar("Item")

LOCAL = "local:"
_MUST_AGREE = ("layerbank", "torch", "transformers", "zarr")
_CONNECT_S = 10
_WITHOUT_WORKERS_S = 60
"""How long a cluster may have no worker before the work is given up: a nanny starts one in seconds."""

_CLOSE_S = 120
"""How long the processes of a local cluster may take to end, on a machine that has much else to do."""

_LOOK_S = 2
"""How often the workers are looked at while none of their tasks ends."""

_AHEAD = 2
"""Tasks at a worker at a time: one being done, one waiting, so that no worker waits for its next."""


@contextmanager
def connect(address: str, *, threads: int | None = None) -> Iterator["Client"]:
    """Joins a cluster, or starts one of processes on this machine that ends with the block.

    Args:
        address: of a scheduler, such as ``tcp://host:8786``; or ``local:N`` for N processes.
        threads: CPU threads of each process of a local cluster; an equal share of the cores by default.

    Raises:
        PipelineError: `distributed` is not installed, the address is none, nothing answers there, or the
            cluster has no workers.
    """
    try:
        import distributed
    except ImportError as error:
        raise PipelineError(
            f"--scheduler {address}: the package distributed is not installed: pip install "
            "'layerbank[cluster]'"
        ) from error
    with ExitStack() as exits:
        exits.enter_context(_quiet())
        if address.startswith(LOCAL):
            cluster = exits.enter_context(_local_cluster(_processes(address), threads))
            client = exits.enter_context(distributed.Client(cluster, set_as_default=False))
            # Ctrl-C reaches every process of a terminal; this one ends the others, which need not say so.
            client.run(lambda: signal.signal(signal.SIGINT, signal.SIG_IGN) and None)
            yield client
            return
        try:
            if "://" not in address:
                address = f"tcp://{address}"
            # Looked at first: a client of an address that is none stays half made, and ends noisily.
            distributed.comm.get_address_host_port(address, strict=True)
            client = distributed.Client(address, timeout=_CONNECT_S, set_as_default=False)
        except (OSError, ValueError, TypeError, NotImplementedError) as error:  # a timeout is an OSError
            raise PipelineError(
                f"--scheduler {address}: no Dask scheduler answers there ({one_line(error)}): start one "
                "with 'dask scheduler', or give local:N for processes on this machine"
            ) from error
        exits.enter_context(client)
        try:
            client.wait_for_workers(1, timeout=_CONNECT_S)
        except TimeoutError as error:
            raise PipelineError(
                f"--scheduler {address}: the cluster has no workers: start some, 'dask worker {address}'"
            ) from error
        yield client


def _processes(address: str) -> int:
    number = address.removeprefix(LOCAL)
    if not number.isdecimal() or int(number) < 1:
        raise PipelineError(f"--scheduler {address}: give local:N with N processes, 1 or more")
    return int(number)


@contextmanager
def _local_cluster(n_workers: int, threads: int | None) -> Iterator[Any]:
    """Processes of this machine, each with a GPU of its own where there are several."""
    from distributed import Nanny, Scheduler, SpecCluster

    share = threads or local_threads(n_workers)
    gpus = _gpus()
    workers = {}
    for number in range(n_workers):
        environment = {"OMP_NUM_THREADS": str(share), "MKL_NUM_THREADS": str(share)}
        if len(gpus) > 1:
            environment["CUDA_VISIBLE_DEVICES"] = gpus[number % len(gpus)]
        options = {
            "nthreads": share,
            "env": environment,
            "host": "127.0.0.1",
            "silence_logs": logging.CRITICAL,
        }
        workers[number] = {"cls": Nanny, "options": {**options, "memory_limit": 0, "dashboard": False}}
    # Any free port for what Dask serves beside: two clusters may run on one machine.
    ports = {"port": 0, "dashboard": False, "dashboard_address": "127.0.0.1:0"}
    scheduler = {"cls": Scheduler, "options": {"host": "127.0.0.1", **ports}}
    cluster = SpecCluster(
        workers=workers, scheduler=scheduler, silence_logs=logging.CRITICAL, name="layerbank"
    )
    try:
        yield cluster
    finally:
        cluster.close(timeout=_CLOSE_S)


def local_threads(n_workers: int) -> int:
    """CPU threads of each of some processes on this machine: those asked for, or a share of the cores."""
    return asked_threads() or max(1, usable_cores() // n_workers)


def _gpus() -> list[str]:
    """What each GPU that may be used is called in CUDA_VISIBLE_DEVICES."""
    import torch

    if not torch.cuda.is_available():
        return []
    visible = [name for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name]
    return visible or [str(number) for number in range(torch.cuda.device_count())]


@contextmanager
def _quiet() -> Iterator[None]:
    """Holds back what `distributed` logs of workers that come and go: what matters is told in one line."""
    logger = logging.getLogger("distributed")
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        logger.setLevel(level)


def workers_of(client: "Client") -> list[str]:
    """Addresses of the workers that are there."""
    return sorted(client.nthreads())


def check_versions(client: "Client") -> None:
    """Refuses a cluster whose workers have other packages: their results could differ.

    Raises:
        PipelineError: a package of a worker differs or lacks; the first is named with both versions.
    """
    # A lambda travels whole: a worker that lacks our packages can run it too.
    found = client.run(
        lambda names: {name: [d.version for d in metadata.distributions(name=name)] for name in names},
        list(_MUST_AGREE),
        on_error="return",
    )
    ours = versions()
    for worker, theirs in sorted(found.items()):
        if not isinstance(theirs, dict):
            raise PipelineError(f"worker {worker} cannot tell its versions: {one_line(theirs)}")
        for name in _MUST_AGREE:
            version = next(iter(theirs[name]), "source" if name == "layerbank" else "none")
            # A build's own mark (2.13.0+cpu) is no other version.
            if ours[name].partition("+")[0] != version.partition("+")[0]:
                raise PipelineError(
                    f"worker {worker} has {name} {version}, this process {ours[name]}: give all of them "
                    "the same"
                )


def on_every_worker(client: "Client", function: Callable[[], Any]) -> dict[str, Any]:
    """Calls a function once at each worker, as a task; what it returns by the worker's address.

    A worker that goes away meanwhile has no entry.

    Raises:
        Exception: what the function raises, of the first worker that does.
    """
    tasks = {w: client.submit(function, workers=[w], pure=False) for w in workers_of(client)}
    owners = {task: worker for worker, task in tasks.items()}
    results = {}
    while owners:
        gone = set(owners.values()) - set(workers_of(client))
        for task in [task for task, worker in owners.items() if worker in gone]:
            del owners[task]
        for task in _ended(client, list(owners)):
            results[owners.pop(task)] = task.result()
    return results


def run(
    client: "Client",
    function: Callable[[Item], Any],
    items: Iterable[Item],
    *,
    ahead: int = _AHEAD,
) -> Iterator[tuple[Item, Any]]:
    """Sends a function's items to the workers, a few at a time, and gives results as they come.

    A task whose worker died is done again by another; what such a task has done so far must do no harm.

    Args:
        client: of a cluster, see `connect`.
        function: what is done with an item; it runs in a worker.
        items: taken from as workers get free.
        ahead: tasks at a worker at a time.

    Yields:
        An item and its result, in the order in which they end.

    Raises:
        PipelineError: the cluster or all of its workers are gone, or a task ended several workers.
        Exception: what the function raises.
    """
    waiting: dict[Future, Item] = {}
    source, more = iter(items), True
    try:
        while more or waiting:
            room = ahead * max(1, len(workers_of(client)))
            while more and len(waiting) < room:
                try:
                    item = next(source)
                except StopIteration:
                    more = False
                else:
                    waiting[client.submit(partial(function, item), pure=False)] = item
            for task in _ended(client, list(waiting)):
                item = waiting.pop(task)
                yield item, _result(task)
                task.release()
            _check_alive(client)
    finally:
        if waiting:
            client.cancel(list(waiting), force=True)


def _ended(client: "Client", tasks: list[Any]) -> list[Any]:
    """The tasks that have ended, after a moment's wait if none has."""
    from distributed import wait

    if not tasks:
        return []
    try:
        with client.as_current():
            return list(wait(tasks, timeout=_LOOK_S, return_when="FIRST_COMPLETED").done)
    except TimeoutError:
        return []


def _result(task: "Future") -> Any:
    from distributed import CancelledError, KilledWorker

    try:
        return task.result()
    except KilledWorker as error:
        raise PipelineError(
            f"one task ended every worker that tried it, worker {error.last_worker.address} last, perhaps "
            "for lack of memory: give fewer --batch-tokens or less --memory, or workers with more. What is "
            "done stays"
        ) from error
    except CancelledError as error:
        raise PipelineError(_GONE) from error


_GONE = "the cluster's scheduler is gone: what is done stays, start it and run the same command again"


def _check_alive(client: "Client") -> None:
    """Gives up where there is no scheduler any more, or no worker and none comes."""
    if client.status not in ("running", "connecting"):
        raise PipelineError(_GONE)
    if workers_of(client):
        return
    try:
        client.wait_for_workers(1, timeout=_WITHOUT_WORKERS_S)
    except TimeoutError as error:
        raise PipelineError(
            f"the cluster has no workers any more, for {_WITHOUT_WORKERS_S} s: what is done stays, start "
            "some and run the same command again"
        ) from error
