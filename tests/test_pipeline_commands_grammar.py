import random
from itertools import pairwise

import pytest

from pipeline import commands_grammar as grammar
from pipeline.errors import PipelineError

SLOTS = set(grammar.SLOTS)
INTENTS = set(grammar.WORDINGS)


def slots_of(row):
    """Pairs of a slot and its words, read off the tags."""
    found = []
    for token, tag in zip(row["tokens"], row["tags"], strict=True):
        if tag.startswith("B-"):
            found.append((tag[2:], [token]))
        elif tag.startswith("I-"):
            found[-1][1].append(token)
    return [(slot, " ".join(words)) for slot, words in found]


def is_iob2(tags):
    return all(
        tag == "O" or tag[:2] == "B-" or (tag[:2] == "I-" and before[2:] == tag[2:])
        for before, tag in pairwise(["O", *tags])
    )


@pytest.fixture(scope="module")
def splits():
    return grammar.generate()


def test_sizes_and_keys(splits):
    assert {split: len(rows) for split, rows in splits.items()} == {"train": 3000, "dev": 500, "test": 500}
    for row in (row for rows in splits.values() for row in rows):
        assert list(row) == ["tokens", "tags", "intent"]
        assert len(row["tokens"]) == len(row["tags"]) > 0
        assert all(token == token.lower() and token.split() == [token] for token in row["tokens"])
        assert not set("".join(row["tokens"])) & set("{}()|")


def test_same_seed_same_rows(splits):
    random.seed(5)
    assert grammar.generate(seed=0) == splits
    assert grammar.generate(seed=1)["dev"] != splits["dev"]


def test_a_split_does_not_depend_on_the_size_of_another(splits):
    assert grammar.generate(train=10)["test"] == splits["test"]


def test_tags_are_iob2(splits):
    assert all(is_iob2(row["tags"]) for rows in splits.values() for row in rows)


@pytest.mark.parametrize("seed", range(3))
def test_a_small_split_holds_every_intent_and_slot(seed):
    for rows in grammar.generate(seed=seed, train=120, dev=120, test=120).values():
        assert {row["intent"] for row in rows} == INTENTS
        assert {slot for row in rows for slot, _ in slots_of(row)} == SLOTS


def test_no_row_stands_twice(splits):
    texts = [" ".join(row["tokens"]) for rows in splits.values() for row in rows]
    assert len(set(texts)) == len(texts)


def test_no_filler_stands_in_two_pools():
    fillers = [filler for pool in grammar.POOLS.values() for filler in pool]
    assert len(set(fillers)) == len(fillers)


@pytest.mark.parametrize("seed", range(3))
def test_no_filler_stands_in_two_splits(seed):
    owned = [
        {filler for fillers in slots.values() for filler in fillers}
        for slots in grammar.partition(seed).values()
    ]
    assert sum(map(len, owned)) == len(set.union(*owned)) == sum(map(len, grammar.POOLS.values()))


def test_rows_use_the_fillers_of_their_split(splits):
    partition = grammar.partition(0)
    for split, rows in splits.items():
        own = {slot: set(fillers) for slot, fillers in partition[split].items()}
        assert all(filler in own[slot] for row in rows for slot, filler in slots_of(row))


def test_wordings_of_dev_and_test_are_not_in_train():
    for common, *held_out in [*grammar.WORDINGS.values(), grammar.PREFIXES, grammar.SUFFIXES]:
        wordings = [*common, *held_out[0], *held_out[1]]
        assert len(set(wordings)) == len(wordings)


def test_the_same_words_fill_several_slots(splits):
    slots_by_filler = {}
    for slot, filler in (pair for row in splits["train"] for pair in slots_of(row)):
        slots_by_filler.setdefault(filler, set()).add(slot)
    n_ambiguous = sum(len(slots) > 1 for slots in slots_by_filler.values())
    assert n_ambiguous > 100


def test_more_rows_than_the_grammar_has_are_refused(monkeypatch):
    monkeypatch.setattr(grammar, "WORDINGS", {"call": (("call {people}",), (), ())})
    monkeypatch.setattr(grammar, "PREFIX_FRAC", 0.0)
    monkeypatch.setattr(grammar, "SUFFIX_FRAC", 0.0)
    with pytest.raises(PipelineError, match=r"500 rows asked for split 'train'.*ask for fewer"):
        grammar.generate(train=500, dev=0, test=0)
