"""Labels of questions: answers that are spans of a text, and options of which some are right.

An answer is found in the text by its characters, then in the tokens through the tokenizer's offsets. The
texts stay beside the target for `pipeline.grading`: exact match and F1 compare texts and not positions.
"""

import json
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from jaxtyping import Int, Int32
from numpy import ndarray

from cache.targets import spans
from pipeline.corpus import Corpus
from pipeline.corpus import Split as Rows
from pipeline.errors import PipelineError
from pipeline.tokens import encode_batch

_LOOK_AT_ROWS = 100
"""A column of lists of texts that occur in no context of the first rows, this many, holds no answers."""

_BATCH_ROWS = 1024


@dataclass(frozen=True, kw_only=True)
class Answers:
    """The answers of one split, in row order; any of a row's is right."""

    texts: list[list[str]]  # an empty list where a row has no label
    starts: list[list[int]] | None  # character of the context at which each starts, if the data says so


def kind_of(
    corpus: Corpus, column: str, declared: str | None, *, asked: bool
) -> Literal["span", "choice"] | None:
    """Whether a column holds answers or choices; None for any other column.

    Args:
        corpus: the data.
        column: one that is no input.
        declared: what the record of a named task says of the column.
        asked: whether the user named the column.

    Raises:
        PipelineError: the record says so, and the values are of another type.
    """
    types = {split.table[column].type for split in _having(corpus, column)}
    if not types:
        return None
    lists_of_text = types <= {pa.list_(pa.string()), pa.list_(pa.null())}
    numbers = all(pa.types.is_integer(_inner(kind)) for kind in types)
    fits = {
        "span": lists_of_text and corpus.text_pair is not None,
        "choice": numbers and corpus.options is not None,
    }
    if declared is not None:
        if declared in fits and not fits[declared]:
            needs = {
                "span": "lists of texts, and the text they stand in as text_pair",
                "choice": "the number of the right option, or a 1 or 0 for each",
            }[declared]
            raise PipelineError(f"{corpus.name}: column {column!r} must hold {needs}; change the files")
        return declared if declared in fits else None  # type: ignore[return-value]
    if fits["choice"] and (asked or _all_fit_options(corpus, column)):
        return "choice"
    if fits["span"] and (asked or _occur(corpus, column)):
        return "span"
    return None


def _inner(kind: pa.DataType) -> pa.DataType:
    return kind.value_type if pa.types.is_list(kind) else kind


def _having(corpus: Corpus, column: str) -> list[Rows]:
    """The splits that have the column and a value in it."""
    found = [split for split in corpus.splits.values() if column in split.table.column_names]
    return [split for split in found if split.table[column].null_count < len(split)]


def _occur(corpus: Corpus, column: str) -> bool:
    """Whether the first rows' lists have an entry in their context, as answers have."""
    split = _having(corpus, column)[0]
    contexts = corpus.pairs(split.name, slice(0, _LOOK_AT_ROWS)) or []
    lists = split.table[column].slice(0, _LOOK_AT_ROWS).to_pylist()
    return any(
        text and text in context
        for context, texts in zip(contexts, lists, strict=True)
        for text in texts or []
    )


def _all_fit_options(corpus: Corpus, column: str) -> bool:
    try:
        read_choices(corpus, column)
    except PipelineError:
        return False
    return True


def read_choices(corpus: Corpus, column: str) -> dict[str, Int32[ndarray, " option"]]:
    """For every option of every row 1 if it is right, 0 if not, -1 where the row has no label.

    Raises:
        PipelineError: a number names no option, or a list is not as long as the options.
    """
    return {name: _choices(corpus, split, column) for name, split in corpus.splits.items()}


def _choices(corpus: Corpus, split: Rows, column: str) -> Int32[ndarray, " option"]:
    counts = pc.list_value_length(split.table[corpus.options]).to_numpy().astype(np.int64)
    flags = np.full(int(counts.sum()), -1, dtype=np.int32)
    if column not in split.table.column_names:
        return flags
    first = spans(counts)[:-1]
    for row, value in enumerate(split.table[column].to_pylist()):
        if value is None or value == -1:
            continue
        here = slice(int(first[row]), int(first[row] + counts[row]))
        if isinstance(value, int):
            if not 0 <= value < counts[row]:
                raise PipelineError(
                    f"{split.where(row)}: column {column!r}: option {value} of {counts[row]}, counted from "
                    "0; correct the row"
                )
            flags[here] = 0
            flags[here.start + value] = 1
            continue
        if len(value) != counts[row] or not set(value) <= {0, 1}:
            raise PipelineError(
                f"{split.where(row)}: column {column!r}: {value} for {counts[row]} options; give each a "
                "1 or a 0"
            )
        flags[here] = value
    return flags


def read_answers(corpus: Corpus, column: str) -> dict[str, Answers]:
    """The answers of every split. ``<column>_start``, if it is there, says where each starts."""
    found = {}
    for name, split in corpus.splits.items():
        if column not in split.table.column_names:
            found[name] = Answers(texts=[[] for _ in range(len(split))], starts=None)
            continue
        texts = [list(texts or []) for texts in split.table[column].to_pylist()]
        starts = None
        if f"{column}_start" in split.table.column_names:
            starts = [list(row or []) for row in split.table[f"{column}_start"].to_pylist()]
        found[name] = Answers(texts=texts, starts=starts)
    return found


@dataclass(frozen=True, kw_only=True)
class Located:
    """Answers in the tokens of their contexts, in row order."""

    values: Int32[ndarray, "row 2"]  # first and last token among the context's; -1 where there is none
    extra: dict[str, ndarray]  # the texts and the offsets, as the bank keeps them
    cut: int  # answered rows whose answers stand in no token that is left


def locate(corpus: Corpus, split: str, answers: Answers, *, tokenizer: Any, max_length: int) -> Located:
    """Finds the first answer of each row that is there in the tokens of its context.

    Args:
        corpus: the data.
        split: one of its splits.
        answers: of that split.
        tokenizer: a fast `transformers` tokenizer.
        max_length: of an example, as at extraction.

    Raises:
        PipelineError: the tokenizer is a slow one, which has no offsets.
    """
    if not tokenizer.is_fast:
        raise PipelineError(
            f"answers need a fast tokenizer, {type(tokenizer).__name__} is a slow one: use an encoder that "
            "has a tokenizer.json"
        )
    n_rows = len(answers.texts)
    values = np.full((n_rows, 2), -1, dtype=np.int32)
    offsets: list[Int32[ndarray, "token 2"]] = []
    lines: list[bytes] = []
    for first in range(0, n_rows, _BATCH_ROWS):
        rows = slice(first, min(first + _BATCH_ROWS, n_rows))
        texts: Any = corpus.texts(split, rows)
        contexts: Any = corpus.pairs(split, rows)
        offsets += context_offsets(tokenizer, texts, contexts, max_length)
        for row, context in zip(range(n_rows)[rows], contexts, strict=True):
            starts = None if answers.starts is None else answers.starts[row]
            values[row] = _find(context, answers.texts[row], starts, offsets[row])
            lines.append(_line([context, answers.texts[row]]))
    answered = np.array([bool(texts) for texts in answers.texts], dtype=bool)
    return Located(
        values=values,
        extra={
            "offset": np.concatenate([*offsets, np.empty((0, 2), np.int32)]),
            "n_offset": np.array([len(each) for each in offsets], dtype=np.int32),
            **_joined(lines),
        },
        cut=int((answered & (values[:, 0] < 0)).sum()),
    )


def context_offsets(
    tokenizer: Any, texts: Sequence[str], contexts: Sequence[str], max_length: int
) -> list[Int32[ndarray, "token 2"]]:
    """First character and end of each token of each context, as far as `max_length` left them."""
    encoded = encode_batch(tokenizer, texts, contexts, max_length)
    return [_offsets(encoding) for encoding in encoded.encodings]


def _offsets(encoding: Any) -> Int32[ndarray, "token 2"]:
    inside = np.array([s == 1 for s in encoding.sequence_ids], dtype=bool)
    return np.array(encoding.offsets, dtype=np.int32).reshape(-1, 2)[inside]


def _find(
    context: str, texts: Sequence[str], starts: Sequence[int] | None, offsets: Int[ndarray, "token 2"]
) -> tuple[int, int]:
    """First and last token of the first answer that stands whole in the tokens; -1, -1 for none."""
    for k, text in enumerate(texts):
        at = starts[k] if starts is not None and k < len(starts) else -1
        if at < 0 or context[at : at + len(text)] != text:
            at = context.find(text)
        if at < 0 or not text or not len(offsets) or offsets[-1, 1] < at + len(text):
            continue
        first = int(np.searchsorted(offsets[:, 1], at, side="right"))
        last = int(np.searchsorted(offsets[:, 0], at + len(text), side="left")) - 1
        if first <= last:
            return first, last
    return -1, -1


def packed(rows: Sequence[Any]) -> dict[str, ndarray]:
    """Texts of every row as a bank keeps them beside a target."""
    return _joined([_line(row) for row in rows])


def _line(row: Any) -> bytes:
    return json.dumps(row, ensure_ascii=False).encode("utf-8")


def _joined(lines: Sequence[bytes]) -> dict[str, ndarray]:
    return {
        "text": np.frombuffer(b"".join(lines), dtype=np.uint8),
        "n_text": np.array([len(line) for line in lines], dtype=np.int32),
    }


def grouped(keys: Sequence[Hashable]) -> dict[str, ndarray]:
    """The number of each row's group, as a bank keeps it; rows of equal keys are a group."""
    numbers: dict[Hashable, int] = {}
    group = [numbers.setdefault(key, len(numbers)) for key in keys]
    return {"group": np.array(group, dtype=np.int32), "n_group": np.ones(len(group), dtype=np.int32)}
