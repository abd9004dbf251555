"""Examples -> forward batches: like lengths together, so that little is padded and few forwards are run."""

import numpy as np
from jaxtyping import Int
from numpy import ndarray

_FORWARDS_A_BUDGET = 64
"""A forward is worth this share of the budget in padded tokens: reading the weights and starting the
kernels costs about 16 tokens of a batch of 1,024 on a CPU (docs/log.md)."""


def group(lengths: Int[ndarray, " example"], budget_tokens: int) -> list[Int[ndarray, " one"]]:
    """Groups examples so that padded tokens and forwards together cost least.

    Examples are taken by length; a dynamic program over the distinct lengths chooses where to cut. A
    function of its arguments alone: the same rows are always grouped alike.

    Args:
        lengths: tokens of each example.
        budget_tokens: padded tokens in one forward; more only where a single example has more.

    Returns:
        Positions in `lengths`, shortest first; empty examples stand in none.
    """
    order = np.argsort(lengths, kind="stable")
    order = order[lengths[order] > 0]
    sizes, counts = np.unique(lengths[order], return_counts=True)
    ends = np.concatenate([[0], np.cumsum(counts)])
    groups = []
    for first, last in _cuts(sizes, ends, budget_tokens):
        step = max(1, budget_tokens // int(sizes[last]))
        here = order[ends[first] : ends[last + 1]]
        groups += [here[i : i + step] for i in range(0, len(here), step)]
    return groups


def _cuts(
    sizes: Int[ndarray, " size"], ends: Int[ndarray, " boundary"], budget_tokens: int
) -> list[tuple[int, int]]:
    """Runs of distinct lengths, first and last included, that are padded to the last one's length."""
    a_forward = max(1, budget_tokens // _FORWARDS_A_BUDGET)
    best, back = np.zeros(len(sizes) + 1), np.zeros(len(sizes) + 1, dtype=np.int64)
    for last, size in enumerate(sizes.astype(np.int64)):
        examples = ends[last + 1] - ends[: last + 1]
        forwards = -(-examples // max(1, budget_tokens // int(size)))
        costs = best[: last + 1] + examples * size + a_forward * forwards
        back[last + 1] = int(np.argmin(costs))
        best[last + 1] = costs[back[last + 1]]
    runs, end = [], len(sizes)
    while end:
        runs.append((int(back[end]), end - 1))
        end = int(back[end])
    return runs[::-1]
