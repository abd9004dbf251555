"""Prompt files: one soft prompt with the encoder it was trained for, and folders of them."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jaxtyping import Float
from safetensors import SafetensorError, safe_open
from torch import Tensor

from pipeline.errors import PipelineError, said_by

TENSOR = "prompt"
FILE = "prompt.safetensors"


def prompt_file(
    prompt: Float[Tensor, "token width"], *, fingerprint: str, method: str, task: str
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors and the metadata of a prompt file."""
    length, width = prompt.shape
    metadata = {
        "encoder_sha256": fingerprint,
        "length": str(length),
        "width": str(width),
        "method": method,
        "task": task,
    }
    return {TENSOR: prompt}, metadata


def read_prompts(path: str, *, fingerprint: str, width: int) -> dict[str, Float[Tensor, "token width"]]:
    """The prompts at a path, by name and in the order of the names: one file, one run, or a folder of them.

    Args:
        path: a prompt file, a run folder, or a folder that holds prompt files or run folders.
        fingerprint: sha256 of the encoder's weights that they must be for.
        width: of the encoder's input embeddings.

    Raises:
        PipelineError: there is none, one cannot be read, or they are of another encoder, width or length.
    """
    prompts = {name: _read(file, fingerprint, width) for name, file in _files(path).items()}
    lengths = {name: len(prompt) for name, prompt in prompts.items()}
    one = next(iter(lengths))
    for name, length in lengths.items():
        if length != lengths[one]:
            raise PipelineError(
                f"--prompts {path}: prompt {name} has {length} soft tokens, {one} has {lengths[one]}: use "
                "prompts of one length"
            )
    return prompts


def _files(path: str) -> dict[str, Path]:
    root = Path(path).expanduser()
    if root.is_file():
        return {root.parent.name if root.name == FILE else root.stem: root}
    if not root.is_dir():
        raise PipelineError(f"--prompts {path}: no such file or folder")
    if (root / FILE).is_file():
        return {root.resolve().name: root / FILE}
    found = {file.stem: file for file in root.glob("*.safetensors")}
    found |= {file.parent.name: file for file in root.glob(f"*/{FILE}")}
    if not found:
        raise PipelineError(
            f"--prompts {path}: no prompt there: train some with 'layerbank tune DATA --method "
            f"prompt_tuning --out {path}/NAME'"
        )
    return dict(sorted(found.items()))


def _read(file: Path, fingerprint: str, width: int) -> Tensor:
    try:
        with safe_open(str(file), framework="pt") as opened:
            metadata: Mapping[str, Any] = opened.metadata() or {}
            prompt: Tensor = opened.get_tensor(TENSOR)
    except (OSError, SafetensorError) as error:
        raise PipelineError(
            f"--prompts: {file} is no prompt file ({said_by(error)}): name another"
        ) from error
    if prompt.ndim != 2 or prompt.shape[1] != width:
        raise PipelineError(
            f"--prompts: {file} has shape {list(prompt.shape)}, the encoder's input embeddings are {width} "
            "wide: use prompts trained with this encoder"
        )
    if metadata.get("encoder_sha256") != fingerprint:
        raise PipelineError(
            f"--prompts: {file} was trained with another encoder (sha256 "
            f"{metadata.get('encoder_sha256', 'unknown')[:12]}, this one {fingerprint[:12]}): a prompt "
            "works with its own encoder only"
        )
    return prompt.float()
