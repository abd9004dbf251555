"""AdamW over a stack, each head with its own learning rate and weight decay.

A head's update reads and writes nothing but its own slice of every parameter, so it never depends on its
neighbours. Decoupled weight decay: Loshchilov and Hutter 2019.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.optim.adamw import adamw

BETAS, EPS = (0.9, 0.999), 1e-8
"""Those of torch's own optimizer."""


@dataclass(frozen=True)
class _Rows:
    """Heads that share their rates: all of a stack, or one."""

    of: slice  # on the head axis
    lr: float
    weight_decay: float
    held: list[tuple[Tensor, ...]]  # of each parameter: values, two moments, number of updates


class StackedAdamW:
    """AdamW for a stack of heads, one fused pass over each tensor.

    Heads that share their rates are updated as whole parameters; where the rates differ, each by itself.
    It calls torch's function, not its optimizer, whose hooks and groups are a quarter of a small update.

    Args:
        part: the stack; its parameters start with the head axis.
        lr: learning rate of each head.
        weight_decay: weight decay of each head.
    """

    def __init__(self, part: nn.Module, *, lr: Sequence[float], weight_decay: Sequence[float]) -> None:
        self.parameters = [p for p in part.parameters() if p.requires_grad]
        self._rates = list(zip(lr, weight_decay, strict=True))
        moments = [(torch.zeros_like(p), torch.zeros_like(p)) for p in self.parameters]
        self._begin([0] * len(self.parameters), moments)

    def _begin(self, steps: Sequence[int], moments: list[tuple[Tensor, Tensor]]) -> None:
        self.moments = moments
        shared = len(set(self._rates)) == 1
        places = [slice(None)] if shared else [slice(k, k + 1) for k in range(len(self._rates))]
        self._rows = [
            _Rows(
                of, *rates,
                [
                    (parameter.detach()[of], *(moment[of] for moment in pair),
                     torch.tensor(float(done), device=parameter.device))
                    for parameter, pair, done in zip(self.parameters, moments, steps, strict=True)
                ],
            )
            for of, rates in zip(places, self._rates, strict=False)
        ]  # fmt: skip

    @property
    def steps(self) -> list[int]:
        """How many updates each parameter has had: a step in which it has no gradient is none."""
        return [int(done) for *_, done in self._rows[0].held]

    def resume(self, steps: Sequence[int], moments: Sequence[tuple[Tensor, Tensor]]) -> None:
        """Goes on from the moments of another stack's heads, after that many updates of each parameter."""
        self._begin(steps, [(first.clone(), second.clone()) for first, second in moments])

    def zero_grad(self) -> None:
        """Drops the gradients of all heads."""
        for parameter in self.parameters:
            parameter.grad = None

    @torch.no_grad()
    def step(self, scale: float) -> None:
        """Updates every head.

        Args:
            scale: factor on every head's learning rate, from the schedule.
        """
        gradients = [parameter.grad for parameter in self.parameters]
        for rows in self._rows:
            learned = [
                (gradient[rows.of], *held)
                for gradient, held in zip(gradients, rows.held, strict=True)
                if gradient is not None
            ]
            if learned:
                grads, values, firsts, seconds, steps = map(list, zip(*learned, strict=True))
                adamw(
                    values, grads, firsts, seconds, [], steps,
                    lr=rows.lr * scale, weight_decay=rows.weight_decay, beta1=BETAS[0], beta2=BETAS[1],
                    eps=EPS, fused=True, amsgrad=False, maximize=False,
                )  # fmt: skip


def linear_schedule(step: int, *, n_steps: int, warmup_steps: int) -> float:
    """Factor on the learning rate at a step counted from 0: linear warm-up, then linear decay to 0.

    >>> [linear_schedule(s, n_steps=4, warmup_steps=2) for s in range(4)]
    [0.5, 1.0, 1.0, 0.5]
    """
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    return (n_steps - step) / max(1, n_steps - warmup_steps)
