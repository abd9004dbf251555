"""Depth-wise attention: the last layer asks, transformed layers answer."""

import math
from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from pipeline.fusions._base import Fusion
from pipeline.stack import Linear, constant, normal, uniform

POSITION_WIDTH = 24
EPS = 1e-5
"""Added to the variance of what is normalised."""


class Bottlenecks(nn.Module):
    """n functions f(x) = W·LN(gelu(U x + a)) + b side by side, each with its own weights.

    Args:
        count: n, the number of functions.
        width: size of x and f(x), d; the bottleneck has d/2 values.
        generator: source of the starting weights, which are those of `torch.nn.Linear`.
    """

    def __init__(self, count: int, width: int, generator: torch.Generator) -> None:
        super().__init__()
        narrow = max(1, width // 2)
        inward, outward = 1 / math.sqrt(width), 1 / math.sqrt(narrow)
        self.down = uniform((count, width, narrow), inward, generator)
        self.down_bias = uniform((count, 1, narrow), inward, generator)
        self.norm_weight = constant((count, 1, narrow), 1.0)
        self.norm_bias = constant((count, 1, narrow), 0.0)
        self.up = uniform((count, narrow, width), outward, generator)
        self.up_bias = uniform((count, 1, width), outward, generator)

    def hidden(self, x: Float[Tensor, "count token width"]) -> Float[Tensor, "head count token narrow"]:
        """The bottlenecks, normalised but neither scaled nor shifted; x is not copied for each head."""
        narrow = torch.einsum("ntd,hndm->hntm", x, self.down) + self.down_bias
        return nn.functional.layer_norm(nn.functional.gelu(narrow), narrow.shape[-1:], eps=EPS)

    def outward(
        self,
    ) -> tuple[Float[Tensor, "head count narrow width"], Float[Tensor, "head count 1 width"]]:
        """W and b with the normalisation's scale and shift multiplied in: f(x) is hidden(x) W + b."""
        return self.norm_weight.mT * self.up, self.norm_bias @ self.up + self.up_bias

    def forward(self, x: Float[Tensor, "count token width"]) -> Float[Tensor, "head count token width"]:
        """Applies function n to x[n], for every head."""
        up, bias = self.outward()
        return self.hidden(x) @ up + bias


class DWAtt(Fusion):
    """h = z_L + Σ_n softmax_n(q·k_n) v_n over layers 1..L (DWAtt paper, eq. 3-11).

    k_n = W^K p_n with fixed p_n ~ U(0,1)^24, v_n = LN_n(f_n(z_n)), q = 1 + elu(z_L + f_Q(z_L)),
    f(x) = W·LN(gelu(U x)) with a bottleneck of d/2.

    U and W have biases (an open point of the paper). Parameters, for d = 1024, L = 24:
    (L + 1)(d² + 5d/2) in f_n and f_Q, 2 L d in LN_n and 24 d in W^K, together 26.35 M; the paper says
    26.38 M, 0.1 % more.

    The start of W^K is open too, and matters. q is positive with values near 1, so a score sums d
    terms of one sign: with the start of `torch.nn.Linear` scores lie some √d / 4 apart and the softmax
    is nearly one-hot. Here W^K ~ N(0, 3 / (24 d)), so that q·k_n has variance E[q²], of order 1. For
    the same reason a step of Adam at rate r can move a score by about 12 r d: hence the paper's rates
    of 1e-5 to 5e-5.

    Args:
        n_layers: number of layers handed to `forward`, usually L; the last of them is z_L.
        width: size of a state, d.
        generator: source of the starting weights and of the positions p_n.
    """

    positions: Tensor

    def __init__(self, *, n_layers: int, width: int, generator: torch.Generator) -> None:
        super().__init__()
        self.out_width = width
        self.register_buffer("positions", torch.rand(1, n_layers, POSITION_WIDTH, generator=generator))
        self.key = normal((POSITION_WIDTH, width), math.sqrt(3 / (POSITION_WIDTH * width)), generator)
        self.query = Bottlenecks(1, width, generator)
        self.value = Bottlenecks(n_layers, width, generator)
        self.norm_weight = constant((n_layers, 1, width), 1.0)
        self.norm_bias = constant((n_layers, 1, width), 0.0)

    @classmethod
    def reads(cls, kept: Sequence[int], last: int, **options: Any) -> list[int]:
        """Every layer kept but the embeddings, and the last one in any case."""
        return sorted({*kept, last} - {0})

    def forward(
        self, states: Float[Tensor, "layer token width"], lengths: Int[Tensor, " example"]
    ) -> Float[Tensor, "head token width"]:
        """Adds to the last layer what the query of each token finds in the others, for every head."""
        last = states[-1:]
        weights = self.weights(states, lengths)
        value = self.value(states)
        value = (
            nn.functional.layer_norm(value, value.shape[-1:], eps=EPS) * self.norm_weight + self.norm_bias
        )
        return last + torch.einsum("htn,hntd->htd", weights, value)

    def scored(
        self,
        states: Float[Tensor, "layer token width"],
        lengths: Int[Tensor, " example"],
        scorer: Linear,
    ) -> Float[Tensor, "head token score"]:
        """Scores of each token; where that takes fewer products, no value is formed for them."""
        n_tokens, width = states.shape[1:]
        narrow, n_scores = self.value.down.shape[3], scorer.weight.shape[2]
        # Products forward and backward with the values, and without them.
        fewer = (n_tokens + width) * (2 * narrow + 3 * n_scores) < 3 * n_tokens * width
        # bfloat16 has too few bits for a variance in this form.
        if fewer and not torch.is_autocast_enabled(states.device.type):
            return self._scored_without_values(states, lengths, scorer)
        return super().scored(states, lengths, scorer)

    def _scored_without_values(
        self,
        states: Float[Tensor, "layer token width"],
        lengths: Int[Tensor, " example"],
        scorer: Linear,
    ) -> Float[Tensor, "head token score"]:
        """v_n = g y C / σ + c with y = h W + b, h the bottleneck, C taking the mean off, σ² = |y C|² / d.

        So all that its scores need are products of h: |h W C|² is h M hᵀ with M = (W C)(W C)ᵀ.
        """
        n_scores = scorer.weight.shape[2]
        up, bias = self.value.outward()
        bias = bias - bias.mean(-1, keepdim=True)
        classes = scorer.weight[:, None]
        scaled = self.norm_weight.mT * classes
        scaled = scaled - scaled.mean(-2, keepdim=True)
        onto = torch.cat([scaled, 2 * bias.mT], -1)
        onto = nn.functional.pad(onto, (0, -onto.shape[-1] % 16))  # see `pipeline.stack.in_a_row`
        hidden = self.value.hidden(states)
        squares, products = _Spread.apply(hidden, up, up @ onto)  # type: ignore[no-untyped-call]
        scores, crossed = products[..., :n_scores], products[..., n_scores : n_scores + 1]
        variance = (squares + crossed + (bias * bias).sum(-1, keepdim=True)) / states.shape[2]
        scores = (scores + bias @ scaled) * torch.rsqrt(variance + EPS) + self.norm_bias @ classes
        weights = self.weights(states, lengths).mT[..., None]
        own: Tensor = scorer(states[-1:])
        return own + (weights * scores).sum(1)

    def weights(
        self, states: Float[Tensor, "layer token width"], lengths: Int[Tensor, " example"]
    ) -> Float[Tensor, "head token layer"]:
        """softmax_n(q·k_n); z_L, which is added to what they weigh, has no part in them."""
        last = states[-1:]
        query = 1 + nn.functional.elu(last + self.query(last)[:, 0])
        return (query @ (self.positions @ self.key).mT).softmax(-1)


class _Spread(torch.autograd.Function):
    """|h W C|² and h P of every row h (see `DWAtt._scored_without_values`).

    Autograd would multiply by M twice more.
    """

    @staticmethod
    def forward(
        ctx: Any,
        h: Float[Tensor, "head count token narrow"],
        up: Float[Tensor, "head count narrow width"],
        onto: Float[Tensor, "head count narrow column"],
    ) -> tuple[Float[Tensor, "head count token 1"], Float[Tensor, "head count token column"]]:
        centred = up - up.mean(-1, keepdim=True)
        along = h @ (centred @ centred.mT)
        ctx.save_for_backward(h, centred, onto, along)
        return (along * h).sum(-1, keepdim=True), h @ onto

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any,
        of_squares: Float[Tensor, "head count token 1"],
        of_products: Float[Tensor, "head count token column"],
    ) -> tuple[Tensor, Tensor, Tensor]:
        h, centred, onto, along = ctx.saved_tensors
        twice = 2 * of_squares
        of_h = torch.addcmul(of_products @ onto.mT, along, twice)
        return of_h, (h.mT @ (h * twice)) @ centred, h.mT @ of_products


FUSION = DWAtt
