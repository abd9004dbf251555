"""Which device computes, and with how many threads."""

import os
from typing import Literal

import torch

from pipeline.errors import PipelineError


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
    count = threads or _asked_threads() or usable_cores()
    torch.set_num_threads(count)
    return count


def _asked_threads() -> int | None:
    """OpenMP's number of threads; of the levels it may be asked for, ``8,2``, the first."""
    first = os.environ.get("OMP_NUM_THREADS", "").partition(",")[0].strip()
    return int(first) or None if first.isdecimal() else None


def usable_cores() -> int:
    """Cores that this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1  # macOS binds no process to cores
