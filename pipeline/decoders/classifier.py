"""One class per example (or pair of examples), from a pooled vector."""

from typing import ClassVar, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from pipeline.decoders._base import Decoder, Layers, Pooling, Scorer, Tokens, cross_entropy, pool


class Classifier(Decoder):
    """Pools an example's tokens into one vector and scores every class.

    The default, the first token into two layers of 256 and a softmax, is that of the attention-fusion
    paper; ``layers="linear"`` is the one linear layer of the DWAtt paper.

    Args:
        width: size of the fused vectors.
        n_classes: number of classes.
        generator: source of the starting weights.
        seed: start of the dropout streams.
        pooling: the first token's vector, or the mean or the maximum over all tokens.
        layers: two hidden layers (``mlp``) or none (``linear``).
        hidden: width of the hidden layers.
        dropout: rate before each product, in [0, 1).
    """

    target_kind: ClassVar[Literal["class", "tags", "float"]] = "class"

    def __init__(
        self,
        *,
        width: int,
        n_classes: int,
        generator: torch.Generator,
        seed: int,
        pooling: Pooling = "first",
        layers: Layers = "mlp",
        hidden: int = 256,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        self.pooling = pooling
        self.tokens: Tokens = "first" if pooling == "first" else "all"
        self.scorer = Scorer(
            width, n_classes, generator=generator, seed=seed, layers=layers, hidden=hidden, dropout=dropout
        )

    def forward(
        self, fused: Float[Tensor, "#head token width"], lengths: Int[Tensor, " example"]
    ) -> Float[Tensor, "head example class"]:
        """Scores every class for every example."""
        return self.scorer(pool(fused, lengths, self.pooling))

    def loss(
        self,
        scores: Float[Tensor, "head example class"],
        labels: Int[Tensor, " example"],
        lengths: Int[Tensor, " example"],
    ) -> Float[Tensor, " head"]:
        """Cross entropy, averaged over the examples with a label >= 0."""
        return cross_entropy(scores, labels)

    def predict(
        self, scores: Float[Tensor, "head example class"], lengths: Int[Tensor, " example"]
    ) -> Int[Tensor, "head example"]:
        """The class of the highest score."""
        return scores.argmax(-1)


DECODER = Classifier
