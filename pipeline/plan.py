"""What an extraction would cost, before it is run: tokens, bytes, operations, time."""

import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
from jaxtyping import Int
from numpy import ndarray
from torch.utils.flop_counter import FlopCounterMode

from cache import Recipe
from cache.layout import ALIKE, Keep
from cache.plan import deal
from pipeline.calibrate import encode_seconds
from pipeline.corpus import Corpus
from pipeline.device import one_thread_each
from pipeline.encoder import Encoder
from pipeline.extract import mask_chunks, open_output_layer, recipe_for
from pipeline.labels import find_labels
from pipeline.masking import WHOLE, Masked, check_maskings
from pipeline.output_layer import OutputLayer
from pipeline.room import NARROWER, Lengths, byte_table, free_bytes, lengths_of, recommend, resampled
from pipeline.tokens import Tokens, tokenize

_CHUNK_ROWS = 64
"""Rows are sampled in runs: a run of an Arrow column is read at once."""

_TRUE_ID_BYTES = 4
"""Of masked text, what stood at a predicted position."""

_MEASURE_S = 4.0
"""Seconds of forwards to measure at least, where the data has that many."""


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """What an extraction would cost. `tokens` are those that go through the encoder."""

    tokens: int
    tokens_error: int  # half of a 95 % interval; 0 where every row was tokenized
    kept_tokens: dict[str, int]  # for each choice of tokens
    bytes: dict[str, dict[str, int]]  # of the bank, for each choice of tokens and data type
    seconds: float
    tokens_per_s: float  # of the forwards that were measured
    break_even_bytes_per_s: float  # a store that reads slower costs more time than encoding anew
    flops: int  # of the encoder's forwards, padding included
    free_bytes: int | None
    recommended: dict[str, Any] | None
    examples: int
    layers: list[int]
    precision: str
    batch_tokens: int
    splits: dict[str, dict[str, int]] = field(default_factory=dict)


@dataclass(frozen=True)
class _Sample:
    """Some rows of a split, tokenized."""

    tokens: Tokens  # as they would be encoded: of masked text, chunk after chunk in all maskings
    row_tokens: Int[ndarray, " row"]  # of each row that was tokenized
    n_rows: int  # of the split
    seconds: float  # for all its rows, from those that were tokenized

    @property
    def n_examples(self) -> int:
        """Examples that all rows of the split make."""
        return round(len(self.tokens.length) * self._scale)

    @property
    def n_tokens(self) -> int:
        """Tokens that go through the encoder for all rows of the split."""
        return round(len(self.tokens.input_ids) * self._scale)

    @property
    def _scale(self) -> float:
        return self.n_rows / max(1, len(self.row_tokens))

    def variance(self) -> float:
        """Of the estimated number of tokens, from the spread between runs of rows."""
        length = self.row_tokens * (len(self.tokens.input_ids) / max(1, self.row_tokens.sum()))
        n_runs = -(-len(length) // _CHUNK_ROWS)
        if len(length) >= self.n_rows or n_runs < 2:
            return 0.0
        runs = np.add.reduceat(length, np.arange(n_runs) * _CHUNK_ROWS) / _CHUNK_ROWS
        unseen = 1 - len(length) / self.n_rows
        return float(self.n_rows**2 * np.var(runs[:-1], ddof=min(1, n_runs - 2)) / n_runs * unseen)


def estimate(
    corpus: Corpus,
    encoder: Encoder,
    *,
    store: str = ".",
    keep: Keep = "all",
    dtype: str = "float16",
    layers: Sequence[int] | None = None,
    max_length: int | None = None,
    batch_tokens: int | None = None,
    sample: int | None = 20_000,
    maskings: int = 1,
) -> Estimate:
    """Estimates an extraction of a corpus by an encoder.

    Args:
        corpus: the data.
        encoder: the encoder, on the device and in the precision that it would have.
        store: where the bank would lie; nothing is written.
        keep: the choice of tokens that time and recommendation start from.
        dtype: the data type likewise.
        layers: which layers are kept, all by default.
        max_length: longest example in tokens.
        batch_tokens: padded tokens in one forward, chosen as an extraction chooses it by default.
        sample: rows of a split to tokenize, None for all. Up to that number all are, and counts are exact.
        maskings: how often each chunk of text is masked, for ``masked``.

    Raises:
        PipelineError: the data or a choice is wrong.
    """
    check_maskings(keep, maskings)
    length = encoder.max_length(max_length)
    output_layer, mask = None, None
    if keep == "masked":
        output_layer = open_output_layer(corpus, encoder)
        draw = {"maskings": maskings, "vocabulary": output_layer.vocabulary, "seed": 0}
        mask = partial(mask_chunks, encoder=encoder, max_length=length, draw=draw)
    samples = {name: _sample(corpus, name, encoder, length, sample, mask) for name in corpus.splits}
    tokens = {name: part.tokens for name, part in samples.items()}
    recipe = recipe_for(
        corpus, encoder, store, tokens, keep=keep, dtype=dtype, layers=layers, max_length=length,
        batch_tokens=batch_tokens,
    )  # fmt: skip
    keeps: Sequence[Keep] = NARROWER["masked" if keep == "masked" else "all"]
    lengths = _all_rows(lengths_of(tokens, keeps), samples)
    kept = _kept_tokens(lengths)
    table = byte_table(recipe, lengths, _beside_bytes(corpus, output_layer, kept))
    total = sum(part.n_tokens for part in samples.values())
    largest = max(tokens.values(), key=lambda t: len(t.input_ids))
    rate, flops = _measure(encoder, largest, recipe)
    free = free_bytes(store)
    return Estimate(
        tokens=total,
        tokens_error=round(1.96 * float(np.sqrt(sum(p.variance() for p in samples.values())))),
        kept_tokens=kept,
        bytes=table,
        seconds=total / rate + sum(part.seconds for part in samples.values()),
        tokens_per_s=rate,
        break_even_bytes_per_s=table[keep][dtype] * rate / max(1, total),
        flops=round(flops * total),
        free_bytes=free,
        recommended=recommend(table, free, keep, dtype),
        examples=sum(part.n_examples for part in samples.values()),
        layers=list(recipe.layers),
        precision=recipe.precision,
        batch_tokens=recipe.batch_tokens,
        splits={name: {"examples": p.n_examples, "tokens": p.n_tokens} for name, p in samples.items()},
    )


def _kept_tokens(lengths: Lengths) -> dict[str, int]:
    """Tokens that each choice keeps, in all splits."""
    of_bank = {keep: [part[ALIKE[keep].index(keep)] for part in lengths[keep].values()] for keep in lengths}
    return {keep: int(sum(length.sum() for length in parts)) for keep, parts in of_bank.items()}


def _beside_bytes(corpus: Corpus, output_layer: OutputLayer | None, kept: Mapping[str, int]) -> int:
    """Bytes of the targets, and of the output layer that masked text comes with."""
    if output_layer is not None:
        return output_layer.n_bytes + _TRUE_ID_BYTES * kept["masked"]
    labels = find_labels(corpus)[0]
    return sum(values.nbytes for label in labels for values in label.values.values())


def _sample(
    corpus: Corpus,
    split: str,
    encoder: Encoder,
    max_length: int,
    sample: int | None,
    mask: Callable[[Tokens, str], Masked] | None = None,
) -> _Sample:
    """Tokenizes a split, or runs of its rows at even distances."""
    n_rows, read = len(corpus.split(split)), corpus.reader(split)
    if sample is None or sample >= n_rows:
        firsts = range(0, n_rows, _CHUNK_ROWS)
    else:
        n_runs = max(1, sample // _CHUNK_ROWS)
        firsts = (np.arange(n_runs) * (n_rows / n_runs)).astype(int).tolist()
    batches = [read(first, min(first + _CHUNK_ROWS, n_rows)) for first in firsts]
    began = time.perf_counter()
    tokens = tokenize(encoder.tokenizer, batches, max_length=WHOLE if mask else max_length)
    row_tokens = tokens.length
    if mask is not None:
        tokens = mask(tokens, split).tokens
    seconds = time.perf_counter() - began
    return _Sample(tokens, row_tokens, n_rows, seconds * n_rows / max(1, len(row_tokens)))


def _all_rows(lengths: Lengths, samples: Mapping[str, _Sample]) -> Lengths:
    """Lengths of all rows, those that were not tokenized drawn from the others."""
    return {
        keep: {name: resampled(part, samples[name].n_examples) for name, part in splits.items()}
        for keep, splits in lengths.items()
    }


def _measure(encoder: Encoder, tokens: Tokens, recipe: Recipe) -> tuple[float, float]:
    """Tokens a second and operations a token, from the forwards of some blocks as they would be dealt."""
    tokens = tokens.pieces
    blocks = _blocks(tokens, recipe)

    def run(encoder: Encoder, rows: Int[ndarray, " row"]) -> float:
        return encode_seconds(encoder, tokens, rows, recipe.layers, recipe.batch_tokens)

    def rate(encoder: Encoder) -> float:
        seconds, done = 0.0, 0
        while seconds < _MEASURE_S and (rows := next(waiting, None)) is not None:
            seconds += run(encoder, rows)
            done += int(tokens.length[rows].sum())
        return done / max(seconds, 1e-9)

    encoders = encoder.side_by_side(len(blocks))
    with one_thread_each(encoder.device), ThreadPoolExecutor(len(encoders)) as pool:
        flops = _flops(partial(run, encoder), blocks[0]) / max(1, int(tokens.length[blocks[0]].sum()))
        waiting = iter(blocks)  # of all threads: each takes the next block
        return max(1.0, sum(pool.map(rate, encoders))), flops


def _blocks(tokens: Tokens, recipe: Recipe) -> list[Int[ndarray, " row"]]:
    """The rows of each block."""
    plan = deal(tokens.lengths(recipe.keep), block_tokens=recipe.block_tokens, seed=recipe.seed)
    return [plan.row[plan.examples(block)] for block in range(plan.n_blocks)] or [plan.row]


def _flops(run: Callable[[ndarray], float], rows: ndarray) -> int:
    """Operations of the products of a forward; this pass also warms the encoder up."""
    with FlopCounterMode(display=False) as counter:
        run(rows)
    return int(counter.get_total_flops())
