"""The blocks of a bank in the making, several at a time: each is computed and written by one thread.

What is written stays: a run that ends early is continued by the same command.
"""

import queue
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from jaxtyping import Int, UInt8
from numpy import ndarray
from torch import Tensor

from cache import Writer
from cache.layout import TOKEN_ARRAYS
from cache.targets import ranges
from pipeline.arrays import TORCH_DTYPES, to_numpy
from pipeline.device import one_thread_each
from pipeline.encoder import Encoder
from pipeline.errors import PipelineError
from pipeline.memory import give_back
from pipeline.quantise import Quantised, Quantiser
from pipeline.tokens import Tokens

_ON_DEVICE = 3
"""Blocks in work beside a device: one is computed there while two are copied and written."""


class StoppedError(PipelineError):
    """The user stopped the extraction; what is written stays."""


@dataclass(frozen=True, kw_only=True)
class Progress:
    """Where an extraction is. Counts are of this run; `n_` of all that it has to do."""

    split: str
    examples: int
    tokens: int
    written_bytes: int
    n_examples: int
    n_tokens: int


@dataclass(kw_only=True)
class _Lane:
    """What one thread makes its blocks with."""

    encoder: Encoder
    buffer: Tensor  # of one block, on the encoder's device
    pinned: Tensor | None = None  # the same in host memory that a device copies to by itself
    copies: Any = None  # the stream of those copies
    quantiser: Quantiser | None = None


class Stage:
    """Computes and writes the missing blocks.

    On a CPU each thread takes a block, computes it alone and writes it, while the others go on with theirs:
    threads that share a forward wait for each other at every product. A block's states then depend on
    nothing but its tokens. Before another device threads take turns: one computes, the others write.

    Args:
        writer: of the bank.
        encoder: the frozen encoder.
        tokens: of each split's rows.
        kept: which of the tokens are kept.
        progress: called after every block.
        todo: split and number of the blocks to make; those that are missing by default.
    """

    def __init__(
        self,
        writer: Writer,
        encoder: Encoder,
        tokens: Mapping[str, Tokens],
        kept: Mapping[str, ndarray],
        progress: Callable[[Progress], None],
        todo: Sequence[tuple[str, int]] | None = None,
    ) -> None:
        self.writer, self.encoder, self.tokens, self.kept = writer, encoder, tokens, kept
        if todo is None:
            todo = [(name, block) for name in tokens for block in writer.missing(name)]
        self.todo = list(todo)
        self._progress = progress
        self._totals = np.zeros(2, dtype=np.int64)  # examples, tokens
        for split, block in self.todo:
            self._totals += self._counts(split, block)
        self._done = np.zeros(2, dtype=np.int64)
        self._blocks_written = self.written_bytes = 0
        self._free: queue.SimpleQueue[_Lane] = queue.SimpleQueue()
        self._turn: AbstractContextManager[Any] = (
            nullcontext() if encoder.device.type == "cpu" else threading.Lock()
        )

    def run(self) -> int:
        """Encodes and writes what is missing; returns how many blocks that was."""
        lanes = list(self._lanes())
        if not lanes:
            self.calibrate()
            return 0
        with (
            one_thread_each(self.encoder.device),
            ThreadPoolExecutor(len(lanes), thread_name_prefix="bank-block") as pool,
        ):
            made: dict[Future[int], tuple[str, int]] = {}
            try:
                self._equip(lanes)
                made |= {pool.submit(self._make, *block): block for block in self.todo}
                for future in as_completed(made):
                    split, block = made.pop(future)
                    self.note(split, [block], future.result())
            except BaseException as error:
                pool.shutdown(cancel_futures=True)
                if not isinstance(error, KeyboardInterrupt):
                    raise
                self._blocks_written += sum(map(_succeeded, made))
                raise self.stopped() from None
        return len(self.todo)

    def calibrate(self) -> None:
        """Makes the scale and shift of an int8 bank, before other processes write its blocks."""
        if self.writer.recipe.dtype == "int8":
            with one_thread_each(self.encoder.device):
                self._quantiser(self.encoder)

    def _quantiser(self, encoder: Encoder) -> Quantiser:
        return Quantiser(self.writer, encoder.device, partial(self._encode, encoder), self._kind)

    def stopped(self) -> StoppedError:
        """What to say when the user stopped it."""
        return StoppedError(
            f"stopped: {self._blocks_written} of {len(self.todo)} blocks were written and stay. "
            "Run the same command again to go on"
        )

    def note(self, split: str, blocks: Sequence[int], written_bytes: int) -> None:
        """Takes note of blocks that are written, here or by another process."""
        for block in blocks:
            self._done += self._counts(split, block)
        self._blocks_written += len(blocks)
        self.written_bytes += written_bytes
        self._report(split)

    def _lanes(self) -> Iterator[_Lane]:
        """One lane a thread of a CPU; a few lanes before another device, which has no threads of ours."""
        recipe, device = self.writer.recipe, self.encoder.device
        room = max((self.writer.plans[split].block_tokens for split, _ in self.todo), default=0)
        shape, dtype = (len(recipe.layers), room, recipe.encoder.width), TORCH_DTYPES[recipe.dtype]
        encoders = self.encoder.side_by_side(len(self.todo))
        if device.type != "cpu":
            encoders *= min(_ON_DEVICE, len(self.todo))
        for encoder in encoders[: len(self.todo)]:
            lane = _Lane(encoder=encoder, buffer=torch.zeros(shape, dtype=dtype, device=device))
            if device.type == "cuda":
                lane.copies = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
                lane.pinned = torch.zeros(shape, dtype=dtype, pin_memory=True)
            yield lane

    def _equip(self, lanes: Sequence[_Lane]) -> None:
        """Makes lanes ready; the first one calibrates an int8 bank."""
        for lane in lanes:
            if self.writer.recipe.dtype == "int8":
                # Lanes that take turns can do so with one.
                shared = None if self.encoder.device.type == "cpu" else lanes[0].quantiser
                lane.quantiser = shared or self._quantiser(lane.encoder)
            self._free.put(lane)

    def _make(self, split: str, block: int) -> int:
        """Computes and writes one block; returns the bytes written."""
        lane = self._free.get()
        try:
            with self._turn:
                found = self._fill(lane, split, block)
                # What has no stream to be copied on is copied before the next block is computed.
                states = lane.buffer.cpu() if lane.pinned is None else lane.pinned
                ready = self._event()
            if ready is not None:
                _copy(lane, ready)
            return self._write(lane, split, block, states, found)
        finally:
            self._free.put(lane)
            give_back()

    def _fill(self, lane: _Lane, split: str, block: int) -> Quantised | None:
        """Computes a block's states into a lane's buffer, as they will be stored."""
        found = None
        if lane.quantiser is None:
            self._encode(lane.encoder, split, block, lane.buffer)
        else:
            found = lane.quantiser.fill(split, block, lane.buffer)
        lane.buffer[:, int(self._counts(split, block)[1]) :] = 0
        return found

    def _event(self) -> Any:
        """The event after which what was computed is there; None on a device that needs none."""
        device = self.encoder.device
        return torch.cuda.current_stream(device).record_event() if device.type == "cuda" else None

    def _encode(self, encoder: Encoder, split: str, block: int, buffer: Tensor) -> None:
        plan = self.writer.plans[split]
        chosen = plan.examples(block)
        places = plan.start[chosen] - block * plan.block_tokens
        sequences, start = self.tokens[split].pieces_of(plan.row[chosen], places, self.kept[split])
        encoder.encode(
            self.tokens[split].pieces,
            sequences,
            kept=self.kept[split],
            layers=self.writer.recipe.layers,
            start=start,
            out=buffer,
            budget_tokens=self.writer.recipe.batch_tokens,
        )
        self.tokens[split].release()

    def _places(self, split: str, block: int) -> Int[ndarray, " token"]:
        """Where the kept tokens of a block are among all tokens."""
        plan, tokens = self.writer.plans[split], self.tokens[split]
        rows = plan.row[plan.examples(block)]
        at = ranges(tokens.start[rows], tokens.length[rows])
        return at[self.kept[split][at]]

    def _kind(self, split: str, block: int) -> UInt8[ndarray, " token"]:
        return np.asarray(self.tokens[split].kind[self._places(split, block)])

    def _write(self, lane: _Lane, split: str, block: int, states: Tensor, found: Quantised | None) -> int:
        plan, tokens, at = self.writer.plans[split], self.tokens[split], self._places(split, block)
        small = {}
        for name in TOKEN_ARRAYS:
            small[name] = np.full(plan.block_tokens, -1 if name == "word_id" else 0, dtype=np.int64)
            small[name][: len(at)] = getattr(tokens, name)[at]
        stored = to_numpy(states)[:, : plan.block_tokens]
        if found is None:
            return self.writer.write_block(split, block, stored, small)
        with torch.cuda.stream(lane.copies):
            clipped = found.check(self.writer, split, block)
        return self.writer.write_block(split, block, stored, small, clipped)

    def _counts(self, split: str, block: int) -> Int[ndarray, "2"]:
        """Examples and kept tokens of a block."""
        plan = self.writer.plans[split]
        chosen = plan.examples(block)
        return np.array([chosen.stop - chosen.start, int(plan.length[chosen].sum())])

    def _report(self, split: str) -> None:
        self._progress(
            Progress(
                split=split,
                examples=int(self._done[0]),
                tokens=int(self._done[1]),
                written_bytes=self.written_bytes,
                n_examples=int(self._totals[0]),
                n_tokens=int(self._totals[1]),
            )
        )


def _copy(lane: _Lane, ready: Any) -> None:
    """Copies a lane's buffer to host memory on a stream of its own, while the device goes on."""
    assert lane.pinned is not None
    with torch.cuda.stream(lane.copies):
        lane.copies.wait_event(ready)
        lane.pinned.copy_(lane.buffer, non_blocking=True)
    lane.copies.synchronize()


def _succeeded(future: Future[int]) -> bool:
    return future.done() and not future.cancelled() and future.exception() is None
