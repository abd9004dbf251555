"""One number per example (or pair of examples), from a pooled vector."""

from typing import ClassVar, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from pipeline.decoders._base import Decoder, Layers, Pooling, Scorer, Tokens, pool


class Regressor(Decoder):
    """Pools an example's tokens into one vector and maps it to a number in the labels' own unit.

    Args:
        width: size of the fused vectors.
        n_classes: numbers per example; only 1 makes sense, the name is that of every decoder.
        generator: source of the starting weights.
        seed: start of the dropout streams.
        pooling: the first token's vector, or the mean or the maximum over all tokens.
        layers: two hidden layers (``mlp``) or none (``linear``).
        hidden: width of the hidden layers.
        dropout: rate before each product, in [0, 1).

    Raises:
        ValueError: `n_classes` is not 1.
    """

    target_kind: ClassVar[Literal["class", "tags", "float"]] = "float"

    def __init__(
        self,
        *,
        width: int,
        n_classes: int = 1,
        generator: torch.Generator,
        seed: int,
        pooling: Pooling = "first",
        layers: Layers = "mlp",
        hidden: int = 256,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        if n_classes != 1:
            raise ValueError(f"a regressor gives 1 number per example, not {n_classes}")
        self.pooling = pooling
        self.tokens: Tokens = "first" if pooling == "first" else "all"
        self.scorer = Scorer(
            width, 1, generator=generator, seed=seed, layers=layers, hidden=hidden, dropout=dropout
        )

    def forward(
        self, fused: Float[Tensor, "#head token width"], lengths: Int[Tensor, " example"]
    ) -> Float[Tensor, "head example 1"]:
        """One number for every example, on an axis of its own as every decoder's scores have."""
        return self.scorer(pool(fused, lengths, self.pooling))

    def loss(
        self,
        scores: Float[Tensor, "head example 1"],
        labels: Float[Tensor, " example"],
        lengths: Int[Tensor, " example"],
    ) -> Float[Tensor, " head"]:
        """Squared error, averaged over the examples whose label is not NaN; 0 if there is none."""
        counted = ~labels.isnan()
        # The NaN itself is replaced, because a NaN times 0 would still be NaN.
        errors = (scores[..., 0] - labels.nan_to_num().to(scores.dtype)) * counted
        return errors.square().sum(1) / counted.sum().clamp(min=1)

    def predict(
        self, scores: Float[Tensor, "head example 1"], lengths: Int[Tensor, " example"]
    ) -> Float[Tensor, "head example"]:
        """The number itself."""
        return scores[..., 0]


DECODER = Regressor
