"""A model's hidden states up to the last layer that is wanted: what comes after it is not computed."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn


class _EnoughError(Exception):
    """Ends a forward whose further states nobody wants."""


def hidden_states(
    model: nn.Module, inputs: Mapping[str, Any], layers: Sequence[int], blocks: Sequence[nn.Module]
) -> list[Tensor]:
    """States of some layers, in their order.

    State k is what block k reads, so a forward that needs no more than that ends there. The last state of
    all may have gone through a norm of its own: only the model itself gives it.

    Args:
        model: the encoder.
        inputs: its arguments.
        layers: which layers, 0 being the embeddings.
        blocks: its blocks, from `find_blocks`; without them every forward is run to its end.
    """
    last = max(layers)
    if last >= len(blocks):
        states: tuple[Tensor, ...] = model(**inputs, output_hidden_states=True).hidden_states
        return [states[layer] for layer in layers]
    found: dict[int, Tensor] = {}
    hooks = [
        blocks[layer].register_forward_pre_hook(_keeper(found, layer, last), with_kwargs=True)
        for layer in set(layers) | {last}
    ]
    try:
        model(**inputs)
    except _EnoughError:
        pass
    finally:
        for hook in hooks:
            hook.remove()
    return [found[layer] for layer in layers]


def _keeper(found: dict[int, Tensor], layer: int, last: int) -> Any:
    def keep(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        found[layer] = args[0] if args else kwargs["hidden_states"]
        if layer == last:
            raise _EnoughError

    return keep


def find_blocks(
    model: nn.Module, inputs: Mapping[str, Any], expected: Sequence[Tensor]
) -> tuple[nn.Module, ...]:
    """The blocks of a model, told by the states they read.

    Args:
        model: the encoder.
        inputs: of a small forward.
        expected: all its hidden states.

    Returns:
        None of them where no list of modules reads those states: a model that shares one block, say.
    """
    for module in model.modules():
        if not isinstance(module, nn.ModuleList) or len(module) != len(expected) - 1 or not len(module):
            continue
        blocks = tuple(module)
        try:
            read = hidden_states(model, inputs, range(len(blocks)), blocks)
        except (KeyError, RuntimeError, TypeError, AttributeError):
            continue  # a list of something else
        if all(torch.equal(one, other) for one, other in zip(read, expected, strict=False)):
            return blocks
    return ()
