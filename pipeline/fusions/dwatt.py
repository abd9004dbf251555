"""Depth-wise attention: the last layer asks, transformed layers answer."""

import math
from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from pipeline.fusions._base import Fusion
from pipeline.stack import constant, normal, uniform

POSITION_WIDTH = 24


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

    def forward(self, x: Float[Tensor, "count token width"]) -> Float[Tensor, "head count token width"]:
        """Applies function n to x[n], for every head; x is not copied for each of them."""
        hidden = nn.functional.gelu(torch.einsum("ntd,hndm->hntm", x, self.down) + self.down_bias)
        hidden = nn.functional.layer_norm(hidden, hidden.shape[-1:]) * self.norm_weight + self.norm_bias
        return hidden @ self.up + self.up_bias


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
        value = nn.functional.layer_norm(value, value.shape[-1:]) * self.norm_weight + self.norm_bias
        return last + torch.einsum("htn,hntd->htd", weights, value)

    def weights(
        self, states: Float[Tensor, "layer token width"], lengths: Int[Tensor, " example"]
    ) -> Float[Tensor, "head token layer"]:
        """softmax_n(q·k_n); z_L, which is added to what they weigh, has no part in them."""
        last = states[-1:]
        query = 1 + nn.functional.elu(last + self.query(last)[:, 0])
        return (query @ (self.positions @ self.key).mT).softmax(-1)


FUSION = DWAtt
