"""Rungs of a stack that is trained in pieces: its heads are ranked as one, whatever piece they are in."""

from collections.abc import Callable, Mapping, Sequence

from pipeline.fitting import worse_half
from pipeline.grid import Shape, Stack
from pipeline.job import Schedule

Standings = Callable[[Stack, Mapping[int, int], int], Mapping[int, float]]
"""Trains a piece up to an epoch without the heads that left before, and tells how the rest stand."""


def lots_of(stacks: Sequence[Stack], schedule: Schedule) -> list[list[Stack]]:
    """What one machine has to train: a stack, or with rungs all pieces of one, which are ranked together.

    Args:
        stacks: pieces that `Runner.fitting` gave.
        schedule: of all.
    """
    distinct = list(dict.fromkeys(stacks))
    if not schedule.rungs:
        return [[stack] for stack in distinct]
    lots: dict[Shape, list[Stack]] = {}
    for stack in distinct:
        lots.setdefault(stack.shape, []).append(stack)
    return list(lots.values())


def climb(pieces: Sequence[Stack], rungs: Sequence[int], standings: Standings) -> list[dict[int, int]]:
    """Takes the pieces of one stack up to each rung, one after the other, where the worse half leaves.

    Returns:
        For each piece the heads that have left, with the epoch of their rung.
    """
    left: list[dict[int, int]] = [{} for _ in pieces]
    for epoch in rungs:
        stand = [standings(piece, gone, epoch) for piece, gone in zip(pieces, left, strict=True)]
        for gone, heads in zip(left, worse_half(stand), strict=True):
            gone |= dict.fromkeys(heads, epoch)
    return left
