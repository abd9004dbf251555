"""Scores a trained head on a split of a bank."""

from typing import Any

import torch

from cache import Bank
from pipeline import batches, metrics
from pipeline.errors import PipelineError
from pipeline.results import Run, finite
from pipeline.train import open_target, predictions


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


def evaluate(run: Run, bank: Bank, split: str, *, device: torch.device | None = None) -> dict[str, Any]:
    """Scores of a head.

    Args:
        run: the head.
        bank: of the same encoder; not necessarily the one the head was trained on.
        split: one of the bank's.
        device: where the head computes, the CPU by default.

    Returns:
        `run`, `split`, `metric`, `score` and all `metrics`, in percent.

    Raises:
        PipelineError: the bank's encoder or classes are not those of the head.
    """
    recipe = bank.recipe
    check_encoder(run, recipe.encoder.weights_sha256, recipe.tokenizer_sha256, what=f"bank {bank.path}")
    part, target = open_target(bank, run.target.name, split)
    if (target.kind, target.names) != (run.target.kind, run.target.names):
        raise PipelineError(
            f"target {target.name!r} of {bank.path} has other classes than {run.path} was trained on: "
            "label the bank with the same data"
        )
    where = device or torch.device("cpu")
    data = batches.load(part, run.head, run.spec.layers, target, where)
    scores = metrics.report(**predictions(run.head.to(where), data), names=target.names)
    plain = {name: float(values[0]) for name, values in scores.items()}
    found = {
        "run": run.path,
        "split": split,
        "metric": run.metric,
        "score": plain[run.metric],
        "metrics": plain,
    }
    return dict(finite(found))
