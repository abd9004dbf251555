"""The chunks of a split's states as they are stored: opened, checked, and the last ones kept.

An uncompressed chunk on a local disk is a raw C-order file, so it is mapped and nothing is copied; its
CRC-32C is checked when it is first touched. Every other chunk goes through Zarr, which checks it too.
"""

from collections.abc import Callable
from functools import lru_cache
from typing import Any
from weakref import WeakMethod

import numpy as np
import zarr
from jaxtyping import Shaped
from numpy import ndarray

from cache import codecs, store
from cache.errors import CacheError, CorruptChunk
from cache.layout import STATES, Recipe
from cache.place import Place

_DECODED_BYTES = 512 * 2**20
"""Memory for the chunks of a split that cannot be mapped and so are kept decoded."""


Chunks = Callable[[int, int], Shaped[ndarray, "token width"]]


def cached_chunks(open_chunk: Chunks, kept: int) -> Chunks:
    """A method that opens chunks, as a function that keeps the last ones.

    It does not hold the method's object: they would hold each other, and the chunks stay in memory until
    the garbage collector comes round, which takes no note of what arrays weigh.
    """
    method = WeakMethod(open_chunk)

    @lru_cache(kept)
    def chunk(index: int, block: int) -> Shaped[ndarray, "token width"]:
        alive = method()
        assert alive is not None
        return alive(index, block)

    return chunk


class StoredChunks:
    """Opens the chunks of one split's states.

    Args:
        split: its name.
        group: its Zarr group.
        recipe: of the bank.
        place: where the bank lies.
        block_tokens: the room of a block.
    """

    def __init__(
        self, split: str, group: zarr.Group, recipe: Recipe, place: Place, block_tokens: int
    ) -> None:
        self._split, self._group, self._layers, self._place = split, group, recipe.layers, place
        self._shape, self._dtype = (block_tokens, recipe.encoder.width), codecs.numpy_dtype(recipe.dtype)
        self._plain = recipe.codec == "none"
        self.maps = self._plain and place.maps
        """Whether a chunk is mapped: opening it again costs next to nothing."""
        self._checked: set[tuple[int, int]] = set()

    @property
    def kept(self) -> int:
        """How many chunks a reader may keep."""
        if self.maps:
            return store.mappable_files()
        return max(len(self._layers), _DECODED_BYTES // self._n_bytes)

    @property
    def _n_bytes(self) -> int:
        return self._shape[0] * self._shape[1] * self._dtype.itemsize

    def open(self, index: int, block: int, *, again: bool = False) -> Shaped[ndarray, "token width"]:
        """One chunk; a mapped one is checked once.

        Args:
            index: place of its layer among those of the bank.
            block: its block.
            again: check it again.

        Raises:
            CorruptChunk: it is damaged.
            CacheError: it cannot be read.
        """
        if not self._plain:
            return self._decoded(index, block)
        key = store.chunk_key(self._split, STATES, index, block, 0)
        try:
            whole = self._place.fetch(key)
        except (FileNotFoundError, ValueError) as error:
            raise self._corrupt(index, block, store.one_line(error)) from error
        except OSError as error:
            raise CacheError(f"cannot read {self._place.name}/{key}: {store.one_line(error)}") from error
        if len(whole) != self._n_bytes + store.CRC_BYTES:
            raise self._corrupt(index, block, f"{len(whole)} bytes of {self._n_bytes + store.CRC_BYTES}")
        if again:
            self._checked.discard((index, block))
        if not self.maps or (index, block) not in self._checked:
            if not store.checksum_fits(whole):
                raise self._corrupt(index, block, "its CRC-32C does not fit")
            self._checked.add((index, block))
        return whole[: self._n_bytes].view(self._dtype).reshape(self._shape)

    def read(self, name: str, selection: Any, *index: int) -> ndarray:
        """A selection of an array of the split that lies in one chunk, through Zarr.

        Args:
            name: of the array.
            selection: as Zarr takes it.
            index: of the chunk, which must be there: Zarr reads an absent one as zeros.

        Raises:
            UNREADABLE: of `cache.store`: it is damaged or not there.
        """
        if not store.chunk_is_there(self._group, name, *index):
            raise FileNotFoundError("it is not there")
        return np.asarray(self._group[name][selection])

    def _decoded(self, index: int, block: int) -> Shaped[ndarray, "token width"]:
        room = self._shape[0]
        try:
            tokens = slice(block * room, (block + 1) * room)
            return self.read(STATES, (index, tokens), index, block, 0)
        except store.UNREADABLE as error:
            raise self._corrupt(index, block, store.one_line(error)) from error

    def _corrupt(self, index: int, block: int, reason: str) -> CorruptChunk:
        return store.corrupt(self._split, STATES, block, reason, layer=self._layers[index])
