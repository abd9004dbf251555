"""The state of an unfinished run, an epoch at a time, so that a killed run goes on."""

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor

from pipeline.errors import PipelineError
from pipeline.folders import write_tensors

ASKED, STATE, RECORD = "asked.json", "state.safetensors", "record.json"
CONTENT = "content"


def open_partial(out: str, asked: Mapping[str, Any], content: Mapping[str, Any]) -> Path:
    """The folder of an unfinished run, beside the one of the run: a new one, or that of the same run.

    Args:
        out: folder of the run.
        asked: its choices, by name.
        content: fingerprints of what was read for them, by what it is: files change under their names.

    Raises:
        PipelineError: it holds an unfinished run that was asked for otherwise or began with other content,
            or the disk refuses.
    """
    folder = _folder(out)
    text = json.dumps({**asked, CONTENT: dict(content)}, indent=2, sort_keys=True)
    try:
        if (folder / ASKED).is_file():
            found = json.loads((folder / ASKED).read_text(encoding="utf-8"))
            now = json.loads(text)
            had, has = found.pop(CONTENT, {}), now.pop(CONTENT)
            differing = sorted(name for name in {*now, *found} if found.get(name) != now.get(name))
            if differing:
                raise PipelineError(
                    f"--out {out}: {folder} holds an unfinished run with another {differing[0]}: ask for "
                    "the same to go on with it, or remove it"
                )
            changed = sorted(name for name in has if had.get(name) != has[name])
            if changed:
                raise PipelineError(
                    f"--out {out}: the {changed[0]} changed since the unfinished run in {folder} began: "
                    "remove it to begin anew, or bring back what it began with"
                )
            return folder
        folder.mkdir(parents=True, exist_ok=True)
        (folder / ASKED).write_text(text, encoding="utf-8")
    except (OSError, ValueError) as error:
        raise PipelineError(f"--out {out}: {folder} cannot be used ({error}): remove it") from error
    return folder


def is_begun(out: str) -> bool:
    """Whether an unfinished run of that folder has an epoch to go on from."""
    return any(_folder(out).glob("epoch-*"))


def _folder(out: str) -> Path:
    path = Path(out).absolute()
    return path.with_name(f"{path.name}.partial")


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
        raise PipelineError(f"{folder} cannot be written: {error}") from error
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
        raise PipelineError(f"{found[-1]} cannot be read ({error}): remove {folder}") from error


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
