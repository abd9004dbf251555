"""From a bank to batches, against the rows that the bank was made of."""

import threading
import time

import numpy as np
import pytest
import tiny
import torch

from cache import CacheError, Kind, Split
from pipeline import batches
from pipeline.batches import Feeds
from pipeline.errors import PipelineError
from pipeline.feed import AHEAD, Resident, Streamed, home_of, taken_in_pieces
from pipeline.head import build_head, plan_head
from pipeline.selection import select

# What a head reads and what its decoder sees, by the parts that make it so.
HEADS = {
    "first": ("label", "attention", {}, "first", "first"),
    "words": ("tags", "attention", {}, "words", "words"),
    "all": ("label", "attention", {"pooling": "mean"}, "all", "all"),
    "all, words decoded": ("tags", "transformer", {}, "all", "words"),
    "all, first decoded": ("value", "transformer", {}, "all", "first"),
}
ENOUGH = {"first": {"first", "words", "all"}, "words": {"words", "all"}, "all": {"all"}}


def open_(name, *, split="dev", **changes):
    """A head of that name, the split, and what the head reads of it."""
    bank = tiny.shared(**changes)
    target_name, fusion, options, reads, decodes = HEADS[name]
    part = bank.split(split)
    target = part.target(target_name)
    spec = plan_head(
        fusion=fusion,
        decoder=None,
        target=target,
        kept=bank.recipe.layers,
        last=tiny.LAST,
        width=tiny.WIDTH,
        options=options,
    )
    head = build_head(spec, seed=0).eval()
    data = batches.load(part, head, spec.layers, target)
    rows = [tiny.example(split, int(row)) for row in part.row]
    return spec, head, data, rows, reads, decodes


def states_of(row, tokens, layers):
    """The states of a row's tokens of that sort, straight from the row."""
    return torch.from_numpy(row.states[list(layers)][:, row.kept(tokens)]).float()


def words_of(row, layers):
    """The states of the first sub-word of each word."""
    return torch.from_numpy(row.states[list(layers)][:, row.kind == Kind.WORD]).float()


@pytest.mark.parametrize("name", HEADS)
@pytest.mark.parametrize("keep", ["all", "words", "first"])
def test_head_reads_its_tokens_of_any_bank_that_keeps_them(name, keep):
    if keep not in ENOUGH[HEADS[name][3]]:
        with pytest.raises(
            PipelineError, match=f"the bank has --keep {keep}: extract with --keep "
        ) as error:
            open_(name, keep=keep)
        cure = str(error.value).rpartition(" ")[2]
        assert cure in ENOUGH[HEADS[name][3]]
        assert "\n" not in str(error.value)
        return
    spec, _, data, rows, reads, decodes = open_(name, keep=keep)
    assert data.n_examples == len(rows)
    assert data.n_tokens == data.feed.states.shape[1]
    for i, row in enumerate(rows):
        found = data.feed.states[:, data.feed.start[i] : data.feed.start[i + 1]]
        # `words` of a bank has the first token too, a decoder that reads words has not.
        expected = words_of(row, spec.layers) if reads == "words" else states_of(row, reads, spec.layers)
        torch.testing.assert_close(found, expected)
        places = slice(data.feed.decoded_start[i], data.feed.decoded_start[i + 1])
        decoded = data.feed.decoded
        chosen = np.arange(data.n_tokens)[places] if decoded is None else decoded[places]
        expected = (
            words_of(row, spec.layers) if decodes == "words" else states_of(row, decodes, spec.layers)
        )
        torch.testing.assert_close(data.feed.states[:, chosen], expected)


@pytest.mark.parametrize("keep", ["all", "words"])
def test_labels_belong_to_the_words_that_have_a_token(keep):
    _, _, data, rows, *_ = open_("words", keep=keep, split="train")
    gold = [tag for row in rows for tag in _tags(row)]
    assert data.gold.tolist() == gold
    assert data.gold_lengths.tolist() == [row.n_words for row in rows]
    words = [row.word_id[row.kind == Kind.WORD] for row in rows]
    seen = [_tags(row)[word] for row, has in zip(rows, words, strict=True) for word in has]
    assert any((np.diff(has) > 1).any() for has in words)
    assert data.labels.tolist() == seen
    assert data.gold[data.unit].tolist() == seen
    assert len(set(data.unit.tolist())) == len(data.unit) < len(gold)


def _tags(row):
    unlabelled = tiny.example("train", 4)
    same = row.states.shape == unlabelled.states.shape and np.array_equal(row.states, unlabelled.states)
    return [-1] * row.n_words if same else row.tags.tolist()


def test_labels_of_examples_are_in_dealt_order():
    _, _, data, rows, *_ = open_("first")
    expected = [row.label for row in rows]
    wrong = np.flatnonzero(data.labels.numpy() != expected)
    assert data.labels[wrong].tolist() == [-1]  # the one example without a label
    assert data.unit.tolist() == list(range(len(rows)))


def test_some_examples_have_no_word_and_some_words_no_token():
    _, _, data, *_ = open_("words")
    counts = np.diff(data.feed.decoded_start)
    assert 0 in counts
    assert (counts < data.gold_lengths).any()


@pytest.mark.parametrize("name", HEADS)
@pytest.mark.parametrize("size", [1, 7, 200])
def test_shuffled_batches_give_what_each_example_gives_alone(name, size):
    _, head, data, *_ = open_(name)
    alone = {}
    for i in range(data.n_examples):
        given, labels, units = next(data.batches(np.array([i]), batch_size=1))
        alone[i] = (head(given), labels, units)
    order = np.random.default_rng(5).permutation(data.n_examples)
    seen = []
    for first, (given, labels, units) in zip(
        range(0, len(order), size), data.batches(order, batch_size=size), strict=True
    ):
        here = order[first : first + size]
        seen += here.tolist()
        assert len(given.lengths) == len(given.decoded_lengths) == len(here)
        assert given.lengths.sum() == given.states.shape[1]
        expected = [torch.cat([alone[i][0] for i in here], 1), torch.cat([alone[i][1] for i in here])]
        torch.testing.assert_close(head(given), expected[0], rtol=1e-4, atol=1e-5)
        assert torch.equal(labels.nan_to_num(-9.0), expected[1].nan_to_num(-9.0))
        assert units.tolist() == np.concatenate([alone[i][2] for i in here]).tolist()
    assert sorted(seen) == list(range(data.n_examples))


def test_tagger_over_new_layers_against_a_padded_batch():
    _, head, data, rows, *_ = open_("all, words decoded")
    chosen = np.array([9, 3, 30, 11, 0, 17])
    given, labels, _ = next(data.batches(chosen, batch_size=len(chosen)))
    here = [rows[i] for i in chosen]
    longest = max(len(row.kind) for row in here)
    # Padded by hand: the fusion runs on each row alone, then rows and words are picked by mask.
    fused = torch.zeros(len(here), longest, tiny.WIDTH)
    is_word = torch.zeros(len(here), longest, dtype=torch.bool)
    for k, row in enumerate(here):
        alone = head.fusion(states_of(row, "all", [tiny.LAST]), torch.tensor([len(row.kind)]))
        fused[k, : len(row.kind)] = alone[0]
        is_word[k, : len(row.kind)] = torch.from_numpy(row.kind == Kind.WORD)
    expected = head.decoder.scorer(fused[is_word][None])
    torch.testing.assert_close(head(given), expected, rtol=1e-4, atol=1e-5)
    assert len(labels) == int(is_word.sum())
    assert given.decoded_lengths.tolist() == is_word.sum(1).tolist()


def test_bank_of_some_layers_gives_those():
    spec, _, data, rows, *_ = open_("words", layers=(0, 2))
    assert spec.layers == (0, 2)
    found = data.feed.states[:, data.feed.start[0] : data.feed.start[1]]
    torch.testing.assert_close(found, words_of(rows[0], (0, 2)))


def test_layer_that_is_not_kept():
    bank = tiny.shared(layers=(0, 2))
    part = bank.split("dev")
    target = part.target("label")
    with pytest.raises(
        PipelineError, match="reads layer 3, the bank keeps 0, 2: extract with --layers all"
    ):
        plan_head(fusion="last_layer", decoder=None, target=target, kept=(0, 2), last=3, width=8)
    spec, head, *_ = open_("first")
    with pytest.raises(CacheError, match="--layers all"):
        batches.load(part, head, spec.layers, target)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_states_stay_in_the_banks_type_and_batches_are_float32(dtype):
    spec, _, data, rows, *_ = open_("words", dtype=dtype)
    assert data.feed.states.dtype == getattr(torch, dtype)
    given, *_ = next(data.batches(np.array([0]), batch_size=1))
    assert given.states.dtype == torch.float32
    rounded = words_of(rows[0], spec.layers).to(getattr(torch, dtype)).float()
    torch.testing.assert_close(given.states, rounded, rtol=2**-7, atol=1e-3)


def test_order_is_a_function_of_seed_and_epoch():
    feed = open_("words", split="train")[2].feed
    n = feed.n_examples
    orders = {(s, e): feed.order(seed=s, epoch=e).tolist() for s in (0, 1) for e in (1, 2)}
    assert all(sorted(found) == list(range(n)) for found in orders.values())
    assert len({tuple(found) for found in orders.values()}) == 4
    assert feed.order(seed=1, epoch=2).tolist() == orders[1, 2]


def test_order_reads_every_block_once_and_shuffles_within():
    feed = open_("words", split="train")[2].feed
    assert feed.split.n_blocks > 2
    blocks = {tuple(dict.fromkeys(feed.block[feed.order(seed=0, epoch=e)])) for e in range(1, 9)}
    assert all(len(found) == feed.split.n_blocks for found in blocks)
    assert len(blocks) > 1
    found = feed.order(seed=0, epoch=1)
    assert (np.diff(found[feed.block[found] == 0]) < 0).any()


@pytest.mark.parametrize("name", HEADS)
@pytest.mark.parametrize("size", [1, 7, 50, 500])
def test_streamed_batches_equal_resident_ones(name, size):
    spec, head, resident, *_ = open_(name, split="train")
    part = tiny.shared().split("train")
    target = part.target(HEADS[name][0])
    notes = []
    streamed = batches.load(part, head, spec.layers, target, Feeds(memory_bytes=1000, note=notes.append))
    assert isinstance(streamed.feed, Streamed)
    assert "they are streamed" in notes[0]
    for sequence in (resident.feed.order(seed=3, epoch=1), np.arange(resident.n_examples)):
        pairs = zip(
            resident.batches(sequence, batch_size=size),
            streamed.batches(sequence, batch_size=size),
            strict=True,
        )
        for (a, labels, units), (b, other, others) in pairs:
            assert torch.equal(a.states, b.states)
            assert torch.equal(a.lengths, b.lengths)
            assert torch.equal(labels.nan_to_num(-9.0), other.nan_to_num(-9.0))
            assert units.tolist() == others.tolist()


def test_streaming_reads_each_block_once_and_not_far_ahead(monkeypatch):
    data = open_("words", split="train")[2]
    streamed = Streamed(data.feed.split, _selection(data.feed.split), (0, 1), torch.device("cpu"))
    read = []
    real = Split.read_block
    monkeypatch.setattr(
        Split, "read_block", lambda self, block, layers: (read.append(block), real(self, block, layers))[1]
    )
    order = streamed.order(seed=0, epoch=1)
    stream = streamed.batches(order, batch_size=1)
    next(stream)
    time.sleep(0.1)
    assert len(read) <= 2 + AHEAD
    assert len(list(stream)) == streamed.n_examples - 1
    assert sorted(read) == list(range(streamed.split.n_blocks))


def test_stopping_early_stops_the_reading():
    data = open_("words", split="train")[2]
    streamed = Streamed(data.feed.split, _selection(data.feed.split), (0, 1), torch.device("cpu"))
    stream = streamed.batches(streamed.order(seed=0, epoch=1), batch_size=2)
    next(stream)
    stream.close()
    assert not [t for t in threading.enumerate() if t.name.startswith("read-ahead")]


def _selection(split):
    return select(split, build_head(open_("words")[0], seed=0))


def test_states_are_resident_as_long_as_the_memory_lasts():
    part = tiny.shared().split("train")
    spec, head, data, *_ = open_("words", split="train")
    size = data.feed.states.nbytes
    target = part.target("tags")
    for memory_bytes, kind in ((2 * size, Resident), (2 * size - 2, Streamed)):
        feeds = Feeds(memory_bytes=memory_bytes)
        found = batches.load(part, head, spec.layers, target, feeds)
        assert isinstance(found.feed, kind)
        assert batches.load(part, head, spec.layers, target, feeds).feed is found.feed


def test_loading_copies_nothing_of_the_bank_into_the_head():
    _, _, data, *_ = open_("first")
    before = data.feed.states.clone()
    given, *_ = next(data.batches(np.array([0, 1]), batch_size=2))
    given.states.zero_()
    assert torch.equal(data.feed.states, before)


def test_budget_is_what_was_asked_or_what_a_gpu_has(monkeypatch):
    gpu, host = torch.device("cuda"), torch.device("cpu")
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (60 * 2**30, 100 * 2**30))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda _: 50 * 2**30)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda _: 10 * 2**30)
    assert batches.memory_budget(gpu) == 80 * 2**30
    assert batches.memory_budget(host) == 4 * 2**30
    assert batches.memory_budget(gpu, 5) == batches.memory_budget(host, 5) == 5
    assert Feeds(device=gpu).budget_bytes == 80 * 2**30
    assert Feeds(device=gpu, memory_bytes=0).budget_bytes == 0
    assert [home_of(n * 2**30, gpu).type for n in (50, 51)] == ["cuda", "cpu"]


def test_states_taken_in_pieces_are_the_same():
    feed = open_("words", split="train")[2].feed
    assert feed.n_tokens > feed.split.block_tokens
    found = taken_in_pieces(feed.split, feed.position, feed.layers, torch.device("cpu"))
    assert torch.equal(found, feed.states)
