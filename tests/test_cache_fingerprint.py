from dataclasses import replace

import numpy as np
import pytest
from banks import RECIPE, make, recipe, rows

from cache.fingerprint import bank_fingerprint, hash_texts, rows_fingerprint

ROWS = {"train": rows_fingerprint(hash_texts(["a", "b"])), "dev": rows_fingerprint(hash_texts(["c"]))}
SAME = bank_fingerprint(RECIPE, ROWS)


@pytest.mark.parametrize(
    "changed",
    [
        {"batch_tokens": 1},
        {"codec": "zstd"},
        {"encoder": replace(RECIPE.encoder, name="elsewhere")},
        {"encoder": replace(RECIPE.encoder, revision="main")},
    ],
)
def test_fingerprint_ignores_what_does_not_change_the_states(changed):
    assert bank_fingerprint(recipe(**changed), ROWS) == SAME


@pytest.mark.parametrize(
    "changed",
    [
        {"encoder": replace(RECIPE.encoder, weights_sha256="v" * 64)},
        {"tokenizer_sha256": "u" * 64},
        {"columns": {"text": "other"}},
        {"max_length": 15},
        {"keep": "words"},
        {"layers": (0, 1)},
        {"dtype": "float32"},
        {"seed": 4},
        {"block_tokens": 32},
    ],
)
def test_fingerprint_changes_with_what_changes_the_bank(changed):
    assert bank_fingerprint(recipe(**changed), ROWS) != SAME


@pytest.mark.parametrize(
    "other",
    [
        {**ROWS, "dev": rows_fingerprint(hash_texts(["d"]))},
        {**ROWS, "train": rows_fingerprint(hash_texts(["b", "a"]))},
        {"train": ROWS["train"]},
        {"train": ROWS["dev"], "dev": ROWS["train"]},
    ],
    ids=["another row", "another order", "a split less", "splits swapped"],
)
def test_fingerprint_changes_with_the_rows(other):
    assert bank_fingerprint(RECIPE, other) != SAME


def test_fingerprint_does_not_depend_on_the_order_of_splits():
    assert bank_fingerprint(RECIPE, dict(reversed(ROWS.items()))) == SAME


def test_fingerprint_in_the_bank_is_that_of_its_recipe_and_rows(tmp_path):
    lengths = {"train": rows([3, 2])}
    bank = make(tmp_path / "bank", lengths)

    expected = {"train": rows_fingerprint(lengths["train"].text_hash)}
    assert bank.fingerprint == bank_fingerprint(RECIPE, expected)


def test_hash_texts_tells_texts_words_and_pairs_apart():
    texts = ["a b", ["a", "b"], ["a b"], ["ab"], [["a"], ["b"]], "", [], "A b", "a\ud800", "ä"]

    assert len(set(hash_texts(texts).tolist())) == len(texts)
    assert hash_texts(["a"]).dtype == np.uint64
    assert len(hash_texts([])) == 0


def test_hash_texts_stays_the_one_that_banks_on_disk_hold():
    assert hash_texts(["hello", ["two", "words"]]).tolist() == [
        12220674961922400787,
        471868654005343023,
    ]
