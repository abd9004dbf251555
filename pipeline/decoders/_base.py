"""What every decoder is: fused vectors in; scores, a loss and predictions out."""

from abc import ABC, abstractmethod
from itertools import pairwise
from typing import ClassVar, Literal, cast

import torch
from jaxtyping import Float, Int, Shaped
from torch import Tensor, nn

from pipeline.stack import Dropout, Linear

Tokens = Literal["all", "words", "first", "pair", "options", "masked"]
TargetKind = Literal["class", "tags", "float", "span", "choice", "token"]
"""As `cache.targets` has it, which no part imports."""

Layers = Literal["mlp", "linear"]
Pooling = Literal["first", "mean", "max"]


class Decoder(nn.Module, ABC):
    """Maps fused vectors to predictions, for each head of a stack.

    A *unit* is what gets one prediction: an example for a classifier, a word for a tagger, an option for
    multiple choice, a token for a masked language model. A subclass
    is built for one head: ``__init__(self, *, width, n_classes, generator, seed, <its own
    hyper-parameters>)``; its parameters start with a head axis (see `pipeline.stack`).
    """

    target_kind: ClassVar[TargetKind]
    """The kind of target it learns."""

    evaluated_at_once: ClassVar[int] = 256
    """Examples scored at once outside training; fewer where the scores of one take much memory."""

    tokens: Tokens
    """Which tokens of an example it looks at; the others never reach it."""

    @property
    def only_product(self) -> Linear | None:
        """The linear layer that is all it does to each vector, where that is so (see `Fusion.scored`)."""
        return None

    @abstractmethod
    def forward(
        self, fused: Float[Tensor, "#head token width"], lengths: Int[Tensor, " example"]
    ) -> Float[Tensor, "head unit score"]:
        """Scores every unit.

        Args:
            fused: vectors of the tokens this decoder looks at, example after example, no padding.
            lengths: number of those tokens in each example; may be 0.
        """

    @abstractmethod
    def loss(
        self,
        scores: Float[Tensor, "head unit score"],
        labels: Shaped[Tensor, " unit"],
        lengths: Int[Tensor, " example"],
    ) -> Float[Tensor, " head"]:
        """The mean loss of a unit, for each head; units with label -1 (or NaN) do not count."""

    @abstractmethod
    def predict(
        self, scores: Float[Tensor, "head unit score"], lengths: Int[Tensor, " example"]
    ) -> Shaped[Tensor, "head unit"]:
        """The prediction for every unit: a class id, a tag id or a number."""

    def outcome(
        self,
        scores: Float[Tensor, "head unit score"],
        labels: Shaped[Tensor, "label ..."],
        lengths: Int[Tensor, " example"],
    ) -> Shaped[Tensor, "head label ..."]:
        """What the metrics of its kind of target look at: the prediction, unless that is not enough."""
        return self.predict(scores, lengths)


def padded(
    values: Float[Tensor, "head token score"], lengths: Int[Tensor, " example"], *, fill: float = -1e30
) -> Float[Tensor, "head example longest score"]:
    """The tokens of each example in a row of their own, filled up to the longest.

    The fill is finite, so that a softmax over a row of nothing is a number and has a gradient.

    >>> padded(torch.tensor([[[1.0], [2.0], [3.0]]]), torch.tensor([1, 2]), fill=0.0)[0, :, :, 0].tolist()
    [[1.0, 0.0], [2.0, 3.0]]
    """
    longest = int(lengths.max()) if len(lengths) else 0
    example = torch.repeat_interleave(torch.arange(len(lengths), device=values.device), lengths)
    place = torch.arange(values.shape[1], device=values.device) - (lengths.cumsum(0) - lengths)[example]
    table = values.new_full((len(values), len(lengths) * longest, values.shape[2]), fill)
    table = table.index_copy(1, example * longest + place, values)
    return table.view(len(values), len(lengths), longest, values.shape[2])


def pool(
    fused: Float[Tensor, "#head token width"], lengths: Int[Tensor, " example"], pooling: Pooling
) -> Float[Tensor, "#head example width"]:
    """One vector per example from the vectors of its tokens; zeros for an example of no tokens.

    Args:
        fused: vectors of all examples' tokens, example after example, no padding.
        lengths: number of tokens of each example; they add up to the token axis.
        pooling: the first token's vector, or the mean or the maximum over the tokens.

    >>> pool(torch.tensor([[[1.0], [3.0], [5.0]]]), torch.tensor([2, 0, 1]), "mean").flatten().tolist()
    [2.0, 0.0, 5.0]
    """
    if pooling == "max":
        # Three times as fast as `segment_reduce` and ten times as fast as `scatter_reduce` on a CPU.
        parts = torch.split(fused, lengths.tolist(), dim=1)
        return torch.stack([p.amax(1) if p.shape[1] else p.sum(1) for p in parts], dim=1)
    if pooling == "mean":
        examples = torch.arange(len(lengths), device=fused.device)
        owner = torch.repeat_interleave(examples, lengths, output_size=fused.shape[1])
        sums = fused.new_zeros(fused.shape[0], len(lengths), fused.shape[2]).index_add(1, owner, fused)
        return sums / lengths.clamp(min=1)[:, None]
    if bool((lengths == 1).all()):
        return fused
    vectors = fused.new_zeros(fused.shape[0], len(lengths), fused.shape[2])
    present = lengths.nonzero()[:, 0]
    starts = lengths.cumsum(0) - lengths
    return vectors.index_copy(1, present, fused.index_select(1, starts[present]))


def cross_entropy(
    scores: Float[Tensor, "head unit score"], labels: Int[Tensor, " unit"]
) -> Float[Tensor, " head"]:
    """Each head's cross entropy in nats, averaged over the units with a label >= 0; 0 if there is none."""
    n_heads, n_units, _ = scores.shape
    flat = nn.functional.cross_entropy(
        scores.flatten(0, 1), labels.long().repeat(n_heads), ignore_index=-1, reduction="none"
    )
    return flat.view(n_heads, n_units).sum(1) / (labels >= 0).sum().clamp(min=1)


class Scorer(nn.Module):
    """The layers that turn a vector into scores: two hidden layers, or none.

    Args:
        n_in: width of the vectors.
        n_out: number of scores.
        generator: source of the starting weights.
        seed: start of the dropout streams.
        layers: ``mlp`` is two ReLU layers and an output (attention-fusion paper); ``linear`` is the
            output alone (DWAtt paper).
        hidden: width of the two hidden layers.
        dropout: rate before each of the products, in [0, 1).
    """

    def __init__(
        self,
        n_in: int,
        n_out: int,
        *,
        generator: torch.Generator,
        seed: int,
        layers: Layers = "mlp",
        hidden: int = 256,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        sizes = [n_in, hidden, hidden, n_out] if layers == "mlp" else [n_in, n_out]
        pairs = list(pairwise(sizes))
        self.products = nn.ModuleList(Linear(i, o, generator=generator) for i, o in pairs)
        self.dropouts = nn.ModuleList(Dropout(dropout, seed=seed + k) for k in range(len(pairs)))

    @property
    def only_product(self) -> Linear | None:
        """The product, where there is but one and nothing is dropped before it."""
        product, dropout = cast(Linear, self.products[0]), cast(Dropout, self.dropouts[0])
        dropping = self.training and any(dropout.rates)
        return None if dropping or len(self.products) > 1 else product

    def forward(self, x: Float[Tensor, "#head row n_in"]) -> Float[Tensor, "head row n_out"]:
        """Scores every row, for each head."""
        last = len(self.products) - 1
        for k, (dropout, product) in enumerate(zip(self.dropouts, self.products, strict=True)):
            x = product(dropout(x))
            x = x.relu() if k < last else x
        return x
