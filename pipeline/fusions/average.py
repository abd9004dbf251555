"""The plain mean of the layers."""

import torch
from jaxtyping import Float, Int
from torch import Tensor

from pipeline.fusions._base import Fusion


class Average(Fusion):
    """h = mean_n z_n, the parameter-free mixture that the DWAtt paper compares with.

    It is the mean over every layer kept, the embeddings too, so that it is what `linear` and
    `attention` are at equal weights. (The DWAtt paper counts from layer 1: keep those to follow it.)

    Args:
        n_layers: number of layers handed to `forward`.
        width: size of a state, d.
        generator: unused.
    """

    def __init__(self, *, n_layers: int, width: int, generator: torch.Generator) -> None:
        super().__init__()
        self.out_width = width

    def forward(
        self, states: Float[Tensor, "layer token width"], lengths: Int[Tensor, " example"]
    ) -> Float[Tensor, "1 token width"]:
        """Averages the layers; the heads share the result."""
        return states.mean(0, keepdim=True)


FUSION = Average
