"""What a head takes from heads that were trained before: a vector of each, frozen in the new head.

A fusion says so by `Fusion.takes`; its option `sources` names the runs. Once trained, the new head's own
run folder holds the vectors: it is used without the runs they are from.
"""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import safetensors
import torch
from torch import Tensor

from cache import EncoderRecord
from pipeline import parts
from pipeline.errors import PipelineError
from pipeline.folders import CONFIG, RESULT, runs_at
from pipeline.head import HeadSpec

WEIGHTS = "head.safetensors"
"""A run's weights, as `pipeline.results` writes them."""


def take_sources(spec: HeadSpec, encoder: EncoderRecord) -> HeadSpec:
    """The spec with what its fusion takes from the runs that its option `sources` names.

    Args:
        spec: of the new head.
        encoder: whose states it reads.

    Returns:
        The spec, its option `sources` with every run by its full path; the spec itself where its fusion
        takes nothing or no sources are given.

    Raises:
        PipelineError: a run does not fit.
    """
    part = parts.load("fusion", spec.fusion)
    takes = part.takes
    given = spec.fusion_options.get("sources")
    if takes is None or given is None:
        return spec
    runs = list_runs(given, fusion=takes[0])
    vectors = [_vector(run, spec, encoder, *takes) for run in runs]
    options = {**spec.fusion_options, "sources": ",".join(str(run.resolve()) for run in runs)}
    return replace(spec, fusion_options=options, taken={part.taken_as: torch.stack(vectors)[None]})


def list_runs(given: str, *, fusion: str) -> list[Path]:
    """The runs that a text names, each once.

    Args:
        given: runs, or folders of runs, with commas between.
        fusion: what they are to be runs of, for the messages.

    Raises:
        PipelineError: there is none.
    """
    found: dict[Path, Path] = {}
    for name in (part.strip() for part in given.split(",") if part.strip()):
        runs = _runs_at(Path(name), fusion)
        found.update({run.resolve(): run for run in runs})
    if not found:
        raise PipelineError(f"--set sources={given} names no run: {_make(fusion)}")
    if any("," in str(path) for path in found):
        raise PipelineError(f"--set sources={given}: a path with a comma in it, rename the folder")
    return list(found.values())


def _runs_at(path: Path, fusion: str) -> list[Path]:
    """The run that a folder is, or the runs right below it."""
    if not path.is_dir():
        raise PipelineError(f"--set sources: no run at {path}: {_make(fusion)}")
    found = runs_at(path)
    if not found:
        raise PipelineError(f"--set sources: {path} holds no run: {_make(fusion)}")
    return found


def _make(fusion: str) -> str:
    return f"make some with 'layerbank train ... --fusion {fusion}'"


def _vector(run: Path, spec: HeadSpec, encoder: EncoderRecord, fusion: str, name: str) -> Tensor:
    """What a run learned, checked against the head that is to take it."""
    head, source = _config(run)
    if head.fusion != fusion:
        raise PipelineError(
            f"--set sources: {run} is a head of {head.fusion}, {spec.fusion} takes heads of {fusion}: "
            f"{_make(fusion)}"
        )
    if head.width != spec.width:
        raise PipelineError(
            f"--set sources: {run} has vectors of width {head.width}, this encoder has width "
            f"{spec.width}: train sources on banks of this encoder"
        )
    if source.weights_sha256 != encoder.weights_sha256:
        raise PipelineError(
            f"--set sources: {run} was trained on states of another encoder ({source.name}, sha256 "
            f"{source.weights_sha256[:12]}), this is {encoder.name}: train sources on banks of this encoder"
        )
    if head.layers != spec.layers:
        theirs, ours = (", ".join(map(str, layers)) for layers in (head.layers, spec.layers))
        raise PipelineError(
            f"--set sources: {run} mixes layers {theirs}, here are {ours}: train sources on a bank "
            "with the same --layers"
        )
    return _read(run, f"fusion.{name}", spec.width)


def _config(run: Path) -> tuple[HeadSpec, EncoderRecord]:
    lacking = [name for name in (CONFIG, WEIGHTS, RESULT) if not (run / name).is_file()]
    if lacking:
        raise PipelineError(
            f"--set sources: {run} is no whole run of 'layerbank train', it lacks {lacking[0]}: train it "
            "again"
        )
    try:
        config: Any = json.loads((run / CONFIG).read_text(encoding="utf-8"))
        return HeadSpec.from_json(config["head"]), EncoderRecord(**config["source"]["encoder"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise _unreadable(run, error) from error


def _read(run: Path, name: str, width: int) -> Tensor:
    try:
        with safetensors.safe_open(str(run / WEIGHTS), framework="pt") as file:
            vector: Tensor = file.get_tensor(name)
    except (OSError, ValueError, safetensors.SafetensorError) as error:
        raise _unreadable(run, error) from error
    if vector.shape != (width,) or not vector.isfinite().all():
        raise _unreadable(run, f"{name} is no vector of {width} finite numbers")
    return vector


def _unreadable(run: Path, said: object) -> PipelineError:
    text = " ".join(str(said).split())
    return PipelineError(f"--set sources: {run} cannot be read as a run ({text}): train it again")
