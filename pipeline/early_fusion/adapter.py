"""Small bottleneck networks inside every layer are trained, with the layer normalisations."""

from collections.abc import Callable
from typing import Any, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor, nn

from pipeline.early_fusion._base import Host, Method
from pipeline.errors import PipelineError

_PLACES = (
    ("attention.output.dropout", "output.dropout"),  # BERT, RoBERTa, ELECTRA, DeBERTa
    ("attention.out_lin", "ffn"),  # DistilBERT
    ("attn.resid_dropout", "mlp.dropout"),  # GPT-2
    ("self_attn.o_proj", "mlp"),  # Llama and its like
)
"""For each family, the modules whose output is a sub-layer's, before the sub-layer's input is added."""


class Bottleneck(nn.Module):
    """x + W_up gelu(W_down x + b_down) + b_up; 2 m d + m + d parameters (Houlsby et al. 2019).

    The weights start as a truncated normal of deviation 1e-3, cut at two deviations, and the biases at 0:
    close to the identity.

    Args:
        width: size of x, d.
        size: of the bottleneck, m.
        generator: source of the starting weights.
    """

    def __init__(self, width: int, size: int, generator: torch.Generator) -> None:
        super().__init__()
        self.down = nn.Parameter(_near_zero((size, width), generator))
        self.down_bias = nn.Parameter(torch.zeros(size))
        self.up = nn.Parameter(_near_zero((width, size), generator))
        self.up_bias = nn.Parameter(torch.zeros(width))

    def forward(self, x: Float[Tensor, "*axes width"]) -> Float[Tensor, "*axes width"]:
        """Adds what the bottleneck makes of x."""
        hidden = nn.functional.gelu(nn.functional.linear(x, self.down, self.down_bias))
        return x + nn.functional.linear(hidden, self.up, self.up_bias)


def _near_zero(shape: tuple[int, int], generator: torch.Generator) -> Tensor:
    return nn.init.trunc_normal_(torch.empty(shape), std=1e-3, a=-2e-3, b=2e-3, generator=generator)


class Adapter(Method):
    """Two bottlenecks a layer, after attention and after the feed-forward network; Houlsby et al. 2019.

    Each works on the output of its sub-layer before it is added to the sub-layer's input. All layer
    normalisations are trained. Parameters: 2 L (2 m d + m + d), and those of the normalisations; for
    L = 24, d = 1024, m = 256 that is 25,227,264 + 100,352. The attention-fusion paper counts 12.6 M, which
    is one bottleneck a layer: 24 (2 m d + m + d) = 12,613,632.

    From text to text the decoder's layers get them too, after attention to its own input and after the
    feed-forward network.

    Args:
        host: the backbone.
        generator: draws the starting weights.
        size: m, width of the bottleneck.
    """

    lr: ClassVar[float] = 1e-3

    def __init__(self, *, host: Host, generator: torch.Generator, size: int = 64) -> None:
        super().__init__(host=host)
        if size < 1:
            raise PipelineError(f"--set size={size}: give a bottleneck of 1 or more")
        stacks = [host.encoder]
        if host.model.config.is_encoder_decoder:
            stacks.append(host.model.get_decoder())
        places = [
            place for stack in stacks for block in host.blocks(stack) for place in _places(block, host)
        ]
        width = host.model.config.hidden_size
        self.bottlenecks = nn.ModuleList(Bottleneck(width, size, generator) for _ in places)
        for place, bottleneck in zip(places, self.bottlenecks, strict=True):
            place.register_forward_hook(_hook(bottleneck))
        for module in host.model.modules():
            if "LayerNorm" in type(module).__name__ or "RMSNorm" in type(module).__name__:
                module.requires_grad_(True)


def _hook(bottleneck: nn.Module) -> Callable[..., Any]:
    def hook(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
        return bottleneck(output)

    return hook


def _places(block: nn.Module, host: Host) -> list[nn.Module]:
    """The modules of a layer whose output an adapter works on."""
    layers: Any = getattr(block, "layer", None)
    if isinstance(layers, nn.ModuleList) and hasattr(layers[0], "SelfAttention"):  # T5
        return [layers[k].get_submodule("dropout") for k in (0, -1)]
    for names in _PLACES:
        try:
            return [block.get_submodule(name) for name in names]
        except AttributeError:
            continue
    raise PipelineError(
        f"where the sub-layers of a {host.kind} model end is not known: use bitfit, prompt_tuning or "
        "prefix_tuning"
    )


METHOD = Adapter
