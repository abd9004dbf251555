"""Text for masked language models: running text in chunks, some tokens of which are to be predicted.

Which tokens those are is a function of the seed, the masking's number and the split alone. This module
knows tokens; it knows no encoder.
"""

import itertools
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from jaxtyping import Bool, Int, UInt64
from numpy import ndarray

from cache.fingerprint import hash_texts
from cache.layout import Keep, Kind
from pipeline.corpus import Corpus
from pipeline.errors import PipelineError
from pipeline.tokens import Batch, Tokens, tokenize

PREDICTED_FRAC, MASKED_FRAC, RANDOM_FRAC = 0.15, 0.8, 0.1
"""Share of the tokens that are predicted; and of these, those replaced by the mask and by any token."""

WHOLE = 2**30
"""A longest example that no text reaches."""


def check_maskable(
    corpus: Corpus, tokenizer: Any, targets: Sequence[str] | None, *, flag: str = "--keep masked"
) -> None:
    """Refuses what cannot be masked.

    Args:
        corpus: the text.
        tokenizer: of the encoder.
        targets: columns of labels that were asked for.
        flag: that asked for masks, for the messages.

    Raises:
        PipelineError: the rows are no plain texts, the tokenizer has no mask, or labels were asked for.
    """
    if corpus.text is None or corpus.text_pair is not None or corpus.options is not None:
        raise PipelineError(
            f"{flag} reads plain text, {corpus.name} has "
            f"{'words' if corpus.words else 'pairs'}: name one column of texts by --text"
        )
    if tokenizer.mask_token_id is None:
        raise PipelineError(
            f"{flag}: the tokenizer has no mask token: use an encoder that was trained with one"
        )
    if targets:
        raise PipelineError(
            f"{flag} has the target 'token' and no other, {targets[0]!r} was asked: leave --target out"
        )


def check_maskings(keep: Keep, maskings: int) -> None:
    """Refuses several maskings of what is not masked.

    Raises:
        PipelineError: they were asked for.
    """
    if maskings != 1 and keep != "masked":
        raise PipelineError(f"--maskings {maskings}: only --keep masked has any, asked was --keep {keep}")


def chunked(tokenizer: Any, batches: Sequence[Batch] | Any, *, max_length: int) -> Tokens:
    """The texts of a split, tokenized whole and joined; see `chunks`."""
    return chunks(tokenize(tokenizer, batches, max_length=WHOLE), max_length=max_length)


def chunks(tokens: Tokens, *, max_length: int) -> Tokens:
    """The rows one after the other, cut into chunks; each gets the special tokens.

    All chunks but the last are `max_length` tokens long. Rows that are empty add nothing.

    Raises:
        PipelineError: `max_length` has no room for more than the special tokens.
    """
    inner = tokens.kind != Kind.SPECIAL
    before, after = _frame(tokens, inner)
    room = max_length - len(before) - len(after)
    if room < 1:
        raise PipelineError(
            f"--max-length {max_length}: the encoder adds {len(before) + len(after)} special tokens, give "
            f"{max_length - room + 1} or more"
        )
    ids, kind = tokens.input_ids[inner], tokens.kind[inner]
    cuts = range(0, len(ids), room)
    framed = [np.concatenate([before, ids[cut : cut + room], after]) for cut in cuts]
    kinds = [_framed_kind(kind[cut : cut + room], len(before), len(after)) for cut in cuts]
    word_id = [np.where(k == Kind.SPECIAL, -1, np.cumsum(k == Kind.WORD) - 1) for k in kinds]
    lengths = np.array([len(chunk) for chunk in framed], dtype=np.int64)
    empty = np.empty(0, np.int32)
    return Tokens(
        input_ids=np.concatenate([*framed, empty]).astype(np.int32),
        word_id=np.concatenate([*word_id, empty]).astype(np.int32),
        kind=np.concatenate([*kinds, empty]).astype(np.uint8),
        type_id=np.zeros(int(lengths.sum()), dtype=np.uint8),
        start=np.concatenate([[0], np.cumsum(lengths)]),
        n_words=np.array([(k == Kind.WORD).sum() for k in kinds], dtype=np.int32),
        cut=np.zeros(len(kinds), dtype=np.int32),
        empty=np.zeros(len(kinds), dtype=np.int32),
    )


def _frame(tokens: Tokens, inner: Bool[ndarray, " token"]) -> tuple[ndarray, ndarray]:
    """The special tokens before and after a text."""
    for first, stop in zip(tokens.start[:-1], tokens.start[1:], strict=True):
        own = np.flatnonzero(inner[first:stop])
        if len(own):
            ids = tokens.input_ids[first:stop]
            return ids[: own[0]], ids[own[-1] + 1 :]
    return tokens.input_ids[:0], tokens.input_ids[:0]


def _framed_kind(kind: ndarray, before: int, after: int) -> ndarray:
    """Kinds of a chunk's tokens; one that begins amid a word begins with a word of its own."""
    kind = kind.copy()
    kind[:1] = Kind.WORD
    return np.pad(kind, (before, after), constant_values=Kind.SPECIAL)


@dataclass(frozen=True, kw_only=True)
class Masked:
    """Chunks in several maskings; masking m of chunk i is row m * (number of chunks) + i."""

    tokens: Tokens  # what the encoder sees
    true_ids: Int[ndarray, " token"]  # what stood there

    @property
    def labels(self) -> Int[ndarray, " predicted"]:
        """The true token at every predicted position, row after row."""
        return self.true_ids[self.tokens.kept("masked")].astype(np.int32)

    def hashes(self) -> UInt64[ndarray, " row"]:
        """A hash of each row: of the true tokens and of those the encoder sees."""
        rows = itertools.pairwise(self.tokens.start)
        return hash_texts(
            [self.true_ids[a:b].tolist(), self.tokens.input_ids[a:b].tolist()] for a, b in rows
        )


def masked(
    tokens: Tokens, *, mask_id: int, vocabulary: int, maskings: int, seed: int, split: str
) -> Masked:
    """Draws the tokens to predict: 15 %, of which 80 % are masked, 10 % any token and 10 % left (BERT).

    Each token is drawn for itself, as `transformers`' collator does; special tokens never are.

    Args:
        tokens: of the chunks.
        mask_id: token that stands for a masked one.
        vocabulary: tokens that may stand for another.
        maskings: how often each chunk is masked.
        seed: of the draw.
        split: its name, so that splits of like text are not masked alike.

    Raises:
        PipelineError: fewer than one masking is asked.
    """
    if maskings < 1:
        raise PipelineError(f"--maskings {maskings}: give 1 or more")
    ids, predicted = [], []
    for number in range(maskings):
        random = np.random.default_rng([seed, number, zlib.crc32(split.encode())])
        chosen = (random.random(len(tokens.kind)) < PREDICTED_FRAC) & (tokens.kind != Kind.SPECIAL)
        share = random.random(len(tokens.kind))
        anything = random.integers(vocabulary, size=len(tokens.kind))
        seen = np.where(share < MASKED_FRAC, mask_id, tokens.input_ids)
        seen = np.where((share >= MASKED_FRAC) & (share < MASKED_FRAC + RANDOM_FRAC), anything, seen)
        ids.append(np.where(chosen, seen, tokens.input_ids).astype(np.int32))
        predicted.append(chosen)
    lengths = np.tile(tokens.length, maskings)
    return Masked(
        tokens=replace(
            tokens,
            input_ids=np.concatenate(ids),
            word_id=np.tile(tokens.word_id, maskings),
            kind=np.tile(tokens.kind, maskings),
            type_id=np.tile(tokens.type_id, maskings),
            start=np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)]),
            n_words=np.tile(tokens.n_words, maskings),
            cut=np.tile(tokens.cut, maskings),
            empty=np.tile(tokens.empty, maskings),
            predicted=np.concatenate(predicted),
        ),
        true_ids=np.tile(tokens.input_ids, maskings),
    )
