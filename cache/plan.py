"""Deals examples to blocks: a pure function of their lengths, a seed, and how often the split has grown."""

from collections.abc import Sequence
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
    sizes: tuple[int, ...]  # examples of the first deal and of each growth since

    @property
    def n_blocks(self) -> int:
        """Number of blocks."""
        return len(self.first) - 1

    def examples(self, block: int) -> slice:
        """The examples of a block."""
        return slice(int(self.first[block]), int(self.first[block + 1]))

    def source_row(self, example: int) -> int:
        """The row of an example in the source, for messages."""
        return int(self.row[example])

    def part(self, blocks: Sequence[int]) -> "Part":
        """What a process needs that makes some of the blocks and has the rows of these alone."""
        here = [self.examples(block) for block in blocks]
        chosen = np.concatenate([np.arange(run.start, run.stop) for run in here])
        return Part(
            row=np.arange(len(chosen)),
            start=self.start[chosen],
            length=self.length[chosen],
            first=np.cumsum([0, *(run.stop - run.start for run in here)]),
            block_tokens=self.block_tokens,
            sizes=(len(chosen),),
            blocks=tuple(blocks),
            source=self.row[chosen],
        )

    @property
    def generations(self) -> list[dict[str, int]]:
        """Examples and blocks of the first deal and of each growth since."""
        blocks = np.diff(np.searchsorted(self.first, np.cumsum([0, *self.sizes])))
        return [{"examples": n, "blocks": int(b)} for n, b in zip(self.sizes, blocks, strict=True)]


@dataclass(frozen=True, kw_only=True)
class Part(Plan):
    """Some blocks of a plan. Rows are numbered among the rows of these, in the order of the examples."""

    blocks: tuple[int, ...]  # their numbers in the whole, ascending
    source: Int[ndarray, " example"]  # the row of each example in the source

    @property
    def n_blocks(self) -> int:
        """Number of blocks up to the last of these."""
        return self.blocks[-1] + 1

    def examples(self, block: int) -> slice:
        """The examples of a block, among those of these blocks."""
        return super().examples(self.blocks.index(block))

    def source_row(self, example: int) -> int:
        """The row of an example in the source, for messages."""
        return int(self.source[example])


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
    return lay(row, lengths, sizes=(len(row),), room=room)


def grow(plan: Plan, rows: Int[ndarray, " new"], lengths: Int[ndarray, " example"], *, seed: int) -> Plan:
    """Deals further rows to blocks of their own, behind those that are there.

    Args:
        plan: of the rows that are there.
        rows: the others, ascending.
        lengths: tokens of each row, in row order.
        seed: of the order, together with how often the split has grown.

    Raises:
        CacheError: a row is longer than the split's blocks.
    """
    longest = int(lengths[rows].max(initial=0))
    if longest > plan.block_tokens:
        raise CacheError(
            f"a new row of {longest} tokens does not fit the bank's blocks of {plan.block_tokens}: extract "
            "into another --store"
        )
    generation = len(plan.sizes)
    row = rows[np.random.default_rng([seed, generation]).permutation(len(rows))]
    sizes = (*plan.sizes, len(rows))
    return lay(np.concatenate([plan.row, row]), lengths, sizes=sizes, room=plan.block_tokens)


def lay(
    row: Int[ndarray, " example"],
    lengths: Int[ndarray, " row"],
    *,
    sizes: tuple[int, ...],
    room: int,
) -> Plan:
    """Lays examples into blocks in the order given, each generation from a new block on.

    Args:
        row: the row of each example.
        lengths: tokens of each row, in row order.
        sizes: examples of each generation.
        room: tokens of a block, as many as the longest example or more.
    """
    length = lengths[row].astype(np.int64)
    starts, firsts, begin, block = [], [np.zeros(1, np.int64)], 0, 0
    for size in sizes:
        here = length[begin : begin + size]
        ends = np.cumsum(here)
        first = _fill(ends, room)
        starts.append(_starts(ends, here, first, room) + block * room)
        firsts.append(first[1:] + begin)
        begin, block = begin + size, block + len(first) - 1
    return Plan(
        row=row,
        start=np.concatenate([*starts, np.empty(0, np.int64)]),
        length=length,
        first=np.concatenate(firsts),
        block_tokens=room,
        sizes=sizes,
    )


def _fill(ends: Int[ndarray, " example"], room: int) -> Int[ndarray, " boundary"]:
    """The first example of each block, and the end: a block takes examples until the next has no room."""
    first = [0]
    while first[-1] < len(ends):
        used = ends[first[-1] - 1] if first[-1] else 0
        first.append(int(np.searchsorted(ends, used + room, side="right")))
    return np.array(first, dtype=np.int64)


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
