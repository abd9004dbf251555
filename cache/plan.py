"""Deals examples to blocks: a pure function of their lengths and a seed."""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Int
from numpy import ndarray

from cache.errors import CacheError


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Where every example of a split lies. Entry i speaks of the i-th example dealt."""

    row: Int[ndarray, " example"]  # its row in the source
    start: Int[ndarray, " example"]  # its first token in the split's token axis
    length: Int[ndarray, " example"]  # its number of tokens
    first: Int[ndarray, " boundary"]  # block b holds the examples first[b] : first[b + 1]
    block_tokens: int

    @property
    def n_blocks(self) -> int:
        """Number of blocks."""
        return len(self.first) - 1

    def examples(self, block: int) -> slice:
        """The examples of a block."""
        return slice(int(self.first[block]), int(self.first[block + 1]))


def deal(lengths: Int[ndarray, " example"], *, block_tokens: int, seed: int) -> Plan:
    """Deals the examples to blocks in a seeded random order, each whole inside one block.

    Blocks are filled one after the other (next fit), so reading blocks in sequence is a random sample
    of the rows, and at most one example's length is unused at a block's end.

    Args:
        lengths: tokens of each row, in row order; 0 is allowed.
        block_tokens: largest room of a block. A split is dealt to the fewest blocks of that room, which
            then get about an equal share, so that the last one is not left almost empty.
        seed: of the order.

    Raises:
        CacheError: a row is longer than a block.
    """
    longest, total = int(lengths.max(initial=0)), int(lengths.sum(dtype=np.int64))
    if longest > block_tokens:
        raise CacheError(
            f"a row of {longest} tokens does not fit a block of {block_tokens}: lower --max-length"
        )
    room = _room(total, longest, block_tokens)
    row = np.random.default_rng(seed).permutation(len(lengths))
    length = lengths[row].astype(np.int64)
    ends = np.cumsum(length)
    first = [0]
    while first[-1] < len(row):
        used = ends[first[-1] - 1] if first[-1] else 0
        first.append(int(np.searchsorted(ends, used + room, side="right")))
    firsts = np.array(first, dtype=np.int64)
    start = _starts(ends, length, firsts, room)
    return Plan(row=row, start=start, length=length, first=firsts, block_tokens=room)


def _room(total: int, longest: int, block_tokens: int) -> int:
    """Room of every block of a split: an equal share, and one example more where there are several."""
    n_blocks = -(-total // block_tokens)
    if n_blocks < 2:
        return max(1, total)
    return min(block_tokens, -(-total // n_blocks) + longest)


def _starts(
    ends: Int[ndarray, " example"],
    length: Int[ndarray, " example"],
    first: Int[ndarray, " boundary"],
    room: int,
) -> Int[ndarray, " example"]:
    """First token of each example, every block beginning at a multiple of its room."""
    counts = np.diff(first)
    unpadded = np.concatenate([[0], ends])[first[:-1]]
    shift = np.arange(len(counts)) * room - unpadded
    return ends - length + np.repeat(shift, counts)
