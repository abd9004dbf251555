"""Tokens of rows against a brute force that tokenizes word by word and cuts by hand."""

from functools import cache

import numpy as np
import pytest
import transformers
from encoders import SENTENCES, tiny_encoder
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from cache import Kind
from pipeline.encoder import Encoder
from pipeline.errors import PipelineError
from pipeline.tokens import batches_of, tokenize, tokenizer_sha256

FAMILIES = ("bert", "roberta", "t5", "llama")
WORDS = (
    "the",
    "Quick",
    "fox,",
    "untranslatable",
    "東京",
    "über",
    "1,000",
    "a b",
    "don't",
    "",
    "\u200b",
)
rows_of_words = st.lists(st.lists(st.sampled_from(WORDS), max_size=9), min_size=1, max_size=4)
texts = st.lists(st.sampled_from(WORDS), max_size=9).map(" ".join)


@cache
def tokenizer_of(family, words=True):
    return Encoder(tiny_encoder(family), device="cpu", words=words).tokenizer


def tokens_of(family, rows, pairs=None, max_length=30, words=True):
    return tokenize(tokenizer_of(family, words), [(rows, pairs)], max_length=max_length)


def frame(tokenizer, pair=False):
    """Special tokens before and after a row."""
    empty = tokenizer("", "" if pair else None)["input_ids"]
    first_is_special = bool(empty) and empty[0] in (tokenizer.cls_token_id, tokenizer.bos_token_id)
    return (empty[:1], empty[1:]) if first_is_special else ([], empty)


def pieces(tokenizer, row):
    """Ids of each word, by itself."""
    return [
        tokenizer([word], is_split_into_words=True, add_special_tokens=False)["input_ids"] for word in row
    ]


def row_of(tokens, i):
    inside = slice(tokens.start[i], tokens.start[i + 1])
    return tokens.input_ids[inside], tokens.word_id[inside], tokens.kind[inside]


def kinds(word_ids, first=Kind.WORD):
    return [
        Kind.SPECIAL if w < 0 else first if i == 0 or word_ids[i - 1] != w else first + 1
        for i, w in enumerate(word_ids)
    ]


@pytest.mark.parametrize("family", FAMILIES)
@settings(max_examples=60)
@given(rows=rows_of_words, room=st.integers(1, 25))
def test_rows_of_words_are_cut_and_counted_as_by_hand(family, rows, room):
    tokenizer = tokenizer_of(family)
    before, after = frame(tokenizer)
    tokens = tokens_of(family, rows, max_length=room + len(before) + len(after))
    cut = empty = 0
    for i, row in enumerate(rows):
        by_word = pieces(tokenizer, row)
        flat = [(word, piece) for word, ids in enumerate(by_word) for piece in ids]
        seen = {word for word, _ in flat[:room]}
        cut += len({word for word, _ in flat} - seen)
        empty += sum(not ids for ids in by_word)
        ids, word_id, kind = row_of(tokens, i)
        assert ids.tolist() == [*before, *(piece for _, piece in flat[:room]), *after]
        words = [*(-1 for _ in before), *(word for word, _ in flat[:room]), *(-1 for _ in after)]
        assert word_id.tolist() == words
        assert kind.tolist() == kinds(words)
    assert tokens.n_words.tolist() == [len(row) for row in rows]
    assert (tokens.words_cut, tokens.words_empty) == (cut, empty)


@pytest.mark.parametrize("family", FAMILIES)
@settings(max_examples=40)
@given(text=texts, room=st.integers(1, 25))
def test_a_text_is_cut_and_counted_as_by_hand(family, text, room):
    tokenizer = tokenizer_of(family, words=False)
    before, after = frame(tokenizer)
    whole = tokenizer(text, add_special_tokens=False)
    words = whole.word_ids()
    tokens = tokens_of(family, [text], max_length=room + len(before) + len(after), words=False)
    ids, word_id, _ = row_of(tokens, 0)
    assert ids.tolist() == [*before, *whole["input_ids"][:room], *after]
    assert word_id.tolist() == [*(-1 for _ in before), *words[:room], *(-1 for _ in after)]
    assert tokens.n_words.tolist() == [max(words, default=-1) + 1]
    assert tokens.words_cut == len(set(words) - set(words[:room]))


@pytest.mark.parametrize("family", FAMILIES)
@settings(max_examples=40)
@given(text=texts, pair=texts, room=st.integers(1, 25))
def test_of_a_pair_the_longer_is_cut_first(family, text, pair, room):
    tokenizer = tokenizer_of(family, words=False)
    special = tokenizer.num_special_tokens_to_add(pair=True)
    one, two = (tokenizer(t, add_special_tokens=False) for t in (text, pair))
    tokens = tokens_of(family, [text], [pair], max_length=room + special, words=False)
    ids, word_id, kind = row_of(tokens, 0)
    first = np.isin(kind, (Kind.WORD, Kind.CONTINUATION))
    second = np.isin(kind, (Kind.PAIR_WORD, Kind.PAIR_CONTINUATION))
    n, m = int(first.sum()), int(second.sum())
    assert n + m == min(room, len(one["input_ids"]) + len(two["input_ids"]))
    for kept, other, whole in ((n, m, one), (m, n, two)):
        assert kept == len(whole["input_ids"]) or kept >= other - 1
    assert ids[first].tolist() == one["input_ids"][:n]
    assert ids[second].tolist() == two["input_ids"][:m]
    assert word_id[first].tolist() == one.word_ids()[:n]
    assert word_id[second].tolist() == two.word_ids()[:m]
    assert kind[second].tolist() == kinds(two.word_ids()[:m], Kind.PAIR_WORD)
    cut = [len(set(whole.word_ids()) - set(whole.word_ids()[:k])) for whole, k in ((one, n), (two, m))]
    assert tokens.words_cut == sum(cut)
    assert tokens.n_words.tolist() == [max(one.word_ids(), default=-1) + 1]


def test_words_at_the_end_that_become_no_token_are_not_taken_for_cut_ones():
    tokens = tokens_of("bert", [["the", "\u200b", ""]])
    assert (tokens.words_cut, tokens.words_empty, tokens.n_words.tolist()) == (0, 2, [3])


def test_a_text_that_is_cut_is_counted():
    text = "the the the the the"
    assert tokens_of("bert", [text], max_length=4, words=False).words_cut == 3


def test_segments_tell_a_pair_apart():
    tokens = tokens_of("bert", ["the"], ["lazy dog"], words=False)
    second = tokens.type_id == 1
    assert tokens.kind[second].tolist() == [4, 4, 5, 5, Kind.SPECIAL]
    assert not tokens.type_id[~second].any()
    assert not tokens_of("roberta", ["the"], ["lazy dog"], words=False).type_id.any()


def test_a_marker_inside_the_text_is_a_word_and_no_special_token():
    tokens = tokens_of("bert", ["the [SEP] fox"], words=False)
    assert tokens.kind.tolist() == [Kind.SPECIAL, 2, 2, 2, Kind.SPECIAL]


@settings(max_examples=30)
@given(rows=rows_of_words)
def test_keep_masks(rows):
    for family in ("bert", "llama"):
        tokens = tokens_of(family, rows)
        begins = {int(start) for start in tokens.start[:-1][tokens.length > 0]}
        words = {i for i, kind in enumerate(tokens.kind) if kind == Kind.WORD}
        assert tokens.kept("all").all()
        assert set(np.flatnonzero(tokens.kept("first"))) == begins
        assert set(np.flatnonzero(tokens.kept("words"))) == begins | words


def test_words_of_pairs_are_kept():
    tokens = tokens_of("bert", ["the fox"], ["lazy"], words=False)
    assert tokens.kind[tokens.kept("words")].tolist() == [Kind.SPECIAL, 2, 2, 4]


@pytest.mark.parametrize(
    ("family", "pairs", "special"),
    [("bert", None, 2), ("bert", ["fox"], 3), ("roberta", ["fox"], 4), ("t5", None, 1), ("llama", None, 0)],
)
def test_a_length_without_room_for_one_token_is_refused(family, pairs, special):
    texts = ["the quick fox jumps"]
    for length in (special, special - 1, -5):
        with pytest.raises(PipelineError, match=f"--max-length {length}: .* give {special + 1} or more"):
            tokens_of(family, texts, pairs, max_length=length, words=False)
    assert tokens_of(family, texts, pairs, max_length=special + 1, words=False).length == special + 1


@settings(max_examples=20)
@given(rows=rows_of_words, size=st.integers(1, 5))
def test_the_size_of_the_batches_changes_nothing(rows, size):
    tokenizer = tokenizer_of("bert")
    some = tokenize(tokenizer, batches_of(lambda a, b: (rows[a:b], None), len(rows), size), max_length=9)
    whole = tokenize(tokenizer, [(rows, None)], max_length=9)
    for name in ("input_ids", "word_id", "kind", "type_id", "start", "n_words"):
        np.testing.assert_array_equal(getattr(some, name), getattr(whole, name))
    assert (some.words_cut, some.words_empty) == (whole.words_cut, whole.words_empty)


def test_no_rows_make_no_tokens():
    tokens = tokenize(tokenizer_of("bert"), batches_of(lambda a, b: ([], None), 0), max_length=9)
    assert tokens.start.tolist() == [0]
    assert len(tokens.input_ids) == len(tokens.n_words) == tokens.words_cut == 0
    assert tokens.kept("words").tolist() == []


def test_words_need_a_fast_tokenizer():
    with pytest.raises(PipelineError, match="need a fast tokenizer, ByT5Tokenizer is a slow one"):
        tokenize(transformers.ByT5Tokenizer(), [([["the"]], None)], max_length=9)


def test_texts_do_with_a_slow_tokenizer():
    tokens = tokenize(transformers.ByT5Tokenizer(), [(["ab", ""], None)], max_length=9)
    assert tokens.input_ids.tolist() == [100, 101, 1, 1]
    assert tokens.kind.tolist() == [Kind.WORD, Kind.CONTINUATION, Kind.SPECIAL, Kind.SPECIAL]


def test_words_are_read_as_after_a_space():
    tokenizer = tokenizer_of("roberta")
    again = tokenizer("the", add_special_tokens=False)["input_ids"]
    assert tokenizer.convert_ids_to_tokens(again) == ["Ġthe"]
    ids, *_ = row_of(tokens_of("roberta", [["the", "the"]]), 0)
    assert ids.tolist()[1:-1] == again * 2


def test_the_general_class_of_tokenizers_reads_words_as_after_a_space_too(tmp_path):
    model = transformers.AutoModel.from_pretrained(tiny_encoder("roberta"))
    model.save_pretrained(tmp_path)
    backend = AutoTokenizer.from_pretrained(tiny_encoder("roberta")).backend_tokenizer
    transformers.PreTrainedTokenizerFast(tokenizer_object=backend).save_pretrained(tmp_path)
    tokens = tokenize(
        Encoder(str(tmp_path), device="cpu", words=True).tokenizer, [([["the", "the"]], None)], max_length=9
    )
    np.testing.assert_array_equal(tokens.input_ids, tokens_of("roberta", [["the", "the"]]).input_ids)


@pytest.mark.parametrize("family", ["bert", "t5"])
def test_the_fingerprint_of_a_tokenizer_does_not_depend_on_what_it_did_before(family):
    fresh = tokenizer_sha256(AutoTokenizer.from_pretrained(tiny_encoder(family)))
    used = AutoTokenizer.from_pretrained(tiny_encoder(family))
    used(list(SENTENCES), truncation=True, max_length=5, padding="max_length")
    assert tokenizer_sha256(used) == fresh


def test_the_fingerprint_of_a_tokenizer_tells_how_it_cuts():
    folder = tiny_encoder("roberta")
    cased = AutoTokenizer.from_pretrained(folder)
    spaced = AutoTokenizer.from_pretrained(folder, add_prefix_space=True)
    more = AutoTokenizer.from_pretrained(folder)
    more.add_tokens(["untranslatable"])
    slow = transformers.ByT5Tokenizer()
    assert len({tokenizer_sha256(t) for t in (cased, spaced, more, slow)}) == 4
    assert tokenizer_sha256(slow) == tokenizer_sha256(transformers.ByT5Tokenizer())
