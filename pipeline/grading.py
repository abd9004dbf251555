"""What grades predictions beyond their labels: the texts of answers and of options, whole questions.

The texts come from beside a target; `pipeline.answers` says how they got there.
"""

import itertools
import json
import re
import string
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from jaxtyping import Float64, Int
from numpy import ndarray

from cache import Target
from cache.targets import spans

_ARTICLES = re.compile(r"\b(a|an|the)\b")
_PUNCTUATION = str.maketrans("", "", string.punctuation)


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


class AnswerTexts:
    """The text side of a span target: scores predicted spans. Nothing is read before it is asked for.

    Args:
        read: gives what is kept beside the target, see `pipeline.answers.Located`.
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
    text: ndarray  # see `pipeline.answers.packed`
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
