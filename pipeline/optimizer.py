"""AdamW over a stack, each head with its own learning rate and weight decay.

A head's update reads and writes nothing but its own slice of every parameter, so it never depends on its
neighbours. Decoupled weight decay: Loshchilov and Hutter 2019.
"""

from collections.abc import Sequence

import torch
from torch import nn


class StackedAdamW:
    """AdamW for a stack of heads, one fused pass over each tensor.

    Heads that share their rates are updated as whole parameters; where the rates differ, each head is a
    parameter group of views.

    Args:
        part: the stack; its parameters start with the head axis.
        lr: learning rate of each head.
        weight_decay: weight decay of each head.
    """

    def __init__(self, part: nn.Module, *, lr: Sequence[float], weight_decay: Sequence[float]) -> None:
        self.n_heads = len(lr)
        self.parameters = [p for p in part.parameters() if p.requires_grad]
        rates = list(zip(lr, weight_decay, strict=True))
        self._shared = len(set(rates)) == 1
        columns = [self.parameters] if self._shared else [self._head(k) for k in range(self.n_heads)]
        groups = [
            {"params": column, "lr": rate, "weight_decay": decay}
            for column, (rate, decay) in zip(columns, rates, strict=False)
        ]
        self._adamw = torch.optim.AdamW(groups, fused=True) if self.parameters else None
        self._lr = list(lr)

    def _head(self, k: int) -> list[torch.Tensor]:
        return [p.detach()[k] for p in self.parameters]

    def zero_grad(self) -> None:
        """Drops the gradients of all heads."""
        for parameter in self.parameters:
            parameter.grad = None

    def step(self, scale: float) -> None:
        """Updates every head.

        Args:
            scale: factor on every head's learning rate, from the schedule.
        """
        if self._adamw is None:
            return
        for k, group in enumerate(self._adamw.param_groups):
            group["lr"] = self._lr[k] * scale
            if not self._shared:
                for view, parameter in zip(group["params"], self.parameters, strict=True):
                    view.grad = None if parameter.grad is None else parameter.grad[k]
        self._adamw.step()


def linear_schedule(step: int, *, n_steps: int, warmup_steps: int) -> float:
    """Factor on the learning rate at a step counted from 0: linear warm-up, then linear decay to 0.

    >>> [linear_schedule(s, n_steps=4, warmup_steps=2) for s in range(4)]
    [0.5, 1.0, 1.0, 0.5]
    """
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    return (n_steps - step) / max(1, n_steps - warmup_steps)
