"""Run folders: what was asked, the head's weights, its scores. JSON and safetensors, nothing executable.

``config.json``      the resolved flags, the bank's fingerprint, the encoder, the versions
``head.safetensors`` the weights of the best epoch, without the head axis
``metrics.jsonl``    one line an epoch
``result.json``      the outcome; written last
"""

import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
from safetensors import SafetensorError

from cache import Bank, EncoderRecord, JoinedBank, Target
from pipeline import folders
from pipeline.errors import PipelineError, said_by
from pipeline.folders import write_tensors
from pipeline.head import Head, HeadSpec, build_head
from pipeline.job import Goal, HeadRates, Precision, Schedule, Trained
from pipeline.versions import made_by

CONFIG, METRICS, RESULT = folders.CONFIG, folders.METRICS, folders.RESULT
WEIGHTS = "head.safetensors"
SWEEP = "sweep.json"
FILES = frozenset({CONFIG, WEIGHTS, METRICS, RESULT})


@dataclass(frozen=True, kw_only=True)
class Source:
    """What a head was trained on, as far as using it again depends on it."""

    store: str
    fingerprint: str  # of the bank
    encoder: EncoderRecord
    tokenizer_sha256: str
    columns: dict[str, str | None]
    max_length: int
    dtype: str
    splits: dict[str, str]  # role (train, dev) -> split
    precision: str = "float32"  # of the encoder's products
    train_on: Sequence[Mapping[str, Any]] = ()  # pieces of banks that took the place of the train split

    @classmethod
    def of(cls, bank: Bank, splits: Mapping[str, str]) -> "Source":
        """The source that a bank is."""
        recipe, name = bank.recipe, bank.recipe.encoder.name
        if Path(name).is_dir():  # to be found from any folder
            name = str(Path(name).resolve())
        return cls(
            store=str(Path(bank.path).resolve()) if "://" not in bank.path else bank.path,
            fingerprint=bank.fingerprint,
            encoder=replace(recipe.encoder, name=name),
            tokenizer_sha256=recipe.tokenizer_sha256,
            columns=recipe.columns,
            max_length=recipe.max_length,
            dtype=recipe.dtype,
            splits=dict(splits),
            precision=recipe.precision,
            train_on=[asdict(piece) for piece in bank.pieces] if isinstance(bank, JoinedBank) else (),
        )


@dataclass(frozen=True, kw_only=True)
class Joint:
    """What a run has in common with the runs of other tasks that it was trained with."""

    tasks: Sequence[str]  # all of them, its own among them
    shared: str  # the part of the fusion that was one in training; each run keeps a copy
    parameters: int  # of that part

    def counts(self, fusion_parameters: int) -> dict[str, Any]:
        """Trainable parameters as ATTEMPT counts them: a task's own, and its share of what is common."""
        own = fusion_parameters - self.parameters
        return {
            "shared_parameters": self.parameters,
            "fusion_parameters_per_task": own + self.parameters / len(self.tasks),
        }


@dataclass(frozen=True, kw_only=True)
class Run:
    """A run folder, read back."""

    path: str
    source: Source
    target: Target  # without values
    metric: str
    spec: HeadSpec
    head: Head
    result: dict[str, Any]
    precision: Precision = "float32"  # of the head's products


def check_free(out: str, *, overwrite: bool) -> None:
    """Refuses an output folder that is taken, before anything is computed.

    Raises:
        PipelineError: the folder holds something, or there can be none.
    """
    path = Path(out).absolute()
    there = next(p for p in (path, *path.parents) if os.path.exists(p))
    if not there.is_dir():
        raise PipelineError(f"--out {out}: {there} is a file, name another folder")
    if not os.access(there if there != path else path.parent, os.W_OK):
        raise PipelineError(f"--out {out}: no permission to write there, name another folder")
    found = {p.name for p in path.iterdir()} if there == path else set()
    # Other folders have a config.json too, an encoder's for one: only what is a run may be replaced.
    is_run = {CONFIG, WEIGHTS} <= found <= FILES
    if found and not (overwrite and is_run):
        cure = "name another one, or give --overwrite" if is_run else "name another one"
        raise PipelineError(f"--out {out}: the folder is not empty, {cure}")


def save_run(
    out: str,
    trained: Trained,
    *,
    job: Goal,
    bank: Bank,
    rates: HeadRates,
    schedule: Schedule,
    splits: Mapping[str, str],
    seconds: float,
    peak_memory_bytes: int | None = None,
    joint: Joint | None = None,
) -> dict[str, Any]:
    """Writes a run folder whole: under another name first, then renamed.

    Args:
        out: the folder.
        trained: the head.
        job: what it learned.
        bank: what it read.
        rates: its seed and rates.
        schedule: epochs and batches.
        splits: the splits in the roles of train and dev.
        seconds: of all the work.
        peak_memory_bytes: the most memory the run took; None where it was one of a stack.
        joint: what it shares with heads that were trained with it.

    Returns:
        The content of ``result.json``.

    Raises:
        PipelineError: the disk refuses.
    """
    result = {**_result(out, trained, job, seconds), "peak_memory_bytes": peak_memory_bytes}
    config = {
        "source": asdict(Source.of(bank, splits)),
        "target": {"name": job.target.name, "kind": job.target.kind, "names": list(job.target.names)},
        "metric": job.metric,
        "head": job.spec.to_json(),
        "rates": asdict(rates),
        "schedule": asdict(schedule),
        **made_by(),
    }
    if joint is not None:
        config["joint"] = asdict(joint)
        result |= joint.counts(result["fusion_parameters"])
    with folders.making(out) as partial:
        _write_json(partial / CONFIG, config)
        weights = {name: value[0].contiguous() for name, value in trained.head.state_dict().items()}
        write_tensors(partial / WEIGHTS, weights)
        lines = [json.dumps(finite(asdict(epoch))) for epoch in trained.epochs]
        (partial / METRICS).write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
        _write_json(partial / RESULT, result)
    return result


def _result(out: str, trained: Trained, job: Goal, seconds: float) -> dict[str, Any]:
    parameters, fusion_parameters = trained.head.n_parameters()
    epochs = trained.epochs
    result = {
        "run": out,
        "fusion": job.spec.fusion,
        "decoder": job.spec.decoder,
        "target": job.target.name,
        "metric": job.metric,
        "dev": trained.dev,
        "best_epoch": trained.best_epoch,
        "epochs": len(epochs),
        "seconds": seconds,
        "seconds_per_epoch": sum(epoch.seconds for epoch in epochs) / len(epochs),
        "parameters": parameters,
        "fusion_parameters": fusion_parameters,
        "dev_metrics": epochs[trained.best_epoch - 1].dev,
    }
    return dict(finite(result))


def load_run(path: str) -> Run:
    """Reads a run folder.

    Raises:
        PipelineError: it is no run folder, or one that was cut off or changed.
    """
    folder = Path(path)
    if not folder.is_dir():
        raise PipelineError(f"no run at {path}: make one with 'layerbank train ... --out {path}'")
    lacking = [name for name in (CONFIG, WEIGHTS, RESULT) if not (folder / name).is_file()]
    if lacking:
        raise PipelineError(f"{path} is no whole run folder, it lacks {lacking[0]}: train it again")
    try:
        config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
        result = json.loads((folder / RESULT).read_text(encoding="utf-8"))
        source, metric = config["source"], config["metric"]
        spec = HeadSpec.from_json(config["head"])
        target = Target(
            values=_NO_VALUES, **{**config["target"], "names": tuple(config["target"]["names"])}
        )
        source = Source(**{**source, "encoder": EncoderRecord(**source["encoder"])})
        # The encoder's own output layer is in the weights that follow; its file may be gone.
        options = {name: v for name, v in spec.decoder_options.items() if name != "output_layer"}
        head = build_head(replace(spec, decoder_options=options), seed=0)
        weights = safetensors.torch.load_file(str(folder / WEIGHTS))
        head.load_state_dict({name: value[None] for name, value in weights.items()})
    except (OSError, ValueError, KeyError, TypeError, RuntimeError, SafetensorError) as error:
        said = " ".join(str(error).split())
        raise PipelineError(f"{path} cannot be read as a run ({said}): train it again") from error
    return Run(
        path=path,
        source=source,
        target=target,
        metric=metric,
        spec=spec,
        head=head.eval(),
        result=result,
        precision=config.get("schedule", {}).get("precision", "float32"),
    )


def finite(value: Any) -> Any:
    """The value with NaN and infinities, which JSON has not, as None."""
    if isinstance(value, Mapping):
        return {name: finite(entry) for name, entry in value.items()}
    if isinstance(value, list):
        return [finite(entry) for entry in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def _write_json(path: Path, value: Mapping[str, Any]) -> None:
    path.write_text(
        json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n", encoding="utf-8"
    )


def read_json(path: Path) -> dict[str, Any]:
    """Reads a file that holds one JSON object.

    Raises:
        PipelineError: it cannot be read, or holds something else.
    """
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        said = " ".join(str(error).split())
        raise PipelineError(
            f"{path} is damaged ({said}): remove its folder, or name another --out"
        ) from error
    if not isinstance(found, dict):
        raise PipelineError(f"{path} is damaged (no JSON object): remove its folder, or name another --out")
    return found


_NO_VALUES = np.empty(0, dtype=np.int32)


def write_whole(path: Path, text: str) -> None:
    """Writes a file under another name first, then renames it: it is there whole or not at all.

    Raises:
        PipelineError: the disk refuses.
    """
    partial = path.with_name(f"{path.name}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        partial.write_text(text, encoding="utf-8")
        partial.replace(path)
    except OSError as error:
        raise PipelineError(f"{path} cannot be written: {said_by(error)}") from error


def check_free_sweep(out: str, asked: Mapping[str, Any], *, store: str) -> None:
    """Makes a sweep's folder, or checks that the one there is of the same sweep.

    Args:
        out: the folder.
        asked: what decides the results.
        store: where the bank lies, for the record.

    Raises:
        PipelineError: the folder holds something else.
    """
    config = Path(out) / SWEEP
    if config.is_file():
        found = read_json(config)
        differing = sorted(name for name in asked if found.get(name) != asked[name])
        if differing:
            raise PipelineError(
                f"--out {out}: holds a sweep with another {differing[0]}, name another folder or ask for "
                "the same"
            )
        return
    check_free(out, overwrite=False)
    write_whole(config, json.dumps({**asked, **made_by(), "store": store}, indent=2) + "\n")
