"""Rows -> tokens: flat arrays of a split's sub-words, and which of them a bank keeps."""

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
from jaxtyping import Bool, Int, UInt8
from numpy import ndarray

from cache.layout import ALIKE, Keep, Kind
from cache.targets import ranges, spans
from pipeline.errors import PipelineError
from pipeline.mapped import Column, let_go

_COLUMNS = {"input_ids": np.int32, "word_id": np.int32, "kind": np.uint8, "type_id": np.uint8}
"""The arrays with one entry a token."""

Inputs = Sequence[str] | Sequence[Sequence[str]]
Batch = tuple[Inputs, Inputs | None]
"""Texts (or lists of words) of some rows, and their pairs; or for each a list of options."""


@dataclass(frozen=True, kw_only=True)
class Tokens:
    """The tokens of some rows, one row after the other. Row i has ``start[i] : start[i + 1]``."""

    input_ids: Int[ndarray, " token"]
    word_id: Int[ndarray, " token"]  # word within its row and sequence, -1 for special tokens
    kind: UInt8[ndarray, " token"]  # see `cache.layout.Kind`
    type_id: UInt8[ndarray, " token"]  # segment, for encoders that ask for it
    start: Int[ndarray, " boundary"]
    n_words: Int[ndarray, " row"]  # words of the row's first sequence, those without a token too; options
    cut: Int[ndarray, " row"]  # words that `max_length` cut off, of pairs too
    empty: Int[ndarray, " row"]  # words that the tokenizer makes no token of
    predicted: Bool[ndarray, " token"] | None = None  # of masked text: the positions to predict
    piece: Int[ndarray, " piece_end"] | None = None  # of the sequences to encode, where rows have several

    @property
    def words_cut(self) -> int:
        """Words of all rows that `max_length` cut off."""
        return int(self.cut.sum())

    @property
    def words_empty(self) -> int:
        """Words of all rows that the tokenizer makes no token of."""
        return int(self.empty.sum())

    @cached_property
    def length(self) -> Int[ndarray, " row"]:
        """Tokens of each row."""
        return np.diff(self.start)

    def kept(self, keep: Keep) -> Bool[ndarray, " token"]:
        """Which tokens a bank of that `keep` holds."""
        if keep == "all":
            return np.ones(len(self.kind), dtype=bool)
        first = np.zeros(len(self.kind), dtype=bool)
        first[self.start[:-1][self.length > 0]] = True
        first |= self.kind == Kind.OPTION
        if keep == "first":
            return first
        if keep == "words":
            return first | (self.kind == Kind.WORD) | (self.kind == Kind.PAIR_WORD)
        assert self.predicted is not None, "text that was not masked"
        return self.predicted

    @cached_property
    def pieces(self) -> "Tokens":
        """The same tokens with each sequence of its own a row: what an encoder is given."""
        if self.piece is None:
            return self
        none = np.zeros(len(self.piece) - 1, dtype=np.int32)
        return replace(self, start=self.piece, n_words=none, cut=none, empty=none, piece=None)

    def pieces_of(
        self, rows: Int[ndarray, " chosen"], start: Int[ndarray, " chosen"], kept: Bool[ndarray, " token"]
    ) -> tuple[Int[ndarray, " piece"], Int[ndarray, " piece"]]:
        """The sequences of some rows, by their number in `pieces`, and where their kept tokens go.

        Args:
            rows: which rows.
            start: where the kept tokens of each of those rows begin.
            kept: which tokens of all rows are kept.
        """
        if self.piece is None:
            return rows, start
        pieces, count = self._pieces(self.piece, rows)
        length = self.piece[pieces + 1] - self.piece[pieces]
        before = spans(kept[ranges(self.piece[pieces], length)].view(np.int8))[spans(length)[:-1]]
        # Kept tokens of the pieces before, less those of the rows before.
        return pieces, before + np.repeat(start - before[spans(count)[:-1]], count)

    def _pieces(
        self, piece: Int[ndarray, " piece_end"], rows: Int[ndarray, " chosen"]
    ) -> tuple[Int[ndarray, " piece"], Int[ndarray, " chosen"]]:
        """Numbers of the sequences of some rows, and how many each row has."""
        first = np.searchsorted(piece, self.start[rows])
        count = np.searchsorted(piece, self.start[rows + 1]) - first
        return ranges(first, count), count

    def kept_length(self, keep: Keep) -> Int[ndarray, " row"]:
        """Tokens of each row that a bank of that `keep` holds."""
        counts = self.length.astype(np.int32)
        if keep != "all":
            some = counts > 0
            counts[some] = np.add.reduceat(self.kept(keep), self.start[:-1][some], dtype=np.int32)
        return counts

    def lengths(self, keep: Keep) -> Int[ndarray, "keep row"]:
        """Tokens of each row in each of the banks that are dealt as one of that `keep` is."""
        return np.stack([self.kept_length(alike) for alike in ALIKE[keep]])

    def release(self) -> None:
        """Lets go of the memory of what lies in a file; it is read again when it is needed."""
        for array in (self.input_ids, self.word_id, self.kind, self.type_id):
            if isinstance(array, np.memmap):
                let_go(array._mmap)  # type: ignore[attr-defined]

    def of_rows(self, rows: Int[ndarray, " one"]) -> tuple["Tokens", Int[ndarray, " some"]]:
        """The tokens of some rows alone, and where they are among all."""
        length = self.length[rows]
        at = ranges(self.start[rows], length)
        part = Tokens(
            input_ids=self.input_ids[at],
            word_id=self.word_id[at],
            kind=self.kind[at],
            type_id=self.type_id[at],
            start=spans(length),
            n_words=self.n_words[rows],
            cut=self.cut[rows],
            empty=self.empty[rows],
            predicted=None if self.predicted is None else self.predicted[at],
            piece=None if self.piece is None else spans(self._piece_lengths(self.piece, rows)),
        )
        return part, at

    def _piece_lengths(
        self, piece: Int[ndarray, " piece_end"], rows: Int[ndarray, " chosen"]
    ) -> Int[ndarray, " piece"]:
        pieces, _ = self._pieces(piece, rows)
        return piece[pieces + 1] - piece[pieces]


def tokenize(tokenizer: Any, batches: Iterable[Batch], *, max_length: int) -> Tokens:
    """Tokenizes rows with the special tokens of the encoder, cut to `max_length` tokens.

    Args:
        tokenizer: a `transformers` tokenizer; a fast one is needed for words.
        batches: the rows, some at a time.
        max_length: tokens, special ones included; the longer of a pair is cut first.

    Raises:
        PipelineError: the rows are words and the tokenizer is not a fast one, or `max_length` has no
            room for more than the special tokens.
    """
    parts = (
        _in_questions(_rows_of(tokenizer, texts, encoded), counts)
        for (texts, counts), encoded in _encoded_ahead(tokenizer, map(_flat_options, batches), max_length)
    )
    with ExitStack() as files:
        return _join(parts, {name: Column(files, dtype) for name, dtype in _COLUMNS.items()})


def _flat_options(batch: Batch) -> tuple[Inputs, Inputs | None, list[int]]:
    """A batch with a row for each option, and how many options each question has; none where it has no."""
    texts, options = batch
    if options is None or not len(options) or isinstance(options[0], str):
        return texts, options, []
    repeated: Any = [text for text, own in zip(texts, options, strict=True) for _ in own]
    return repeated, [option for own in options for option in own], [len(own) for own in options]


def _encoded_ahead(
    tokenizer: Any, batches: Iterable[tuple[Inputs, Inputs | None, list[int]]], max_length: int
) -> Iterator[tuple[tuple[Inputs, list[int]], Any]]:
    """Texts and what the tokenizer makes of them; it works on the next batch while this one is read."""
    before: tuple[tuple[Inputs, list[int]], Future[Any]] | None = None
    # One thread: a tokenizer is told of truncation by being changed, which two must not do at a time.
    with ThreadPoolExecutor(1, thread_name_prefix="tokenizer") as pool:
        for texts, pairs, counts in batches:
            now = (texts, counts), pool.submit(_encode, tokenizer, texts, pairs, max_length)
            if before:
                yield before[0], before[1].result()
            before = now
        if before:
            yield before[0], before[1].result()


def _in_questions(rows: Tokens, counts: list[int]) -> Tokens:
    """Rows of one option each joined to questions; as they are where there are no options.

    The first token of each option is marked and numbered.
    """
    if not counts:
        return rows
    ends = spans(np.asarray(counts))
    word_id, kind = rows.word_id.copy(), rows.kind.copy()
    word_id[rows.start[:-1]] = ranges(np.zeros(len(counts), dtype=np.int64), np.asarray(counts))
    kind[rows.start[:-1]] = Kind.OPTION
    return replace(
        rows,
        word_id=word_id,
        kind=kind,
        start=rows.start[ends],
        n_words=np.asarray(counts, dtype=np.int32),
        cut=np.diff(spans(rows.cut)[ends]).astype(np.int32),
        empty=np.diff(spans(rows.empty)[ends]).astype(np.int32),
        piece=rows.start,
    )


def _join(parts: Iterable[Tokens], columns: dict[str, Column]) -> Tokens:
    small: dict[str, list[ndarray]] = {n: [np.empty(0, np.int32)] for n in ("n_words", "cut", "empty")}
    lengths, pieces = [np.empty(0, np.int64)], [np.empty(0, np.int64)]
    for part in parts:
        for name, column in columns.items():
            column.add(getattr(part, name))
        for name, values in small.items():
            values.append(getattr(part, name))
        lengths.append(part.length)
        pieces += [] if part.piece is None else [np.diff(part.piece)]
    return Tokens(
        **{name: column.array() for name, column in columns.items()},
        **{name: np.concatenate(values) for name, values in small.items()},
        start=spans(np.concatenate(lengths)),
        piece=spans(np.concatenate(pieces)) if len(pieces) > 1 else None,
    )


def _encode(tokenizer: Any, texts: Inputs, pairs: Inputs | None, max_length: int) -> Any:
    words = bool(len(texts)) and not isinstance(texts[0], str)
    if words and not tokenizer.is_fast:
        raise PipelineError(
            f"rows of words need a fast tokenizer, {type(tokenizer).__name__} is a slow one: "
            "use an encoder that has a tokenizer.json, or rows of plain text"
        )
    _check_room(tokenizer, max_length, pair=pairs is not None)
    return encode_batch(tokenizer, texts, pairs, max_length)


def encode_batch(tokenizer: Any, texts: Inputs, pairs: Inputs | None, max_length: int) -> Any:
    """What a tokenizer makes of some rows; every use of it must cut the same way."""
    return tokenizer(
        list(texts),
        list(pairs) if pairs is not None else None,
        is_split_into_words=bool(len(texts)) and not isinstance(texts[0], str),
        truncation=True,
        max_length=max_length,
        padding=False,
        return_attention_mask=False,
        return_special_tokens_mask=True,
        verbose=False,
    )


def _rows_of(tokenizer: Any, texts: Inputs, encoded: Any) -> Tokens:
    """What a tokenizer made of some rows, as one table; few large steps, for there are many rows."""
    ids: Sequence[Sequence[int]] = encoded["input_ids"]
    types: Sequence[Sequence[int]] = encoded.get("token_type_ids") or [[0] * len(row) for row in ids]
    if tokenizer.is_fast:
        words = [encoding.word_ids for encoding in encoded.encodings]
        sequences = [encoding.sequence_ids for encoding in encoded.encodings]
        cut = {i: _cut_words(e) for i, e in enumerate(encoded.encodings) if e.overflowing}
    else:
        words = sequences = [[None if s else 0 for s in row] for row in encoded["special_tokens_mask"]]
        cut = {}
    length = np.array([len(row) for row in ids], dtype=np.int64)
    start, row = spans(length), np.repeat(np.arange(len(length)), length)
    sequence = _flat(sequences, np.int32)
    word = np.where(sequence < 0, -1, _flat(words, np.int32))
    opens = np.ones(len(word), dtype=bool)
    opens[1:] = (word[1:] != word[:-1]) | (sequence[1:] != sequence[:-1]) | (row[1:] != row[:-1])
    kind = np.where(opens, Kind.WORD, Kind.CONTINUATION) + 2 * (sequence == 1)
    kind[word < 0] = Kind.SPECIAL
    own = (sequence == 0) & (word >= 0)
    seen = np.bincount(row[own & opens], minlength=len(length))
    last = np.full(len(length), -1, dtype=np.int64)
    np.maximum.at(last, row[own], word[own])
    for i, lost in cut.items():
        first = [number for part, number in lost if part == 0]
        seen[i] += len(first)
        last[i] = max([last[i], *first])
    of_words = bool(len(texts)) and not isinstance(texts[0], str)
    total = np.array([len(text) for text in texts]) if of_words else last + 1
    return Tokens(
        input_ids=_flat(ids, np.int32),
        word_id=word.astype(np.int32),
        kind=kind.astype(np.uint8),
        type_id=_flat(types, np.uint8),
        start=start,
        n_words=total.astype(np.int32),
        cut=np.array([len(cut.get(i, ())) for i in range(len(length))], dtype=np.int32),
        empty=(total - seen).astype(np.int32),
    )


def _flat(rows: Sequence[Sequence[int | None]], dtype: Any) -> ndarray:
    """The numbers of all rows one after the other, -1 where there is none."""
    return np.fromiter((-1 if n is None else n for row in rows for n in row), dtype)


def _check_room(tokenizer: Any, max_length: int, *, pair: bool) -> None:
    """Below the number of special tokens, tokenizers do not truncate at all."""
    special = tokenizer.num_special_tokens_to_add(pair=pair)
    if max_length <= special:
        raise PipelineError(
            f"--max-length {max_length}: the encoder adds {special} special tokens, "
            f"give {special + 1} or more"
        )


def _cut_words(encoding: Any) -> set[tuple[int, int]]:
    """Sequence and number of each word that truncation left no token of."""
    cut: set[tuple[int, int]] = set()
    for rest in encoding.overflowing:
        cut |= _words(rest)
    return cut - _words(encoding) if cut else cut


def _words(encoding: Any) -> set[tuple[int, int]]:
    pairs = zip(encoding.sequence_ids, encoding.word_ids, strict=True)
    return {(sequence, word) for sequence, word in pairs if None not in (sequence, word)}


def tokenizer_sha256(tokenizer: Any) -> str:
    """Fingerprint of how a tokenizer cuts text, whatever it was last asked to pad or truncate."""
    if tokenizer.is_fast:
        whole = json.loads(tokenizer.backend_tokenizer.to_str())
        whole = {name: value for name, value in whole.items() if name not in ("truncation", "padding")}
    else:
        whole = {"class": type(tokenizer).__name__, "vocabulary": tokenizer.get_vocab()}
    text = json.dumps(whole, sort_keys=True, ensure_ascii=False)
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


def batches_of(read: Callable[[int, int], Batch], n_rows: int, size: int = 1024) -> Iterable[Batch]:
    """Reads rows `size` at a time."""
    return (read(first, min(first + size, n_rows)) for first in range(0, n_rows, size))
