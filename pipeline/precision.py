"""In which floating-point type the products of the encoder's blocks are computed.

Below float32 the weights of those products are rounded and the products are computed in the short type;
embeddings, norms and the sums between blocks stay float32, so the states are not rounded once more.
"""

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import nn

from cache.bank import find_bank
from pipeline.errors import PipelineError

PRECISIONS = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}

_CPU_UNITS = {"bfloat16": ("amx_bf16", "avx512_bf16", "bf16"), "float16": ("amx_fp16", "avx512_fp16")}
"""What `torch.cpu.get_capabilities` calls the units for products of that type."""


def forward_precision(asked: str, device: torch.device, store: str | None = None) -> str:
    """The precision of a forward; ``auto``: the bank's own, else bfloat16 if the device has units for it.

    Args:
        asked: ``auto`` or one of `PRECISIONS`.
        device: where the encoder computes.
        store: a bank that may be there already, in part.

    Raises:
        PipelineError: float16 on a device that has no units for it.
    """
    if asked == "auto" and store and (known := bank_precision(store)):
        asked = known
    if asked == "auto":
        return "bfloat16" if is_fast("bfloat16", device) else "float32"
    if asked == "float16" and device.type != "mps" and not is_fast("float16", device):
        raise PipelineError(
            f"--precision float16: {device} has no units for it: use --precision auto or float32"
        )
    return asked


def bank_precision(store: str) -> str | None:
    """The precision an existing bank, whole or in part, was made with."""
    known = find_bank(store)
    return known.recipe.precision if known else None


def is_fast(precision: str, device: torch.device) -> bool:
    """Whether a device has units for products of a type shorter than float32."""
    if device.type == "cuda":
        newest = torch.cuda.get_device_capability(device)
        return newest >= ((8, 0) if precision == "bfloat16" else (7, 0))
    if device.type != "cpu" or not hasattr(torch.cpu, "get_capabilities"):
        return False  # an older torch does not say
    units = torch.cpu.get_capabilities()
    return any(units.get(name, False) for name in _CPU_UNITS[precision])


def round_weights(model: nn.Module, precision: str, device: torch.device) -> None:
    """Rounds the weights of the blocks' products in place, so that no forward casts them again.

    A product outside the blocks, such as one that widens embeddings, stays float32: what it gives is what
    the blocks' outputs are added to.
    """
    if precision == "float32":
        return
    in_blocks = {
        m for found in model.modules() if isinstance(found, nn.ModuleList) for m in found.modules()
    }
    for module in model.modules():
        if type(module).__name__ not in ("Linear", "Conv1D"):  # Conv1D: what GPT-2 calls its products
            continue
        if module in in_blocks:
            module.to(PRECISIONS[precision])
        else:
            module.forward = torch.autocast(device.type, enabled=False)(module.forward)


def products_in(precision: str, device: torch.device) -> AbstractContextManager[Any]:
    """A context in which products are computed in that type."""
    if precision == "float32":
        return nullcontext()
    return torch.autocast(device.type, dtype=PRECISIONS[precision])
