"""Queries of heads trained on other tasks, mixed for each example: ATTEMPT's idea on late fusion."""

import math
from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from pipeline.fusions._base import Fusion
from pipeline.stack import LayerNorm, Linear, normal


class Mixer(nn.Module):
    """a_j = softmax_j(Q_j·H / (d e^K)) with H = LN(W_up·SiLU(W_down·x̂)) (ATTEMPT, eq. 2-3).

    2 r d + 2 d parameters; W_down and W_up have no bias, as in the authors' code.

    Args:
        width: size of x̂ and of a query, d.
        size: r.
        temperature: K.
        generator: source of the starting weights, which are those of `torch.nn.Linear`.
    """

    def __init__(self, width: int, *, size: int, temperature: float, generator: torch.Generator) -> None:
        super().__init__()
        self.down = Linear(width, size, generator=generator, bias=False)
        self.up = Linear(size, width, generator=generator, bias=False)
        self.norm = LayerNorm(width)
        self.scale = width * math.exp(temperature)

    def forward(
        self, pooled: Float[Tensor, "1 example width"], sources: Float[Tensor, "head source width"]
    ) -> Float[Tensor, "head example source"]:
        """The share of each source for each example."""
        hidden = self.norm(self.up(nn.functional.silu(self.down(pooled))))
        return (hidden @ sources.mT / self.scale).softmax(-1)


class Mixture(Fusion):
    """h = Σ_n softmax_n(Q(x)·z_n) z_n with Q(x) = Q_target + Σ_j a_j(x) Q_j over frozen queries Q_j.

    The late counterpart of ATTEMPT (Asai et al. 2022): queries of `attention` stand where the paper has
    soft prompts. x̂ is the maximum over an example's tokens of their states in layer 0, so every token is
    needed, and a stays the same for all tokens of an example. The paper's sum runs over the target's own
    prompt too; here the target's query is added once and the shares are those of the sources alone.

    d + 2 r d + 2 d parameters: the query, and the network of `Mixer`, which tasks that are trained together
    share: d + (2 r d + 2 d) / N for each of N. Q_target starts from N(0, 0.02²),
    small against trained queries, so that training starts from their mixture. The shares start near
    equal: the temperature is made for prompts of embedding size, and queries are shorter. A smaller K
    lets them differ (K = -ln(d) / 2 is the √d of dot-product attention).

    Args:
        n_layers: number of layers handed to `forward`; the first of them is the embeddings.
        width: size of a state, d.
        generator: source of the starting weights.
        sources: runs of `attention` that the Q_j are taken from, with commas between.
        random_sources: number of frozen Q_j drawn from N(0, 0.02²) instead: what is lost without training.
        size: r, the bottleneck of the network.
        temperature: K, the exponent of the scale.
        target: whether Q_target is there; without it h follows the sources alone.
        attention: whether a depends on the example; else a_j = 1/t, without the network. One source has a
            share of 1 in either case, so it gets no network.

    Raises:
        ValueError: there are no sources, or sources of both kinds; a number is out of its range.
    """

    mixes_tokens: ClassVar[bool] = True
    takes: ClassVar[tuple[str, str] | None] = ("attention", "query")
    shared: ClassVar[str | None] = "mixer"
    sources: Tensor

    def __init__(
        self,
        *,
        n_layers: int,
        width: int,
        generator: torch.Generator,
        sources: str | None = None,
        random_sources: int = 0,
        size: int = 100,
        temperature: float = 1.0,
        target: bool = True,
        attention: bool = True,
    ) -> None:
        super().__init__()
        n_sources = len(sources.split(",")) if sources else random_sources
        if n_sources < 1 or (sources and random_sources):
            raise ValueError(
                "mixture mixes the queries of trained heads: give --set sources=RUN,RUN (runs of --fusion "
                "attention), or --set random_sources=N"
            )
        if not abs(temperature) <= 20:
            raise ValueError(f"mixture: temperature is {temperature}; it is an exponent from -20 to 20")
        self.out_width = width
        # Queries of trained heads come in place of these draws (see `pipeline.transfer`).
        self.register_buffer("sources", normal((n_sources, width), 0.02, generator).detach())
        self.query = normal((width,), 0.02, generator) if target else None
        self.mixer = None
        if attention and n_sources > 1:
            self.mixer = Mixer(width, size=size, temperature=temperature, generator=generator)

    @classmethod
    def reads(cls, kept: Sequence[int], last: int, **options: Any) -> list[int]:
        """Every layer kept, and the embeddings in any case."""
        return sorted({0, *kept})

    def shares(
        self, states: Float[Tensor, "layer token width"], lengths: Int[Tensor, " example"]
    ) -> Float[Tensor, "head example source"]:
        """a_j(x): how much of each source's query goes into that of each example.

        Args:
            states: of a batch's tokens, as for `forward`.
            lengths: number of tokens of each example.
        """
        if self.mixer is None:
            n_heads, n_sources, _ = self.sources.shape
            return self.sources.new_full((n_heads, len(lengths), n_sources), 1 / n_sources)
        examples = torch.split(states[0], lengths.tolist())
        pooled = torch.stack([x.amax(0) if len(x) else x.sum(0) for x in examples])
        shares: Tensor = self.mixer(pooled[None], self.sources)
        return shares

    def forward(
        self, states: Float[Tensor, "layer token width"], lengths: Int[Tensor, " example"]
    ) -> Float[Tensor, "head token width"]:
        """Mixes the layers of each token by its example's query, for every head.

        Small products per token on a view of the states, as in `attention`.
        """
        weights = self.weights(states, lengths).transpose(0, 1).to(states.dtype)
        return torch.bmm(weights, states.transpose(0, 1)).transpose(0, 1)

    def weights(
        self, states: Float[Tensor, "layer token width"], lengths: Int[Tensor, " example"]
    ) -> Float[Tensor, "head token layer"]:
        """softmax_n(Q(x)·z_n), by the query of the token's example."""
        if not states.shape[1]:
            return states.new_zeros(len(self.sources), 0, len(states))
        query = self.shares(states, lengths) @ self.sources
        if self.query is not None:
            query = query + self.query[:, None]
        query = query.repeat_interleave(lengths, 1, output_size=states.shape[1])
        scores = torch.bmm(states.transpose(0, 1), query.permute(1, 2, 0).to(states.dtype))
        return scores.softmax(1).permute(2, 0, 1)


FUSION = Mixture
