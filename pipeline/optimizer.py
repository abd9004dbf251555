"""AdamW over a stack, each head with its own learning rate and weight decay.

A head's update reads and writes nothing but its own slice of every parameter, so it never depends on its
neighbours. Decoupled weight decay: Loshchilov and Hutter 2019.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn


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
        self.moments = [(torch.zeros_like(p), torch.zeros_like(p)) for p in self.parameters]
        self._lr, self._weight_decay = list(lr), list(weight_decay)
        self._make([0] * len(self.parameters))

    def _make(self, steps: Sequence[int]) -> None:
        """The optimizer of torch that does the update, on views of the moments."""
        rates = list(zip(self._lr, self._weight_decay, strict=True))
        self._shared = len(set(rates)) == 1
        columns: list[Any] = [slice(None)] if self._shared else list(range(self.n_heads))
        self._views = [[p if self._shared else p.detach()[k] for p in self.parameters] for k in columns]
        groups = [
            {"params": views, "lr": rate, "weight_decay": decay}
            for views, (rate, decay) in zip(self._views, rates, strict=False)
        ]
        self._adamw = torch.optim.AdamW(groups, fused=True) if self.parameters else None
        for k, views in zip(columns, self._views, strict=True):
            for view, (first, second), done in zip(views, self.moments, steps, strict=True):
                step = torch.tensor(float(done), device=view.device)
                held = {"step": step, "exp_avg": first[k], "exp_avg_sq": second[k]}
                if self._adamw is not None:
                    self._adamw.state[view] = held

    @property
    def steps(self) -> list[int]:
        """How many updates each parameter has had: a step in which it has no gradient is none."""
        if self._adamw is None:
            return []
        return [int(self._adamw.state[view]["step"]) for view in self._views[0]]

    def resume(self, steps: Sequence[int], moments: Sequence[tuple[Tensor, Tensor]]) -> None:
        """Goes on from the moments of another stack's heads, after that many updates of each parameter."""
        self.moments = [(first.clone(), second.clone()) for first, second in moments]
        self._make(steps)

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
