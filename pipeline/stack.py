"""The head axis: N heads of one shape are one module whose every parameter starts with that axis.

A part (fusion or decoder) is built for one head, so its parameters and buffers have shape
``(1, ...)``; `stack` joins N such parts into one whose tensors have shape ``(N, ...)``, and `unstack`
takes one out again. There is no single-head code path: one head is a stack of one.

Inputs that all heads share have a head axis of 1 and broadcast. This module knows the axis and the
layers that carry it; it knows no fusion, no decoder and no data.
"""

import copy
import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, TypeVar

import torch
from jaxtyping import Float, UInt8
from torch import Tensor, nn

Module = TypeVar("Module", bound=nn.Module)

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": nn.functional.gelu,
    "gelu_tanh": partial(nn.functional.gelu, approximate="tanh"),
    "relu": nn.functional.relu,
    "silu": nn.functional.silu,
    "tanh": torch.tanh,
}
"""Functions of one number, by the name under which a part takes them."""


def uniform(shape: Sequence[int], bound: float, generator: torch.Generator) -> nn.Parameter:
    """A parameter of one head, drawn from U(-bound, bound); shape is given without the head axis."""
    return nn.Parameter(torch.empty(1, *shape).uniform_(-bound, bound, generator=generator))


def normal(shape: Sequence[int], std: float, generator: torch.Generator) -> nn.Parameter:
    """A parameter of one head, drawn from N(0, std²); shape is given without the head axis."""
    return nn.Parameter(torch.empty(1, *shape).normal_(0.0, std, generator=generator))


def constant(shape: Sequence[int], value: float) -> nn.Parameter:
    """A parameter of one head that starts as a constant; shape is given without the head axis."""
    return nn.Parameter(torch.full((1, *shape), value))


class Linear(nn.Module):
    """y = x W + b for every head; the start is that of `torch.nn.Linear`.

    Args:
        n_in: size of the input's last axis.
        n_out: size of the output's last axis.
        generator: source of the starting weights.
        bias: whether b is there.

    Raises:
        ValueError: a size is below 1.
    """

    def __init__(self, n_in: int, n_out: int, *, generator: torch.Generator, bias: bool = True) -> None:
        super().__init__()
        if min(n_in, n_out) < 1:
            raise ValueError(f"a layer of {n_in} x {n_out} weights: give sizes of 1 or more")
        bound = 1 / math.sqrt(n_in)
        self.weight = uniform((n_in, n_out), bound, generator)
        self.bias = uniform((1, n_out), bound, generator) if bias else None

    def forward(self, x: Float[Tensor, "#head row n_in"]) -> Float[Tensor, "head row n_out"]:
        """Applies each head's matrix to its rows; an input shared by the heads is not copied."""
        return _multiply(x, self.weight, self.bias)


def _multiply(
    x: Float[Tensor, "#head row n_in"],
    weight: Float[Tensor, "head n_in n_out"],
    bias: Float[Tensor, "head 1 n_out"] | None,
) -> Float[Tensor, "head row n_out"]:
    n_heads, n_in, n_out = weight.shape
    if n_heads == 1:
        # Reshaping, not indexing: the gradient of an index is a zeroed tensor and a copy.
        return nn.functional.linear(
            x.flatten(0, 1), weight.view(n_in, n_out).T, None if bias is None else bias.view(n_out)
        ).unsqueeze(0)
    if x.shape[0] == 1:
        wide = weight.transpose(0, 1).reshape(n_in, n_heads * n_out)
        y = (x[0] @ wide).view(-1, n_heads, n_out).transpose(0, 1)
        return y if bias is None else y + bias
    return torch.bmm(x, weight) if bias is None else torch.baddbmm(bias, x, weight)


def in_a_row(
    x: Float[Tensor, "#head row n_in"], first: Linear, second: Linear
) -> Float[Tensor, "head row n_out"]:
    """second(first(x)), multiplied in the cheaper order: (x W₁) W₂ or x (W₁ W₂).

    With many rows and few scores the second takes a small part of the products of the first, in the
    backward pass too.
    """
    (n_in, n_mid), n_out, n_rows = first.weight.shape[1:], second.weight.shape[2], x.shape[1]
    # Columns of zeros up to the next 16: a product with 13 columns takes twice as long as with 16.
    narrow = nn.functional.pad(second.weight, (0, -n_out % 16))
    if n_rows * n_mid * (n_in + n_out) <= n_in * narrow.shape[2] * (n_mid + n_rows):
        return second(first(x))
    scores = _multiply(x, torch.bmm(first.weight, narrow), None)[..., :n_out]
    bias = second.bias if first.bias is None else second(first.bias)
    return scores if bias is None else scores + bias


class LayerNorm(nn.Module):
    """Layer normalisation over the last axis with each head's own scale and shift.

    Args:
        width: size of the last axis.
        eps: added to the variance.
    """

    def __init__(self, width: int, *, eps: float = 1e-5) -> None:
        super().__init__()
        self.eps = eps
        self.weight = constant((1, width), 1.0)
        self.bias = constant((1, width), 0.0)

    def forward(self, x: Float[Tensor, "#head row width"]) -> Float[Tensor, "head row width"]:
        """Normalises each row, then applies each head's scale and shift."""
        if self.weight.shape[0] == 1:
            return nn.functional.layer_norm(
                x, x.shape[-1:], self.weight.flatten(), self.bias.flatten(), self.eps
            )
        return nn.functional.layer_norm(x, x.shape[-1:], eps=self.eps) * self.weight + self.bias


class Dropout(nn.Module):
    """Dropout with a rate and a random stream of its own for each head.

    A head's mask depends on nothing but its seed and its own steps, so a head trains the same in
    every company.

    Args:
        rate: share of values set to zero, in [0, 1).
        seed: start of the random stream.

    Raises:
        ValueError: the rate is out of its range.
    """

    def __init__(self, rate: float, *, seed: int) -> None:
        super().__init__()
        if not 0 <= rate < 1:
            raise ValueError(f"dropout is {rate}: give a rate from 0 to below 1")
        self.restart([rate], [seed])

    def restart(self, rates: list[float], seeds: list[int]) -> None:
        """Sets every head's rate and seed, and puts every stream back to its start."""
        self.rates = rates
        self.seeds = seeds
        self._generators: list[torch.Generator] = []
        self._states: list[Tensor] = []

    def keep(self, other: "Dropout", heads: Sequence[int]) -> None:
        """Takes over the streams of some heads of another stack, as far as they have run."""
        states = other.states()
        self.restart([other.rates[k] for k in heads], [other.seeds[k] for k in heads])
        self.resume([states[k] for k in heads] if states else [])

    def states(self) -> list[UInt8[Tensor, " byte"]]:
        """How far every head's stream has run; nothing where none has begun."""
        return [generator.get_state() for generator in self._generators] or self._states

    def resume(self, states: Sequence[UInt8[Tensor, " byte"]]) -> None:
        """Puts every stream to where `states` had it."""
        self._states = list(states)
        self._generators = []

    def forward(self, x: Float[Tensor, "#head row width"]) -> Float[Tensor, "head row width"]:
        """Drops values while training; returns the input itself otherwise."""
        if not self.training or not any(self.rates):
            return x
        return x * torch.cat([self._mask(k, x) for k in range(len(self.rates))])

    def _mask(self, head: int, x: Tensor) -> Tensor:
        if len(self._generators) != len(self.seeds):
            self._generators = [torch.Generator(x.device).manual_seed(s) for s in self.seeds]
            for generator, state in zip(self._generators, self._states, strict=False):
                generator.set_state(state)
        keep = 1.0 - self.rates[head]
        mask = torch.empty(1, *x.shape[1:], device=x.device, dtype=x.dtype)
        return mask.bernoulli_(keep, generator=self._generators[head]).div_(keep)


def stack(parts: Sequence[Module]) -> Module:
    """Joins parts of one shape into one part with a head axis as long as all of theirs together.

    Args:
        parts: modules built alike (same class, same sizes), each with its own values.

    Raises:
        ValueError: there is no part.
    """
    if not parts:
        raise ValueError("a stack needs at least one part")
    joined: dict[int, Any] = {}
    for same in zip(*(part.parameters() for part in parts), strict=True):
        values = torch.cat([parameter.detach() for parameter in same])
        joined[id(same[0])] = nn.Parameter(values, requires_grad=same[0].requires_grad)
    for buffers in zip(*(part.buffers() for part in parts), strict=True):
        joined[id(buffers[0])] = torch.cat(buffers)
    whole = copy.deepcopy(parts[0], joined)
    for module, *dropouts in zip(whole.modules(), *(part.modules() for part in parts), strict=True):
        if isinstance(module, Dropout):
            rates = [rate for d in dropouts for rate in d.rates]
            module.restart(rates, [seed for d in dropouts for seed in d.seeds])
    return whole


def take(part: Module, heads: Sequence[int]) -> Module:
    """Takes some heads out of a stack, as a stack of those that shares no memory with it."""
    chosen = list(heads)
    # Handed to deepcopy as what it has copied already: the other heads' values are never copied.
    taken: dict[int, Any] = {id(b): b[chosen] for b in part.buffers()}
    for parameter in part.parameters():
        taken[id(parameter)] = nn.Parameter(
            parameter.detach()[chosen], requires_grad=parameter.requires_grad
        )
    fewer = copy.deepcopy(part, taken)
    for old, new in zip(part.modules(), fewer.modules(), strict=True):
        if isinstance(old, Dropout) and isinstance(new, Dropout):
            new.keep(old, chosen)
    return fewer


def unstack(part: Module, head: int) -> Module:
    """Takes one head out of a stack, as a stack of one, its dropout stream at its start."""
    single = take(part, [head])
    for module in single.modules():
        if isinstance(module, Dropout):
            module.restart(module.rates, module.seeds)
    return single
