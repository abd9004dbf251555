"""Some tokens and layers of a split of a bank, as the writer of a smaller bank wants them."""

from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import torch
from jaxtyping import Bool, Float, Int, Shaped
from numpy import ndarray
from torch import Tensor

from cache import Calibration, Kind, Recipe, Rows, Split, Target
from cache.layout import ALIKE, Keep
from cache.plan import Plan
from cache.targets import ranges, reorder_extra, reorder_tags, spans
from pipeline.arrays import channel_range, to_float, to_torch


class Excerpt:
    """What a smaller bank takes of a split.

    Args:
        split: of the larger bank.
        recipe: of the smaller one.
    """

    def __init__(self, split: Split, recipe: Recipe) -> None:
        self.split, self.layers = split, recipe.layers
        self._channels = channel_range(split, recipe.layers, torch.device("cpu"))
        self._example_of = np.argsort(split.row)
        self._keep: Keep = recipe.keep
        kept = _kept(split, recipe.keep)
        self._position = ranges(split.start, split.length)[kept]
        self._bounds = spans(kept.view(np.int8))[spans(split.length)]

    def rows(self) -> Rows:
        """What the plan is made of, in row order."""
        return Rows(
            lengths=self.lengths(self._keep),
            kept=ALIKE[self._keep].index(self._keep),
            n_words=self.split.n_words[self._example_of],
            text_hash=self.split.text_hash[self._example_of],
        )

    def lengths(self, keep: Keep) -> Int[ndarray, "keep row"]:
        """Tokens of each row in each of the banks that are dealt as one of that `keep` is."""
        lengths = np.stack([_length(self.split, alike) for alike in ALIKE[keep]])
        return lengths[:, self._example_of].astype(np.int32)

    def positions(self, plan: Plan, block: int) -> Int[ndarray, " token"]:
        """Where the tokens of a block to make lie in the source."""
        examples = self._example_of[plan.row[plan.examples(block)]]
        first = self._bounds[examples]
        return self._position[ranges(first, self._bounds[examples + 1] - first)]

    def stored(self, position: Int[ndarray, " token"]) -> Shaped[Tensor, "layer token width"]:
        """States as the source has them."""
        return to_torch(self.split.take(position, self.layers))

    def floats(
        self, position: Int[ndarray, " token"], dtype: torch.dtype
    ) -> Float[Tensor, "layer token width"]:
        """States as numbers."""
        first = None if self._channels is None else self.split.first_tokens[position]
        return to_float(self.stored(position), self._channels, first, dtype)

    def calibration(self) -> Calibration | None:
        """Scale and shift of the layers, where the source has any."""
        if self._channels is None:
            return None
        scale, shift = (part[:, :, 0].numpy() for part in (self._channels.scale, self._channels.shift))
        return Calibration(scale=scale, shift=shift)

    def targets(self) -> Iterator[Target]:
        """The labels, in row order."""
        for name in self.split.target_names():
            target, order = self.split.target(name), self._example_of
            counts = {"tags": self.split.n_words, "choice": self.split.n_words, "token": self.split.length}
            target = replace(target, extra=reorder_extra(self.split.target_extra(name), order))
            if target.kind in counts:
                yield replace(target, values=reorder_tags(target.values, counts[target.kind], order))
            else:
                yield replace(target, values=target.values[order])


def _length(split: Split, keep: Keep) -> Int[ndarray, " example"]:
    """Tokens that each example has in a bank of that `keep`, which may be more than the split has."""
    if keep == "all":
        return split.full_length
    return np.diff(spans(_kept(split, keep).view(np.int8))[spans(split.length)])


def _kept(split: Split, keep: Keep) -> Bool[ndarray, " token"]:
    """Which of a split's tokens a bank of that `keep` holds; see `pipeline.tokens.Tokens.kept`."""
    position = ranges(split.start, split.length)
    if keep == split.keep:
        return np.ones(len(position), dtype=bool)
    first = np.zeros(len(position), dtype=bool)
    first[spans(split.length)[:-1][split.length > 0]] = True
    first |= split.kind[position] == Kind.OPTION
    if keep == "first":
        return first
    return first | np.isin(split.kind[position], (Kind.WORD, Kind.PAIR_WORD))
