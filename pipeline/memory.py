"""Memory of the process: its peak, and what is freed, kept for the next step or given back."""

import contextlib
import ctypes
import resource
import sys
from functools import cache
from pathlib import Path

import pyarrow as pa
import torch


def start(device: torch.device) -> None:
    """Forgets earlier peaks, where the system can."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return
    with contextlib.suppress(OSError):  # Linux alone has it, and a container may refuse
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")


def peak_bytes(device: torch.device) -> int:
    """The peak since `start`: tensors of a CUDA device, else all of the process in main memory.

    The process is more than the work: the libraries take some 100 MB, and pages of a mapped bank count as
    long as the system keeps them.
    """
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    with contextlib.suppress(OSError, StopIteration):
        lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
        return int(next(line for line in lines if line.startswith("VmHWM")).split()[1]) * 1024
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


@cache
def keep_freed() -> None:
    """Has freed memory kept for the next use, where the C library is glibc; once is enough.

    By its defaults glibc gives the tensors of a training step back to the system and asks for them again in
    the next one. Every page is then zeroed and mapped anew: up to a tenth of a step (docs/log.md).
    """
    with contextlib.suppress(OSError, AttributeError):
        mallopt = ctypes.CDLL(None).mallopt
        for setting, value in _KEPT.items():
            mallopt(setting, value)


_KEPT = {-3: 2**30, -1: 2**31 - 1, -2: 2**26}
"""M_MMAP_THRESHOLD, M_TRIM_THRESHOLD and M_TOP_PAD of glibc's malloc.h, in bytes."""


def give_back() -> None:
    """Gives freed memory back to the system, where the C library is glibc.

    Tensors of a forward are freed between others that stay, and the heap keeps their pages: over the blocks
    of an extraction they add up (docs/log.md).
    """
    pa.default_memory_pool().release_unused()
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)
