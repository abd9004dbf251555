"""One layer alone, any of them: the probe of what a layer knows."""

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from pipeline.fusions._base import Fusion


class SingleLayer(Fusion):
    """h = z_k for one chosen k. No parameters; the vectors are the states themselves, not a copy.

    Args:
        n_layers: number of layers handed to `forward`, 1.
        width: size of a state, d.
        generator: unused.
        layer: k, from 0 (the embeddings) to L. It chooses what is read; `forward` sees nothing else.
    """

    def __init__(self, *, n_layers: int, width: int, generator: torch.Generator, layer: int) -> None:
        super().__init__()
        self.layer = layer
        self.out_width = width

    @classmethod
    def reads(cls, kept: Sequence[int], last: int, **options: Any) -> list[int]:
        """The chosen layer."""
        return [options["layer"]]

    def forward(
        self, states: Float[Tensor, "1 token width"], lengths: Int[Tensor, " example"]
    ) -> Float[Tensor, "1 token width"]:
        """Returns the layer; the heads share it."""
        return states


FUSION = SingleLayer
