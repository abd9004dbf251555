import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cache.errors import CacheError
from cache.plan import deal

LENGTHS = st.lists(st.integers(0, 20), max_size=60).map(lambda lengths: np.array(lengths, dtype=np.int32))
SEEDS = st.integers(0, 2**32 - 1)


@given(lengths=LENGTHS, seed=SEEDS)
def test_every_row_is_dealt_once_with_its_own_length(lengths, seed):
    plan = deal(lengths, block_tokens=20, seed=seed)

    assert sorted(plan.row) == list(range(len(lengths)))
    assert np.array_equal(plan.length, lengths[plan.row])


@given(lengths=LENGTHS, seed=SEEDS, room=st.integers(20, 50))
def test_every_example_lies_whole_inside_one_block(lengths, seed, room):
    plan = deal(lengths, block_tokens=room, seed=seed)

    assert plan.block_tokens <= room
    for block in range(plan.n_blocks):
        here = plan.examples(block)
        assert here.stop > here.start, "a block without examples"
        assert (plan.start[here] >= block * plan.block_tokens).all()
        assert (plan.start[here] + plan.length[here] <= (block + 1) * plan.block_tokens).all()


@given(lengths=LENGTHS, seed=SEEDS)
def test_blocks_hold_consecutive_examples_and_all_of_them(lengths, seed):
    plan = deal(lengths, block_tokens=20, seed=seed)

    dealt = [i for block in range(plan.n_blocks) for i in range(len(lengths))[plan.examples(block)]]
    assert dealt == list(range(len(lengths)))


@given(lengths=LENGTHS, seed=SEEDS)
def test_tokens_follow_one_another_without_overlap(lengths, seed):
    plan = deal(lengths, block_tokens=20, seed=seed)

    ends = plan.start + plan.length
    assert (plan.start[1:] >= ends[:-1]).all()
    for block in range(plan.n_blocks):
        here = plan.examples(block)
        assert plan.start[here][0] == block * plan.block_tokens, "a block begins with a gap"
        assert (plan.start[here][1:] == ends[here][:-1]).all(), "a gap inside a block"


@given(lengths=LENGTHS, seed=SEEDS)
def test_what_a_block_leaves_unused_is_less_than_the_next_example(lengths, seed):
    plan = deal(lengths, block_tokens=20, seed=seed)

    for block in range(plan.n_blocks - 1):
        unused = plan.block_tokens - plan.length[plan.examples(block)].sum()
        assert unused < plan.length[plan.examples(block + 1)][0]


@given(lengths=LENGTHS, seed=SEEDS)
def test_the_plan_is_a_pure_function_of_lengths_and_seed(lengths, seed):
    before = lengths.copy()
    one = deal(lengths, block_tokens=20, seed=seed)
    other = deal(lengths.astype(np.int64), block_tokens=20, seed=seed)

    assert np.array_equal(lengths, before), "the lengths were changed"
    for name in ("row", "start", "length", "first"):
        assert np.array_equal(getattr(one, name), getattr(other, name)), name


def test_the_order_is_random_and_depends_on_the_seed():
    orders = [deal(np.full(200, 3), block_tokens=30, seed=seed).row.tolist() for seed in range(5)]

    assert len({tuple(order) for order in orders}) == 5
    assert list(range(200)) not in orders


def test_the_deal_stays_the_one_that_banks_on_disk_were_made_with():
    plan = deal(np.arange(1, 13), block_tokens=20, seed=7)

    assert plan.row.tolist() == [4, 6, 10, 0, 1, 3, 8, 7, 2, 5, 9, 11]
    assert plan.start.tolist() == [0, 5, 20, 31, 32, 34, 40, 49, 57, 60, 66, 80]


def test_an_empty_split_has_no_blocks():
    plan = deal(np.array([], dtype=np.int32), block_tokens=16, seed=0)

    assert plan.n_blocks == 0
    assert len(plan.row) == len(plan.start) == 0


def test_rows_without_tokens_are_kept():
    plan = deal(np.zeros(5, dtype=np.int32), block_tokens=16, seed=0)

    assert plan.n_blocks == 1
    assert plan.block_tokens == 1
    assert sorted(plan.row) == [0, 1, 2, 3, 4]


def test_a_split_smaller_than_a_block_gets_a_block_of_its_own_size():
    plan = deal(np.array([3, 4]), block_tokens=4096, seed=0)

    assert (plan.n_blocks, plan.block_tokens) == (1, 7)


def test_a_row_longer_than_a_block_is_refused():
    with pytest.raises(CacheError, match="17 tokens does not fit a block of 16: lower --max-length"):
        deal(np.array([3, 17]), block_tokens=16, seed=0)


def test_lengths_may_sum_to_more_than_an_int32_holds():
    plan = deal(np.full(1000, 2**22, dtype=np.int32), block_tokens=2**22, seed=0)

    assert plan.start[-1] == 999 * 2**22
