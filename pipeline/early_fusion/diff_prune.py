"""A sparse difference to the pre-trained weights is trained."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor, nn

from pipeline.early_fusion._base import Host, Method
from pipeline.early_fusion._gates import Room, fixed_weights, gate, gated_weights, open_probability
from pipeline.errors import PipelineError

START = 5.0
"""Where log α starts: gates are open at first, so that every difference can be tried."""


class DiffPrune(Method):
    """θ = θ_0 + δ with a δ that is made sparse while it is trained (Guo, Rush and Kim 2021).

    δ_i = z_i z_g w_i, where w is dense, z_i is a gate of its own for every number and z_g one for its
    tensor g ("structured"). A gate is hard-concrete (Louizos et al. 2018):
    z = clamp(s (r - l) + l, 0, 1), s = σ(log u - log(1 - u) + log α), u ~ U(0, 1). The expected number
    of weights that differ, Σ_i P(z_i > 0) P(z_g > 0) with P(z > 0) = σ(log α - log(-l / r)), is added to
    the loss with weight λ. In evaluation u is 1/2.

    Before the last part of the epochs the δ with the largest magnitudes, `share` of all, are kept and the
    others are set to 0 for good; what is kept is trained on (the paper's projection onto the L0 ball, and
    its further training with a fixed mask).

    Memory while training: two further numbers with their gradients and moments for each weight, and two
    that the draws are made in. The embeddings have gates too, as in the authors' code. What is kept of a
    run is the places and the values of the differences.

    Args:
        host: the backbone.
        generator: unused, δ starts at 0.
        share: of the weights that may differ in the end; the paper has 0.005 and 0.001.
        penalty: λ, weight of the expected number of weights that differ.
        gate_lr: learning rate of log α.
        fixed_frac: share of the epochs that train with the fixed mask.
    """

    lr: ClassVar[float] = 1e-3
    weight_decay: ClassVar[float] = 0.0
    recomputes: ClassVar[bool] = False

    kept: Tensor

    def __init__(
        self,
        *,
        host: Host,
        generator: torch.Generator,
        share: float = 0.001,
        penalty: float = 1.25e-7,
        gate_lr: float = 0.1,
        fixed_frac: float = 0.4,
    ) -> None:
        super().__init__(host=host)
        if not 0 < share <= 1:
            raise PipelineError(f"--set share={share}: give a share above 0, up to 1")
        if not 0 <= fixed_frac < 1:
            raise PipelineError(f"--set fixed_frac={fixed_frac}: give a share from 0 to below 1")
        self.share, self.weight, self.fixed_frac, self.gate_lr = share, penalty, fixed_frac, gate_lr
        self._names = [name for name, _ in host.model.named_parameters()]
        weights = [p for _, p in host.model.named_parameters()]
        self.sizes = [p.numel() for p in weights]
        size = sum(self.sizes)
        self.values = nn.Parameter(torch.zeros(size, device=weights[0].device))
        self.gates = nn.Parameter(torch.full((size,), START, device=weights[0].device))
        self.group_gates = nn.Parameter(torch.full((len(weights),), START, device=weights[0].device))
        self.register_buffer("kept", torch.ones(size, dtype=torch.bool, device=weights[0].device))
        self.projected = False
        self._scores: tuple[float, float] | None = None
        self._room: Room | None = None
        self._opened: Tensor | None = None

    def difference(self) -> Float[Tensor, " weight"]:
        """δ, with gates at rest."""
        if self.projected:
            return self.values * self.kept
        return (
            self.values * gate(self.gates, drawn=False) * self._spread(gate(self.group_gates, drawn=False))
        )

    def _spread(self, of_groups: Float[Tensor, " group"]) -> Float[Tensor, " weight"]:
        """A number of each tensor for every weight in it."""
        return torch.repeat_interleave(of_groups, torch.tensor(self.sizes, device=of_groups.device))

    def penalty(self) -> Tensor | None:
        """λ times the expected number of weights that differ; in training that of the last `call`."""
        if self.projected:
            return None
        opened, self._opened = self._opened, None
        if opened is None:
            parts = torch.split(open_probability(self.gates), self.sizes)
            opened = torch.stack([part.sum() for part in parts])
        return self.weight * (opened * open_probability(self.group_gates)).sum()

    def call(self, model: Any, inputs: Mapping[str, Any]) -> Any:
        """The model with θ_0 + δ, its gates drawn; in evaluation `applied` has put it in place."""
        if not self.training:
            return model(**inputs)
        base = dict(self.host.model.named_parameters())
        if self._room is None:
            self._room = Room([base[name] for name in self._names])
        weights: Sequence[Tensor]
        if self.projected:
            weights = fixed_weights(self.values, self.kept.nonzero()[:, 0], self._room)
        else:
            drawn = gate(self.group_gates, drawn=True)
            *weights, self._opened = gated_weights(self.values, self.gates, drawn, self._room)
        named = dict(zip(self._names, weights, strict=True))
        return torch.func.functional_call(model, named, (), dict(inputs))

    def _weights(self, difference: Tensor) -> dict[str, Tensor]:
        """Every weight with its difference, by name."""
        parts = torch.split(difference, self.sizes)
        base = dict(self.host.model.named_parameters())
        return {
            name: base[name].detach() + part.view_as(base[name])
            for name, part in zip(self._names, parts, strict=True)
        }

    @contextmanager
    def applied(self) -> Iterator[None]:
        """The model computes with θ_0 + δ; afterwards its weights are what they were, bit for bit."""
        base = dict(self.host.model.named_parameters())
        kept = {name: base[name].data for name in self._names}
        with torch.no_grad():
            for name, weight in self._weights(self.difference()).items():
                base[name].data = weight
        try:
            yield
        finally:
            for name, weight in kept.items():
                base[name].data = weight

    def _fixed_from(self, epochs: int) -> int:
        """The first epoch with a fixed mask; one past the last where there is none."""
        return max(2, epochs + 1 - round(self.fixed_frac * epochs))

    def start_epoch(self, epoch: int, epochs: int) -> bool:
        """Projects before the first epoch with a fixed mask, or where training ended before it."""
        if self.projected or not (epoch >= self._fixed_from(epochs) or epoch > epochs):
            return False
        self.project()
        return True

    @torch.no_grad()
    def project(self) -> None:
        """Keeps the largest differences and drops the others, for good."""
        was = self.training
        self.eval()
        difference = self.difference()
        n_kept = int(self.share * len(difference))
        chosen = difference.abs().topk(n_kept).indices
        self.kept.zero_()
        self.kept[chosen] = True
        self.values.copy_(difference * self.kept)
        self.projected = True
        self.train(was)

    def counts(self, epoch: int, epochs: int) -> bool:
        """Only sparse differences may be kept."""
        return self.projected

    def note_score(self, before: float, after: float) -> None:
        """Dev scores around the projection."""
        self._scores = (before, after)

    def rates(self, lr: float) -> list[dict[str, Any]]:
        """The differences and the gates, each with a rate of its own."""
        gates = {"params": [self.gates, self.group_gates], "lr": self.gate_lr}
        return [{"params": [self.values], "lr": lr}, gates]

    def n_parameters(self) -> int:
        """The differences that are kept."""
        return int(self.kept.sum()) if self.projected else int(self.share * len(self.values))

    def facts(self) -> dict[str, Any]:
        """Scores around the projection, and how many weights differ."""
        found: dict[str, Any] = {"trained_parameters": 2 * len(self.values) + len(self.group_gates)}
        if self._scores is not None:
            before, after = self._scores
            found |= {"dev_before_projection": before, "dev_after_projection": after}
        if self.projected:
            found["nonzero_frac"] = int((self.values * self.kept).count_nonzero()) / len(self.values)
        return found

    def everything(self) -> dict[str, Tensor]:
        """All that training changes, the dense difference and its gates too."""
        return {**super().everything(), "method.projected": torch.tensor(self.projected)}

    def load_everything(self, state: Mapping[str, Tensor]) -> None:
        """Puts back what `everything` gave."""
        rest = dict(state)
        self.projected = bool(rest.pop("method.projected"))
        super().load_everything(rest)

    def state(self) -> dict[str, Tensor]:
        """The places of the differences and their values."""
        places = self.kept.nonzero()[:, 0]
        return {"method.places": places, "method.differences": self.values.detach()[places]}

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Puts back what `state` gave."""
        places = state["method.places"]
        with torch.no_grad():
            self.kept.zero_()
            self.values.zero_()
            self.kept[places] = True
            self.values[places] = state["method.differences"]
        self.projected = True


METHOD = DiffPrune
