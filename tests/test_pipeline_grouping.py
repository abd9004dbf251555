"""Batches by length, against every way to cut the sorted lengths."""

from itertools import combinations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.grouping import group


@settings(max_examples=80)
@given(lengths=st.lists(st.integers(0, 30), max_size=40), budget=st.integers(1, 2000))
def test_every_example_stands_in_one_batch_within_the_budget(lengths, budget):
    lengths = np.array(lengths, dtype=np.int64)
    groups = group(lengths, budget)
    found = np.concatenate([*groups, np.empty(0, np.int64)])
    assert sorted(found) == np.flatnonzero(lengths).tolist()
    assert (np.diff(lengths[found]) >= 0).all()
    for one in groups:
        assert len(one) == 1 or lengths[one].max() * len(one) <= budget


def cost(groups, lengths, a_forward):
    return sum(len(one) * int(lengths[one].max()) + a_forward for one in groups)


def cut(sizes, counts, ends, budget):
    """The batches that some cuts between distinct lengths make, as lengths."""
    for first, last in zip((0, *ends), (*ends, len(sizes)), strict=True):
        n, size = int(counts[first:last].sum()), int(sizes[last - 1])
        step = max(1, budget // size)
        yield from (min(step, n - i) * size for i in range(0, n, step))


@settings(max_examples=60)
@given(lengths=st.lists(st.integers(1, 9), min_size=1, max_size=30), budget=st.integers(9, 900))
def test_no_other_cuts_cost_less(lengths, budget):
    lengths = np.array(lengths)
    sizes, counts = np.unique(lengths, return_counts=True)
    a_forward = max(1, budget // 64)
    best = min(
        sum(padded + a_forward for padded in cut(sizes, counts, ends, budget))
        for n in range(len(sizes))
        for ends in combinations(range(1, len(sizes)), n)
    )
    # Inside one run of lengths the shorter examples come first and may be padded less than counted.
    assert cost(group(lengths, budget), lengths, a_forward) <= best


def test_lengths_of_one_kind_are_not_padded():
    lengths = np.array([5, 9, 5, 9, 5] * 20)
    assert sorted(len(set(lengths[one])) for one in group(lengths, 256)) == [1] * 4
