"""An answer as a span of the second text: a score for its first token and one for its last."""

from typing import ClassVar

import torch
from jaxtyping import Float, Int
from torch import Tensor

from pipeline.decoders._base import Decoder, Layers, Scorer, TargetKind, Tokens, padded


class Span(Decoder):
    """Scores every token of `text_pair` as the first and as the last of the answer.

    p(first = i) = softmax_i(s_i), p(last = j) = softmax_j(e_j), both over the tokens of one example's
    second text; the loss is the mean of their two cross entropies. Predicted are the i <= j < i + `longest`
    of the highest s_i + e_j (Devlin et al. 2019, section 4.2).

    Args:
        width: size of the fused vectors.
        n_classes: unused; the name is that of every decoder.
        generator: source of the starting weights.
        seed: start of the dropout streams.
        longest: tokens of the longest answer that is predicted.
        layers: two hidden layers (``mlp``) or none (``linear``, as in the paper).
        hidden: width of the hidden layers.
        dropout: rate before each product, in [0, 1).

    Raises:
        ValueError: `longest` is below 1.
    """

    target_kind: ClassVar[TargetKind] = "span"

    def __init__(
        self,
        *,
        width: int,
        n_classes: int = 1,
        generator: torch.Generator,
        seed: int,
        longest: int = 30,
        layers: Layers = "linear",
        hidden: int = 256,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        if longest < 1:
            raise ValueError(f"longest is {longest}: give 1 token or more")
        self.longest = longest
        self.tokens: Tokens = "pair"
        self.scorer = Scorer(
            width, 2, generator=generator, seed=seed, layers=layers, hidden=hidden, dropout=dropout
        )

    def forward(
        self, fused: Float[Tensor, "#head token width"], lengths: Int[Tensor, " example"]
    ) -> Float[Tensor, "head token 2"]:
        """Scores every token as the first and as the last of the answer."""
        return self.scorer(fused)

    def loss(
        self,
        scores: Float[Tensor, "head token 2"],
        labels: Int[Tensor, "example 2"],
        lengths: Int[Tensor, " example"],
    ) -> Float[Tensor, " head"]:
        """Mean cross entropy of the first and the last token, over the examples that have both."""
        known = (labels >= 0).all(1)
        logs = padded(scores, lengths).log_softmax(2)[:, known]
        chosen = logs.gather(2, labels[known].long().expand(len(scores), -1, -1)[:, :, None, :])
        return -chosen.sum((1, 2, 3)) / (2 * known.sum()).clamp(min=1)

    def predict(
        self, scores: Float[Tensor, "head token 2"], lengths: Int[Tensor, " example"]
    ) -> Int[Tensor, "head example 2"]:
        """First and last token of the best span of each example; -1 where it has no token."""
        table = padded(scores, lengths)
        first, last = table.unbind(-1)
        longest = table.shape[2]
        if longest == 0:
            return torch.full((len(scores), len(lengths), 2), -1, device=scores.device)
        sums = []
        for more in range(min(self.longest, longest)):
            both = first[:, :, : longest - more] + last[:, :, more:]
            sums.append(torch.nn.functional.pad(both, (0, more), value=float("-inf")))
        best = torch.stack(sums, dim=2).flatten(2).argmax(2)
        found = torch.stack([best % longest, best % longest + best // longest], dim=-1)
        return torch.where((lengths > 0)[:, None], found, -1)


DECODER = Span
