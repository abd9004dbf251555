"""Joined splits against numpy concatenation of their pieces."""

import gc
import pickle
import weakref
from dataclasses import replace

import numpy as np
import pytest
import tiny

from cache import CacheError, EncoderRecord, JoinedBank, Kind, Piece, open_bank
from cache.targets import spans, write_target


def joined(*pieces, main=None):
    return JoinedBank(main or tiny.shared(), "train", pieces)


def states_of(split, example, states):
    """The states of one example of a plain split, out of those of all."""
    first = split.start[example]
    return states[:, first : first + split.length[example]]


def place_of(split, text_hash):
    [place] = np.flatnonzero(split.text_hash == text_hash)
    return place


@pytest.fixture(scope="module")
def other(tmp_path_factory):
    """A bank of other rows: its sizes differ, so the splits hold other numbers of rows."""
    path = tmp_path_factory.mktemp("banks") / "other"
    return tiny.bank(path, sizes={"train": 40, "dev": 70}, block_tokens=64, seed=9)


def test_every_example_of_every_piece_is_there_once_with_its_states_and_labels(other):
    main = tiny.shared()
    bank = joined(Piece(store=main.path), Piece(store=other.path, split="dev"))
    split, parts = bank.split("train"), [main.split("train"), other.split("dev")]
    assert split.n_examples == 120 + 70
    assert split.n_tokens == sum(part.n_tokens for part in parts)
    everything = np.concatenate([part.text_hash for part in parts])
    assert sorted(split.text_hash) == sorted(everything)
    whole, tags = split.numpy(), split.target("tags").values
    words = spans(split.n_words)
    plain = {id(part): part.numpy() for part in parts}
    labels = {id(part): {n: part.target(n).values for n in ("label", "tags", "value")} for part in parts}
    label, value = split.target("label").values, split.target("value").values
    for i, text_hash in enumerate(split.text_hash):
        part = next(p for p in parts if text_hash in p.text_hash)
        there = place_of(part, text_hash)
        tokens = slice(split.start[i], split.start[i] + split.length[i])
        theirs = slice(part.start[there], part.start[there] + part.length[there])
        assert np.array_equal(whole[:, tokens], states_of(part, there, plain[id(part)]))
        for name in ("word_id", "kind", "input_ids"):
            assert np.array_equal(getattr(split, name)[tokens], getattr(part, name)[theirs])
        n = spans(part.n_words)
        theirs = labels[id(part)]
        assert np.array_equal(tags[words[i] : words[i + 1]], theirs["tags"][n[there] : n[there + 1]])
        assert label[i] == theirs["label"][there]
        assert np.array_equal(value[i], theirs["value"][there], equal_nan=True)


def test_take_gather_and_blocks_read_the_same(other):
    split = joined(Piece(store=tiny.shared().path, share=0.4), Piece(store=other.path)).split("train")
    whole = split.numpy([1, 3])
    tokens = np.random.default_rng(0).permutation(split.n_tokens)[:50]
    assert np.array_equal(split.take(tokens, [1, 3]), whole[:, tokens])
    found, lengths = split.gather([5, 2], [1, 3])
    assert np.array_equal(lengths, split.length[[5, 2]])
    first = slice(split.start[5], split.start[5] + split.length[5])
    assert np.array_equal(found[:, : lengths[0]], whole[:, first])
    for block, states in split.blocks([1, 3]):
        here = slice(block * split.block_tokens, (block + 1) * split.block_tokens)
        assert np.array_equal(np.stack(states), whole[:, here])
        assert np.array_equal(np.stack(split.read_block(block, [1, 3])), whole[:, here])


def test_every_example_lies_whole_in_one_block_and_fill_is_fill(other):
    split = joined(Piece(store=tiny.shared().path), Piece(store=other.path)).split("train")
    some = split.length > 0
    last = split.start + split.length - 1
    assert np.array_equal(split.start[some] // split.block_tokens, last[some] // split.block_tokens)
    used = np.zeros(split.n_blocks * split.block_tokens, bool)
    for start, length in zip(split.start, split.length, strict=True):
        assert not used[start : start + length].any()
        used[start : start + length] = True
    assert (split.kind[~used] == Kind.FILL).all()
    assert not split.numpy()[:, ~used].any()


def test_the_examples_of_every_piece_are_spread_evenly(other):
    split = joined(Piece(store=tiny.shared().path), Piece(store=other.path)).split("train")
    quarters = np.array_split(split._part, 4)
    assert [int((quarter == 1).sum()) for quarter in quarters] == [10] * 4


def test_a_draw_is_seeded_without_repetition_and_the_same_in_every_bank_of_the_rows(tmp_path):
    again = tiny.bank(tmp_path / "again", keep="words", seed=5, block_tokens=64)
    a, b = tiny.shared().split("train"), again.split("train")
    assert not np.array_equal(a.row, b.row)

    def rows(split, **choice):
        chosen = Piece(store="x", **choice).examples(split)
        assert len(set(chosen.tolist())) == len(chosen)
        return set(split.row[chosen].tolist())

    assert rows(a, n_examples=17, seed=3) == rows(b, n_examples=17, seed=3)
    assert rows(a, n_examples=17, seed=3) < rows(a, n_examples=30, seed=3)
    assert rows(a, n_examples=17, seed=3) != rows(a, n_examples=17, seed=4)
    assert len(rows(a, share=0.05)) == 6
    assert rows(a) == set(range(120))


def test_a_draw_is_uniform():
    split = tiny.shared().split("train")
    counts = np.zeros(split.n_examples)
    for seed in range(300):
        counts[Piece(store="x", n_examples=12, seed=seed).examples(split)] += 1
    # 300 draws of a tenth: 30 of each expected, with a standard deviation of 5.2.
    assert counts.min() > 8
    assert counts.max() < 56


def renamed(bank, path, names):
    """A copy of a bank's target under other names, written over it."""
    for name in bank.splits:
        target = bank.split(name).target("label")
        write_target(bank.writable_split(name), replace(target, names=names))
    return open_bank(str(path))


def test_classes_are_unified_by_name_and_the_bank_s_other_splits_are_numbered_alike(tmp_path):
    path = tmp_path / "other"
    # Theirs are numbered otherwise, and one class is new.
    theirs = renamed(tiny.bank(path, sizes={"train": 40, "dev": 10}), path, ("red", "black", "blue"))
    main = tiny.shared()
    bank = joined(Piece(store=main.path), Piece(store=theirs.path))
    target, dev = bank.split("train").target("label"), bank.split("dev").target("label")
    assert target.names == dev.names == ("blue", "green", "red", "black")
    assert bank.split("dev").target_names()["label"]["classes"] == 4
    assert np.array_equal(dev.values, main.split("dev").target("label").values)
    part, example = bank.split("train")._part, bank.split("train")._example
    for k, source in enumerate((main, theirs)):
        plain = source.split("train").target("label")
        said = [plain.names[v] if v >= 0 else None for v in plain.values[example[part == k]]]
        assert [target.names[v] if v >= 0 else None for v in target.values[part == k]] == said


def test_int8_pieces_come_as_float32_each_by_its_own_scale(tmp_path):
    paths = [tmp_path / name for name in "ab"]
    banks = [tiny.bank(paths[0], dtype="int8"), tiny.bank(paths[1], dtype="int8", sizes={"train": 30})]
    split = joined(*(Piece(store=bank.path) for bank in banks), main=banks[0]).split("train")
    assert not np.array_equal(banks[0].split("train").scale, banks[1].split("train").scale)
    assert (split.dtype, split.recipe.dtype, split.scale, split.shift) == (
        np.float32,
        "float32",
        None,
        None,
    )
    plain = [bank.split("train") for bank in banks]
    states, whole = [part.numpy([2]) for part in plain], split.numpy([2])
    for i in range(split.n_examples):
        part = split._part[i]
        tokens = slice(split.start[i], split.start[i] + split.length[i])
        assert np.array_equal(whole[:, tokens], states_of(plain[part], split._example[i], states[part]))


def test_a_split_of_one_data_type_keeps_it(tmp_path):
    half = tiny.bank(tmp_path / "half", dtype="float16")
    assert joined(Piece(store=half.path), main=half).split("train").dtype == np.float16
    mixed = joined(Piece(store=half.path), Piece(store=tiny.shared().path)).split("train")
    assert mixed.dtype == np.float32


def test_the_fingerprint_names_the_pieces_and_not_where_they_lie(tmp_path):
    copy = tiny.bank(tmp_path / "copy")
    main = tiny.shared()
    one = joined(Piece(store=main.path, share=0.5)).fingerprint
    assert one == joined(Piece(store=copy.path, share=0.5)).fingerprint
    others = [
        main.fingerprint,
        joined(Piece(store=main.path)).fingerprint,
        joined(Piece(store=main.path, share=0.5, seed=1)).fingerprint,
        joined(Piece(store=main.path, share=0.5), Piece(store=main.path, split="dev")).fingerprint,
    ]
    assert len({one, *others}) == 5


def test_a_joined_split_can_be_sent(other):
    split = joined(Piece(store=tiny.shared().path), Piece(store=other.path)).split("train")
    back = pickle.loads(pickle.dumps(split))
    assert np.array_equal(back.numpy(), split.numpy())
    assert np.array_equal(back.target("label").values, split.target("label").values)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"encoder": EncoderRecord(name="x", revision=None, weights_sha256="v" * 64, n_layers=4, width=8)},
         "is of encoder x .* join banks of one encoder"),
        ({"layers": (0, 3)}, "has layers 0,3, .* has 0,1,2,3: extract both the same way"),
        ({"keep": "words"}, "has keep words, .* has all"),
        ({"tokenizer_sha256": "u" * 64}, "has tokenizer_sha256 uuuu"),
    ],
)  # fmt: skip
def test_banks_that_do_not_go_together_are_refused_in_one_line(changes, said, tmp_path):
    bank = tiny.bank(tmp_path / "b", sizes={"train": 8}, **changes)
    with pytest.raises(CacheError, match=said) as caught:
        joined(Piece(store=bank.path))
    assert "\n" not in str(caught.value)


def test_a_target_that_a_piece_lacks_or_has_of_another_kind_is_named(tmp_path):
    lacking = tiny.bank(tmp_path / "lacking", sizes={"train": 8}, only=("tags",))
    bank = joined(Piece(store=tiny.shared().path), Piece(store=lacking.path))
    with pytest.raises(CacheError, match=f"{lacking.path} has no target 'label' on split train"):
        bank.split("train").target("label")
    other = tiny.bank(tmp_path / "other", sizes={"train": 8}, only=("value",))
    value = other.split("train").target("value")
    write_target(other.writable_split("train"), replace(value, name="label"))
    bank = joined(Piece(store=tiny.shared().path), Piece(store=other.path))
    with pytest.raises(CacheError, match=f"'label' is class in .* and float in {other.path}"):
        bank.split("train").target("label")


@pytest.mark.parametrize(
    ("choice", "said"),
    [
        ({"share": 0.0}, "share of 0.0"),
        ({"share": 1.5}, "share of 1.5"),
        ({"n_examples": 0}, "0 examples, give 1"),
        ({"share": 0.5, "n_examples": 3}, "not both"),
        ({"n_examples": 121}, "121 examples asked for, split train has 120"),
    ],
)
def test_a_piece_that_cannot_be_is_refused(choice, said):
    with pytest.raises(CacheError, match=said):
        joined(Piece(store=tiny.shared().path, **choice))


@pytest.mark.parametrize("make", [lambda: tiny.shared().split("train"), lambda: pieces_of(tiny.shared())])
def test_the_memory_of_a_split_that_is_no_longer_used_is_free_at_once(make):
    gc.disable()  # it comes round seldom, and not for the weight of arrays
    try:
        split = make()
        held = [weakref.ref(split), weakref.ref(split.chunk(0, 0))]
        assert split.chunk(0, 0) is held[1](), "chunks are kept while the split is"
        del split
        assert [one() for one in held] == [None, None]
    finally:
        gc.enable()


def pieces_of(bank):
    return joined(Piece(store=bank.path), Piece(store=bank.path, split="dev")).split("train")
