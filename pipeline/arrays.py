"""States as numpy arrays and as tensors, without a copy between the two; and as numbers to compute with."""

from collections.abc import Sequence
from dataclasses import dataclass

import ml_dtypes
import numpy as np
import torch
from jaxtyping import Bool, Float, Shaped
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


@dataclass(frozen=True)
class ChannelRange:
    """Scale and shift of some layers of an int8 bank, see `cache.calibration`."""

    scale: Float[Tensor, "group layer 1 width"]
    shift: Float[Tensor, "group layer 1 width"]


def channel_range(
    split: Split, layers: Sequence[int], device: torch.device, *, group: int | None = None
) -> ChannelRange | None:
    """Scale and shift of some layers of a split; None where it has none.

    Args:
        split: of a bank.
        layers: their numbers.
        device: where they are wanted.
        group: of the tokens, where all of them are of one.
    """
    if split.scale is None or split.shift is None:
        return None
    indices = split.layer_indices(layers)
    groups = slice(None) if group is None else slice(group, group + 1)
    parts = (part[groups, indices, None] for part in (split.scale, split.shift))
    return ChannelRange(*(torch.from_numpy(part).to(device) for part in parts))


def to_float(
    states: Shaped[Tensor, "layer token width"],
    channels: ChannelRange | None,
    first: Bool[ndarray, " token"] | None,
    dtype: torch.dtype,
) -> Float[Tensor, "layer token width"]:
    """States as a bank of any data type stores them -> numbers to compute with.

    Args:
        states: of some layers.
        channels: of these layers, for an int8 bank.
        first: which of the tokens are first ones; None where `channels` are of the one group of them all.
        dtype: of the result.
    """
    if channels is None:
        return states.to(dtype)
    floats = states.to(torch.float32)
    # Into the memory of the conversion: one pass more than float16 takes, over half the bytes read.
    torch.addcmul(channels.shift[0], floats, channels.scale[0], out=floats)
    if first is not None:  # they are few, and done again
        places = torch.from_numpy(np.flatnonzero(first)).to(states.device)
        own = states.index_select(1, places).to(torch.float32)
        floats.index_copy_(1, places, torch.addcmul(channels.shift[1], own, channels.scale[1]))
    return floats.to(dtype)
