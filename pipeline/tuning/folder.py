"""Run folders of early fusion: JSON and safetensors, and all it takes to use them again.

``config.json``         what was asked, the encoder's fingerprint, the tasks, the versions
``tuned.safetensors``   what was learned: of the backbone, of the method, of the heads
``prompt.safetensors``  the prompt, where the method's outcome is one
``attentions.safetensors``  weights of the source prompts for every dev example, where the method has them
``metrics.jsonl``       one line an epoch
``result.json``         the outcome; written last
"""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import safetensors.torch
from safetensors import SafetensorError
from torch import Tensor

from cache import EncoderRecord
from pipeline.attentions import ATTENTIONS
from pipeline.errors import PipelineError, nearest
from pipeline.folders import CONFIG, METRICS, RESULT, making, write_tensors
from pipeline.head import HeadSpec
from pipeline.results import check_free, finite
from pipeline.versions import made_by

WEIGHTS = "tuned.safetensors"
PROMPT = "prompt.safetensors"
FILES = frozenset({CONFIG, WEIGHTS, METRICS, RESULT, PROMPT, ATTENTIONS})


@dataclass(frozen=True, kw_only=True)
class TaskSpec:
    """One task of a run."""

    name: str
    data: str
    columns: dict[str, str | None]  # of the input, by role
    revision: str | None
    splits: dict[str, str]  # role (train, dev) -> split
    target: str
    kind: str
    names: tuple[str, ...]
    metric: str
    head: HeadSpec | None  # None from text to text
    texts: tuple[str, ...] = ()  # of the classes, from text to text
    maskings: int | None = None  # of masked text: how often each chunk is masked
    step: float | None = None  # what numbers are rounded to, from text to text


@dataclass(frozen=True, kw_only=True)
class Source:
    """What a run was trained with, as far as using it again depends on it; `predict` reads `columns`."""

    encoder: EncoderRecord
    tokenizer_sha256: str
    max_length: int
    columns: dict[str, str | None]  # of the first task


@dataclass(frozen=True, kw_only=True)
class TunedRun:
    """A run folder, read back, without its weights."""

    path: str
    method: str
    options: dict[str, Any]
    source: Source
    tasks: tuple[TaskSpec, ...]
    sources: dict[str, list[int]]  # shapes of the source prompts, by name
    result: dict[str, Any]
    precision: str = "float32"  # of the products


def number_of_task(run: TunedRun, target: str | None) -> int:
    """Which of a run's tasks is asked for.

    Args:
        run: of one task or of several.
        target: the task's target or, where several have one of that name, DATA.TARGET; the only task's if
            None.

    Raises:
        PipelineError: the run has no such task, or several.
    """
    names = [task.name for task in run.tasks]
    found = [k for k, task in enumerate(run.tasks) if target in (None, task.name, task.target)]
    if len(found) == 1:
        return found[0]
    if not found:
        raise PipelineError(
            f"--target {target}: {run.path} learned no such task: {nearest(str(target), names)}"
        )
    several = ", ".join(names[k] for k in found)
    raise PipelineError(f"{run.path} learned several tasks: name one by --target, of {several}")


def is_tuned(path: str) -> bool:
    """Whether a folder holds a run of `layerbank tune`."""
    return (Path(path) / WEIGHTS).is_file()


def check_free_run(out: str, *, overwrite: bool) -> None:
    """Refuses an output folder that is taken.

    Raises:
        PipelineError: the folder holds something else than a run that may be replaced.
    """
    path = Path(out)
    found = {p.name for p in path.iterdir()} if path.is_dir() else set()
    is_run = {CONFIG, WEIGHTS} <= found <= FILES
    if is_run and not overwrite:
        raise PipelineError(f"--out {out}: the folder is not empty, name another one, or give --overwrite")
    if not is_run:
        check_free(out, overwrite=False)


def save(
    out: str,
    config: Mapping[str, Any],
    *,
    weights: Mapping[str, Tensor],
    lines: list[dict[str, Any]],
    result: Mapping[str, Any],
    further: Mapping[str, tuple[dict[str, Tensor], dict[str, str]]],
) -> None:
    """Writes a run folder whole: under another name first, then renamed.

    Raises:
        PipelineError: the disk refuses.
    """
    with making(out) as draft:
        _write_json(draft / CONFIG, {**config, **made_by()})
        write_tensors(draft / WEIGHTS, _plain(weights))
        for name, (tensors, metadata) in further.items():
            write_tensors(draft / name, _plain(tensors), metadata)
        text = "".join(f"{json.dumps(finite(line))}\n" for line in lines)
        (draft / METRICS).write_text(text, encoding="utf-8")
        _write_json(draft / RESULT, finite(result))


def config_of(run: TunedRun) -> dict[str, Any]:
    """What ``config.json`` says of a run; with `asked` and the versions it is the whole file."""
    tasks = [replace(task, head=None) for task in run.tasks]
    values = asdict(replace(run, tasks=tuple(tasks)))
    for task, written in zip(run.tasks, values["tasks"], strict=True):
        written["head"] = None if task.head is None else task.head.to_json()
    return {name: values[name] for name in ("method", "options", "source", "tasks", "sources")}


def load(path: str) -> tuple[TunedRun, dict[str, Tensor]]:
    """Reads a run folder and its weights.

    Raises:
        PipelineError: it is no run folder of `layerbank tune`, or one that was cut off or changed.
    """
    folder = Path(path)
    lacking = [name for name in (CONFIG, WEIGHTS, RESULT) if not (folder / name).is_file()]
    if lacking:
        raise PipelineError(f"{path} is no whole run of 'layerbank tune', it lacks {lacking[0]}")
    try:
        config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
        source = config["source"]
        run = TunedRun(
            path=path,
            method=config["method"],
            options=config["options"],
            source=Source(**{**source, "encoder": EncoderRecord(**source["encoder"])}),
            tasks=tuple(_task(task) for task in config["tasks"]),
            sources=config["sources"],
            result=json.loads((folder / RESULT).read_text(encoding="utf-8")),
            precision=config.get("plan", {}).get("precision", "float32"),
        )
        return run, safetensors.torch.load_file(str(folder / WEIGHTS))
    except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
        said = " ".join(str(error).split())
        raise PipelineError(f"{path} cannot be read as a run ({said}): tune it again") from error


def _task(values: Mapping[str, Any]) -> TaskSpec:
    head = None if values["head"] is None else HeadSpec.from_json(values["head"])
    return TaskSpec(
        **{**values, "head": head, "names": tuple(values["names"]), "texts": tuple(values["texts"])}
    )


def _plain(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: value.detach().cpu().contiguous().clone() for name, value in tensors.items()}


def _write_json(path: Path, value: Mapping[str, Any]) -> None:
    text = json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False)
    path.write_text(f"{text}\n", encoding="utf-8")
