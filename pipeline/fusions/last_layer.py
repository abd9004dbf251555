"""The last layer alone: what a frozen encoder with a head on top gives, and the baseline of every table."""

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from pipeline.fusions._base import Fusion


class LastLayer(Fusion):
    """h = z_L. No parameters; the vectors are the states themselves, not a copy.

    Args:
        n_layers: number of layers handed to `forward`, 1.
        width: size of a state, d.
        generator: unused.
    """

    def __init__(self, *, n_layers: int, width: int, generator: torch.Generator) -> None:
        super().__init__()
        self.out_width = width

    @classmethod
    def reads(cls, kept: Sequence[int], last: int, **options: Any) -> list[int]:
        """The encoder's last layer, L."""
        return [last]

    def forward(
        self, states: Float[Tensor, "layer token width"], lengths: Int[Tensor, " example"]
    ) -> Float[Tensor, "1 token width"]:
        """Returns the last of the layers; the heads share it."""
        return states[-1:]


FUSION = LastLayer
