"""Multiple choice: one score for each option of a question, and a softmax over the options."""

from typing import ClassVar

import torch
from jaxtyping import Float, Int
from torch import Tensor

from pipeline.decoders._base import Decoder, Layers, Scorer, TargetKind, Tokens, padded


class Choice(Decoder):
    """Scores the first token of every option's text.

    p(option i) = softmax_i(s_i) over the options of one question. Where several are right, their
    probabilities add up: the loss of a question is -log Σ_{i right} p(i).

    Args:
        width: size of the fused vectors.
        n_classes: unused; the name is that of every decoder.
        generator: source of the starting weights.
        seed: start of the dropout streams.
        layers: two hidden layers (``mlp``) or none (``linear``).
        hidden: width of the hidden layers.
        dropout: rate before each product, in [0, 1).
    """

    target_kind: ClassVar[TargetKind] = "choice"

    def __init__(
        self,
        *,
        width: int,
        n_classes: int = 1,
        generator: torch.Generator,
        seed: int,
        layers: Layers = "mlp",
        hidden: int = 256,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        self.tokens: Tokens = "options"
        self.scorer = Scorer(
            width, 1, generator=generator, seed=seed, layers=layers, hidden=hidden, dropout=dropout
        )

    def forward(
        self, fused: Float[Tensor, "#head option width"], lengths: Int[Tensor, " example"]
    ) -> Float[Tensor, "head option 1"]:
        """Scores every option."""
        return self.scorer(fused)

    def loss(
        self,
        scores: Float[Tensor, "head option 1"],
        labels: Int[Tensor, " option"],
        lengths: Int[Tensor, " example"],
    ) -> Float[Tensor, " head"]:
        """The mean loss of a question; one without a right option does not count."""
        right = padded((labels == 1)[None, :, None].to(scores.dtype), lengths, fill=0.0)[0, :, :, 0] > 0
        known = right.any(1)
        logs = padded(scores, lengths)[:, known, :, 0].log_softmax(2)
        of_right = torch.where(right[known], logs, FAR_BELOW).logsumexp(2)
        return -of_right.sum(1) / known.sum().clamp(min=1)

    def predict(
        self, scores: Float[Tensor, "head option 1"], lengths: Int[Tensor, " example"]
    ) -> Int[Tensor, "head option"]:
        """1 for the option of the highest score of each question, 0 for the others."""
        taken = torch.zeros(scores.shape[:2], dtype=torch.long, device=scores.device)
        some = lengths > 0
        if bool(some.any()):
            best = padded(scores, lengths)[:, some, :, 0].argmax(2)
            taken.scatter_(1, (lengths.cumsum(0) - lengths)[some] + best, 1)
        return taken


FAR_BELOW = -1e30
"""Logarithm of a probability of nothing, finite so that gradients are."""

DECODER = Choice
