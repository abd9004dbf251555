"""How a trained head mixes what it took from heads of other tasks, example by example."""

import json
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Int
from numpy import ndarray
from torch import Tensor

from pipeline.batches import Labelled
from pipeline.head import Head, HeadSpec

Attentions = tuple[dict[str, Tensor], dict[str, str]]
"""A tensor (example, source) by the target's name, and by the same name the sources, as JSON."""


@torch.no_grad()
def source_attentions(
    head: Head, spec: HeadSpec, target: str, data: Labelled, rows: Int[ndarray, " example"]
) -> Attentions | None:
    """The share of each source for each example; None for a head whose fusion has no shares.

    Args:
        head: trained.
        spec: what it was built from.
        target: name of what it learned.
        data: examples of one split.
        rows: their rows in the source of that split, whose order the result has.
    """
    shares = getattr(head.to(data.feed.device).fusion, "shares", None)
    if shares is None:
        return None
    found, places = [], []
    for batch in data.feed.batches(np.arange(data.n_examples), batch_size=256):
        inputs = batch.inputs(data.layers)
        found.append(shares(inputs.states, inputs.lengths)[0].float().cpu())
        places.append(rows[batch.examples])
    whole = torch.cat(found)
    weights = torch.full((int(rows.max()) + 1, whole.shape[1]), torch.nan)
    weights[torch.from_numpy(np.concatenate(places)).long()] = whole
    return {target: weights}, {target: json.dumps(_names(spec, whole.shape[1]))}


def _names(spec: HeadSpec, count: int) -> list[str]:
    """Names of the sources: those of their runs, or random-0, random-1 and so on."""
    given = spec.fusion_options.get("sources")
    return [Path(run).name for run in given.split(",")] if given else [f"random-{k}" for k in range(count)]
