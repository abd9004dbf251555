"""What one head reads of one split, with its labels; and which states of a bank are held in memory."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from jaxtyping import Int
from numpy import ndarray
from torch import Tensor

from cache import Split, Target
from cache.targets import TargetKind, spans
from pipeline.feed import Batch, Feed, Resident, Streamed
from pipeline.grading import AnswerTexts, grader
from pipeline.head import Head, Inputs
from pipeline.metrics import Texts
from pipeline.selection import Selection, TokenSet, select

MEMORY_BYTES = 4 * 2**30
"""What states and heads may take together on a host where nothing else is said."""

GPU_FRAC = 0.8
"""Share of a GPU's free memory that they may take there: kernels and an allocator's gaps want the rest."""

Key = tuple[str, str, str]  # split, tokens read, tokens decoded


@dataclass(frozen=True, kw_only=True)
class Labelled:
    """What one head reads of one split, with its labels."""

    feed: Feed
    layers: slice | list[int]  # places of the head's layers among the feed's
    labels: Tensor  # of the units: examples, or decoded words
    gold: ndarray  # of all units of the source, words without a token included
    unit: Int[ndarray, " unit"]  # place of each unit in `gold`
    gold_lengths: Int[ndarray, " example"] | None  # words, options or tokens of each example
    kind: TargetKind = "class"
    answers: Texts | None = None  # what scores answers, where the target has any

    @property
    def n_examples(self) -> int:
        """Number of examples."""
        return self.feed.n_examples

    @property
    def n_tokens(self) -> int:
        """Number of tokens read."""
        return self.feed.n_tokens

    def units(self, batch: Batch) -> Int[ndarray, " unit"]:
        """The units of a batch, as positions among all of the split."""
        return batch.examples if self.gold_lengths is None else batch.decoded_places

    def of(self, batch: Batch) -> tuple[Inputs, Tensor, Int[ndarray, " unit"]]:
        """What the head reads of a batch, the labels of its units, and where the units stand."""
        units = self.units(batch)
        return batch.inputs(self.layers), self.labels[torch.from_numpy(units).to(self.labels.device)], units

    def batches(
        self,
        sequence: Int[ndarray, " example"],
        *,
        batch_size: int,
        dtype: torch.dtype = torch.float32,
    ) -> Iterator[tuple[Inputs, Tensor, Int[ndarray, " unit"]]]:
        """Batches as `Feed.batches` deals them, as `of` gives them."""
        for batch in self.feed.batches(sequence, batch_size=batch_size, dtype=dtype):
            yield self.of(batch)


@dataclass
class Feeds:
    """The feeds of a bank, each made once: resident as long as the memory lasts, streamed beyond.

    Args:
        memory_bytes: what states and heads may take together, see `memory_budget`; half of it is for
            states.
        device: where batches are wanted.
        layers: for each feed, the layers that its heads read together; a feed that is not named has
            those of the first head that opens it.
        note: is told how states are held, where they do not fit.
    """

    memory_bytes: int | None = None
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    layers: Mapping[Key, Sequence[int]] = field(default_factory=dict)
    note: Callable[[str], None] = lambda _: None
    resident_bytes: int = 0
    budget_bytes: int = field(init=False)
    _feeds: dict[Key, Feed] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Looks once at what the device has."""
        self.budget_bytes = memory_budget(self.device, self.memory_bytes)

    def open(self, split: Split, head: Head, layers: Sequence[int]) -> Feed:
        """The feed of a head on a split.

        Raises:
            PipelineError: the bank does not keep the tokens.
            CacheError: a chunk is damaged.
        """
        key = feed_key(split, head)
        found = self._feeds.get(key)
        if found is None or not set(layers) <= set(found.layers):
            if isinstance(found, Resident):
                self.resident_bytes -= found.states.nbytes
            # Those it has too: a search asks for other layers in every round.
            before = found.layers if found else ()
            wanted = sorted({*self.layers.get(key, layers), *layers, *before})
            found = self._feeds[key] = self._make(split, select(split, head), wanted)
        return found

    def _make(self, split: Split, selection: Selection, layers: Sequence[int]) -> Feed:
        n_tokens = len(selection.read.position)
        n_bytes = n_tokens * len(layers) * split.width * split.dtype.itemsize
        if self.resident_bytes + n_bytes <= self.budget_bytes // 2:
            self.resident_bytes += n_bytes
            return Resident(split, selection, layers, self.device)
        self.note(
            f"{split.name}: {n_bytes / 2**30:.2g} GiB of states do not fit half of --memory "
            f"{self.budget_bytes / 2**30:.3g}GiB, they are streamed"
        )
        return Streamed(split, selection, layers, self.device)


def memory_budget(device: torch.device, asked_bytes: int | None = None) -> int:
    """What states and heads may take together, bytes.

    Args:
        device: where heads compute, and states are held that fit.
        asked_bytes: what the user said; None for what is usual, on a GPU by what it has. Not by what is
            free: a sweep that is run again must be split as it was.
    """
    if asked_bytes is not None:
        return asked_bytes
    if device.type != "cuda":
        return MEMORY_BYTES
    return int(GPU_FRAC * torch.cuda.mem_get_info(device)[1])


def feed_key(split: Split, head: Head) -> Key:
    """What feeds are told apart by: heads of one key read the same tokens."""
    return split.name, head.reads, head.decoder.tokens


def load(
    split: Split,
    head: Head,
    layers: Sequence[int],
    target: Target,
    feeds: Feeds | None = None,
    *,
    scored: bool = True,
) -> Labelled:
    """What a head reads of a split, with its labels.

    Args:
        split: of a bank.
        head: one of those that read.
        layers: numbers of the layers it reads.
        target: of the split.
        feeds: hold the states.
        scored: whether its answers will be scored, which some targets keep texts for.

    Raises:
        PipelineError: the bank does not keep the tokens.
        CacheError: a chunk is damaged, or a layer is not kept.
    """
    feeds = feeds or Feeds()
    feed = feeds.open(split, head, layers)
    unit, gold_lengths = _units(split, target, select(split, head).decoded)
    labels = torch.from_numpy(target.values[unit]).to(feeds.device)
    return Labelled(
        feed=feed,
        layers=places(feed.layers, layers),
        labels=labels if target.kind == "float" else labels.long(),
        gold=target.values,
        unit=unit,
        gold_lengths=gold_lengths,
        kind=target.kind,
        answers=_grader(split, target) if scored else None,
    )


def _grader(split: Split, target: Target) -> Texts | None:
    """What scores the target's answers, where the bank keeps what it takes."""
    if target.kind == "span":
        return AnswerTexts(lambda: split.target_extra(target.name))
    if target.kind not in ("class", "choice"):
        return None
    return grader(target, split.target_extra(target.name), split.n_words)


def places(held: Sequence[int], wanted: Sequence[int]) -> slice | list[int]:
    """Where layers stand among others; a slice, which copies nothing, for neighbours."""
    places = [held.index(layer) for layer in wanted]
    if places == list(range(places[0], places[-1] + 1)):
        return slice(places[0], places[-1] + 1)
    return places


def _units(
    split: Split, target: Target, chosen: TokenSet
) -> tuple[Int[ndarray, " unit"], Int[ndarray, " example"] | None]:
    """The place of each unit's label in the target; and where units are no examples, how many each has."""
    if target.kind == "token":
        return np.arange(len(chosen.position)), split.length
    if target.kind not in ("tags", "choice"):
        return np.arange(split.n_examples), None
    first = np.repeat(spans(split.n_words)[:-1], chosen.count)
    return first + split.word_id[chosen.position], split.n_words
