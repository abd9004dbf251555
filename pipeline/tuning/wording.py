"""Labels as text and text as labels, for models from text to text.

A class is said by its text (`pipeline.tuning.verbalizer`), a number rounded, an option by its number
counted from 0, an answer as it stands in its text.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Bool, Float
from numpy import ndarray

from cache.targets import TargetKind, spans
from pipeline.errors import PipelineError
from pipeline.grading import AnswerTexts
from pipeline.tuning.examples import Examples
from pipeline.tuning.folder import TaskSpec
from pipeline.tuning.verbalizer import spell

SAYABLE_KINDS = ("class", "float", "span", "choice")
"""Kinds of targets that can be said."""

_LEVELS = 25
"""Steps that the labels of a column of numbers span: 0.2 for STS-B's 0 to 5, as in T5's paper."""

_LONGEST = {"float": 16, "choice": 8, "span": 30}
"""Tokens that are generated at most; for answers as many as the decoder `span` predicts."""


@dataclass(frozen=True, kw_only=True)
class Wording:
    """How the labels of one task are said and read."""

    target: str
    kind: TargetKind
    longest: int  # tokens that are generated at most
    texts: tuple[str, ...] = ()  # of the classes
    spelled: tuple[str, ...] = ()  # the same as generation spells them
    step: float | None = None  # numbers are said as multiples of it

    def answers(self, examples: Examples, tokenizer: Any) -> tuple[tuple[int, ...], ...]:
        """The tokens of what is to be said for each row; none where it has no label.

        Raises:
            PipelineError: the tokenizer cannot spell a number.
        """
        said = self.say(examples)
        distinct = sorted({text for text in said if text is not None})
        tokens = tokenizer(text_target=distinct)["input_ids"] if distinct else []
        if self.kind in ("float", "choice"):
            back = tokenizer.batch_decode(tokens, skip_special_tokens=True)
            for text, spelled in zip(distinct, map(_plain, back), strict=True):
                if text != spelled:
                    raise PipelineError(
                        f"target {self.target!r}: the tokenizer makes {spelled!r} of {text!r}, it cannot "
                        "spell such numbers: use an encoder such as BERT for it"
                    )
        known: dict[str | None, tuple[int, ...]] = dict(zip(distinct, map(tuple, tokens), strict=True))
        return tuple(known.get(text, ()) for text in said)

    def say(self, examples: Examples) -> list[str | None]:
        """The text of each row's label; None where it has none."""
        values = examples.target.values
        if self.kind == "class":
            return [self.texts[label] if label >= 0 else None for label in values]
        if self.kind == "float":
            assert self.step is not None
            return [None if np.isnan(value) else number_text(float(value), self.step) for value in values]
        if self.kind == "span":
            return _answers(examples)
        questions = np.split(values, spans(examples.tokens.n_words)[1:-1])
        return [str(int(flags.argmax())) if (flags == 1).any() else None for flags in questions]

    def read(self, said: Sequence[str], examples: Examples) -> ndarray:
        """What was said as predictions: those of a decoder, or the texts themselves of answers.

        Where it cannot be read: -1 for a class, NaN for a number, no option taken of a choice.
        """
        texts = [_plain(text) for text in said]
        if self.kind == "span":
            return np.array(texts, dtype=object)
        if self.kind == "float":
            return np.array([_number(text) for text in texts], dtype=np.float64)
        if self.kind == "class":
            numbers = {text: number for number, text in enumerate(self.spelled)}
            return np.array([numbers.get(text, -1) for text in texts], dtype=np.int64)
        counts = examples.tokens.n_words
        first, taken = spans(counts), np.zeros(int(counts.sum()), dtype=np.int64)
        for row, text in enumerate(texts):
            if text.isdecimal() and int(text) < counts[row]:
                taken[first[row] + int(text)] = 1
        return taken

    def report(self, guess: ndarray, examples: Examples) -> dict[str, float]:
        """All scores of a split that apply, and the share of outputs that cannot be read.

        Such an output is wrong. For a number it counts as the label of the split that is farthest from the
        right one: a correlation has no place for a missing one.
        """
        if self.kind == "span":
            assert isinstance(examples.grader, AnswerTexts)
            return examples.grader.score_texts(guess.tolist())
        unread = self._unread(guess, examples)
        if self.kind == "float":
            guess = np.where(unread, _farthest(examples.target.values), guess)
        return {**examples.scores(guess), "unparsable": 100.0 * float(np.mean(unread))}

    def _unread(self, guess: ndarray, examples: Examples) -> Bool[ndarray, " row"]:
        if self.kind == "float":
            return np.isnan(guess)
        if self.kind == "class":
            return np.asarray(guess < 0)
        return np.diff(spans(guess)[spans(examples.tokens.n_words)]) == 0


def wording_of(task: TaskSpec, tokenizer: Any) -> Wording:
    """How a task's labels are said.

    Raises:
        PipelineError: the tokenizer cannot tell two classes apart.
    """
    kind: Any = task.kind
    if kind != "class":
        return Wording(target=task.target, kind=kind, longest=_LONGEST[kind], step=task.step)
    tokens, spelled = spell(tokenizer, task.target, task.texts)
    longest = 1 + max(map(len, tokens))
    return Wording(target=task.target, kind=kind, longest=longest, texts=task.texts, spelled=tuple(spelled))


def step_of(values: Float[ndarray, " row"]) -> float:
    """What numbers are rounded to: 1, 2 or 5 times a power of ten, near a 25th of the labels' range.

    The T5 paper rounds STS-B's 0 to 5 to multiples of 0.2 (Raffel et al. 2020, section 2.4).

    >>> step_of(np.array([0.0, 5.0, np.nan])), step_of(np.array([1.0, 100.0]))
    (0.2, 5.0)
    """
    known = values[np.isfinite(values)].astype(np.float64)
    wanted = float(np.ptp(known)) / _LEVELS if len(known) else 0.0
    if not wanted:
        return 1.0
    power = math.floor(math.log10(wanted))
    steps = [float(f"{digit}e{power + more}") for digit, more in ((1, 0), (2, 0), (5, 0), (1, 1))]
    return min(steps, key=lambda step: abs(math.log(step / wanted)))


def number_text(value: float, step: float) -> str:
    """A number as text, rounded to a multiple of a step.

    >>> number_text(2.57, 0.2), number_text(-0.04, 0.2), number_text(37.0, 5.0)
    ('2.6', '0.0', '35')
    """
    decimals = max(0, -math.floor(math.log10(step) + 1e-9))
    return f"{round(round(value / step) * step, decimals) + 0.0:.{decimals}f}"


def _answers(examples: Examples) -> list[str | None]:
    """The first answer of each row that stands in the tokens that are left of its text."""
    texts, found = examples.grader, []
    assert isinstance(texts, AnswerTexts)
    for row, (first, last) in enumerate(examples.target.values.tolist()):
        whole = texts.span_text(row, first, last)
        answers = texts.text_and_answers(row)[1]
        found.append(next((a for a in answers if a in whole), None) if first >= 0 else None)
    return found


def _number(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        return math.nan
    return value if math.isfinite(value) else math.nan


def _farthest(gold: Float[ndarray, " row"]) -> Float[ndarray, " row"]:
    """For every label the least or the greatest one, whichever is farther away."""
    known = gold[~np.isnan(gold)]
    low, high = (known.min(), known.max()) if len(known) else (0.0, 0.0)
    return np.where(gold - low > high - gold, low, high).astype(np.float64)


def _plain(text: str) -> str:
    return " ".join(text.split())
