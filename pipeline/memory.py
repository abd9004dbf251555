"""The most memory that a stretch of work took."""

import contextlib
import resource
import sys
from pathlib import Path

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
