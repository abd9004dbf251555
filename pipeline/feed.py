"""States of a bank as a stream of batches, held in memory or read block by block ahead of the step.

No padding: a batch holds its examples' tokens one after the other. States stay in the bank's data type
and are converted a batch at a time, once for all stacks that step on it. The order of an epoch is the same
however the states are held, so a result never depends on the memory that was there.
"""

import queue
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import torch
from jaxtyping import Float, Int, Shaped
from numpy import ndarray
from torch import Tensor

from cache import Split
from cache.targets import ranges, spans
from pipeline.arrays import TORCH_DTYPES, ChannelRange, channel_range, to_float, to_numpy, to_torch
from pipeline.head import Inputs
from pipeline.selection import Selection

AHEAD = 2
"""Blocks, or batches for another device, that are made ready while one is computed on."""

Item = TypeVar("Item")
Made = TypeVar("Made")


@dataclass(frozen=True)
class Batch:
    """Some examples as every head of a selection reads them; on the device that computes."""

    examples: Int[ndarray, " example"]  # their positions in the split
    decoded_places: Int[ndarray, " chosen"]  # positions of the decoded tokens among all of the split
    states: Float[Tensor, "layer token width"]  # every layer of the feed
    lengths: Int[Tensor, " example"]
    decoded: Int[Tensor, " chosen"] | None
    decoded_lengths: Int[Tensor, " example"]

    def inputs(self, layers: slice | list[int]) -> Inputs:
        """What a head of some of the layers reads; neighbouring layers are not copied."""
        states = self.states[layers]
        return Inputs(
            states=states,
            lengths=self.lengths,
            decoded=self.decoded,
            decoded_lengths=self.decoded_lengths,
        )


class Feed(ABC):
    """The tokens that heads of one selection read of a split.

    Args:
        split: of a bank.
        selection: which of its tokens.
        layers: numbers of the layers, ascending.
        device: where batches are wanted.
    """

    def __init__(
        self, split: Split, selection: Selection, layers: Sequence[int], device: torch.device
    ) -> None:
        self.split = split
        self.layers = tuple(layers)
        self.device = device
        self.position = selection.read.position
        self.start = spans(selection.read.count)  # example i has the tokens start[i] : start[i + 1]
        self.decoded = selection.chosen
        self.decoded_start = spans(selection.decoded.count)
        self.block = _block_of(split)
        first = split.first_tokens[self.position] if split.dtype == np.int8 else np.zeros(0, bool)
        # Heads mostly read tokens of one group, which is one pass over a batch.
        self._first = first if first.any() and not first.all() else None
        self._group = int(first.any()) if self._first is None else None
        self._channels: dict[torch.device, ChannelRange | None] = {}

    @property
    def n_examples(self) -> int:
        """Number of examples."""
        return len(self.start) - 1

    @property
    def n_tokens(self) -> int:
        """Number of tokens read."""
        return int(self.start[-1])

    def order(self, *, seed: int, epoch: int) -> Int[ndarray, " example"]:
        """The order of an epoch: blocks in a random order, the examples of each in a random order.

        A block is a random sample of the split (see `cache.plan`), so this is a shuffle that reads every
        block once. A function of the seed and the epoch alone.
        """
        random = np.random.default_rng([seed, epoch])
        place = random.permutation(self.split.n_blocks)[self.block]
        return np.lexsort((random.permutation(self.n_examples), place))

    def batches(
        self,
        sequence: Int[ndarray, " example"],
        *,
        batch_size: int | Sequence[int],
        dtype: torch.dtype = torch.float32,
    ) -> Iterator[Batch]:
        """Deals examples in batches.

        Args:
            sequence: the examples, in their order; those of a block side by side.
            batch_size: examples in a batch; or in each, one after the other, which add up to all of them.
            dtype: the type states are converted to.

        Raises:
            CacheError: a chunk is damaged.
        """
        batches = self._host_batches(_cut(sequence, batch_size), dtype)
        if self.device.type == "cpu":
            return batches
        if self.device.type == "cuda":
            return _copied(batches, self.device)
        return (_moved(batch, self.device) for batch in batches)

    def _host_batches(self, pieces: Sequence[Int[ndarray, " _"]], dtype: torch.dtype) -> Iterator[Batch]:
        for chosen, states in self._gather(pieces):
            first = None if self._first is None else self._first[self._tokens(chosen)]
            yield self._batch(chosen, to_float(states, self._channels_on(states.device), first, dtype))

    def _tokens(self, chosen: Int[ndarray, " example"]) -> Int[ndarray, " token"]:
        """The tokens of some examples, by their number among those that are read."""
        return ranges(self.start[chosen], self.start[chosen + 1] - self.start[chosen])

    def _channels_on(self, device: torch.device) -> ChannelRange | None:
        """Scale and shift of an int8 bank, copied to a device once."""
        if device not in self._channels:
            self._channels[device] = channel_range(self.split, self.layers, device, group=self._group)
        return self._channels[device]

    @abstractmethod
    def _gather(
        self, pieces: Sequence[Int[ndarray, " _"]]
    ) -> Iterator[tuple[Int[ndarray, " example"], Shaped[Tensor, "layer token width"]]]:
        """The examples of each batch, and their states in the bank's data type."""

    def _batch(self, chosen: Int[ndarray, " example"], states: Float[Tensor, "layer token width"]) -> Batch:
        lengths = self.start[chosen + 1] - self.start[chosen]
        decoded_lengths = self.decoded_start[chosen + 1] - self.decoded_start[chosen]
        places = ranges(self.decoded_start[chosen], decoded_lengths)
        decoded = None
        if self.decoded is not None:
            shift = np.repeat(spans(lengths)[:-1] - self.start[chosen], decoded_lengths)
            decoded = torch.from_numpy(self.decoded[places] + shift)
        return Batch(
            examples=chosen,
            decoded_places=places,
            states=states,
            lengths=torch.from_numpy(lengths),
            decoded=decoded,
            decoded_lengths=torch.from_numpy(decoded_lengths),
        )


class Resident(Feed):
    """Holds its states in memory: on the device, or on the host where the device has no room."""

    def __init__(
        self, split: Split, selection: Selection, layers: Sequence[int], device: torch.device
    ) -> None:
        super().__init__(split, selection, layers, device)
        n_bytes = self.n_tokens * len(self.layers) * split.width * split.dtype.itemsize
        home = home_of(n_bytes, device)
        self.states: Shaped[Tensor, "layer token width"]
        if home.type != "cpu":
            self.states = taken_in_pieces(split, self.position, self.layers, home)
            return
        states = to_torch(split.take(self.position, self.layers))
        self.states = states.pin_memory() if device.type == "cuda" else states

    def _gather(
        self, pieces: Sequence[Int[ndarray, " _"]]
    ) -> Iterator[tuple[Int[ndarray, " example"], Shaped[Tensor, "layer token width"]]]:
        for chosen in pieces:
            tokens = torch.from_numpy(self._tokens(chosen)).to(self.states.device)
            yield chosen, self.states.index_select(1, tokens)


class Streamed(Feed):
    """Reads its states block by block, in a thread, while the blocks before them are computed on."""

    def _gather(
        self, pieces: Sequence[Int[ndarray, " _"]]
    ) -> Iterator[tuple[Int[ndarray, " example"], Shaped[Tensor, "layer token width"]]]:
        sequence = np.concatenate(pieces) if pieces else self.block[:0]
        ends = _run_ends(self.block[sequence])
        free: queue.SimpleQueue[Tensor] = queue.SimpleQueue()
        blocks = ahead(lambda block: self._read(block, free), self.block[sequence[ends - 1]].tolist())
        window: deque[_Loaded] = deque()
        reached = dealt = 0
        for chosen in pieces:
            dealt += len(chosen)
            while reached < dealt:
                window.append(next(blocks))
                reached = int(ends[np.searchsorted(ends, reached, side="right")])
            found = [loaded.take(self, chosen) for loaded in window]
            yield chosen, found[0] if len(found) == 1 else torch.cat(found, 1)
            done = len(window) if reached == dealt else len(window) - 1
            for _ in range(done):
                free.put(window.popleft().buffer)

    def _read(self, block: int, free: "queue.SimpleQueue[Tensor]") -> "_Loaded":
        first, end = np.searchsorted(self.block, [block, block + 1])
        tokens = slice(int(self.start[first]), int(self.start[end]))
        inside = self.position[tokens] - block * self.split.block_tokens
        # Used again: the first touch of fresh memory is slower than reading the file.
        buffer = self._buffer() if free.empty() else free.get()
        out = to_numpy(buffer)[:, : len(inside)]
        for k, chunk in enumerate(self.split.read_block(block, self.layers)):
            np.take(chunk, inside, axis=0, out=out[k], mode="clip")
        return _Loaded(buffer=buffer, block=block, first_token=tokens.start)

    def _buffer(self) -> Tensor:
        shape = (len(self.layers), self.split.block_tokens, self.split.width)
        return torch.empty(shape, dtype=TORCH_DTYPES[self.split.recipe.dtype])


@dataclass(frozen=True)
class _Loaded:
    """A block in memory: the tokens of a feed that lie in it."""

    buffer: Shaped[Tensor, "layer token width"]
    block: int
    first_token: int

    def take(self, feed: Feed, chosen: Int[ndarray, " example"]) -> Shaped[Tensor, "layer token width"]:
        """The states of those of the examples that lie in this block, in their order."""
        here = chosen[feed.block[chosen] == self.block]
        tokens = ranges(feed.start[here] - self.first_token, feed.start[here + 1] - feed.start[here])
        return self.buffer.index_select(1, torch.from_numpy(tokens))


def ahead(make: Callable[[Item], Made], items: Sequence[Item], depth: int = AHEAD) -> Iterator[Made]:
    """Makes each thing of a list in a thread, up to `depth` of them before they are asked for."""
    with ThreadPoolExecutor(1, thread_name_prefix="read-ahead") as pool:
        coming: deque[Future[Made]] = deque()
        try:
            for item in items:
                coming.append(pool.submit(make, item))
                if len(coming) > depth:
                    yield coming.popleft().result()
            while coming:
                yield coming.popleft().result()
        finally:
            for future in coming:
                future.cancel()


def _cut(sequence: Int[ndarray, " example"], batch_size: int | Sequence[int]) -> list[Int[ndarray, " _"]]:
    """The examples of each batch."""
    if isinstance(batch_size, int):
        return [sequence[i : i + batch_size] for i in range(0, len(sequence), batch_size)]
    return np.split(sequence, np.cumsum(batch_size))[: len(batch_size)]


def _block_of(split: Split) -> Int[ndarray, " example"]:
    """The block of each example, ascending; one without a token goes with the token before it."""
    return np.maximum(0, split.start + split.length - 1) // split.block_tokens


def _run_ends(values: Int[ndarray, " entry"]) -> Int[ndarray, " run"]:
    """Where each run of equal values ends."""
    return np.append(np.flatnonzero(np.diff(values)) + 1, len(values)) if len(values) else values[:0]


def home_of(n_bytes: int, device: torch.device) -> torch.device:
    """Where states are held for a device: on it, or on the host if half of what it has free is less."""
    if device.type != "cuda":
        return device
    # Torch keeps what was freed, which the device does not count as free.
    kept_bytes = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    fits = n_bytes <= (torch.cuda.mem_get_info(device)[0] + kept_bytes) // 2
    return device if fits else torch.device("cpu")


def taken_in_pieces(
    split: Split, position: Int[ndarray, " token"], layers: Sequence[int], home: torch.device
) -> Shaped[Tensor, "layer token width"]:
    """States of some tokens on a device, put there bit by bit: a host may have less memory than its GPU."""
    dtype = TORCH_DTYPES[split.recipe.dtype]
    states = torch.empty(len(layers), len(position), split.width, dtype=dtype, device=home)
    for first in range(0, len(position), split.block_tokens):
        piece = position[first : first + split.block_tokens]
        states[:, first : first + len(piece)] = to_torch(split.take(piece, layers)).to(home)
    return states


def _copied(batches: Iterator[Batch], device: torch.device) -> Iterator[Batch]:
    """Batches on a GPU, each copied on a stream of its own while the one before is computed on."""
    copies = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
    waiting: deque[tuple[Batch, torch.cuda.Event]] = deque()
    for batch in batches:
        with torch.cuda.stream(copies):
            moved = _moved(batch, device)
            waiting.append((moved, copies.record_event()))
        if len(waiting) > AHEAD:
            yield _arrived(*waiting.popleft())
    while waiting:
        yield _arrived(*waiting.popleft())


def _moved(batch: Batch, device: torch.device) -> Batch:
    def move(tensor: Tensor) -> Tensor:
        if tensor.device == device:
            return tensor
        pinned = device.type == "cuda"
        return (tensor.pin_memory() if pinned else tensor).to(device, non_blocking=pinned)

    return Batch(
        examples=batch.examples,
        decoded_places=batch.decoded_places,
        states=move(batch.states),
        lengths=move(batch.lengths),
        decoded=None if batch.decoded is None else move(batch.decoded),
        decoded_lengths=move(batch.decoded_lengths),
    )


def _arrived(batch: Batch, event: torch.cuda.Event) -> Batch:
    """A batch whose copies are done for all that the computing stream does from now on."""
    stream = torch.cuda.current_stream(batch.states.device)
    stream.wait_event(event)
    for tensor in (batch.states, batch.lengths, batch.decoded, batch.decoded_lengths):
        if tensor is not None:
            tensor.record_stream(stream)
    return batch
