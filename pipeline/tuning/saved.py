"""The state of an unfinished run, an epoch at a time, in the folder of `pipeline.unfinished`."""

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor

from pipeline.errors import PipelineError, said_by
from pipeline.folders import write_tensors
from pipeline.unfinished import STATE

RECORD = "record.json"


def write_epoch(folder: Path, epoch: int, tensors: Mapping[str, Tensor], record: Mapping[str, Any]) -> None:
    """Writes the state after an epoch whole, then drops the one before.

    Raises:
        PipelineError: the disk refuses.
    """
    made, draft = folder / f"epoch-{epoch:05d}", folder / "draft"
    try:
        shutil.rmtree(draft, ignore_errors=True)
        draft.mkdir()
        plain = {name: value.detach().cpu().contiguous().clone() for name, value in tensors.items()}
        write_tensors(draft / STATE, plain)
        (draft / RECORD).write_text(json.dumps(record), encoding="utf-8")
        draft.rename(made)
    except OSError as error:
        raise PipelineError(f"{folder} cannot be written: {said_by(error)}") from error
    for older in folder.glob("epoch-*"):
        if older != made:
            shutil.rmtree(older, ignore_errors=True)


def last_epoch(folder: Path) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
    """Tensors and record of the last whole epoch, if there is one.

    Raises:
        PipelineError: they cannot be read.
    """
    found = sorted(folder.glob("epoch-*"))
    if not found:
        return None
    try:
        tensors = safetensors.torch.load_file(str(found[-1] / STATE))
        return tensors, json.loads((found[-1] / RECORD).read_text(encoding="utf-8"))
    except (OSError, ValueError, SafetensorError) as error:
        raise PipelineError(f"{found[-1]} cannot be read ({said_by(error)}): remove {folder}") from error


def optimizer_tensors(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """AdamW's moments and step counts, by the parameter's number."""
    found = {}
    for number, parameter in enumerate(_parameters(optimizer)):
        for name, value in optimizer.state.get(parameter, {}).items():
            found[f"optimizer.{number}.{name}"] = value
    return found


def restore_optimizer(optimizer: torch.optim.Optimizer, tensors: Mapping[str, Tensor]) -> None:
    """Puts back what `optimizer_tensors` gave."""
    for number, parameter in enumerate(_parameters(optimizer)):
        prefix = f"optimizer.{number}."
        for name, value in tensors.items():
            if name.startswith(prefix):
                key = name.removeprefix(prefix)
                # The count of steps stays on the CPU, as AdamW makes it.
                kept = value if key == "step" else value.to(parameter.device)
                optimizer.state[parameter][key] = kept.clone()


def _parameters(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]
