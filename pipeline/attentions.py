"""How a run mixes what it took from other tasks, example by example: heads, or prompts of `tune`."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float, Int
from numpy import ndarray
from safetensors import SafetensorError, safe_open
from torch import Tensor

from pipeline.batches import Labelled
from pipeline.errors import PipelineError
from pipeline.head import Head, HeadSpec

ATTENTIONS = "attentions.safetensors"
"""The file of a run folder that has them."""

OWN = "its own"
"""What stands for the task's own prompt among the sources."""

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


@dataclass(frozen=True)
class Shares:
    """How much of each source goes into each example of one task."""

    task: str  # its target; of `layerbank tune` DATA.TARGET
    sources: tuple[str, ...]  # the task's own prompt is `OWN`
    weights: Float[ndarray, "example source"]  # by row of the source; NaN for a row that was not read

    @property
    def known(self) -> Float[ndarray, "example source"]:
        """Those of the rows that were read."""
        return self.weights[~np.isnan(self.weights).any(1)]

    @property
    def means(self) -> dict[str, float]:
        """The mean share of each source over the rows that were read; they sum to 1."""
        return dict(zip(self.sources, self.known.mean(0, dtype=np.float64).tolist(), strict=True))


def read_shares(run: Path) -> list[Shares]:
    """The shares that a run has noted of its dev examples, task by task.

    Raises:
        PipelineError: there are none, or they cannot be read.
    """
    try:
        with safe_open(str(run / ATTENTIONS), framework="numpy") as opened:
            names = opened.metadata() or {}
            return [
                Shares(task, _told_apart(task, json.loads(names[task])), opened.get_tensor(task))
                for task in sorted(opened.keys())
            ]
    except (OSError, KeyError, ValueError, SafetensorError) as error:
        said = " ".join(str(error).split())
        raise PipelineError(
            f"{run} has no {ATTENTIONS} that can be read ({said}): train it again"
        ) from error


def _told_apart(task: str, names: Sequence[str]) -> tuple[str, ...]:
    """Names of sources as they are shown: the task's own prompt, which comes last, and no name twice.

    The tasks of `layerbank tune`, which alone have a prompt of their own, are named ``DATA.TARGET``; of a
    head on a bank it is the target, and a source may be a run of that name.

    >>> _told_apart("x.intent", ["a", "b", "a", "x.intent"])
    ('a (1)', 'b', 'a (2)', 'its own')
    >>> _told_apart("intent", ["tags", "intent"])
    ('tags', 'intent')
    """
    own = len(names) - 1 if "." in task else -1
    shown = [OWN if k == own and name == task else name for k, name in enumerate(names)]
    return tuple(
        name if shown.count(name) == 1 else f"{name} ({shown[: k + 1].count(name)})"
        for k, name in enumerate(shown)
    )
