"""Rows that come to a bank that is there."""

import random
from collections import Counter

import numpy as np
import pytest
import zarr
from banks import block_of, files_of, make, recipe, rows, states_of, zeros
from faults import FAULT, Killed
from hypothesis import given
from hypothesis import strategies as st

from cache import BankIncomplete, CacheError, Rows, Target, Writer, open_bank
from cache.growth import match
from cache.plan import deal, grow
from cache.verify import verify

LENGTHS = st.lists(st.integers(0, 20), max_size=40).map(lambda lengths: np.array(lengths, dtype=np.int32))


@given(one=LENGTHS, more=LENGTHS, seed=st.integers(0, 99))
def test_further_rows_lie_in_blocks_of_their_own_and_the_others_stay(one, more, seed):
    before = deal(one, block_tokens=20, seed=seed)
    if more.max(initial=0) > before.block_tokens:
        with pytest.raises(CacheError, match="does not fit the bank's blocks"):
            grow(
                before,
                np.arange(len(one), len(one) + len(more)),
                np.concatenate([one, more]),
                block_tokens=20,
                seed=seed,
            )
        return
    lengths = np.concatenate([one, more])
    plan = grow(before, np.arange(len(one), len(lengths)), lengths, block_tokens=20, seed=seed)
    n = len(one)
    for name in ("row", "start", "length"):
        assert np.array_equal(getattr(plan, name)[:n], getattr(before, name)), name
    assert np.array_equal(plan.first[: len(before.first)], before.first)
    assert sorted(plan.row) == list(range(len(lengths)))
    assert np.array_equal(plan.length, lengths[plan.row])
    room, dealt = plan.block_tokens, []
    for block in range(plan.n_blocks):
        here = plan.examples(block)
        dealt += range(here.start, here.stop)
        assert (plan.start[here] >= block * room).all()
        assert (plan.start[here] + plan.length[here] <= (block + 1) * room).all()
        assert (here.stop <= n) == (block < before.n_blocks)
    assert dealt == list(range(len(lengths)))
    assert [part["examples"] for part in plan.generations] == [n, len(more)]
    assert [part["blocks"] for part in plan.generations] == [
        before.n_blocks,
        plan.n_blocks - before.n_blocks,
    ]


def test_each_growth_is_dealt_in_an_order_of_its_own():
    plan = deal(np.full(50, 2), block_tokens=20, seed=3)
    for generation in (1, 2):
        lengths = np.full(50 * (generation + 1), 2)
        plan = grow(plan, np.arange(50 * generation, len(lengths)), lengths, block_tokens=20, seed=3)
    orders = {tuple(plan.row[50 * k : 50 * (k + 1)] - 50 * k) for k in range(3)}
    assert len(orders) == 3


TEXTS = st.lists(st.integers(0, 5), max_size=25)


@given(dealt=TEXTS, offered=TEXTS, before=st.lists(st.integers(-1, 30), max_size=25), data=st.data())
def test_texts_are_matched_as_often_as_they_are_there(dealt, offered, before, data):
    row = None
    if data.draw(st.booleans()):
        row = np.array((before + [0] * len(dealt))[: len(dealt)], dtype=np.int64)
    texts, hashes = np.array(dealt, dtype=np.uint64), np.array(offered, dtype=np.uint64)
    found = match(texts, row, hashes)
    taken = found[found >= 0]
    assert len(set(taken.tolist())) == len(taken), "a row was given twice"
    assert (hashes[taken] == texts[found >= 0]).all()
    common = Counter(dealt) & Counter(offered)
    assert Counter(texts[found >= 0].tolist()) == common
    if row is not None and len(set(before[: len(dealt)])) == len(dealt):
        fits = (row >= 0) & (row < len(hashes))
        fits[fits] = hashes[row[fits]] == texts[fits]
        assert (found[fits] == row[fits]).all(), "a row that still fits was given up"


LENGTH = {f"old {i}": length for i, length in enumerate([5, 9, 3, 16, 0, 7, 12])}
LENGTH |= {f"new {i}": length for i, length in enumerate([4, 16, 2, 8, 0, 11])}
LENGTH |= {f"later {i}": length for i, length in enumerate([6, 6])}
OLD, NEW, LATER = ([text for text in LENGTH if text.startswith(part)] for part in ("old", "new", "later"))


def rows_of(texts):
    """Rows of texts; what is in the bank of a text is a function of the text."""
    length = np.array([LENGTH[text] for text in texts], dtype=np.int32)
    named = {text: rows([1], text).text_hash[0] for text in texts}
    hashes = np.array([named[text] for text in texts], dtype=np.uint64)
    return Rows(lengths=length[None], n_words=(length * 2 // 3).astype(np.int32), text_hash=hashes)


def labels(texts, names=("a", "b", "c")):
    """Labels of texts in row order: a class, and a tag a word."""
    found = rows_of(texts)
    number = np.array([list(LENGTH).index(text) for text in texts])
    tags = [100 * k + np.arange(n) for k, n in zip(number, found.n_words, strict=True)]
    return [
        Target(name="y", kind="class", names=names, values=(number % 3).astype(np.int32)),
        Target(name="t", kind="tags", names=(), values=np.concatenate(tags).astype(np.int32)),
    ]


def extract(path, splits, written=("y", "t"), stop=None, **changes):
    """An extraction, which tells the blocks it encoded; ended before the block `stop`."""
    encoded = []
    with Writer(
        str(path), recipe(**changes), {name: rows_of(texts) for name, texts in splits.items()}
    ) as w:
        for split, texts in splits.items():
            for block in w.missing(split):
                if len(encoded) == stop:
                    return encoded
                w.write_block(split, block, *block_of_texts(w, split, block, texts))
                encoded.append((split, block))
            for target in labels(texts):
                if target.name in written:
                    w.write_target(split, target)
        w.lengthen_targets(written)
        w.finish()
    return encoded


def block_of_texts(writer, split, block, texts):
    plan, states = writer.plans[split], zeros(writer, split)
    _, tokens = block_of(writer, split, block)
    here, room = plan.examples(block), plan.block_tokens
    for row, start, length in zip(plan.row[here], plan.start[here], plan.length[here], strict=True):
        inside = slice(start - block * room, start - block * room + length)
        number = list(LENGTH).index(texts[row])
        states[:, inside] = states_of(writer.recipe, "text", number, length)
        tokens["input_ids"][inside] = number
    return states, tokens


def check(path, splits, written=("y", "t")):
    """That a bank is whole and holds these texts, each with its own states and labels."""
    bank = open_bank(str(path))
    assert verify(bank).bad == []
    assert sorted(bank.splits) == sorted(splits)
    for name, texts in splits.items():
        split = bank.split(name)
        assert sorted(split.row) == list(range(len(texts)))
        by_row = {target.name: target.values for target in labels(texts)}
        ends = np.concatenate([[0], np.cumsum(split.n_words)])
        first_tag = np.concatenate([[0], np.cumsum(rows_of(texts).n_words)])
        for i, row in enumerate(split.row):
            number, length = list(LENGTH).index(texts[row]), int(split.length[i])
            states, _ = split.gather([i])
            assert np.array_equal(states, states_of(bank.recipe, "text", number, length))
            assert (split.input_ids[split.start[i] : split.start[i] + length] == number).all()
            if "y" in written:
                assert split.target("y").values[i] == by_row["y"][row]
            if "t" in written:
                words = split.target("t").values[ends[i] : ends[i + 1]]
                assert words.tolist() == by_row["t"][first_tag[row] : first_tag[row + 1]].tolist()
    return bank


@pytest.mark.parametrize("codec", ["none", "zstd"])
def test_only_rows_that_came_are_encoded(tmp_path, codec):
    extract(tmp_path / "b", {"train": OLD}, codec=codec)
    old = open_bank(str(tmp_path / "b"))
    n = old.split("train").n_blocks
    before = {name: data for name, data in files_of(tmp_path / "b").items() if "/states/c/" in name}
    mixed = [*NEW, *OLD]
    random.Random(1).shuffle(mixed)
    encoded = extract(tmp_path / "b", {"train": mixed, "dev": LATER}, codec=codec)
    assert encoded[0] == ("train", n), "an old block was encoded again"
    assert ("dev", 0) in encoded
    bank = check(tmp_path / "b", {"train": mixed, "dev": LATER})
    assert before.items() <= files_of(tmp_path / "b").items()
    assert bank.fingerprint != old.fingerprint
    assert bank.attrs.keys() == old.attrs.keys()
    assert extract(tmp_path / "b", {"train": mixed, "dev": LATER}, codec=codec) == []


def test_a_bank_may_grow_again_and_knows_how_it_grew(tmp_path):
    for texts in (OLD, [*OLD, *NEW], [*LATER, *OLD, *NEW]):
        extract(tmp_path / "b", {"train": texts})
    split = check(tmp_path / "b", {"train": [*LATER, *OLD, *NEW]}).split("train")
    assert [part["examples"] for part in split.generations] == [len(OLD), len(NEW), len(LATER)]
    assert sum(part["blocks"] for part in split.generations) == split.n_blocks
    assert not {".growth-0", ".growth-1"} & {p.name for p in (tmp_path / "b").iterdir()}


def test_rows_in_another_order_are_not_encoded_again(tmp_path):
    extract(tmp_path / "b", {"train": OLD})
    other = OLD[::-1]
    assert extract(tmp_path / "b", {"train": other}) == []
    check(tmp_path / "b", {"train": other})
    fresh = make(tmp_path / "c")
    assert "generations" not in fresh.split("train").group.attrs


def test_a_text_that_is_there_twice_is_kept_twice(tmp_path):
    extract(tmp_path / "b", {"train": [*OLD, OLD[0]]})
    twice = [OLD[0], *OLD, OLD[0], OLD[2]]
    assert len(extract(tmp_path / "b", {"train": twice})) == 1
    check(tmp_path / "b", {"train": twice})
    with pytest.raises(CacheError, match="1 of 10 of split train are not in the data"):
        extract(tmp_path / "b", {"train": [*OLD, OLD[0], OLD[0]]})


def test_a_target_that_the_data_lacks_has_no_label_on_the_rows_that_came(tmp_path):
    extract(tmp_path / "b", {"train": OLD})
    extract(tmp_path / "b", {"train": [*NEW, *OLD]}, written=("y",))
    split = check(tmp_path / "b", {"train": [*NEW, *OLD]}, written=("y",)).split("train")
    tags, ends = split.target("t").values, np.concatenate([[0], np.cumsum(split.n_words)])
    for i, row in enumerate(split.row):
        found = tags[ends[i] : ends[i + 1]]
        assert (found == -1).all() if row < len(NEW) else (found >= 0).all()


def test_a_row_that_no_block_has_room_for_is_refused_and_changes_nothing(tmp_path):
    extract(tmp_path / "b", {"train": OLD[:1]})
    before = files_of(tmp_path)
    with pytest.raises(CacheError, match=r"new row of 16 tokens does not fit the bank's blocks of 5"):
        extract(tmp_path / "b", {"train": [OLD[0], *NEW]})
    assert files_of(tmp_path) == before


def test_killed_at_any_change_a_growth_ends_with_the_same_bank(tmp_path):
    grown = {"train": [*NEW[:3], *OLD, *NEW[3:]], "dev": LATER}
    extract(tmp_path / "old", {"train": OLD})
    old = files_of(tmp_path / "old")

    def start(name):
        for file, data in old.items():
            (tmp_path / name / file).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / name / file).write_bytes(data)
        return tmp_path / name

    path = start("undisturbed")
    assert FAULT.run(path, 10**6, Killed(), lambda: extract(path, grown))
    changes, expected = 10**6 - FAULT.left, files_of(path)
    check(path, grown)
    draw = random.Random(4)
    for change in sorted({0, 1, changes - 2, changes - 1} | set(draw.sample(range(changes), 5))):
        path = start(f"killed-{change}")
        assert not FAULT.run(path, change, Killed(), lambda at=path: extract(at, grown))
        try:
            open_bank(str(path))
        except BankIncomplete:
            FAULT.run(path, draw.randrange(changes), Killed(), lambda at=path: extract(at, grown))
        else:
            found = files_of(path)
            for name in list(found):
                if name.startswith(".growth") or name.endswith(".partial"):
                    del found[name]
            assert found in (old, expected), f"half a growth opens as whole, killed at change {change}"
        extract(path, grown)
        assert files_of(path) == expected, f"killed at change {change}"


def test_more_rows_that_come_while_a_growth_is_cut_off_are_taken_too(tmp_path):
    extract(tmp_path / "b", {"train": OLD})
    first = extract(tmp_path / "b", {"train": [*OLD, *NEW]}, stop=1)
    assert len(first) == 1
    with pytest.raises(BankIncomplete):
        open_bank(str(tmp_path / "b"))
    rest = extract(tmp_path / "b", {"train": [*LATER, *OLD, *NEW]})
    assert not set(first) & set(rest)
    split = check(tmp_path / "b", {"train": [*LATER, *OLD, *NEW]}).split("train")
    assert [part["examples"] for part in split.generations] == [len(OLD), len(NEW), len(LATER)]


@pytest.mark.parametrize("lost", [("text_hash",), ("row",), ("start", "n_words")])
@pytest.mark.parametrize("texts", [[*OLD, *NEW], [*OLD, *NEW, *LATER]], ids=["same", "grown"])
def test_a_grown_banks_order_is_found_again(tmp_path, lost, texts):
    extract(tmp_path / "b", {"train": OLD})
    extract(tmp_path / "b", {"train": [*OLD, *NEW]})
    for name in lost:
        (tmp_path / "b/train" / name / "c/0").unlink()
    assert len(extract(tmp_path / "b", {"train": texts})) == (1 if len(texts) > 13 else 0)
    check(tmp_path / "b", {"train": texts})


def test_an_order_that_is_lost_for_good_is_said(tmp_path):
    extract(tmp_path / "b", {"train": OLD})
    extract(tmp_path / "b", {"train": [*OLD, *NEW]})
    for name in ("text_hash", "row"):
        (tmp_path / "b/train" / name / "c/0").unlink()
    with pytest.raises(CacheError, match=r"the order of split train is lost .*another --store"):
        extract(tmp_path / "b", {"train": [*OLD, *NEW]})


def test_blocks_are_read_in_an_order_that_spreads_the_generations(tmp_path):
    for texts in (OLD, [*OLD, *NEW], [*OLD, *NEW, *LATER]):
        extract(tmp_path / "b", {"train": texts})
    split = open_bank(str(tmp_path / "b")).split("train")
    assert sorted(split.sequence) == list(range(split.n_blocks))
    assert [number for number, _ in split.blocks()] == split.sequence.tolist()
    counts = [part["blocks"] for part in split.generations]
    of_block = np.repeat(np.arange(3), counts)[split.sequence]
    for generation, count in enumerate(counts):
        seen = np.cumsum(of_block == generation)
        even = count * np.arange(1, split.n_blocks + 1) / split.n_blocks
        assert np.abs(seen - even).max() <= 1.5
    assert (make(tmp_path / "c").split("train").sequence == np.arange(5)).all()


def test_another_reader_of_zarr_reads_a_grown_bank(tmp_path):
    extract(tmp_path / "b", {"train": OLD})
    extract(tmp_path / "b", {"train": [*OLD, *NEW]})
    split = open_bank(str(tmp_path / "b")).split("train")
    plain = zarr.open_group(str(tmp_path / "b"), mode="r")["train"]
    assert np.array_equal(plain["states"][:], split.numpy())
