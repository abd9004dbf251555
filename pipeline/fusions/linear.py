"""One learned weight per layer, the same for every token: "linear-fusion"."""

import torch
from jaxtyping import Float, Int
from torch import Tensor

from pipeline.fusions._base import Fusion
from pipeline.stack import constant


class LinearFusion(Fusion):
    """h = γ Σ_n softmax(s)_n z_n, the scalar mixture of ELMo (Peters et al. 2018, eq. 1).

    L + 2 parameters: s starts at 0 (the plain mean) and γ at 1, as in AllenNLP. ELMo's optional layer
    normalisation of z_n is left out: its statistics run over the batch, so that a vector would depend
    on the examples beside it.

    Args:
        n_layers: number of layers handed to `forward`, usually L + 1.
        width: size of a state, d.
        generator: unused, the start is fixed.
    """

    def __init__(self, *, n_layers: int, width: int, generator: torch.Generator) -> None:
        super().__init__()
        self.out_width = width
        self.scores = constant((n_layers,), 0.0)
        self.scale = constant((1,), 1.0)

    def forward(
        self, states: Float[Tensor, "layer token width"], lengths: Int[Tensor, " example"]
    ) -> Float[Tensor, "head token width"]:
        """Mixes the layers for every head in one matrix product over the states, which are not copied."""
        weights = self.scale * self.scores.softmax(-1)
        return (weights @ states.flatten(1)).view(len(weights), *states.shape[1:])

    def weights(
        self, states: Float[Tensor, "layer token width"], lengths: Int[Tensor, " example"]
    ) -> Float[Tensor, "head token layer"]:
        """softmax(s)_n, the same for every token; γ scales the vector and favours no layer."""
        return self.scores.softmax(-1)[:, None].expand(-1, states.shape[1], -1)


FUSION = LinearFusion
