"""The rows of a task as tokens and labels, and what scores predictions of them."""

import hashlib
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from jaxtyping import Int
from numpy import ndarray

from cache import Target
from cache.targets import spans
from pipeline import metrics
from pipeline.grading import grader
from pipeline.metrics import Texts
from pipeline.tokens import Tokens


@dataclass(frozen=True, kw_only=True)
class Examples:
    """One split of one task."""

    task: int  # its number among the tasks that are learned together
    tokens: Tokens
    target: Target  # labels in the order of the rows
    answers: tuple[tuple[int, ...], ...] = ()  # tokens of what to say for each row, from text to text
    cut: int = 0  # answered rows whose answer stands in no token

    def __len__(self) -> int:
        return len(self.tokens.length)

    @cached_property
    def labelled(self) -> Int[ndarray, " row"]:
        """Units with a label in each row: 0 or 1, or the number of tagged words or predicted tokens.

        A question whose options are all wrong has nothing to learn from.
        """
        values, kind = self.target.values, self.target.kind
        if kind == "span":
            return np.min(values >= 0, axis=1).astype(np.int64)
        has_label = ~np.isnan(values) if kind == "float" else values >= int(kind == "choice")
        if kind not in ("tags", "choice", "token"):
            return has_label.astype(np.int64)
        units = self.tokens.kept_length("masked") if kind == "token" else self.tokens.n_words
        found: ndarray = np.diff(spans(has_label.astype(np.int64))[spans(units)])
        return np.where(found > 0, 1, 0) if kind == "choice" else found

    @cached_property
    def grader(self) -> Texts | None:
        """What scores answers and questions; one for all epochs, for it remembers what it has compared."""
        return grader(self.target, self.target.extra, self.tokens.n_words)

    def scores(self, predictions: ndarray) -> dict[str, float]:
        """All scores that apply, of one prediction for each unit."""
        target = self.target
        scores = metrics.report(
            predictions=predictions[None],
            gold=target.values,
            names=target.names,
            lengths=self.tokens.n_words if target.kind in ("tags", "choice") else None,
            kind=target.kind,
            answers=self.grader,
        )
        return {name: float(values[0]) for name, values in scores.items()}

    def sequence_lengths(self, rows: Int[ndarray, " chosen"]) -> Int[ndarray, " sequence"]:
        """Tokens of each sequence of some rows: of the rows, or of their options."""
        return self.tokens.pieces.length[self.tokens.sequences(rows)[0]]

    @property
    def sha256(self) -> str:
        """Fingerprint of all that is learned from or scored: tokens, labels, what grades answers."""
        tokens, target = self.tokens, self.target
        digest = hashlib.sha256(
            repr((target.kind, target.names, self.answers, sorted(target.extra))).encode()
        )
        arrays = [
            tokens.input_ids,
            tokens.word_id,
            tokens.kind,
            tokens.start,
            tokens.n_words,
            target.values,
        ]
        arrays += [target.extra[name] for name in sorted(target.extra)]
        arrays += [array for array in (tokens.predicted, tokens.piece) if array is not None]
        for array in arrays:
            digest.update(np.ascontiguousarray(array).data)
        return digest.hexdigest()

    @cached_property
    def unit_of_token(self) -> Int[ndarray, " token"]:
        """For masked text: the place of each predicted token among all of them."""
        return np.cumsum(self.tokens.kept("masked")) - 1

    @cached_property
    def trainable(self) -> Int[ndarray, " chosen"]:
        """Rows to learn from: those with a label and a token."""
        return np.flatnonzero((self.labelled > 0) & (self.tokens.length > 0))
