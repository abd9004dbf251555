"""Labels of questions: answers that are spans of a text, and options of which some are right.

An answer is found in the text by its characters, then in the tokens through the tokenizer's offsets. The
texts stay beside the target, because exact match and F1 compare texts and not positions.
"""

import itertools
import json
import re
import string
from collections import Counter
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from jaxtyping import Float64, Int, Int32
from numpy import ndarray

from cache import Target
from cache.targets import spans
from pipeline.corpus import Corpus
from pipeline.corpus import Split as Rows
from pipeline.errors import PipelineError
from pipeline.tokens import encode_batch

_LOOK_AT_ROWS = 100
"""A column of lists of texts that occur in no context of the first rows, this many, holds no answers."""

_BATCH_ROWS = 1024

_ARTICLES = re.compile(r"\b(a|an|the)\b")
_PUNCTUATION = str.maketrans("", "", string.punctuation)


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


class AnswerTexts:
    """The text side of a span target: scores predicted spans. Nothing is read before it is asked for.

    Args:
        read: gives what is kept beside the target, see `Located`.
    """

    def __init__(self, read: Callable[[], Mapping[str, ndarray]]) -> None:
        self._read = read
        self._scored: dict[tuple[int, int, int], tuple[float, float]] = {}

    @cached_property
    def _stored(self) -> Mapping[str, ndarray]:
        return self._read()

    @cached_property
    def _bounds(self) -> tuple[Int[ndarray, " boundary"], Int[ndarray, " boundary"]]:
        return spans(self._stored["n_text"]), spans(self._stored["n_offset"])

    @cached_property
    def _lines(self) -> list[list[Any]]:
        whole, bounds = self._stored["text"].tobytes(), self._bounds[0]
        return [json.loads(whole[a:b].decode("utf-8")) for a, b in itertools.pairwise(bounds)]

    def text_and_answers(self, example: int) -> tuple[str, list[str]]:
        """The context and the answers of an example, in the order of the target."""
        if example >= len(self._lines):  # a row that came later and was given no label
            return "", []
        context, answers = self._lines[example]
        return context, answers

    def span_text(self, example: int, first: int, last: int) -> str:
        """The characters of the context's tokens `first` to `last`; none for -1."""
        if first < 0:
            return ""
        bounds = self._bounds[1]
        offsets = self._stored["offset"][bounds[example] : bounds[example + 1]]
        return self.text_and_answers(example)[0][offsets[first, 0] : offsets[last, 1]]

    def score(self, predictions: Int[ndarray, "head example 2"]) -> dict[str, Float64[ndarray, " head"]]:
        """Exact match and F1 in percent, over the examples that have an answer."""
        totals = np.zeros((len(predictions), 2))
        answered = 0
        for example in range(predictions.shape[1]):
            if not self.text_and_answers(example)[1]:
                continue
            answered += 1
            for head, (first, last) in enumerate(predictions[:, example].tolist()):
                totals[head] += self._of(example, first, last)
        found = 100.0 * totals / max(1, answered)
        return {"span_f1": found[:, 1], "exact_match": found[:, 0]}

    def score_texts(self, predictions: Sequence[str]) -> dict[str, float]:
        """The same scores of one prediction in words for each example."""
        best: list[tuple[float, float]] = []
        for example, predicted in enumerate(predictions):
            if answers := self.text_and_answers(example)[1]:
                best.append(_best(predicted, answers))
        exact, overlap = 100.0 * np.sum(np.reshape(best, (-1, 2)), axis=0) / max(1, len(best))
        return {"span_f1": float(overlap), "exact_match": float(exact)}

    def _of(self, example: int, first: int, last: int) -> tuple[float, float]:
        key = (example, first, last)  # many heads and epochs predict the same
        if key not in self._scored:
            predicted = self.span_text(example, first, last)
            answers = self.text_and_answers(example)[1]
            self._scored[key] = _best(predicted, answers)
        return self._scored[key]


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


def grader(
    target: Target, extra: Mapping[str, ndarray], counts: Int[ndarray, " example"] | None = None
) -> "AnswerTexts | Questions | OptionTexts | None":
    """What scores a target by its texts or questions; None where nothing is kept for that.

    Args:
        target: with its labels.
        extra: what is kept beside it, in the same order.
        counts: options of each example.
    """
    if target.kind == "span" and extra:
        return AnswerTexts(lambda: extra)
    if target.kind == "class" and "group" in extra:
        return Questions(gold=target.values, group=extra["group"])
    if target.kind == "choice" and "text" in extra and counts is not None:
        return OptionTexts(gold=target.values, counts=counts, text=extra["text"], n_text=extra["n_text"])
    return None


@dataclass(frozen=True, kw_only=True)
class Questions:
    """Scores whole questions, each answer of which is an example (MultiRC)."""

    gold: Int[ndarray, " example"]  # -1 where there is no label
    group: Int[ndarray, " grouped"]  # number of each example's question; examples that came later have none

    def score(self, predictions: Int[ndarray, "head example"]) -> dict[str, Float64[ndarray, " head"]]:
        """Percent of the questions whose every labelled example is right."""
        n = len(self.group)
        counted = self.gold[:n] >= 0
        group, gold = self.group[counted], self.gold[:n][counted]
        wrong = [np.bincount(group, weights=row != gold) for row in predictions[:, :n][:, counted]]
        present = np.bincount(group) > 0
        right = np.stack(wrong)[:, present] == 0
        return {"question_exact_match": 100.0 * right.sum(1) / max(1, int(present.sum()))}


@dataclass(frozen=True, kw_only=True)
class OptionTexts:
    """Scores the option taken by its text against those of the right ones (ReCoRD)."""

    gold: Int[ndarray, " option"]  # 1 for a right one, -1 where the example has no label
    counts: Int[ndarray, " example"]
    text: ndarray  # see `packed`
    n_text: Int[ndarray, " having"]

    @cached_property
    def _scores(self) -> list[Float64[ndarray, "_ 2"]]:
        """For every example exact match and F1 of each option; none where no option is right."""
        whole, found = self.text.tobytes(), []
        lines = itertools.pairwise(spans(self.n_text))
        for (a, b), (first, stop) in zip(lines, itertools.pairwise(spans(self.counts)), strict=False):
            texts = json.loads(whole[a:b].decode("utf-8"))
            right = [text for text, flag in zip(texts, self.gold[first:stop], strict=True) if flag == 1]
            found.append(np.array([_best(text, right) for text in texts] if right else np.empty((0, 2))))
        return found

    def score(self, predictions: Int[ndarray, "head option"]) -> dict[str, Float64[ndarray, " head"]]:
        """Exact match and F1 in percent, over the examples with a right option."""
        totals = np.zeros((len(predictions), 2))
        for scores, first in zip(self._scores, spans(self.counts), strict=False):
            totals += (predictions[:, first : first + len(scores)] == 1).astype(np.float64) @ scores
        found = 100.0 * totals / max(1, sum(len(scores) > 0 for scores in self._scores))
        return {"answer_f1": found[:, 1], "exact_match": found[:, 0]}


def _best(predicted: str, answers: Sequence[str]) -> tuple[float, float]:
    """Exact match and F1 with the answer that suits best."""
    return max(exact_match(predicted, a) for a in answers), max(f1(predicted, a) for a in answers)


def normalise(text: str) -> str:
    """SQuAD's form of an answer: lower case, no punctuation, no articles, single spaces.

    >>> normalise("The  U.S. Navy,")
    'us navy'
    """
    return " ".join(_ARTICLES.sub(" ", text.lower().translate(_PUNCTUATION)).split())


def exact_match(predicted: str, answer: str) -> float:
    """1 where both are the same after `normalise`, else 0."""
    return float(normalise(predicted) == normalise(answer))


def f1(predicted: str, answer: str) -> float:
    """F1 of the words that both have, each counted as often as both have it; 0 to 1."""
    ours, theirs = normalise(predicted).split(), normalise(answer).split()
    both = sum((Counter(ours) & Counter(theirs)).values())
    return 2 * both / (len(ours) + len(theirs)) if both else 0.0
