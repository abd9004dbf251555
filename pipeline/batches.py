"""From a bank to batches: which tokens a head reads, held resident, dealt in flat batches.

No padding: a batch holds its examples' tokens one after the other. States stay in the bank's data type
and are converted a batch at a time.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import numpy as np
import torch
from jaxtyping import Int, Shaped, UInt8
from numpy import ndarray
from torch import Tensor

from cache import Kind, Split, Target
from cache.targets import ranges, spans
from pipeline.arrays import to_torch
from pipeline.errors import PipelineError
from pipeline.head import Head, Inputs

_SHORT = {"all": "every token", "words": "the first sub-word of every word", "first": "the first token"}


@runtime_checkable
class TokenTable(Protocol):
    """Where tokens lie and what they are: a split of a bank, or a batch of raw text."""

    @property
    def keep(self) -> str:
        """Which tokens are there."""

    @property
    def start(self) -> Int[ndarray, " example"]:
        """First token of each example."""

    @property
    def length(self) -> Int[ndarray, " example"]:
        """Number of tokens of each example."""

    @property
    def kind(self) -> UInt8[ndarray, " token"]:
        """What each token is, see `cache.layout.Kind`."""


@dataclass(frozen=True, kw_only=True)
class TokenSet:
    """Some tokens of each example, in the order of the examples."""

    position: Int[ndarray, " token"]  # on the table's token axis
    count: Int[ndarray, " example"]


@dataclass(frozen=True, kw_only=True)
class Selection:
    """What one head reads: the tokens its fusion sees, and which of them its decoder sees."""

    read: TokenSet
    decoded: TokenSet
    chosen: Int[ndarray, " chosen"] | None  # places of the decoded among the read; None for all


@dataclass(frozen=True, kw_only=True)
class Labelled:
    """What one head reads of one split, with its labels, in memory."""

    states: Shaped[Tensor, "layer token width"]  # in the bank's data type
    start: Int[ndarray, " boundary"]  # example i has the tokens start[i] : start[i + 1]
    decoded: Int[ndarray, " chosen"] | None  # tokens that go on to the decoder, None for all
    decoded_start: Int[
        ndarray, " boundary"
    ]  # example i has decoded_start[i] : decoded_start[i + 1] of them
    labels: Tensor  # of the units: examples, or decoded words
    gold: ndarray  # of all units of the source, words without a token included
    unit: Int[ndarray, " unit"]  # place of each unit in `gold`
    gold_lengths: Int[ndarray, " example"] | None  # words of each example, for tags

    @property
    def n_examples(self) -> int:
        """Number of examples."""
        return len(self.start) - 1

    @property
    def n_tokens(self) -> int:
        """Number of tokens read."""
        return int(self.start[-1])


def token_set(table: TokenTable, tokens: str, *, why: str) -> TokenSet:
    """Chooses tokens of every example.

    Args:
        table: where the tokens are.
        tokens: all, words or first.
        why: the part that needs them, for the message.

    Raises:
        PipelineError: the bank does not keep them.
    """
    enough = {"all": ("all",), "words": ("all", "words"), "first": ("all", "words", "first")}[tokens]
    if table.keep not in enough:
        raise PipelineError(
            f"{why} reads {_SHORT[tokens]}, the bank has --keep {table.keep}: "
            f"extract with --keep {enough[-1]}"
        )
    if tokens == "first":
        count = np.minimum(table.length, 1)
        return TokenSet(position=table.start[count > 0], count=count)
    position = ranges(table.start, table.length)
    if tokens == "all":
        return TokenSet(position=position, count=table.length)
    is_word = table.kind[position] == Kind.WORD
    before, ends = spans(is_word.view(np.int8)), spans(table.length)
    return TokenSet(position=position[is_word], count=np.diff(before[ends]))


def select(table: TokenTable, head: Head) -> Selection:
    """Chooses the tokens that a head reads.

    Raises:
        PipelineError: the bank does not keep them.
    """
    needy = head.fusion if head.fusion.mixes_tokens else head.decoder
    read = token_set(table, head.reads, why=type(needy).__name__)
    if head.reads == head.decoder.tokens:
        return Selection(read=read, decoded=read, chosen=None)
    decoded = token_set(table, head.decoder.tokens, why=type(head.decoder).__name__)
    chosen = np.flatnonzero(np.isin(read.position, decoded.position))
    return Selection(read=read, decoded=decoded, chosen=chosen)


def load(
    split: Split, head: Head, layers: tuple[int, ...], target: Target, device: torch.device
) -> Labelled:
    """Reads what a head needs of a split into memory.

    Raises:
        PipelineError: the bank does not keep the tokens.
        CacheError: a chunk is damaged.
    """
    selection = select(split, head)
    states = to_torch(split.take(selection.read.position, layers)).to(device)
    unit, gold_lengths = _units(split, target, selection.decoded)
    labels = torch.from_numpy(target.values[unit]).to(device)
    return Labelled(
        states=states,
        start=spans(selection.read.count),
        decoded=selection.chosen,
        decoded_start=spans(selection.decoded.count),
        labels=labels if target.kind == "float" else labels.long(),
        gold=target.values,
        unit=unit,
        gold_lengths=gold_lengths,
    )


def _units(
    split: Split, target: Target, chosen: TokenSet
) -> tuple[Int[ndarray, " unit"], Int[ndarray, " example"] | None]:
    """The place of each unit's label in the target; and for tags, the words of each example."""
    if target.kind != "tags":
        return np.arange(split.n_examples), None
    first = np.repeat(spans(split.n_words)[:-1], chosen.count)
    return first + split.word_id[chosen.position], split.n_words


def order(n_examples: int, *, seed: int, epoch: int) -> Int[ndarray, " example"]:
    """The order of an epoch: a function of the seed and the epoch alone."""
    return np.random.default_rng([seed, epoch]).permutation(n_examples)


def batches(
    data: Labelled,
    sequence: Int[ndarray, " example"],
    *,
    batch_size: int,
    dtype: torch.dtype = torch.float32,
) -> Iterator[tuple[Inputs, Tensor, Int[ndarray, " unit"]]]:
    """Deals examples in batches.

    Args:
        data: of a split.
        sequence: the examples, in their order.
        batch_size: examples in a batch.
        dtype: the type states are converted to.

    Yields:
        What the head reads, the labels of its units, and the units' positions among all of the split.
    """
    for first in range(0, len(sequence), batch_size):
        yield make_batch(data, sequence[first : first + batch_size], dtype)


def make_batch(
    data: Labelled, chosen: Int[ndarray, " example"], dtype: torch.dtype
) -> tuple[Inputs, Tensor, Int[ndarray, " unit"]]:
    """One batch of some examples; see `batches`."""
    device = data.states.device
    lengths = data.start[chosen + 1] - data.start[chosen]
    tokens = torch.from_numpy(ranges(data.start[chosen], lengths)).to(device)
    states = data.states.index_select(1, tokens).to(dtype)
    decoded_lengths = data.decoded_start[chosen + 1] - data.decoded_start[chosen]
    decoded_places = ranges(data.decoded_start[chosen], decoded_lengths)
    decoded = None
    if data.decoded is not None:
        shift = np.repeat(spans(lengths)[:-1] - data.start[chosen], decoded_lengths)
        decoded = torch.from_numpy(data.decoded[decoded_places] + shift).to(device)
    units = decoded_places if data.gold_lengths is not None else chosen
    inputs = Inputs(
        states=states,
        lengths=torch.from_numpy(lengths).to(device),
        decoded=decoded,
        decoded_lengths=torch.from_numpy(decoded_lengths).to(device),
    )
    return inputs, data.labels[torch.from_numpy(units).to(device)], units
