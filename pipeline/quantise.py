"""States -> int8, on the device that made them; `cache.calibration` says what the numbers mean."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Float, Int, Int8, UInt8
from numpy import ndarray
from torch import Tensor

from cache import Writer
from cache.calibration import (
    ENOUGH,
    GROUPS,
    LEVELS,
    Calibration,
    calibration_split,
    first_tokens,
    from_ranges,
)


@dataclass(frozen=True)
class Quantised:
    """What is to be known of states that became int8. On their device: looking would wait for it."""

    clipped: Int[Tensor, " layer"]  # states out of range
    finite: Bool[Tensor, "layer token"]  # tokens without NaN and infinity

    def check(self, writer: Writer, split: str, block: int) -> Int[ndarray, " layer"]:
        """How many states of each layer of a block were out of range.

        Raises:
            CacheError: one of them is no number that can be stored.
        """
        bad = (~self.finite).nonzero().tolist()
        if bad:
            raise writer.bad_state(split, block, writer.recipe.layers[bad[0][0]], bad[0][1])
        return self.clipped.cpu().numpy()


class Quantiser:
    """Fills blocks of an int8 bank; calibrates it where that was not done yet.

    The calibration is made from the first block of one split, whatever is written already, so it does not
    depend on how often a run was cut off.

    Args:
        writer: of the bank.
        device: where states are made.
        states_of: puts the float32 states of a block of a split into a tensor on that device.
        kind_of: the kinds of its tokens.

    Raises:
        CacheError: a state that calibrates is NaN or infinite, or the disk refused.
    """

    def __init__(
        self,
        writer: Writer,
        device: torch.device,
        states_of: Callable[[str, int, Tensor], None],
        kind_of: Callable[[str, int], UInt8[ndarray, " token"]],
    ) -> None:
        recipe = writer.recipe
        room = max((plan.block_tokens for plan in writer.plans.values()), default=0)
        self._writer, self._states_of, self._kind_of = writer, states_of, kind_of
        self._floats = torch.zeros((len(recipe.layers), room, recipe.encoder.width), device=device)
        self._holds: tuple[str, int] | None = None
        known = writer.calibration
        if known is None:
            known = self._calibrate()
            writer.calibrate(known)
        self._scale = torch.from_numpy(known.scale).to(device)
        self._shift = torch.from_numpy(known.shift).to(device)

    def fill(self, split: str, block: int, out: Int8[Tensor, "layer room width"]) -> Quantised:
        """Computes a block's states and writes them into `out` as int8; fill is left alone."""
        states = self._block(split, block)
        first = self._first(split, block).nonzero()[:, 0].to(states.device)
        return quantise(states, self._scale, self._shift, first, out[:, : states.shape[1]])

    def _first(self, split: str, block: int) -> Bool[Tensor, " token"]:
        """Which of a block's tokens are first ones."""
        plan = self._writer.plans[split]
        here = plan.examples(block)
        start = plan.start[here][plan.length[here] > 0] - block * plan.block_tokens
        return torch.from_numpy(first_tokens(self._writer.recipe.keep, self._kind_of(split, block), start))

    def _block(self, split: str, block: int) -> Float[Tensor, "layer token width"]:
        """A block's states without fill; those that calibrated are not made a second time."""
        if self._holds != (split, block):
            self._states_of(split, block, self._floats)
            self._holds = (split, block)
        plan = self._writer.plans[split]
        return self._floats[:, : int(plan.length[plan.examples(block)].sum())]

    def _calibrate(self) -> Calibration:
        split, layers = calibration_split(self._writer.plans), self._writer.recipe.layers
        if split is None:  # no token anywhere, so any scale will do
            nothing = np.zeros((GROUPS, len(layers), self._writer.recipe.encoder.width))
            return from_ranges(nothing, nothing, np.zeros(GROUPS, np.int64))
        states = self._block(split, 0)
        lowest, highest = torch.aminmax(states, dim=1)
        if not bool((lowest.isfinite() & highest.isfinite()).all()):  # NaN is lowest and highest both
            layer, token = (~states.isfinite().all(-1)).nonzero()[0].tolist()
            raise self._writer.bad_state(split, 0, layers[layer], token)
        first = self._first(split, 0).to(states.device)
        found = [(lowest, highest, len(first))] * GROUPS
        for group, chosen in enumerate((~first, first)):
            n_tokens = int(chosen.sum())
            if n_tokens >= ENOUGH:
                found[group] = (*torch.aminmax(states[:, chosen], dim=1), n_tokens)
        lowests, highests, counts = zip(*found, strict=True)
        return from_ranges(
            torch.stack(lowests).cpu().numpy(), torch.stack(highests).cpu().numpy(), np.array(counts)
        )


def quantise(
    states: Float[Tensor, "layer token width"],
    scale: Float[Tensor, "group layer width"],
    shift: Float[Tensor, "group layer width"],
    first: Int[Tensor, " first"],
    out: Int8[Tensor, "layer token width"],
) -> Quantised:
    """Rounds states to the nearest whole number of steps; those out of range go to its end.

    Args:
        states: float32.
        scale: a step of each channel, for each group of tokens.
        shift: the middle of its range.
        first: places of the first tokens.
        out: filled in place.
    """
    steps = 1 / scale
    clipped, finite = [], []
    for layer in range(len(states)):  # what lies between is no larger than one layer
        rounded = (states[layer] - shift[0, layer]).mul_(steps[0, layer])
        own = states[layer].index_select(0, first)
        rounded.index_copy_(0, first, (own - shift[1, layer]).mul_(steps[1, layer])).round_()
        clipped.append((rounded.abs() > LEVELS).sum())
        finite.append(states[layer].abs().amax(-1).isfinite())
        out[layer].copy_(rounded.clamp_(-LEVELS, LEVELS))
    return Quantised(torch.stack(clipped), torch.stack(finite))
