"""Labelled rows as a task of early fusion: their tokens as the backbone takes them, their labels."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np

from pipeline.corpus import Corpus
from pipeline.errors import PipelineError
from pipeline.labels import Labels, locate_labels
from pipeline.tokens import Batch, Tokens, batches_of, tokenize
from pipeline.tuning.backbone import Backbone
from pipeline.tuning.examples import Examples


@dataclass(frozen=True, kw_only=True)
class LabelledText:
    """A corpus with labels of its rows."""

    corpus: Corpus
    labels: Labels
    backbone: Backbone

    def examples(self, split: str, *, task: int, max_length: int) -> Examples:
        """Tokens and labels of a split.

        Raises:
            PipelineError: the split is not there, or none of its rows has a label.
        """
        name = self.corpus.name
        batches = batches_of(self.corpus.reader(split), len(self.corpus.split(split)))
        tokens = read_tokens(self.backbone, batches, max_length=max_length)
        labels = self._located(split, max_length)
        cut = labels.cut.get(split, 0)
        found = Examples(task=task, tokens=tokens, target=labels.target(split), cut=cut)
        if not found.labelled.any():
            why = f"has no label of target {labels.name!r}: name another split"
            if cut:
                why = f"has all {cut} answers beyond --max-length {max_length}: give a larger one"
            raise PipelineError(f"split {split} of {name} {why}")
        return found

    def _located(self, split: str, max_length: int) -> Labels:
        """The labels, answers found in the tokens of this split."""
        answers = {name: each for name, each in self.labels.answers.items() if name == split}
        labels = replace(self.labels, answers=answers)
        return locate_labels(self.corpus, labels, tokenizer=self.backbone.tokenizer, max_length=max_length)


def read_tokens(backbone: Backbone, batches: Iterable[Batch], *, max_length: int) -> Tokens:
    """Rows as the backbone takes them: from text to text, the options of a question are one text.

    Raises:
        PipelineError: as `pipeline.tokens.tokenize`.
    """
    if not backbone.text_to_text:
        return tokenize(backbone.tokenizer, batches, max_length=max_length)
    counts: list[int] = []

    def joined() -> Iterator[Batch]:
        for texts, pairs in batches:
            if pairs is None or not len(pairs) or isinstance(pairs[0], str):
                yield texts, pairs
                continue
            counts.extend(map(len, pairs))
            yield texts, [options_text(options) for options in pairs]

    tokens = tokenize(backbone.tokenizer, joined(), max_length=max_length)
    return replace(tokens, n_words=np.array(counts, dtype=np.int32)) if counts else tokens


def options_text(options: Sequence[str]) -> str:
    """The options of a question as one text, each under the number it is chosen by.

    >>> options_text(["the wind", "the rain"])
    'option0: the wind option1: the rain'
    """
    return " ".join(f"option{number}: {option}" for number, option in enumerate(options))
