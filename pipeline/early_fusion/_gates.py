"""Differences through hard-concrete gates, a piece at a time.

Each weight takes a dozen operations that cost next to nothing beside the memory they read. So they are done
on pieces that stay in the processor's cache, into tensors that are used again: on a fresh tensor of all
weights every operation would wait for new pages.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

STRETCH = (-1.5, 1.5)
"""Ends of the stretched concrete distribution, l and r in the paper."""

_LEAST = 1e-6
"""The noise u is drawn from between this and 1 less it."""


def gate(log_alpha: Tensor, *, drawn: bool) -> Tensor:
    """Gates z = clamp(s (r - l) + l, 0, 1), s = σ(log u - log(1 - u) + log α); u is 1/2 if not drawn."""
    low, high = STRETCH
    if drawn:
        log_alpha = torch.rand_like(log_alpha).logit(_LEAST) + log_alpha
    return (log_alpha.sigmoid() * (high - low) + low).clamp(0, 1)


def open_probability(log_alpha: Tensor) -> Tensor:
    """P(z > 0) = σ(log α - log(-l / r))."""
    low, high = STRETCH
    return (log_alpha - torch.tensor(-low / high).log()).sigmoid()


class Room:
    """The tensors that one draw after the other is computed in.

    Args:
        base: θ_0, a tensor a group.
    """

    def __init__(self, base: Sequence[Tensor]) -> None:
        self.base = list(base)
        self.sizes = [one.numel() for one in base]
        device = base[0].device
        self.piece = 2**16 if device.type == "cpu" else 2**26
        whole = [torch.empty(sum(self.sizes), device=device) for _ in range(4)]
        self.weights, self.gates, self.values_grad, self.gates_grad = whole
        self.scratch = torch.empty(2, min(self.piece, max(self.sizes)), device=device)

    def pieces(self) -> Iterator[tuple[int, slice, slice]]:
        """The number of the group, the place among all weights and that within the group."""
        first = 0
        for group, size in enumerate(self.sizes):
            for start in range(0, size, self.piece):
                stop = min(start + self.piece, size)
                yield group, slice(first + start, first + stop), slice(start, stop)
            first += size

    def shaped(self) -> tuple[Tensor, ...]:
        """The weights, each in its own form."""
        parts = torch.split(self.weights, self.sizes)
        return tuple(part.view_as(one) for part, one in zip(parts, self.base, strict=True))


class GatedWeights(torch.autograd.Function):
    """Every tensor of θ_0 + δ, δ_i = z_i z_g w_i with drawn z_i; and Σ_i P(z_i > 0) of each group.

    With f = (r - l) s (1 - s) = (z - l) (r - z) / (r - l) where 0 < z < 1, and 0 elsewhere: ∂z/∂log α = f.
    """

    @staticmethod
    def forward(
        ctx: Any,
        values: Float[Tensor, " weight"],
        gates: Float[Tensor, " weight"],
        group_gates: Float[Tensor, " group"],
        room: Room,
    ) -> tuple[Tensor, ...]:
        """Draws every gate; `group_gates` are the z_g, `gates` the log α of the z_i."""
        low, high = STRETCH
        factors, opened = group_gates.tolist(), torch.zeros_like(group_gates)
        bases = [one.detach().flatten() for one in room.base]
        for group, place, within in room.pieces():
            z, weight = room.gates[place], room.weights[place]
            noise, rest = (one[: len(z)] for one in room.scratch)
            # s = u / (u + (1 - u) / α): the sigmoid of the sum of logarithms, with one exponential.
            torch.neg(gates[place], out=rest).exp_()
            opened[group] += rest.mul(-low / high).add_(1).reciprocal_().sum()
            noise.uniform_(_LEAST, 1 - _LEAST)
            rest.addcmul_(noise, rest, value=-1).add_(noise)
            torch.div(noise, rest, out=z).mul_(high - low).add_(low).clamp_(0, 1)
            torch.mul(z, values[place], out=weight)
            torch.add(bases[group][within], weight, alpha=factors[group], out=weight)
        ctx.save_for_backward(values, gates, group_gates)
        ctx.room, ctx.factors = room, factors
        return (*room.shaped(), opened)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        """Gradients of w, of log α and of the z_g."""
        low, high = STRETCH
        values, gates, group_gates = ctx.saved_tensors
        room: Room = ctx.room
        *of_weights, of_opened = grads
        flat = [one.reshape(-1) for one in of_weights]
        to_opened, group_grad = of_opened.tolist(), torch.zeros_like(group_gates)
        # Those of an earlier piece of the same step are still in use: these then get memory of their own.
        free = values.grad is None and gates.grad is None
        values_grad = room.values_grad if free else torch.empty_like(room.values_grad)
        gates_grad = room.gates_grad if free else torch.empty_like(room.gates_grad)
        for group, place, within in room.pieces():
            z, w, grad, factor = room.gates[place], values[place], flat[group][within], ctx.factors[group]
            one, other = (scratch[: len(z)] for scratch in room.scratch)
            torch.mul(grad, z, out=one)
            group_grad[group] += torch.dot(one, w)
            torch.mul(one, factor, out=values_grad[place])
            # ∂z/∂log α times ∂loss/∂z; z - z² has the sign 1 where 0 < z < 1 and 0 at both ends.
            inside = torch.addcmul(z, z, z, value=-1, out=one).sign_()
            torch.mul(grad, w, out=other).mul_(inside).mul_(factor / (high - low))
            torch.sub(z, low, out=one)
            other.mul_(one)
            torch.mul(z, -1, out=one).add_(high)
            other.mul_(one)
            torch.mul(gates[place], -1, out=one).exp_().mul_(-low / high).add_(1).reciprocal_()
            one.addcmul_(one, one, value=-1)
            torch.add(other, one, alpha=to_opened[group], out=gates_grad[place])
        # New names for the same memory: autograd then hands them on as they are, without a copy.
        return values_grad.detach(), gates_grad.detach(), group_grad, None


class FixedWeights(torch.autograd.Function):
    """Every tensor of θ_0 + δ where δ differs from 0 at some places only: δ_i = w_i there."""

    @staticmethod
    def forward(
        ctx: Any, values: Float[Tensor, " weight"], places: Tensor, room: Room
    ) -> tuple[Tensor, ...]:
        """The places are those of the differences among all weights."""
        torch.cat([one.detach().flatten() for one in room.base], out=room.weights)
        room.weights[places] += values[places]
        ctx.save_for_backward(values, places)
        ctx.room = room
        return room.shaped()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        """The gradient of w: that of the weights at the places."""
        values, places = ctx.saved_tensors
        room: Room = ctx.room
        torch.cat([one.reshape(-1) for one in grads], out=room.gates)
        values_grad = room.values_grad if values.grad is None else torch.empty_like(room.values_grad)
        values_grad.zero_()[places] = room.gates[places]
        return values_grad.detach(), None, None


gated_weights: Callable[..., tuple[Tensor, ...]] = GatedWeights.apply
fixed_weights: Callable[..., tuple[Tensor, ...]] = FixedWeights.apply
