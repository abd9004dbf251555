"""What `layerbank plan` says, against the bank that is then made; and what does not fit."""

import json
import shutil
from collections import namedtuple
from functools import cache

import numpy as np
import pytest
from encoders import SENTENCES, tiny_encoder, tiny_masked_lm

from cache import open_bank
from cache.size import STATE_BYTES
from pipeline import calibrate, plan
from pipeline.convert import convert
from pipeline.corpus import load_corpus
from pipeline.encoder import Encoder
from pipeline.errors import PipelineError
from pipeline.extract import extract
from pipeline.plan import estimate
from pipeline.tokens import tokenize

KEEPS = ("all", "words", "first")


@cache
def encoder():
    return Encoder(tiny_encoder(), device="cpu", words=True)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """Some rows of two splits."""
    tmp_path = tmp_path_factory.mktemp("plan")
    random, pool = np.random.default_rng(0), " ".join(SENTENCES).split()
    (tmp_path / "data").mkdir()
    for split, n in (("train", 500), ("dev", 60)):
        rows = []
        for i in range(n):
            words = random.choice(pool, random.integers(0, 12)).tolist()
            rows.append({"tokens": words, "tags": ["O"] * len(words), "intent": f"c{i % 3}"})
        (tmp_path / f"data/{split}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows), "utf-8")
    return load_corpus(str(tmp_path / "data"))


@pytest.fixture
def data(corpus, monkeypatch):
    """They are dealt to many blocks."""
    monkeypatch.setattr("pipeline.extract.block_tokens_for", lambda *_: 1024)
    monkeypatch.setattr(plan, "_MEASURE_S", 0.0)
    return corpus


@pytest.fixture(scope="module")
def n_tokens(corpus, tmp_path_factory):
    """How many tokens a bank of all of them has."""
    return extract(corpus, encoder(), str(tmp_path_factory.mktemp("all") / "bank")).tokens


@pytest.mark.parametrize("keep", KEEPS)
@pytest.mark.parametrize(("dtype", "layers"), [("float16", None), ("float32", [0, 2])])
def test_bytes_are_those_of_the_bank(tmp_path, data, n_tokens, keep, dtype, layers):
    said = estimate(data, encoder(), keep=keep, dtype=dtype, layers=layers)
    made = extract(data, encoder(), str(tmp_path / "b"), keep=keep, dtype=dtype, layers=layers)
    assert said.bytes[keep][dtype] == pytest.approx(made.bytes, rel=0.02)
    assert said.kept_tokens[keep] == made.tokens
    assert said.examples == made.examples == 560
    assert said.tokens_error == 0
    assert said.tokens == n_tokens
    # Read at that rate, the bank takes the time of the forwards.
    forward_s = said.tokens / said.tokens_per_s
    assert said.bytes[keep][dtype] / said.break_even_bytes_per_s == pytest.approx(forward_s)
    assert set(said.bytes) == set(KEEPS)
    assert all(set(kinds) == set(STATE_BYTES) for kinds in said.bytes.values())


def test_masked_text_is_planned_as_it_is_extracted(tmp_path, monkeypatch):
    (tmp_path / "data").mkdir()
    for split, n in (("train", 40), ("dev", 9)):
        texts = np.random.default_rng(n).choice(SENTENCES, 10 * n)
        lines = (json.dumps({"text": text}) + "\n" for text in texts.tolist())
        (tmp_path / f"data/{split}.jsonl").write_text("".join(lines), "utf-8")
    corpus, bert = load_corpus(str(tmp_path / "data")), Encoder(tiny_masked_lm("bert"), device="cpu")
    monkeypatch.setattr(plan, "_MEASURE_S", 0.0)
    how = {"keep": "masked", "maskings": 2, "max_length": 20}
    said = estimate(corpus, bert, **how)
    made = extract(corpus, bert, str(tmp_path / "b"), **how)
    assert said.bytes["masked"]["float16"] == pytest.approx(made.bytes, rel=0.02)
    assert (said.kept_tokens, said.examples) == ({"masked": made.tokens}, made.examples)
    assert said.tokens == 2 * estimate(corpus, bert, **{**how, "maskings": 1}).tokens
    part = estimate(corpus, bert, sample=320, **how)
    assert 0 < part.tokens_error < 0.2 * said.tokens
    assert 0 < abs(part.tokens - said.tokens) < 2 * part.tokens_error
    with_free(monkeypatch, round(said.bytes["masked"]["int8"] * 1.1))
    assert estimate(corpus, bert, **how).recommended["dtype"] == "int8"
    with pytest.raises(PipelineError, match="--keep masked --dtype int8 takes"):
        extract(corpus, bert, str(tmp_path / "other"), **how)
    with pytest.raises(PipelineError, match="only --keep masked has any, asked was --keep all"):
        estimate(corpus, bert, maskings=2)


def test_a_conversion_that_cannot_fit_does_not_start(tmp_path, data, monkeypatch):
    made = extract(data, encoder(), str(tmp_path / "b"), dtype="float32")
    with_free(monkeypatch, made.bytes // 2)
    with pytest.raises(
        PipelineError, match=r"the bank takes .* --keep all --dtype float16 takes .* --force"
    ):
        convert(open_bank(made.store), str(tmp_path / "c"), layers=[0, 1])
    assert not (tmp_path / "c").exists()
    assert convert(open_bank(made.store), str(tmp_path / "c"), dtype="int8").bytes < made.bytes // 2
    assert convert(open_bank(made.store), str(tmp_path / "d"), layers=[0, 1], force=True).blocks_written


def test_a_bank_that_is_there_under_another_name_is_named(tmp_path, data):
    said, one, two = [], str(tmp_path / "one"), str(tmp_path / "two")
    made = [(one, {}), (two, {}), (one, {}), (f"{one}-zstd", {"codec": "zstd"}), (f"{one}-1", {"seed": 1})]
    for store, how in made:
        extract(data, encoder(), store, keep="first", note=said.append, **how)
    assert said == [f"note: {one} holds the very same states; they are made once more for {two}"]


def test_a_sample_is_near_and_says_how_near(data):
    exact = estimate(data, encoder(), sample=None)
    said = estimate(data, encoder(), sample=192)
    assert 0 < said.tokens_error < 0.2 * exact.tokens
    assert abs(said.tokens - exact.tokens) < 2 * said.tokens_error
    assert said.bytes["all"]["float16"] == pytest.approx(exact.bytes["all"]["float16"], rel=0.1)
    assert said.splits["dev"] == exact.splits["dev"]  # smaller than the sample


def test_operations_are_those_of_the_products(data):
    """By hand: three squares and the output, and the two products of the feed-forward, for each token."""
    width, inner, blocks = 32, 48, 2
    per_token = 2 * blocks * (4 * width * width + 2 * width * inner)
    said = estimate(data, encoder())
    assert 1.0 < said.flops / (per_token * said.tokens) < 1.5  # padding and attention come on top
    first = estimate(data, encoder(), layers=[0, 1])
    assert 0.45 < first.flops / said.flops < 0.55


Usage = namedtuple("Usage", "total used free")


def with_free(monkeypatch, n_bytes):
    monkeypatch.setattr(shutil, "disk_usage", lambda _: Usage(0, 0, n_bytes))


def test_the_recommendation_is_what_keeps_most_and_fits(data, monkeypatch):
    table = estimate(data, encoder()).bytes
    for free, keep in ((10**9, "all"), (round(table["words"]["float16"] * 1.1), "words"), (10_000, None)):
        with_free(monkeypatch, free)
        best = estimate(data, encoder()).recommended
        assert (best and best["keep"]) == keep
    assert estimate(data, encoder(), store="memory://bucket/bank").free_bytes is None


def test_an_extraction_that_cannot_fit_does_not_start_and_says_what_would(tmp_path, data, monkeypatch):
    table = estimate(data, encoder()).bytes
    with_free(monkeypatch, round(table["words"]["float16"] * 1.1))
    with pytest.raises(PipelineError, match=r"the bank takes .*: --keep words --dtype \w+ takes .*--force"):
        extract(data, encoder(), str(tmp_path / "b"))
    assert not (tmp_path / "b").exists()
    made = extract(data, encoder(), str(tmp_path / "b"), force=True)
    # What is there already needs no room.
    with_free(monkeypatch, 20_000)
    assert extract(data, encoder(), str(tmp_path / "b")).bytes == made.bytes
    with pytest.raises(PipelineError, match="fewer --layers or a larger disk"):
        extract(data, encoder(), str(tmp_path / "other"))


def test_the_budget_is_the_fastest_of_those_tried_and_stays_in_the_bank(tmp_path, data, monkeypatch):
    tried = []

    def seconds(_encoder, _tokens, rows, _layers, budget_tokens):
        tried.append((budget_tokens, len(rows)))
        return abs(budget_tokens - 20)

    monkeypatch.setattr(calibrate, "_BUDGETS", {"cpu": (10, 20, 30)})
    monkeypatch.setattr(calibrate, "encode_seconds", seconds)
    made = extract(data, encoder(), str(tmp_path / "b"))
    assert made.batch_tokens == open_bank(made.store).recipe.batch_tokens == 20
    assert [budget for budget, _ in tried] == [1024, 10, 20, 30]
    tried.clear()
    again = extract(data, encoder(), str(tmp_path / "b"), batch_tokens=77)
    assert again.batch_tokens == 20
    assert again.notes[0].startswith("--batch-tokens 77: the bank was begun with 20")
    assert not tried


def test_little_data_is_not_tried_on(data, monkeypatch):
    monkeypatch.setattr(calibrate, "encode_seconds", None)
    tokens = tokenize(encoder().tokenizer, [(data.texts("train"), None)], max_length=30)
    assert calibrate.pick_budget(encoder(), tokens, [0, 1, 2]) == 1024


def test_blocks_are_measured_as_they_are_dealt(data, monkeypatch):
    seen = []
    monkeypatch.setattr(plan, "_MEASURE_S", 2.5)

    def seconds(_encoder, tokens, rows, _layers, _budget):
        seen.append(int(tokens.length[rows].sum()))
        return 1.0

    monkeypatch.setattr(plan, "encode_seconds", seconds)
    said = estimate(data, encoder())
    assert len(seen) == 4  # one for the operations, then until more than 2.5 seconds
    assert said.tokens_per_s == pytest.approx(np.mean(seen[1:]))
