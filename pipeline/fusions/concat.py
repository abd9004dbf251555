"""All layers side by side, for the decoder's first layer to choose from: "concat-fusion"."""

import torch
from jaxtyping import Float, Int
from torch import Tensor

from pipeline.fusions._base import Fusion


class Concat(Fusion):
    """h = [z_0; …; z_L] (Cao et al. 2020). No parameters here; the decoder's first layer grows.

    The "Concat" of the DWAtt paper, which maps back to d values, is `affine`.

    Args:
        n_layers: number of layers handed to `forward`.
        width: size of a state, d; the vectors have n_layers · d values.
        generator: unused.
    """

    def __init__(self, *, n_layers: int, width: int, generator: torch.Generator) -> None:
        super().__init__()
        self.out_width = n_layers * width

    def forward(
        self, states: Float[Tensor, "layer token width"], lengths: Int[Tensor, " example"]
    ) -> Float[Tensor, "1 token out"]:
        """Joins the layers of each token, first layer first; the heads share the result."""
        return states.transpose(0, 1).flatten(1)[None]


FUSION = Concat
