"""The blocks of a bank in the making: while one is computed, the ones before it are written.

What is written stays: a run that ends early is continued by the same command.
"""

import queue
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
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
from pipeline.encoder import Encoder
from pipeline.errors import PipelineError
from pipeline.quantise import Quantised, Quantiser
from pipeline.tokens import Tokens

_BUFFERS = 3
"""One block being computed, one being written, one in reserve."""


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


class Stage:
    """Computes the missing blocks and writes each behind the next one's computation.

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
        self._pending: list[Future[int]] = []
        self._free: queue.Queue[Tensor] = queue.Queue()

    def run(self) -> int:
        """Encodes and writes what is missing; returns how many blocks that was."""
        self._make_buffers()
        int8 = self.writer.recipe.dtype == "int8"
        self._int8 = self._quantiser() if int8 else None
        with ThreadPoolExecutor(1, thread_name_prefix="bank-writer") as pool:
            try:
                for split, block in self.todo:
                    self._collect(wait=False)
                    buffer = self._free.get()
                    found = self._fill(split, block, buffer)
                    ready = self._event()
                    self._pending.append(pool.submit(self._write, split, block, buffer, found, ready))
                    self._report(split)
                self._collect(wait=True)
            except KeyboardInterrupt:
                self._collect(wait=True)
                raise self.stopped() from None
        return len(self.todo)

    def calibrate(self) -> None:
        """Makes the scale and shift of an int8 bank, before other processes write its blocks."""
        if self.writer.recipe.dtype == "int8":
            self._quantiser()

    def _quantiser(self) -> Quantiser:
        return Quantiser(self.writer, self.encoder.device, self._encode, self._kind)

    def stopped(self) -> StoppedError:
        """What to say when the user stopped it."""
        return StoppedError(
            f"stopped: {self._blocks_written} of {len(self.todo)} blocks were written and stay. "
            "Run the same command again to go on"
        )

    def note(self, split: str, blocks: Sequence[int], written_bytes: int) -> None:
        """Takes note of blocks that another process wrote."""
        for block in blocks:
            self._done += self._counts(split, block)
        self._blocks_written += len(blocks)
        self.written_bytes += written_bytes
        self._report(split)

    def _make_buffers(self) -> None:
        recipe, device = self.writer.recipe, self.encoder.device
        room = max((self.writer.plans[split].block_tokens for split, _ in self.todo), default=0)
        shape = (len(recipe.layers), room, recipe.encoder.width)
        for _ in range(min(_BUFFERS, len(self.todo))):
            self._free.put(torch.zeros(shape, dtype=TORCH_DTYPES[recipe.dtype], device=device))
        if device.type == "cuda":
            self._copies = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
            self._pinned = torch.zeros(shape, dtype=TORCH_DTYPES[recipe.dtype], pin_memory=True)

    def _fill(self, split: str, block: int, buffer: Tensor) -> Quantised | None:
        """Computes a block's states into a buffer, as they will be stored."""
        counts, found = self._counts(split, block), None
        if self._int8 is None:
            self._encode(split, block, buffer)
        else:
            found = self._int8.fill(split, block, buffer)
        buffer[:, int(counts[1]) :] = 0
        self._done += counts
        return found

    def _event(self) -> Any:
        """The event after which what was computed is there; None on a device that needs none."""
        device = self.encoder.device
        return torch.cuda.current_stream(device).record_event() if device.type == "cuda" else None

    def _encode(self, split: str, block: int, buffer: Tensor) -> None:
        plan = self.writer.plans[split]
        chosen = plan.examples(block)
        places = plan.start[chosen] - block * plan.block_tokens
        sequences, start = self.tokens[split].pieces_of(plan.row[chosen], places, self.kept[split])
        self.encoder.encode(
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

    def _write(self, split: str, block: int, buffer: Tensor, found: Quantised | None, ready: Any) -> int:
        try:
            plan, tokens, at = self.writer.plans[split], self.tokens[split], self._places(split, block)
            small = {}
            for name in TOKEN_ARRAYS:
                small[name] = np.full(plan.block_tokens, -1 if name == "word_id" else 0, dtype=np.int64)
                small[name][: len(at)] = getattr(tokens, name)[at]
            states = to_numpy(self._on_host(buffer, ready))[:, : plan.block_tokens]
            if found is None:
                return self.writer.write_block(split, block, states, small)
            with torch.cuda.stream(None if ready is None else self._copies):
                clipped = found.check(self.writer, split, block)
            return self.writer.write_block(split, block, states, small, clipped)
        finally:
            self._free.put(buffer)

    def _on_host(self, buffer: Tensor, ready: Any) -> Tensor:
        """The buffer in host memory, copied on a stream of its own while the device goes on."""
        if ready is None:
            return buffer.cpu()
        with torch.cuda.stream(self._copies):
            self._copies.wait_event(ready)
            self._pinned.copy_(buffer, non_blocking=True)
        self._copies.synchronize()
        return self._pinned

    def _counts(self, split: str, block: int) -> Int[ndarray, "2"]:
        """Examples and kept tokens of a block."""
        plan = self.writer.plans[split]
        chosen = plan.examples(block)
        return np.array([chosen.stop - chosen.start, int(plan.length[chosen].sum())])

    def _collect(self, *, wait: bool) -> None:
        """Takes note of blocks that are written; raises what their writing raised."""
        while self._pending and (wait or self._pending[0].done()):
            self.written_bytes += self._pending.pop(0).result()
            self._blocks_written += 1

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
