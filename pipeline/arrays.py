"""States as numpy arrays and as tensors, without a copy between the two."""

import ml_dtypes
import numpy as np
import torch
from jaxtyping import Shaped
from numpy import ndarray
from torch import Tensor

TORCH_DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}
"""The data types a bank may have."""


def to_numpy(states: Shaped[Tensor, "layer token width"]) -> Shaped[ndarray, "layer token width"]:
    """A host tensor as numpy, without a copy; numpy itself has no bfloat16, `ml_dtypes` brings it."""
    if states.dtype == torch.bfloat16:
        return states.view(torch.int16).numpy().view(ml_dtypes.bfloat16)
    return states.numpy()


def to_torch(states: Shaped[ndarray, "*axes"]) -> Shaped[Tensor, "*axes"]:
    """A numpy array of states as a tensor that shares its memory."""
    if states.dtype == ml_dtypes.bfloat16:
        return torch.from_numpy(states.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(states)
