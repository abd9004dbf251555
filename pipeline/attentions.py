"""How a run of `layerbank tune` mixes the prompts of other tasks, example by example, as it noted it."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jaxtyping import Float
from numpy import ndarray
from safetensors import SafetensorError, safe_open

from pipeline.errors import PipelineError

ATTENTIONS = "attentions.safetensors"
"""The file of a run folder that has them."""

OWN = "its own"
"""What stands for the task's own prompt among the sources."""


@dataclass(frozen=True)
class Shares:
    """How much of each source goes into each example of one task."""

    task: str  # of `layerbank tune` DATA.TARGET; its target
    sources: tuple[str, ...]  # the task's own prompt is `OWN`
    weights: Float[ndarray, "example source"]  # NaN for an example that was not read

    @property
    def known(self) -> Float[ndarray, "example source"]:
        """Those of the examples that were read."""
        return self.weights[~np.isnan(self.weights).any(1)]

    @property
    def means(self) -> dict[str, float]:
        """The mean share of each source over the examples that were read; they sum to 1."""
        return dict(zip(self.sources, self.known.mean(0, dtype=np.float64).tolist(), strict=True))


def read_shares(run: Path) -> list[Shares]:
    """The shares that a run has noted of its dev examples, task by task, in the order of the rows.

    Raises:
        PipelineError: there are none, or they cannot be read.
    """
    try:
        with safe_open(str(run / ATTENTIONS), framework="numpy") as opened:
            names = opened.metadata() or {}
            return [
                Shares(task, _with_own(task, json.loads(names[task])), opened.get_tensor(task))
                for task in sorted(opened.keys())
            ]
    except (OSError, KeyError, ValueError, SafetensorError) as error:
        said = " ".join(str(error).split())
        raise PipelineError(
            f"{run} has no {ATTENTIONS} that can be read ({said}): train it again"
        ) from error


def _with_own(task: str, names: Sequence[str]) -> tuple[str, ...]:
    """Names of sources as they are shown; the task's own prompt comes last.

    >>> _with_own("x.intent", ["a", "b", "a", "x.intent"])
    ('a (1)', 'b', 'a (2)', 'its own')
    """
    *others, last = names
    return told_apart([*others, OWN if last == task else last])


def told_apart(names: Sequence[str]) -> tuple[str, ...]:
    """Names of which none is there twice.

    >>> told_apart(["a", "b", "a"])
    ('a (1)', 'b', 'a (2)')
    """
    return tuple(
        name if names.count(name) == 1 else f"{name} ({names[: k + 1].count(name)})"
        for k, name in enumerate(names)
    )
