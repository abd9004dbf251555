"""Soft tokens at every layer, not only in the input."""

from collections.abc import Callable
from typing import Any, ClassVar, Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from pipeline.early_fusion._base import Host, Method
from pipeline.early_fusion._soft import check_length
from pipeline.errors import PipelineError

_PROJECTIONS = (("key", "value"), ("k_lin", "v_lin"), ("k", "v"), ("k_proj", "v_proj"))
"""How the families call the projections to keys and values."""


class PrefixTuning(Method):
    """m soft tokens at each layer (P-tuning v2, Liu et al. 2022).

    The input gets m places for them, after a [CLS] and otherwise at the start. With ``form="states"`` what
    a layer reads at these places is replaced by m trained vectors, from which its own projections make keys
    and values: L m d parameters, 1,228,800 for m = 50 and 24 layers of 1024, the count that the
    attention-fusion paper gives. With ``form="keys_values"`` the keys and values themselves are trained, as
    in the authors' code: 2 L m d. Either way what a layer makes of these places is dropped, so that the
    text attends to the trained vectors and they attend to nothing. The table starts as N(0, 0.02²), with
    dropout on it, as in the authors' code.

    From text to text the encoder's layers get them.

    Args:
        host: the backbone.
        generator: draws the starting values.
        length: m, soft tokens a layer.
        form: what is trained: states, or keys and values.
        prefix_dropout: rate of dropout on the soft tokens, in [0, 1).
    """

    lr: ClassVar[float] = 1e-2
    weight_decay: ClassVar[float] = 0.0

    def __init__(
        self,
        *,
        host: Host,
        generator: torch.Generator,
        length: int = 20,
        form: Literal["states", "keys_values"] = "states",
        prefix_dropout: float = 0.1,
    ) -> None:
        super().__init__(host=host)
        check_length(length)
        if not 0 <= prefix_dropout < 1:
            raise PipelineError(f"--set prefix_dropout={prefix_dropout}: give a rate from 0 to below 1")
        self.n_slots = length
        blocks = host.blocks(host.encoder)
        per_layer = 1 if form == "states" else 2
        width = host.model.config.hidden_size
        start = torch.empty(len(blocks), per_layer, length, width)
        self.table = nn.Parameter(start.normal_(0.0, 0.02, generator=generator))
        self.dropout = nn.Dropout(prefix_dropout)
        for layer, block in enumerate(blocks):
            if form == "states":
                block.register_forward_pre_hook(self._state_hook(layer), with_kwargs=True)
                continue
            for which, projection in enumerate(_projections(block, host.kind, width)):
                projection.register_forward_hook(self._projection_hook(layer, which))

    def slots(
        self,
        embedded: Float[Tensor, "example token width"],
        mask: Bool[Tensor, "example token"],
        tasks: Int[Tensor, " example"],
    ) -> Float[Tensor, "example slot width"]:
        """Empty places; each layer fills them."""
        return embedded.new_zeros(len(embedded), self.n_slots, embedded.shape[2])

    def _filled(
        self, states: Float[Tensor, "example place width"], layer: int, which: int
    ) -> Float[Tensor, "example place width"]:
        at = self.host.slot_at
        soft = self.dropout(self.table[layer, which]).to(states.dtype).expand(len(states), -1, -1)
        return torch.cat([states[:, :at], soft, states[:, at + self.n_slots :]], 1)

    def _state_hook(self, layer: int) -> Callable[..., Any]:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            if args:
                return (self._filled(args[0], layer, 0), *args[1:]), kwargs
            return args, {**kwargs, "hidden_states": self._filled(kwargs["hidden_states"], layer, 0)}

        return hook

    def _projection_hook(self, layer: int, which: int) -> Callable[..., Any]:
        def hook(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
            return self._filled(output, layer, which)

        return hook


def _projections(block: nn.Module, kind: str, width: int) -> tuple[nn.Module, nn.Module]:
    """The projections to keys and to values of a layer's attention to its own input."""
    linear = {n.rpartition(".")[2]: m for n, m in block.named_modules() if isinstance(m, nn.Linear)}
    for key, value in _PROJECTIONS:
        if key in linear and value in linear and linear[key].out_features == width:
            return linear[key], linear[value]
    raise PipelineError(
        f"the layers of a {kind} model have no projections to keys and values of the states' width: use "
        "--set form=states"
    )


METHOD = PrefixTuning
