"""One matrix per layer and their sum: the "Concat" of the DWAtt paper."""

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from pipeline.fusions._base import Fusion
from pipeline.stack import Linear, in_a_row


class Affine(Fusion):
    """h = Σ_n W_n z_n + b over layers 1..L (DWAtt paper, eq. 2, there called "Concat").

    L d² + d parameters, 25.17 M for d = 1024, L = 24: one linear layer on the concatenated states,
    which starts like `torch.nn.Linear`. The paper's bias b is counted in its L d² + d.

    Args:
        n_layers: number of layers handed to `forward`, usually L.
        width: size of a state, d.
        generator: source of the starting weights.
    """

    def __init__(self, *, n_layers: int, width: int, generator: torch.Generator) -> None:
        super().__init__()
        self.out_width = width
        self.product = Linear(n_layers * width, width, generator=generator)

    @classmethod
    def reads(cls, kept: Sequence[int], last: int, **options: Any) -> list[int]:
        """Every layer kept but the embeddings."""
        return [layer for layer in kept if layer > 0]

    def forward(
        self, states: Float[Tensor, "layer token width"], lengths: Int[Tensor, " example"]
    ) -> Float[Tensor, "head token width"]:
        """Maps the concatenated layers of each token, for every head."""
        return self.product(_joined(states))

    def scored(
        self,
        states: Float[Tensor, "layer token width"],
        lengths: Int[Tensor, " example"],
        scorer: Linear,
    ) -> Float[Tensor, "head token score"]:
        """Scores of each token; two linear maps in a row are one, and few scores make that one narrow."""
        return in_a_row(_joined(states), self.product, scorer)


def _joined(states: Float[Tensor, "layer token width"]) -> Float[Tensor, "1 token joined"]:
    return states.transpose(0, 1).flatten(1)[None]


FUSION = Affine
