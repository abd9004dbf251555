"""How many bytes a bank will take, from its plan, before it is made."""

from collections.abc import Mapping

import numpy as np

from cache.layout import TOKEN_ARRAYS, Recipe, example_arrays
from cache.plan import Plan
from cache.store import CRC_BYTES

STATE_BYTES = {"float32": 4, "float16": 2, "bfloat16": 2, "int8": 1}

_SCALES_BYTES = 16
"""An int8 bank keeps two scales and two shifts, all float32, for each layer and channel of a split."""

_METADATA_BYTES = 700
"""Of an array or a group, about."""


def bank_bytes(recipe: Recipe, plans: Mapping[str, Plan]) -> int:
    """Bytes of an uncompressed bank without its targets. Compressed, it is the most that it can take.

    Args:
        recipe: what it is made with.
        plans: where the examples of each split lie.
    """
    return sum(_split_bytes(recipe, plan) for plan in plans.values()) + 2 * _METADATA_BYTES


def _split_bytes(recipe: Recipe, plan: Plan) -> int:
    layers, width, room = len(recipe.layers), recipe.encoder.width, plan.block_tokens
    chunk = room * width * STATE_BYTES[recipe.dtype] + CRC_BYTES
    small = sum(room * np.dtype(dtype).itemsize + CRC_BYTES for dtype in TOKEN_ARRAYS.values())
    of_example = example_arrays(recipe.keep)
    examples = sum(np.dtype(dtype).itemsize for dtype in of_example.values()) * len(plan.row)
    scales = layers * width * _SCALES_BYTES if recipe.dtype == "int8" else 0
    arrays = 2 + len(TOKEN_ARRAYS) + len(of_example)
    return plan.n_blocks * (layers * chunk + small) + examples + scales + arrays * _METADATA_BYTES
