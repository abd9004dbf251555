"""States as numpy arrays and as tensors, without a copy between the two; and as numbers to compute with."""

from collections.abc import Sequence

import ml_dtypes
import numpy as np
import torch
from jaxtyping import Float, Shaped
from numpy import ndarray
from torch import Tensor

from cache import Split

TORCH_DTYPES = {
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
    "float32": torch.float32,
    "int8": torch.int8,
}
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


def channel_range(
    split: Split, layers: Sequence[int], device: torch.device
) -> tuple[Tensor | None, Tensor | None]:
    """Scale and shift of some layers of a split as `to_float` takes them; None where it has none."""
    if split.scale is None or split.shift is None:
        return None, None
    rows = split.layer_indices(layers)
    scale, shift = (torch.from_numpy(part[rows][:, None]).to(device) for part in (split.scale, split.shift))
    return scale, shift


def to_float(
    states: Shaped[Tensor, "layer token width"],
    scale: Float[Tensor, "layer 1 width"] | None,
    shift: Float[Tensor, "layer 1 width"] | None,
    dtype: torch.dtype,
) -> Float[Tensor, "layer token width"]:
    """States as a bank of any data type stores them -> numbers to compute with.

    Args:
        states: of some layers.
        scale: of these layers, for an int8 bank.
        shift: likewise.
        dtype: of the result.
    """
    if scale is None or shift is None:
        return states.to(dtype)
    floats = states.to(torch.float32)
    # Into the memory of the conversion: one pass more than float16 takes, over half the bytes read.
    return torch.addcmul(shift, floats, scale, out=floats).to(dtype)
