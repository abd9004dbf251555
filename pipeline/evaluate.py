"""Scores a trained head on a split of a bank."""

from dataclasses import replace
from typing import Any

import numpy as np
import torch

from cache import Bank, Target, open_bank
from cache.store import local_path
from pipeline import batches, metrics
from pipeline.errors import PipelineError
from pipeline.job import open_target
from pipeline.results import Run, finite
from pipeline.train import predictions


def check_encoder(run: Run, weights_sha256: str, tokenizer_sha256: str, *, what: str) -> None:
    """Refuses states of another encoder than the one the head was trained on.

    Raises:
        PipelineError: weights or tokenizer differ.
    """
    known = run.source.encoder
    if weights_sha256 != known.weights_sha256:
        raise PipelineError(
            f"{what} has other weights than the encoder of {run.path} ({known.name}, sha256 "
            f"{known.weights_sha256[:12]}): a head works on the states of its own encoder only"
        )
    if tokenizer_sha256 != run.source.tokenizer_sha256:
        raise PipelineError(f"{what} has another tokenizer than {run.path} was trained with: use the same")


def open_bank_of(run: Run, store: str | None = None) -> Bank:
    """The bank asked for, or the one a head was trained on.

    Raises:
        PipelineError: that one is no longer where it was.
        CacheError: there is no complete bank.
    """
    path = store or run.source.store
    local = local_path(path)
    if store is None and local is not None and not local.exists():
        raise PipelineError(f"the bank of {run.path} is no longer at {path}: give --store")
    return open_bank(path)


def evaluate(
    run: Run,
    bank: Bank,
    split: str,
    *,
    device: torch.device | None = None,
    memory_bytes: int | None = None,
) -> dict[str, Any]:
    """Scores of a head, computed in the precision that it was trained in.

    Args:
        run: the head.
        bank: of the same encoder; not necessarily the one the head was trained on.
        split: one of the bank's.
        device: where the head computes, the CPU by default.
        memory_bytes: states that take more than half of it are streamed; by the device if None.

    Returns:
        `run`, `split`, `metric`, `score` and all `metrics`, in percent.

    Raises:
        PipelineError: the bank's encoder or classes are not those of the head.
    """
    recipe = bank.recipe
    check_encoder(run, recipe.encoder.weights_sha256, recipe.tokenizer_sha256, what=f"bank {bank.path}")
    part, found = open_target(bank, run.target.name, split)
    target = _by_class_of(run, found, bank)
    where = device or torch.device("cpu")
    feeds = batches.Feeds(memory_bytes=memory_bytes, device=where)
    data = batches.load(part, run.head, run.spec.layers, target, feeds)
    scores = metrics.report(**predictions(run.head.to(where), data, run.precision), names=target.names)
    plain = {name: float(values[0]) for name, values in scores.items()}
    result = {
        "run": run.path,
        "split": split,
        "metric": run.metric,
        "score": plain[run.metric],
        "metrics": plain,
    }
    return dict(finite(result))


def _by_class_of(run: Run, target: Target, bank: Bank) -> Target:
    """A bank's target in the class numbers of a head: another data set may lack some of its classes."""
    known = run.target
    unknown = sorted(set(target.names) - set(known.names))
    if target.kind != known.kind or unknown:
        what = f"a class {unknown[0]!r}" if unknown else f"the kind {target.kind}"
        raise PipelineError(
            f"target {target.name!r} of {bank.path} has {what} that {run.path} was not trained on: "
            "label the bank with data of the same classes"
        )
    if target.names == known.names:
        return target
    numbers = np.array([*map(known.names.index, target.names), -1], dtype=target.values.dtype)
    return replace(target, names=known.names, values=numbers[target.values])
