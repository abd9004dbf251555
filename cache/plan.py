"""Deals examples to blocks: a pure function of their lengths, a seed, and how often the split has grown.

Banks of all tokens and of words are dealt alike, so that a head sees their examples in one order.
"""

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
    length: Int[ndarray, " example"]  # its number of tokens that are kept
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


def deal(lengths: Int[ndarray, "*keep row"], *, block_tokens: int, seed: int, kept: int = 0) -> Plan:
    """Deals the examples to blocks in a seeded random order, each whole inside one block.

    Blocks are filled one after the other (next fit), so reading blocks in sequence is a random sample
    of the rows.

    Args:
        lengths: tokens of each row, in row order; 0 is allowed. Where banks of several choices of tokens
            are dealt alike (`cache.layout.ALIKE`), those of each choice; blocks are filled by the first.
        block_tokens: largest room of a block, in tokens of the first choice. A split is dealt to the
            fewest blocks of that room, which then get about an equal share, so that the last one is not
            left almost empty.
        seed: of the order.
        kept: which of the choices the bank is of. The room of its blocks is, for the first, what they were
            filled up to; for any other, the most tokens that a block came to.

    Raises:
        CacheError: a row is longer than a block.
    """
    longest = int(np.atleast_2d(lengths)[0].max(initial=0))
    if longest > block_tokens:
        raise CacheError(
            f"a row of {longest} tokens does not fit a block of {block_tokens}: lower --max-length"
        )
    row = np.random.default_rng(seed).permutation(lengths.shape[-1])
    return lay(row, lengths, sizes=(len(row),), block_tokens=block_tokens, kept=kept)


def grow(
    plan: Plan,
    rows: Int[ndarray, " new"],
    lengths: Int[ndarray, "*keep row"],
    *,
    block_tokens: int,
    seed: int,
    kept: int = 0,
) -> Plan:
    """Deals further rows to blocks of their own, behind those that are there.

    Args:
        plan: of the rows that are there.
        rows: the others, ascending.
        lengths: of all rows, as in `deal`.
        block_tokens: as in the first deal.
        seed: of the order, together with how often the split has grown.
        kept: as in the first deal.

    Raises:
        CacheError: a row is longer than the split's blocks.
    """
    longest = int(np.atleast_2d(lengths)[kept, rows].max(initial=0))
    if longest > plan.block_tokens:
        raise CacheError(
            f"a new row of {longest} tokens does not fit the bank's blocks of {plan.block_tokens}: extract "
            "into another --store"
        )
    generation = len(plan.sizes)
    row = rows[np.random.default_rng([seed, generation]).permutation(len(rows))]
    sizes = (*plan.sizes, len(rows))
    return lay(np.concatenate([plan.row, row]), lengths, sizes=sizes, block_tokens=block_tokens, kept=kept)


def lay(
    row: Int[ndarray, " example"],
    lengths: Int[ndarray, "*keep row"],
    *,
    sizes: tuple[int, ...],
    block_tokens: int,
    kept: int = 0,
) -> Plan:
    """Lays examples into blocks in the order given, each generation from a new block on.

    The first generation decides the rooms of a block, for every choice of tokens. Later ones keep to all of
    them, so that they too are dealt alike.

    Args:
        row: the row of each example.
        lengths: of all rows, as in `deal`.
        sizes: examples of each generation.
        block_tokens: as in `deal`.
        kept: as in `deal`.
    """
    length = np.atleast_2d(lengths)[:, row].astype(np.int64)
    rooms = _rooms(length[:, : sizes[0]], block_tokens)
    room = int(rooms[kept])
    starts, firsts, begin, block = [], [np.zeros(1, np.int64)], 0, 0
    for size in sizes:
        here = length[:, begin : begin + size]
        first = _fill(_before(here), rooms)
        starts.append(_starts(here[kept], first, room) + block * room)
        firsts.append(first[1:] + begin)
        begin, block = begin + size, block + len(first) - 1
    return Plan(
        row=row,
        start=np.concatenate([*starts, np.empty(0, np.int64)]),
        length=length[kept],
        first=np.concatenate(firsts),
        block_tokens=room,
        sizes=sizes,
    )


def _rooms(length: Int[ndarray, "keep example"], block_tokens: int) -> Int[ndarray, " keep"]:
    """Room of every block, for each choice of tokens, as the examples of a first deal decide it."""
    before = _before(length)
    room = np.array([_room(int(before[0, -1]), int(length[0].max(initial=0)), block_tokens)])
    first = _fill(before[:1], room)
    most = np.diff(before[1:, first], axis=1).max(axis=1, initial=1)
    return np.concatenate([room, most])


def _before(length: Int[ndarray, "keep example"]) -> Int[ndarray, "keep example_end"]:
    """The tokens before each example, and those of all."""
    before = np.zeros((len(length), length.shape[1] + 1), np.int64)
    np.cumsum(length, axis=1, out=before[:, 1:])
    return before


def _fill(
    before: Int[ndarray, "keep example_end"], rooms: Int[ndarray, " keep"]
) -> Int[ndarray, " boundary"]:
    """The first example of each block, and the end: a block takes examples until the next has no room.

    An example that has more tokens than a block has room for gets a block of its own: it can only be of a
    choice of tokens that the bank is not of.
    """
    first, end = [0], before.shape[1] - 1
    while first[-1] < end:
        here = first[-1]
        fitting = [
            int(np.searchsorted(tokens[1:], tokens[here] + room, side="right"))
            for tokens, room in zip(before, rooms, strict=True)
        ]
        first.append(max(here + 1, min(fitting)))
    return np.array(first, dtype=np.int64)


def _room(total: int, longest: int, block_tokens: int) -> int:
    """Room of every block of a split: an equal share, and one example more where there are several."""
    n_blocks = -(-total // block_tokens)
    if n_blocks < 2:
        return max(1, total)
    return min(block_tokens, -(-total // n_blocks) + longest)


def _starts(
    length: Int[ndarray, " example"], first: Int[ndarray, " boundary"], room: int
) -> Int[ndarray, " example"]:
    """First token of each example, every block beginning at a multiple of its room."""
    before, counts = _before(length[None])[0], np.diff(first)
    shift = np.arange(len(counts)) * room - before[first[:-1]]
    return before[:-1] + np.repeat(shift, counts)
