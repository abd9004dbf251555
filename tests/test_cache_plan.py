import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cache.errors import CacheError
from cache.plan import deal, grow

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


PAIRS = st.lists(st.tuples(st.integers(0, 12), st.integers(0, 8)), max_size=60).map(
    lambda pairs: np.array([(a + b, b) for a, b in pairs], dtype=np.int32).reshape(-1, 2).T
)


@given(lengths=PAIRS, seed=SEEDS)
def test_all_tokens_and_words_are_dealt_alike(lengths, seed):
    plans = [deal(lengths, block_tokens=30, seed=seed, kept=kept) for kept in (0, 1)]
    words = plans[1]
    most = [words.length[words.examples(block)].sum() for block in range(words.n_blocks)]

    assert np.array_equal(plans[0].row, words.row)
    assert np.array_equal(plans[0].first, words.first)
    assert np.array_equal(plans[0].start, deal(lengths[0], block_tokens=30, seed=seed).start)
    assert np.array_equal(words.length, lengths[1, words.row])
    assert words.block_tokens == max([1, *most]), "the room is what the fullest block needs"
    for block in range(words.n_blocks):
        assert words.start[words.examples(block)][0] == block * words.block_tokens


@given(lengths=PAIRS, more=PAIRS, again=PAIRS, seed=SEEDS)
def test_all_tokens_and_words_grow_alike(lengths, more, again, seed):
    plans = [deal(lengths, block_tokens=30, seed=seed, kept=kept) for kept in (0, 1)]
    for new in (more, again):
        rows = np.arange(lengths.shape[1], lengths.shape[1] + new.shape[1])
        lengths = np.concatenate([lengths, new], axis=1)
        if any(new[kept].max(initial=0) > plans[kept].block_tokens for kept in (0, 1)):
            return
        how = {"block_tokens": 30, "seed": seed}
        plans = [grow(plan, rows, lengths, kept=kept, **how) for kept, plan in enumerate(plans)]

    assert np.array_equal(plans[0].row, plans[1].row)
    assert np.array_equal(plans[0].first, plans[1].first)
    for plan in plans:
        for block in range(plan.n_blocks):
            assert plan.length[plan.examples(block)].sum() <= plan.block_tokens


def test_a_block_of_words_has_no_more_room_than_the_fullest_needs():
    random = np.random.default_rng(0)
    full = random.integers(20, 60, 3000)
    whole, words = (
        deal(np.stack([full, full // 3]), block_tokens=4096, seed=0, kept=kept) for kept in (0, 1)
    )

    assert whole.n_blocks == words.n_blocks > 20
    assert words.block_tokens < 0.34 * whole.block_tokens


def test_new_rows_that_would_overfill_a_block_of_words_begin_another_one_in_both():
    lengths = np.array([[10, 10, 10, 10], [2, 2, 2, 2]])
    new = np.array([[10] * 6, [4] * 6])  # as long as before, but of more words
    both = np.concatenate([lengths, new], axis=1)
    how = {"block_tokens": 20, "seed": 0}
    grown = [
        grow(deal(lengths, kept=kept, **how), np.arange(4, 10), both, kept=kept, **how) for kept in (0, 1)
    ]

    assert [plan.first.tolist() for plan in grown] == [[0, 2, 4, 5, 6, 7, 8, 9, 10]] * 2
    assert [plan.block_tokens for plan in grown] == [20, 4]
