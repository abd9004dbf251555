"""Writing to a disk that may be full: one kind of error for it, whatever writes."""

import os
import re
from collections.abc import Mapping
from pathlib import Path

import safetensors.torch
from safetensors import SafetensorError
from torch import Tensor


def write_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> None:
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
