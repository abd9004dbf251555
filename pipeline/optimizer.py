"""AdamW over a stack: one flat row of memory a head, each with its own learning rate and decay.

A head's update reads and writes nothing but its own row, so it never depends on its neighbours.
Decoupled weight decay: Loshchilov and Hutter 2019.
"""

import warnings
from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor, nn


class StackedAdamW:
    """AdamW for a stack of heads.

    Moves the stack's parameters into one buffer of shape ``head parameter`` and keeps them as views of
    it, so that a head's update is one fused pass over its row.

    Args:
        part: the stack; its parameters start with the head axis.
        lr: learning rate of each head.
        weight_decay: weight decay of each head.
    """

    def __init__(self, part: nn.Module, *, lr: Sequence[float], weight_decay: Sequence[float]) -> None:
        parameters = [p for p in part.parameters() if p.requires_grad]
        n_heads, device = len(lr), next(iter(parameters), torch.empty(0)).device
        size = sum(p[0].numel() for p in parameters)
        self.values: Float[Tensor, "head parameter"] = torch.empty(n_heads, size, device=device)
        self._gradients = torch.zeros_like(self.values)
        self._lay_out(parameters)
        rows = list(self.values)
        for row, gradient in zip(rows, self._gradients, strict=True):
            row.grad = gradient
        self._lr = list(lr)
        groups = [
            {"params": [row], "lr": rate, "weight_decay": decay}
            for row, rate, decay in zip(rows, lr, weight_decay, strict=True)
        ]
        self._adamw = torch.optim.AdamW(groups, fused=True) if size else None

    def _lay_out(self, parameters: Sequence[nn.Parameter]) -> None:
        # Autograd adds into a gradient in place, whatever its strides, but prefers one that is contiguous
        # across heads; then a head's row would not be.
        warnings.filterwarnings("ignore", "grad and param do not obey the gradient layout contract")
        at = 0
        for parameter in parameters:
            here = slice(at, at + parameter[0].numel())
            self.values[:, here] = parameter.detach().flatten(1)
            parameter.data = self.values[:, here].view(parameter.shape)
            parameter.grad = self._gradients[:, here].view(parameter.shape)
            at = here.stop

    def zero_grad(self) -> None:
        """Clears the gradients of all heads."""
        self._gradients.zero_()

    def step(self, scale: float) -> None:
        """Updates every head.

        Args:
            scale: factor on every head's learning rate, from the schedule.
        """
        if self._adamw is None:
            return
        for group, lr in zip(self._adamw.param_groups, self._lr, strict=True):
            group["lr"] = lr * scale
        self._adamw.step()


def linear_schedule(step: int, *, n_steps: int, warmup_steps: int) -> float:
    """Factor on the learning rate at a step counted from 0: linear warm-up, then linear decay to 0.

    >>> [linear_schedule(s, n_steps=4, warmup_steps=2) for s in range(4)]
    [0.5, 1.0, 1.0, 0.5]
    """
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    return (n_steps - step) / max(1, n_steps - warmup_steps)
