"""Batches of tasks' rows: like lengths together, padding masked."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from numpy import ndarray
from torch import Tensor

from cache.targets import ranges, spans
from pipeline.head import Head, Inputs
from pipeline.selection import KINDS_READ
from pipeline.tokens import Tokens
from pipeline.tuning.backbone import Backbone
from pipeline.tuning.examples import Examples

POOL_BATCHES = 50
"""Batches out of which examples of like length are put together."""

EVALUATION_EXAMPLES = 64
"""Examples in a batch that is scored."""


@dataclass(frozen=True, kw_only=True)
class Part:
    """The examples of one task in a batch."""

    task: int
    inputs: Inputs | None  # places of the tokens its head reads; `states` is empty. None from text to text
    places: Int[Tensor, " token"]  # of the tokens read, in the padded batch with its soft tokens
    labels: Tensor  # one a unit
    units: Int[ndarray, " unit"]  # places of the units among all of the split
    share: float = 1.0  # of the loss of the whole step


@dataclass(frozen=True, kw_only=True)
class Batch:
    """Some examples, padded on the right; one of several options is as many sequences."""

    ids: Int[Tensor, "sequence token"]
    mask: Bool[Tensor, "sequence token"]
    types: Int[Tensor, "sequence token"] | None  # segments, for encoders that ask for them
    tasks: Int[Tensor, " sequence"]
    parts: tuple[Part, ...] = field(default=())
    answers: Int[Tensor, "example answer"] | None = None  # from text to text; -100 after the end
    weights: Float[Tensor, " example"] | None = None  # share of each answer in the loss
    penalty_share: float = 1.0  # of the method's penalty, where a step is made of several batches


Picked = Sequence[tuple[Examples, ndarray]]
"""Numbers of rows of some tasks."""


def deal(
    lengths: Int[ndarray, " example"], *, batch_size: int, seed: int, epoch: int
) -> list[Int[ndarray, " chosen"]]:
    """The batches of an epoch: a random order, like lengths together within every `POOL_BATCHES` batches.

    A function of its arguments alone, so that an epoch that is begun again is dealt alike.
    """
    random = np.random.default_rng([seed, epoch])
    order = random.permutation(len(lengths))
    dealt: list[Int[ndarray, " chosen"]] = []
    pool = POOL_BATCHES * batch_size
    for first in range(0, len(order), pool):
        here = order[first : first + pool]
        here = here[np.argsort(lengths[here], kind="stable")]
        dealt += [here[i : i + batch_size] for i in range(0, len(here), batch_size)]
    return [dealt[i] for i in random.permutation(len(dealt))]


def in_order(examples: Examples, at_once: int = EVALUATION_EXAMPLES) -> Iterator[Picked]:
    """All rows of a split that have a token, by length, at most `at_once` together, for scoring."""
    order = np.argsort(examples.tokens.length, kind="stable")
    order = order[examples.tokens.length[order] > 0]
    most = int(examples.tokens.sequences(order)[1].max(initial=1))
    size = max(1, min(at_once, EVALUATION_EXAMPLES) // most)
    for first in range(0, len(order), size):
        yield [(examples, order[first : first + size])]


def make_batch(
    picked: Picked,
    backbone: Backbone,
    heads: Sequence[Head],
    *,
    n_slots: int,
    shares: Mapping[int, float] | None = None,
    penalty_share: float = 1.0,
) -> Batch:
    """Pads rows of one or more tasks into one batch.

    Args:
        picked: the rows.
        backbone: tells how inputs are padded and where soft tokens stand.
        heads: one a task; none from text to text.
        n_slots: soft tokens that each input will get.
        shares: of a task's mean loss in the loss of the step, by the task's number; 1 if not given.
        penalty_share: of the method's penalty in the loss of the step.
    """
    lengths = [examples.sequence_lengths(rows) for examples, rows in picked]
    sizes = np.concatenate(lengths)
    longest = int(sizes.max())
    ids = np.full((len(sizes), longest), backbone.pad_id, dtype=np.int64)
    types = np.zeros((len(sizes), longest), dtype=np.int64)
    first, parts = 0, []
    for (examples, rows), of_sequence in zip(picked, lengths, strict=True):
        tokens = examples.tokens
        column = ranges(np.zeros(len(of_sequence), dtype=np.int64), of_sequence)
        row = np.repeat(np.arange(first, first + len(of_sequence)), of_sequence)
        source = ranges(tokens.start[rows], tokens.length[rows])
        ids[row, column], types[row, column] = tokens.input_ids[source], tokens.type_id[source]
        share = 1.0 if shares is None else shares[examples.task]
        head = heads[examples.task] if heads else None
        places = row * (longest + n_slots) + column + n_slots * (column >= backbone.slot_at)
        parts.append(_part(examples, rows, head, places, source, share))
        first += len(of_sequence)
    mask = np.arange(longest) < sizes[:, None]
    answers, weights = _answers(picked, parts) if not heads else (None, None)
    return Batch(
        ids=torch.from_numpy(ids),
        mask=torch.from_numpy(mask),
        types=torch.from_numpy(types) if backbone.asks_type_ids else None,
        tasks=torch.from_numpy(
            np.concatenate([np.full(len(n), e.task) for (e, _), n in zip(picked, lengths, strict=True)])
        ),
        parts=tuple(parts),
        answers=answers,
        weights=weights,
        penalty_share=penalty_share,
    )


def _part(
    examples: Examples, rows: ndarray, head: Head | None, places: ndarray, source: ndarray, share: float
) -> Part:
    """The labels of some rows, and which of their tokens the head and its decoder read."""
    target, empty = examples.target, torch.empty(0, dtype=torch.long)
    if head is None:
        return Part(task=examples.task, inputs=None, places=empty, labels=empty, units=rows, share=share)
    lengths = examples.tokens.length[rows]
    read, read_lengths = _chosen(examples.tokens, head.reads, source, lengths)
    seen, seen_lengths = _chosen(examples.tokens, head.decoder.tokens, source, lengths)
    if target.kind in ("tags", "choice"):
        owner = np.repeat(rows, seen_lengths)
        units = spans(examples.tokens.n_words)[owner] + examples.tokens.word_id[source[seen]]
    elif target.kind == "token":
        units = examples.unit_of_token[source[seen]]
    else:
        units = rows
    inputs = Inputs(
        states=torch.empty(1, 0, 1),
        lengths=_long(read_lengths),
        decoded=None if head.reads == head.decoder.tokens else _long(np.flatnonzero(np.isin(read, seen))),
        decoded_lengths=_long(seen_lengths),
    )
    labels = torch.from_numpy(target.values[units])
    return Part(
        task=examples.task,
        inputs=inputs,
        places=_long(places[read]),
        labels=labels if target.kind == "float" else labels.long(),
        units=units,
        share=share,
    )


def _chosen(tokens: Tokens, which: str, source: ndarray, lengths: ndarray) -> tuple[ndarray, ndarray]:
    """Which of the rows' tokens are read, and how many of each row; see `pipeline.selection`."""
    if which == "all":
        return np.arange(len(source)), lengths
    bounds = spans(lengths)
    if which == "first":
        return bounds[:-1][lengths > 0], np.minimum(lengths, 1)
    some = (
        tokens.kept("masked")[source]
        if which == "masked"
        else np.isin(tokens.kind[source], KINDS_READ[which])
    )
    return np.flatnonzero(some), np.diff(spans(some.astype(np.int64))[bounds])


def _answers(picked: Picked, parts: Sequence[Part]) -> tuple[Tensor, Tensor]:
    """The tokens of what to say for each example, and its share in the loss of the step."""
    known = [examples.answers[row] if examples.answers else () for examples, rows in picked for row in rows]
    padded = np.full((len(known), max(1, *map(len, known))), -100, dtype=np.int64)
    for row, answer in zip(padded, known, strict=True):
        row[: len(answer)] = answer
    weights = np.concatenate(
        [np.full(len(part.units), part.share / max(1, len(part.units))) for part in parts]
    )
    return torch.from_numpy(padded), torch.from_numpy(weights.astype(np.float32))


def _long(values: ndarray) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(values, dtype=np.int64))
