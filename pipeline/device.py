"""Which device computes, and with how many threads."""

import math
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any, Literal

import torch

from pipeline.errors import PipelineError

SHARED_PRODUCTS = 2**24
"""Multiplications and additions of a step from which on threads that share them pay (docs/log.md)."""

CGROUP = Path("/sys/fs/cgroup")

Run = Callable[[Sequence[Callable[[], Any]]], list[Any]]
"""Does some jobs and gives what each made, in their order."""


def pick_device(name: str = "auto") -> torch.device:
    """The device of that name; ``auto`` takes CUDA, then Apple's GPU, then the CPU.

    Raises:
        PipelineError: the device is not there.
    """
    if name == "auto":
        if torch.cuda.is_available():
            return torch.device("cuda")
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise PipelineError(f"--device {name}: not available here, use --device auto or cpu") from error
    return device


def pick_precision(name: str, device: torch.device) -> Literal["float32", "bfloat16"]:
    """The precision of a head's products; ``auto`` takes bfloat16 where the device has units for it.

    Weights, their updates and losses stay float32.
    """
    if name == "auto":
        return "bfloat16" if _computes_bfloat16(device) else "float32"
    return "bfloat16" if name == "bfloat16" else "float32"


def _computes_bfloat16(device: torch.device) -> bool:
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    # AMX only: the vector units of AVX512-BF16 gain less than the conversions cost.
    return device.type == "cpu" and bool(torch.cpu._is_amx_tile_supported())


def set_threads(threads: int | None) -> int:
    """Sets the number of CPU threads of torch's products.

    Args:
        threads: None for what the environment asks by OMP_NUM_THREADS, as torch does, or else one a usable
            core.

    Raises:
        PipelineError: the number is below 1.
    """
    if threads is not None and threads < 1:
        raise PipelineError(f"--threads {threads}: give 1 or more")
    count = threads or asked_threads() or usable_cores()
    torch.set_num_threads(count)
    return count


@contextmanager
def one_thread_each(device: torch.device) -> Iterator[None]:
    """Every product on a CPU is computed by the thread that asks for it: for work that runs side by side.

    A product shared by threads ends with its slowest one; what is computed whole on one thread waits for
    nobody, and its sums do not depend on how many threads there are.
    """
    if device.type != "cpu":
        yield
        return
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextmanager
def side_by_side(device: torch.device, n_jobs: int, n_products: float = math.inf) -> Iterator[Run]:
    """What runs jobs: on a CPU each on a thread of its own, where there are enough of them for all threads.

    Args:
        device: where the jobs compute.
        n_jobs: how many there will be at a time.
        n_products: multiplications and additions of all of them; small ones share no product.
    """
    threads = torch.get_num_threads()
    if device.type != "cpu" or not 1 < threads <= n_jobs:
        small = n_products < SHARED_PRODUCTS
        with one_thread_each(device) if small else nullcontext():
            yield lambda jobs: [job() for job in jobs]
        return
    with one_thread_each(device), ThreadPoolExecutor(threads, thread_name_prefix="side-by-side") as pool:
        yield lambda jobs: list(pool.map(lambda job: job(), jobs))


def asked_threads() -> int | None:
    """OpenMP's number of threads; of the levels it may be asked for, ``8,2``, the first."""
    first = os.environ.get("OMP_NUM_THREADS", "").partition(",")[0].strip()
    return int(first) or None if first.isdecimal() else None


def usable_cores() -> int:
    """Cores that this process may keep busy: those it may run on, or fewer by a container's quota."""
    # macOS binds no process to cores.
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, math.ceil(min(cores, _quota())))


def _quota() -> float:
    """Cores' worth of time that Linux grants the container."""
    try:
        if (both := CGROUP / "cpu.max").is_file():
            quota, period = both.read_text().split()
        else:
            quota, period = (
                (CGROUP / "cpu" / f"cpu.cfs_{name}_us").read_text() for name in ("quota", "period")
            )
        return int(quota) / int(period) if int(quota) > 0 else math.inf
    except (OSError, ValueError):  # no such files, or "max"
        return math.inf
