"""What a bank will take on disk for each choice of what is kept, and what fits."""

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Int
from numpy import ndarray

from cache import Recipe
from cache.codecs import DTYPES
from cache.layout import ALIKE, Keep
from cache.place import place
from cache.plan import deal
from cache.size import STATE_BYTES, bank_bytes
from cache.store import local_path
from pipeline.errors import PipelineError
from pipeline.units import size

NARROWER: Mapping[Keep, tuple[Keep, ...]] = {
    "all": ("all", "words", "first"),
    "words": ("words", "first"),
    "first": ("first",),
    "masked": ("masked",),
}
"""The choices of tokens that are part of each choice. None can stand for masked text."""

_FULL = 0.95
"""Share of a disk's free bytes that a bank may take: the file system itself needs some."""


@runtime_checkable
class HasLengths(Protocol):
    """The rows of a split: tokens, or what is taken of a bank."""

    def lengths(self, keep: Keep) -> Int[ndarray, "keep row"]:
        """Tokens of each row in each of the banks that are dealt as one of that `keep` is."""


Lengths = Mapping[Keep, Mapping[str, ndarray]]
"""For each choice of tokens, what a bank of each split is dealt by, see `Tokens.lengths`."""


def lengths_of(parts: Mapping[str, HasLengths], keeps: Sequence[Keep]) -> Lengths:
    """The lengths that choices of tokens give the rows of each split."""
    return {keep: {name: part.lengths(keep) for name, part in parts.items()} for keep in keeps}


def byte_table(recipe: Recipe, lengths: Lengths, beside_bytes: int = 0) -> dict[str, dict[str, int]]:
    """Bytes of the bank for each choice of tokens and of data type; the layers are the recipe's.

    Args:
        recipe: of one of them.
        lengths: of each choice of tokens.
        beside_bytes: what it holds beside states and rows, such as targets.
    """
    table: dict[str, dict[str, int]] = {}
    for keep, splits in lengths.items():
        kept = ALIKE[keep].index(keep)
        plans = {
            name: deal(rows, block_tokens=recipe.block_tokens, seed=recipe.seed, kept=kept)
            for name, rows in splits.items()
        }
        table[keep] = {
            dtype: bank_bytes(replace(recipe, keep=keep, dtype=dtype), plans) + beside_bytes
            for dtype in STATE_BYTES
        }
    return table


def free_bytes(store: str) -> int | None:
    """Free bytes where a bank would lie; None for a URL."""
    local = local_path(store)
    if local is None:
        return None
    path = local.absolute()
    while not path.exists():
        path = path.parent
    return shutil.disk_usage(path).free


def written_bytes(store: str) -> int:
    """Bytes of a bank that are on the disk already."""
    return sum(place(store).sizes().values())


def recommend(
    table: Mapping[str, Mapping[str, int]], free: int | None, keep: Keep = "all", dtype: str = "float16"
) -> dict[str, Any] | None:
    """The choice that keeps most and fits: the one asked for, else a shorter type, else fewer tokens.

    Returns:
        `keep`, `dtype`, `bytes` and the reason `why`; None where not even the least fits.
    """
    shorter = [d for d in ("float16", "int8") if d in DTYPES and STATE_BYTES[d] < STATE_BYTES[dtype]]
    for tokens in NARROWER[keep]:
        for kind in (dtype, *shorter):
            n_bytes = table[tokens][kind]
            if free is None or n_bytes <= _FULL * free:
                room = "a store whose room is not known" if free is None else f"{size(free)} free"
                why = f"{size(n_bytes)} for {room}"
                if (tokens, kind) != (keep, dtype):
                    why += f"; {keep}, {dtype} takes {size(table[keep][dtype])}"
                return {"keep": tokens, "dtype": kind, "bytes": n_bytes, "why": why}
    return None


def check_room(store: str, recipe: Recipe, parts: Mapping[str, HasLengths], beside_bytes: int = 0) -> None:
    """Refuses a bank that the disk has no room for. What is written of it already is counted.

    Args:
        store: folder or URL of the bank; that of a URL is not known.
        recipe: what it is made with.
        parts: the rows of each split.
        beside_bytes: what it holds beside states and rows.

    Raises:
        PipelineError: it cannot fit; says what would.
    """
    free = free_bytes(store)
    if free is None or recipe.codec != "none":  # nobody knows beforehand how far states compress
        return
    asked = lengths_of(parts, [recipe.keep])
    wanted = byte_table(recipe, asked, beside_bytes)[recipe.keep][recipe.dtype]
    if wanted - written_bytes(store) <= free:
        return
    table = byte_table(recipe, lengths_of(parts, NARROWER[recipe.keep]), beside_bytes)
    best = recommend(table, free, recipe.keep, recipe.dtype)
    cure = "fewer --layers or a larger disk"
    if best:
        cure = f"--keep {best['keep']} --dtype {best['dtype']} takes {size(best['bytes'])}"
    raise PipelineError(
        f"{store}: the bank takes {size(wanted)}, {size(free)} are free there: {cure}, or start "
        "anyhow with --force"
    )


def resampled(lengths: ndarray, n_rows: int) -> ndarray:
    """Lengths of as many rows as there are, drawn from a sample's."""
    if lengths.shape[1] == n_rows:
        return lengths
    return lengths[:, np.random.default_rng(0).choice(lengths.shape[1], n_rows)]
