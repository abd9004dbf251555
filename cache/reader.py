"""Reads a bank: by blocks in sequence, by any tokens, or as one numpy or Dask array.

`Split.numpy` and `Split.dask` give numbers. `Split.take`, `gather`, `blocks` and `chunk` give states as
they are stored: of an int8 bank whole numbers, which `Split.to_float` turns into float32. How a chunk is
opened and checked stands in `cache.chunks`.
"""

from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import cached_property, partial
from itertools import islice
from typing import Any

import numpy as np
import zarr
from jaxtyping import Bool, Float32, Int, Shaped, UInt8, UInt64
from numpy import ndarray

from cache import calibration, codecs, extras, store, targets
from cache.chunks import StoredChunks, cached_chunks
from cache.errors import REPAIR, CacheError, CorruptChunk, StoreRefused, StoreUnreachable
from cache.layout import CLIPPED, FULL_LENGTH, GENERATIONS, SCALE, SHIFT, Recipe
from cache.place import Place, place


class Split:
    """One split of a bank, read only. Made by `Bank.split`."""

    def __init__(self, name: str, group: zarr.Group, recipe: Recipe, path: str) -> None:
        self.name = name
        self.group = group
        self.recipe = recipe
        self.layers: tuple[int, ...] = recipe.layers
        self.keep: str = recipe.keep
        self.width = recipe.encoder.width
        self.dtype = codecs.numpy_dtype(recipe.dtype)
        self.block_tokens = int(group.attrs["block_tokens"])
        self.n_blocks = int(group.attrs["n_blocks"])
        self.n_examples = int(group.attrs["n_examples"])
        self.n_tokens = int(group.attrs["n_tokens"])
        self._place: Place = place(path)
        self._stored = StoredChunks(name, group, recipe, self._place, self.block_tokens)
        self._maps = self._stored.maps
        self._chunks = cached_chunks(self._open_chunk, self._stored.kept)

    def __reduce__(self) -> tuple[Any, ...]:
        """A copy in another process opens the files itself."""
        return Split, (self.name, self.group, self.recipe, self._place.name)

    @cached_property
    def generations(self) -> list[dict[str, int]]:
        """Examples and blocks of the first deal and of each growth since."""
        whole = {"examples": self.n_examples, "blocks": self.n_blocks}
        return list(self.group.attrs.get(GENERATIONS) or [whole])

    @cached_property
    def sequence(self) -> Int[ndarray, " block"]:
        """The blocks in the order in which reading them is a random sample of the rows.

        Each generation's blocks are a random sample of its own rows, so they are spread evenly.
        """
        counts = [part["blocks"] for part in self.generations]
        place = [(np.arange(count) + 0.5) / max(1, count) for count in counts]
        return np.argsort(np.concatenate(place), kind="stable").astype(np.int64)

    @cached_property
    def start(self) -> Int[ndarray, " example"]:
        """First token of each example, on the token axis that includes fill."""
        return self._example_array("start")

    @cached_property
    def length(self) -> Int[ndarray, " example"]:
        """Number of kept tokens of each example."""
        return self._example_array("length")

    @cached_property
    def full_length(self) -> Int[ndarray, " example"]:
        """Number of tokens of each example, kept or not; banks of `first` and `masked` do not know it.

        Raises:
            CacheError: it is damaged; or the bank is from before banks of `words` had it.
        """
        if self.keep == "all":
            return self.length
        if not self._place.sizes(f"{self.name}/{FULL_LENGTH}"):
            raise CacheError(
                f"{self._place.name} was made by an earlier version, without {FULL_LENGTH}: extract it "
                "again, into another --store"
            )
        return self._example_array(FULL_LENGTH)

    @cached_property
    def n_words(self) -> Int[ndarray, " example"]:
        """Number of words of each example in the source, those cut off included."""
        return self._example_array("n_words")

    @cached_property
    def row(self) -> Int[ndarray, " example"]:
        """Row of each example in the source."""
        return self._example_array("row")

    @cached_property
    def text_hash(self) -> UInt64[ndarray, " example"]:
        """Hash of each example's text, see `cache.fingerprint.hash_texts`."""
        return self._example_array("text_hash")

    @cached_property
    def input_ids(self) -> Int[ndarray, " token"]:
        """Token ids on the token axis, 0 in fill."""
        return self._token_array("input_ids")

    @cached_property
    def word_id(self) -> Int[ndarray, " token"]:
        """Word of each token within its example, -1 for special tokens and fill."""
        return self._token_array("word_id")

    @cached_property
    def kind(self) -> UInt8[ndarray, " token"]:
        """What each token is, see `cache.layout.Kind`."""
        return self._token_array("kind")

    @cached_property
    def scale(self) -> Float32[ndarray, "group layer width"] | None:
        """Of an int8 bank: what a stored number is multiplied by, for each layer kept and channel.

        Tokens that are not `first_tokens` come first, those that are second.
        """
        return self._channels(SCALE) if self.recipe.dtype == "int8" else None

    @cached_property
    def shift(self) -> Float32[ndarray, "group layer width"] | None:
        """Of an int8 bank: what is added after that."""
        return self._channels(SHIFT) if self.recipe.dtype == "int8" else None

    @cached_property
    def first_tokens(self) -> Bool[ndarray, " token"]:
        """Which tokens have the scale and shift of first tokens."""
        return calibration.first_tokens(self.keep, self.kind, self.start[self.length > 0])

    @property
    def clipped_frac(self) -> float | None:
        """Of an int8 bank: the share of states that were out of range, in the blocks that are there."""
        if self.recipe.dtype != "int8":
            return None
        try:
            counts = np.asarray(self.group[CLIPPED][:])
        except store.UNREADABLE as error:
            reason = f"{self.name}/{CLIPPED} is damaged ({store.one_line(error)})"
            raise CacheError(f"{reason}: {REPAIR}") from error
        return float(np.sum(counts)) / max(1, self.n_tokens * self.width * len(self.layers))

    def to_float(
        self,
        states: Shaped[ndarray, "layer token width"],
        tokens: Int[ndarray, " token"],
        layers: Sequence[int] | None = None,
    ) -> Shaped[ndarray, "layer token width"]:
        """Stored states as numbers: float32 for an int8 bank, as they are for any other.

        Args:
            states: as `take` and `gather` give them.
            tokens: their positions on the token axis.
            layers: numbers of the layers they are of, all by default.
        """
        if self.scale is None or self.shift is None:
            return states
        indices = self.layer_indices(layers)
        scale, shift = self.scale[:, indices], self.shift[:, indices]
        return calibration.dequantise(states, scale, shift, self.first_tokens[tokens])

    def take(
        self, tokens: Int[ndarray, " token"], layers: Sequence[int] | None = None
    ) -> Shaped[ndarray, "layer token width"]:
        """Copies the states of some tokens, as they are stored.

        Args:
            tokens: positions on the token axis; ascending ones are read fastest.
            layers: numbers of kept layers, all by default.

        Raises:
            CorruptChunk: a chunk is damaged.
            CacheError: a layer is not kept.
        """
        indices = self.layer_indices(layers)
        out = np.empty((len(indices), len(tokens), self.width), self.dtype)
        block = tokens // self.block_tokens
        cuts = np.flatnonzero(np.diff(block)) + 1
        runs = np.split(np.arange(len(tokens)), cuts) if len(tokens) else []
        numbers = [int(block[run[0]]) for run in runs]
        for run, (number, states) in zip(runs, self._blocks_by_number(numbers, indices), strict=True):
            here = slice(int(run[0]), int(run[-1]) + 1)
            inside = tokens[here] - number * self.block_tokens
            for k, chunk in enumerate(states):
                np.take(chunk, inside, axis=0, out=out[k, here], mode="clip")
        return out

    def gather(
        self, examples: Sequence[int] | Int[ndarray, " chosen"], layers: Sequence[int] | None = None
    ) -> tuple[Shaped[ndarray, "layer token width"], Int[ndarray, " chosen"]]:
        """Copies the states of any examples, as they are stored, one after the other; and their lengths.

        Raises:
            CorruptChunk: a chunk is damaged.
            CacheError: a layer is not kept, or a store does not answer.
        """
        chosen = np.asarray(examples, dtype=np.int64)
        lengths = self.length[chosen]
        indices = self.layer_indices(layers)
        out = np.empty((len(indices), int(lengths.sum()), self.width), self.dtype)
        for first, end, at in _runs(self.start[chosen], lengths, self.block_tokens):
            block, inside = divmod(first, self.block_tokens)
            here, there = slice(at, at + end - first), slice(inside, inside + end - first)
            for k, index in enumerate(indices):
                # Twice as fast as `take` on a few dozen tokens.
                out[k, here] = self.chunk(index, block)[there]
        return out, lengths

    def blocks(
        self,
        layers: Sequence[int] | None = None,
        *,
        order: Sequence[int] | None = None,
        ahead: int = 2,
    ) -> Iterator[tuple[int, list[Shaped[ndarray, "token width"]]]]:
        """Streams the split: each block's number and its layers, mapped where that is possible.

        Args:
            layers: numbers of kept layers, all by default.
            order: the blocks; by default all in `sequence`, which is a random order of the rows.
            ahead: blocks fetched ahead of the one in use, where they are not mapped. No more than
                ``ahead + 1`` blocks are in memory beside those the caller still holds.

        Yields:
            The block's number, and its layers as they are stored, fill included.
        """
        indices = self.layer_indices(layers)
        numbers = iter(self.sequence.tolist() if order is None else order)
        if self._maps or ahead < 1:
            for block in numbers:
                yield block, self._block(block, indices)
            return
        waiting: deque[tuple[int, Future[list[ndarray]]]] = deque()
        pool = ThreadPoolExecutor(ahead, thread_name_prefix="bank-ahead")
        try:
            waiting.extend((b, pool.submit(self._block, b, indices)) for b in islice(numbers, ahead))
            while waiting:
                block, coming = waiting.popleft()
                states = coming.result()
                del coming
                waiting.extend((b, pool.submit(self._block, b, indices)) for b in islice(numbers, 1))
                yield block, states
                del states
        finally:
            pool.shutdown(cancel_futures=True)

    def read_block(
        self, block: int, layers: Sequence[int] | None = None
    ) -> list[Shaped[ndarray, "token width"]]:
        """One block's layers, fill included: mapped, or else fetched all at a time; none of them kept.

        May be called from several threads.

        Raises:
            CorruptChunk: a chunk is damaged.
            CacheError: a layer is not kept, or the store does not answer.
        """
        return self._place.each(partial(self._open_chunk, block=block), self.layer_indices(layers))

    def numpy(self, layers: Sequence[int] | None = None) -> Shaped[ndarray, "layer token width"]:
        """Copies the whole split, fill included, so that `start` and `length` index it.

        States of an int8 bank come as float32.
        """
        indices = self.layer_indices(layers)
        shape = (len(indices), self.n_blocks * self.block_tokens, self.width)
        out = np.empty(shape, self._float_dtype)
        for block in range(self.n_blocks):
            here = slice(block * self.block_tokens, (block + 1) * self.block_tokens)
            # Not kept mapped or decoded: all of it is in `out` now.
            for k, chunk in enumerate(self.read_block(block, layers)):
                self._floats(indices[k], block, chunk, out[k, here])
        return out

    def dask(self, layers: Sequence[int] | None = None) -> Any:
        """The whole split as a lazy `dask.array` in ``layer token width``, one chunk a stored chunk.

        States of an int8 bank come as float32.
        """
        import dask.array

        if not self.n_blocks:
            return dask.array.from_array(self.numpy(layers))
        whole = dask.array.map_blocks(
            _dask_chunk,
            chunks=((1,) * len(self.layers), (self.block_tokens,) * self.n_blocks, (self.width,)),
            dtype=self._float_dtype,
            split=self,
        )
        return whole[self.layer_indices(layers)]

    def chunk(self, index: int, block: int) -> Shaped[ndarray, "token width"]:
        """One chunk as it is stored; the last ones are kept.

        Raises:
            CorruptChunk: it is damaged.
        """
        return self._chunks(index, block)

    def float_chunk(self, index: int, block: int) -> Shaped[ndarray, "token width"]:
        """One chunk as numbers."""
        chunk = self.chunk(index, block)
        return (
            chunk
            if self.scale is None
            else self._floats(index, block, chunk, np.empty(chunk.shape, np.float32))
        )

    @property
    def _float_dtype(self) -> np.dtype[Any]:
        return np.dtype(np.float32) if self.recipe.dtype == "int8" else self.dtype

    def _floats(
        self,
        index: int,
        block: int,
        chunk: Shaped[ndarray, "token width"],
        out: Shaped[ndarray, "token width"],
    ) -> Shaped[ndarray, "token width"]:
        if self.scale is None or self.shift is None:
            out[:] = chunk
            return out
        first = self.first_tokens[block * self.block_tokens : (block + 1) * self.block_tokens]
        return calibration.dequantise(chunk, self.scale[:, index], self.shift[:, index], first, out)

    def layer_indices(self, layers: Sequence[int] | None) -> list[int]:
        """Positions of layer numbers on the bank's layer axis.

        Raises:
            CacheError: a layer is not kept.
        """
        wanted = self.layers if layers is None else tuple(layers)
        lacking = [layer for layer in wanted if layer not in self.layers]
        if lacking:
            raise CacheError(
                f"layer {lacking[0]} is not in the bank, which keeps layers "
                f"{', '.join(map(str, self.layers))}: extract with --layers all"
            )
        return [self.layers.index(layer) for layer in wanted]

    def target_names(self) -> dict[str, dict[str, Any]]:
        """The targets of this split, each with its kind and number of classes."""
        return targets.target_names(self.group)

    def target(self, name: str) -> targets.Target:
        """A target in the order of the examples.

        Raises:
            CacheError: there is no such target, or it is damaged.
        """
        known = self.target_names()
        if name not in known:
            have = ", ".join(known) or "none"
            raise CacheError(
                f"split {self.name} has no target {name!r}, it has: {have}. "
                "Add it with 'layerbank label STORE DATA --target " + name + "'"
            )
        return targets.read_target(self.group, name)

    def target_extra(self, name: str) -> dict[str, ndarray]:
        """What a target keeps beside its labels, in the order of the examples.

        Raises:
            CacheError: it is damaged.
        """
        return extras.read(self.group, name)

    def damaged_states(self, block: int) -> list[CacheError]:
        """The layers of a block that do not read back."""

        def check(index: int) -> CacheError | None:
            try:
                self._stored.open(index, block, again=True)
            except (StoreRefused, StoreUnreachable):
                raise
            except CacheError as error:
                return error
            return None

        return [error for error in self._place.each(check, range(len(self.layers))) if error]

    def damaged_tokens(self, name: str) -> list[CorruptChunk]:
        """The blocks of a token array that do not read back."""
        found = []
        for block in range(self.n_blocks):
            try:
                self._stored.read(
                    name, slice(block * self.block_tokens, (block + 1) * self.block_tokens), block
                )
            except store.UNREADABLE as error:
                found.append(store.corrupt(self.name, name, block, store.one_line(error)))
        return found

    def damaged_counts(self) -> list[str]:
        """The blocks of an int8 bank whose counts of clipped states do not read back."""
        found = []
        for block in range(self.n_blocks if self.recipe.dtype == "int8" else 0):
            try:
                self._stored.read(CLIPPED, block, block, 0)
            except store.UNREADABLE as error:
                found.append(str(store.corrupt(self.name, CLIPPED, block, store.one_line(error))))
        return found

    def _block(self, block: int, indices: Sequence[int]) -> list[Shaped[ndarray, "token width"]]:
        if self._maps:
            return [self.chunk(index, block) for index in indices]
        return self._place.each(partial(self._open_chunk, block=block), indices)

    def _blocks_by_number(
        self, numbers: list[int], indices: list[int]
    ) -> Iterator[tuple[int, list[Shaped[ndarray, "token width"]]]]:
        """Blocks read ahead where each is asked for once, else kept for the next time."""
        if len(set(numbers)) == len(numbers):
            yield from self.blocks([self.layers[index] for index in indices], order=numbers)
        else:
            for number in numbers:
                yield number, [self.chunk(index, number) for index in indices]

    def _open_chunk(self, index: int, block: int) -> Shaped[ndarray, "token width"]:
        return self._stored.open(index, block)

    def _example_array(self, name: str) -> ndarray:
        try:
            return store.read_whole(self.group[name])
        except store.UNREADABLE as error:
            raise CacheError(
                f"{self.name}/{name} is damaged ({store.one_line(error)}): {REPAIR}"
            ) from error

    def _channels(self, name: str) -> ndarray:
        found = self._example_array(name)
        calibration.check_groups(f"{self.name}/{name}", found.ndim)
        return found

    def _token_array(self, name: str) -> ndarray:
        try:
            return store.read_whole(self.group[name])
        except store.UNREADABLE as error:
            for damaged in self.damaged_tokens(name):
                raise damaged from error
            raise CacheError(f"cannot read {self.name}/{name}: {store.one_line(error)}") from error


def _runs(
    start: Int[ndarray, " chosen"], length: Int[ndarray, " chosen"], block_tokens: int
) -> list[tuple[int, int, int]]:
    """First token, end and place in the output of each run of examples that lie one after the other."""
    some = length > 0
    start, length = start[some], length[some].astype(np.int64)
    ends, at = start + length, np.cumsum(length) - length
    begins = np.ones(len(start), dtype=bool)
    begins[1:] = (start[1:] != ends[:-1]) | (start[1:] % block_tokens == 0)
    finishes = np.append(begins[1:], True)[: len(begins)]
    return list(zip(start[begins].tolist(), ends[finishes].tolist(), at[begins].tolist(), strict=True))


def _dask_chunk(*, split: Split, block_info: Mapping[Any, Any]) -> Shaped[ndarray, "1 token width"]:
    index, block, _ = block_info[None]["chunk-location"]
    return split.float_chunk(index, block)[None]
