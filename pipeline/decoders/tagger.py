"""One tag per word: a softmax for each word, or a linear-chain CRF over each sequence of words."""

from typing import Any, ClassVar, Literal, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.autograd.function import once_differentiable

from pipeline.decoders._base import Decoder, Layers, Scorer, Tokens, cross_entropy
from pipeline.stack import Linear, uniform

FLOOR = 1e-15
"""Least weight of a transition beside the likeliest one; see `_LogPartition`."""

MAX_PATHS = 2**23
"""Numbers in the largest array of the Viterbi search (32 MiB): heads are taken in groups that fit."""


class Tagger(Decoder):
    """Scores every tag for every word; with `crf`, also every step from one tag to the next.

    The attention-fusion paper tags with two layers of 256 and a linear-chain CRF, the DWAtt paper with
    one linear layer and a softmax.

    Args:
        width: size of the fused vectors.
        n_classes: number of tags.
        generator: source of the starting weights.
        seed: start of the dropout streams.
        crf: a linear-chain CRF over the words of an example instead of a softmax for each word.
        layers: two hidden layers (``mlp``) or none (``linear``).
        hidden: width of the hidden layers.
        dropout: rate before each product, in [0, 1).
    """

    target_kind: ClassVar[Literal["class", "tags", "float"]] = "tags"

    def __init__(
        self,
        *,
        width: int,
        n_classes: int,
        generator: torch.Generator,
        seed: int,
        crf: bool = False,
        layers: Layers = "mlp",
        hidden: int = 256,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        self.tokens: Tokens = "words"
        self.scorer = Scorer(
            width, n_classes, generator=generator, seed=seed, layers=layers, hidden=hidden, dropout=dropout
        )
        self.crf = CRF(n_classes, generator=generator) if crf else None

    @property
    def only_product(self) -> Linear | None:
        """That of its scorer."""
        return self.scorer.only_product

    def forward(
        self, fused: Float[Tensor, "#head word width"], lengths: Int[Tensor, " example"]
    ) -> Float[Tensor, "head word tag"]:
        """Scores every tag for every word."""
        return self.scorer(fused)

    def loss(
        self,
        scores: Float[Tensor, "head word tag"],
        labels: Int[Tensor, " word"],
        lengths: Int[Tensor, " example"],
    ) -> Float[Tensor, " head"]:
        """The mean loss of a word; words with label -1 do not count.

        A CRF's loss is the negative log-likelihood of whole sequences, summed and divided by the number
        of their words: one learning rate then suits it and the softmax. Its likelihood needs every tag
        of a sequence, so one word without a label takes its whole sequence out of the loss.
        """
        if self.crf is None:
            return cross_entropy(scores, labels)
        return self.crf.loss(scores, labels, lengths)

    def predict(
        self, scores: Float[Tensor, "head word tag"], lengths: Int[Tensor, " example"]
    ) -> Int[Tensor, "head word"]:
        """The likeliest tag of each word, or with a CRF the likeliest sequence (Viterbi)."""
        return scores.argmax(-1) if self.crf is None else self.crf.decode(scores, lengths)


class CRF(torch.nn.Module):
    """A linear-chain CRF: scores for the first tag, for the last, and for each step between two.

    score(y) = start[y_1] + Σ_t emission_t[y_t] + Σ_t transitions[y_t, y_{t+1}] + end[y_T];
    p(y) = exp(score(y)) / Z. The scores of the ends are added to the emissions of the first and the last
    word at once, so that the recursions below know emissions and transitions alone.

    Args:
        n_tags: number of tags.
        generator: source of the starting scores, drawn from U(-0.1, 0.1) as in pytorch-crf.
    """

    def __init__(self, n_tags: int, *, generator: torch.Generator) -> None:
        super().__init__()
        self.start = uniform((n_tags,), 0.1, generator)
        self.end = uniform((n_tags,), 0.1, generator)
        self.transitions = uniform((n_tags, n_tags), 0.1, generator)

    def loss(
        self,
        scores: Float[Tensor, "head word tag"],
        labels: Int[Tensor, " word"],
        lengths: Int[Tensor, " example"],
    ) -> Float[Tensor, " head"]:
        """Negative log-likelihood of the fully labelled sequences, divided by the number of their words."""
        steps = _steps(lengths, _labelled(labels, lengths))
        emissions = self._emissions(scores, steps)
        gold = labels.long()[steps.words]
        taken = torch.zeros_like(self.transitions[0])
        taken.index_put_((gold[steps.before], gold[steps.sizes[0] :]), taken.new_ones(()), accumulate=True)
        path = emissions.gather(2, gold[None, :, None].expand(len(emissions), -1, 1)).sum((1, 2))
        path = path + (self.transitions * taken).sum((1, 2))
        log_z: Tensor = _LogPartition.apply(  # type: ignore[no-untyped-call]
            emissions, self.transitions, steps.before, steps.sizes
        )
        return (log_z - path) / max(1, len(gold))

    @torch.no_grad()
    def decode(
        self, scores: Float[Tensor, "head word tag"], lengths: Int[Tensor, " example"]
    ) -> Int[Tensor, "head word"]:
        """The likeliest tags of every sequence (Viterbi)."""
        steps = _steps(lengths, lengths > 0)
        emissions = self._emissions(scores, steps)
        n_tags = scores.shape[-1]
        group = max(1, MAX_PATHS // (max(1, steps.sizes[0]) * n_tags * n_tags))
        parts = zip(torch.split(emissions, group), torch.split(self.transitions, group), strict=True)
        tags = torch.cat([_viterbi(e, t, steps.sizes) for e, t in parts])
        return torch.empty_like(tags).index_copy_(1, steps.words, tags)

    def _emissions(
        self, scores: Float[Tensor, "head word tag"], steps: "_Steps"
    ) -> Float[Tensor, "head row tag"]:
        emissions = scores.index_select(1, steps.words)
        emissions[:, : steps.sizes[0]] += self.start[:, None]
        return emissions.index_add_(1, steps.last, self.end[:, None].expand(-1, len(steps.last), -1))


class _Steps(NamedTuple):
    """Words reordered so that a step of the chain is one slice and no row is padding.

    Sequences are sorted by falling length; then come the first words of all, the second words of all that
    have one, and so on. The sequences alive at a step are therefore the first rows of the step before.
    """

    words: Int[Tensor, " row"]
    """The word in each row."""
    sizes: list[int]
    """Number of rows of each step; at least one step, which may be empty."""
    before: Int[Tensor, " later"]
    """For each row after the first step: the row of the word before it."""
    last: Int[Tensor, " sequence"]
    """The row of each sequence's last word."""


def _steps(lengths: Int[Tensor, " example"], counted: Bool[Tensor, " example"]) -> _Steps:
    """Lays out the sequences that count; each of them has a word."""
    host = lengths.cpu()
    kept = counted.cpu().nonzero()[:, 0]
    kept = kept[host[kept].argsort(descending=True, stable=True)]
    long = host[kept]
    longest = int(long[0]) if len(long) else 1
    alive = torch.arange(longest)[:, None] < long
    step, sequence = alive.nonzero(as_tuple=True)
    sizes = alive.sum(1)
    words = (host.cumsum(0) - host)[kept][sequence] + step
    before = torch.arange(int(sizes[0]), len(words)) - sizes[:-1].repeat_interleave(sizes[1:])
    last = (sizes.cumsum(0) - sizes)[long - 1] + torch.arange(len(long))
    device = lengths.device
    return _Steps(words.to(device), sizes.tolist(), before.to(device), last.to(device))


def _labelled(labels: Int[Tensor, " word"], lengths: Int[Tensor, " example"]) -> Bool[Tensor, " example"]:
    """Which examples have a word, and a label on every word."""
    owner = torch.repeat_interleave(lengths, output_size=len(labels))
    present = torch.zeros_like(lengths).index_add_(0, owner, (labels >= 0).to(lengths.dtype))
    return (lengths > 0) & (present == lengths)


class _LogPartition(torch.autograd.Function):
    """Σ over sequences of log Z, by the forward–backward algorithm on scaled weights.

    Forward weights are kept as exponentials and normalised at each step, and the norms' logarithms add up
    to log Z: a step is one matrix product of a slice. The gradient is written out (marginals of tags and
    of pairs of tags), because autograd would add up a (tag, tag) matrix per step; here the pairs of all
    steps are one product. With 111 tags and 16 heads on one core this takes 10 ms, the same recursion on
    logarithms under autograd 16, a log-sum-exp over (tag, tag) 270.

    Float32 holds it whatever the scores: emissions weigh at most 1 and transitions lie in [FLOOR, 1], so a
    norm is at least FLOOR, a backward weight at most 1 / FLOOR, and what underflows, below 1e-38 / FLOOR of
    a norm, comes to less than 1e-7 of a marginal. The floor changes the result only if transition scores
    of one head lie more than 34 apart; it then counts the unlikeliest as likelier than they are.
    """

    @staticmethod
    def forward(
        ctx: Any,
        emissions: Float[Tensor, "head row tag"],
        transitions: Float[Tensor, "head tag tag"],
        before: Int[Tensor, " later"],
        sizes: list[int],
    ) -> Float[Tensor, " head"]:
        peak = emissions.amax(-1, keepdim=True)
        top = transitions.amax((1, 2), keepdim=True)
        emits = (emissions - peak).exp_()
        moves = (transitions - top).exp_().clamp_min_(FLOOR)
        weights = torch.empty_like(emits)
        norms = torch.empty_like(peak)
        row, earlier = 0, 0
        for step, n in enumerate(sizes):
            rows = slice(row, row + n)
            here = emits[:, rows]
            if step > 0:
                here = torch.bmm(weights[:, earlier : earlier + n], moves).mul_(here)
            norms[:, rows] = here.sum(-1, keepdim=True)
            weights[:, rows] = here / norms[:, rows]
            earlier, row = row, row + n
        ctx.save_for_backward(emits, moves, weights, norms, before)
        ctx.sizes = sizes
        return (norms.log() + peak).sum((1, 2)) + top[:, 0, 0] * len(before)

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, gradient: Float[Tensor, " head"]
    ) -> tuple[Float[Tensor, "head row tag"], Float[Tensor, "head tag tag"], None, None]:
        emits, moves, weights, norms, before = ctx.saved_tensors
        later = torch.ones_like(weights)  # weight of all that may follow a row's tag; 1 at the end
        seen = emits / norms
        row = weights.shape[1]
        for step in range(len(ctx.sizes) - 1, 0, -1):
            n = ctx.sizes[step]
            row -= n
            earlier = row - ctx.sizes[step - 1]
            ahead = seen[:, row : row + n].mul_(later[:, row : row + n])
            later[:, earlier : earlier + n] = torch.bmm(ahead, moves.mT)
        scale = gradient[:, None, None]
        pairs = torch.bmm(weights.index_select(1, before).mT, seen[:, ctx.sizes[0] :])
        return later.mul_(weights).mul_(scale), pairs.mul_(moves).mul_(scale), None, None


def _viterbi(
    emissions: Float[Tensor, "head row tag"], transitions: Float[Tensor, "head tag tag"], sizes: list[int]
) -> Int[Tensor, "head row"]:
    """The likeliest tag of each row.

    No table of back pointers: on the way there a step takes only the maximum, and on the way back only
    the one tag that was chosen is asked where it came from.
    """
    into = transitions.mT.contiguous()  # (head, tag, tag before): the maximum runs over contiguous memory
    best = emissions.clone()
    row, earlier = sizes[0], 0
    for n in sizes[1:]:
        paths = best[:, earlier : earlier + n, None, :] + into[:, None]
        best[:, row : row + n] += paths.amax(-1)
        earlier, row = row, row + n
    tags = best.argmax(-1)
    heads = torch.arange(len(tags), device=tags.device)[:, None]
    row = best.shape[1]
    for step in range(len(sizes) - 1, 0, -1):
        n = sizes[step]
        row -= n
        earlier = row - sizes[step - 1]
        came_from = best[:, earlier : earlier + n] + into[heads, tags[:, row : row + n]]
        tags[:, earlier : earlier + n] = came_from.argmax(-1)
    return tags


DECODER = Tagger
