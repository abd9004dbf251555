"""The scale and shift of an int8 bank: what they are made of, and how they lie beside the states.

A state x of a channel is stored as the whole number q from -127 to 127 nearest to (x - shift) / scale.
First tokens are a group with a scale and a shift of their own: in the lower layers they hardly differ from
one another, and a scale with room for all tokens leaves nothing of what tells them apart.

Scale and shift are calibrated once, before any block is written; root attribute ``calibration`` is their
digest and is set when every split has them. Blocks are never written under others.
"""

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import zarr
from jaxtyping import Bool, Float, Float32, Int, Int8, UInt8
from numpy import ndarray

from cache import codecs, store
from cache.errors import CacheError
from cache.layout import CALIBRATION, CLIPPED, SCALE, SHIFT, Kind, Recipe
from cache.plan import Plan

LEVELS = 127
"""Largest whole number; -128 is left out, so that the range lies evenly around the shift."""

GROUPS = 2
"""All tokens but the first; first tokens."""

ENOUGH = 8
"""Tokens that make a range of their own; where a group has fewer, it gets the range of all tokens."""

_MARGIN = 10.0
"""Added to a range seen, as a share of it over the root of the number of tokens that were seen: the fewer
they were, the further others go beyond it."""

_FLOOR_FRAC, _OWN_FLOOR_FRAC = 0.01, 1e-4
"""Least half range of a channel, in largest states of the layer's median channel and of its own."""


@dataclass(frozen=True, kw_only=True)
class Calibration:
    """Scale and shift of every channel of the layers kept, for each group of tokens."""

    scale: Float32[ndarray, "group layer width"]
    shift: Float32[ndarray, "group layer width"]

    @property
    def digest(self) -> str:
        """SHA-256 of both."""
        parts = [np.ascontiguousarray(part, "<f4").tobytes() for part in (self.scale, self.shift)]
        return hashlib.sha256(b"".join(parts)).hexdigest()


def first_tokens(
    keep: str, kind: UInt8[ndarray, " token"], start: Int[ndarray, " example"]
) -> Bool[ndarray, " token"]:
    """Which tokens are the first of an example, or of one option of a multiple choice.

    Args:
        keep: of the bank; one of masked text has predicted positions only.
        kind: of the tokens.
        start: the first token of each example that has any, among them.
    """
    first = kind == Kind.OPTION
    if keep != "masked":
        first[start] = True
    return first


def from_ranges(
    lowest: Float[ndarray, "group layer width"],
    highest: Float[ndarray, "group layer width"],
    n_tokens: Int[ndarray, " group"],
) -> Calibration:
    """The calibration for states that lay between these, in so many tokens of each group.

    A channel that hardly moves gets a range of its own too: what the order of a sum changes in its last
    bits is not to count as out of range.
    """
    lowest, highest = lowest.astype(np.float64), highest.astype(np.float64)
    largest = np.maximum(np.abs(lowest), np.abs(highest))
    floor = np.maximum(_FLOOR_FRAC * np.median(largest, axis=-1, keepdims=True), _OWN_FLOOR_FRAC * largest)
    margin = 1 + _MARGIN / np.sqrt(np.maximum(n_tokens, 1))
    half = np.maximum(margin[:, None, None] * (highest - lowest) / 2, floor)
    scale = np.maximum(half / LEVELS, np.finfo(np.float32).tiny)
    return Calibration(scale=scale.astype(np.float32), shift=((lowest + highest) / 2).astype(np.float32))


def calibration_split(plans: Mapping[str, Plan]) -> str | None:
    """The split whose first block calibrates the bank: train, else dev, else the first by name.

    None where no split has a token.
    """
    usual = {"train": 0, "dev": 1}
    filled = [name for name, plan in plans.items() if plan.length.sum()]
    return min(filled, key=lambda name: (usual.get(name, 2), name), default=None)


def dequantise(
    states: Int8[ndarray, "*axes token width"],
    scale: Float32[ndarray, "group *rows width"],
    shift: Float32[ndarray, "group *rows width"],
    first: Bool[ndarray, " token"],
    out: Float32[ndarray, "*axes token width"] | None = None,
) -> Float32[ndarray, "*axes token width"]:
    """Stored states as numbers: q · scale + shift of the channel, those of the token's group."""
    floats = np.multiply(states, scale[0][..., None, :], out=out, dtype=np.float32)
    np.add(floats, shift[0][..., None, :], out=floats)
    own = states[..., first, :] * scale[1][..., None, :]
    floats[..., first, :] = own + shift[1][..., None, :]
    return floats


def check_groups(name: str, ndim: int) -> None:
    """Refuses a scale or shift of before there were groups of tokens.

    Raises:
        CacheError: it is such.
    """
    if ndim != 3:
        raise CacheError(
            f"{name} is the same for all tokens, as in int8 banks of an earlier layerbank: extract again, "
            "into another --store"
        )


def fit_arrays(group: zarr.Group, recipe: Recipe, n_blocks: int) -> None:
    """Makes the arrays that only an int8 bank has, where they are not; gives them their length."""
    channels = (GROUPS, len(recipe.layers), recipe.encoder.width)
    counts = (n_blocks, len(recipe.layers))
    numbers, whole = np.dtype(np.float32), np.dtype(np.int64)
    for name, shape, chunks, dtype, axes in (
        (SCALE, channels, channels, numbers, ("group", "layer", "width")),
        (SHIFT, channels, channels, numbers, ("group", "layer", "width")),
        (CLIPPED, counts, (1, len(recipe.layers)), whole, ("block", "layer")),
    ):
        found = store.member(group, name)
        if found is None:
            store.forget_metadata(group, name)
            _make(group, name, shape, chunks, dtype, axes)
        elif found.shape != shape:
            if name != CLIPPED:
                check_groups(f"{group.basename}/{name}", found.ndim)
            found.resize(shape)


def _make(
    group: zarr.Group,
    name: str,
    shape: tuple[int, ...],
    chunks: tuple[int, ...],
    dtype: np.dtype[Any],
    axes: tuple[str, ...],
) -> None:
    group.create_array(
        name,
        shape=shape,
        chunks=chunks,
        dtype=dtype,
        compressors=codecs.bytes_codecs("none", dtype),
        dimension_names=axes,
        config={"write_empty_chunks": True},
    )


def settle(root: zarr.Group, splits: Iterable[str]) -> Calibration | None:
    """The calibration of a bank; a split that has lost it gets it from another one.

    Returns:
        None where no split has it: it was not made yet, or all are damaged.
    """
    digest = root.attrs.get(CALIBRATION)
    found = {name: _read(root[name]) for name in splits} if digest else {}
    whole = next((each for each in found.values() if each and each.digest == digest), None)
    for name, each in found.items():
        if whole and (each is None or each.digest != digest):
            _write(root[name], whole)
    return whole


def record(root: zarr.Group, splits: Iterable[str], calibration: Calibration) -> None:
    """Writes a calibration into every split, the root's attribute last.

    Raises:
        CacheError: the bank was calibrated before, to other values.
    """
    digest = root.attrs.get(CALIBRATION)
    if digest not in (None, calibration.digest):
        raise CacheError(
            "scale and shift of the bank are damaged in every split, and on this machine they come out "
            "otherwise: extract into another --store"
        )
    for name in splits:
        _write(root[name], calibration)
    if digest is None:
        root.update_attributes({CALIBRATION: calibration.digest})


def _read(group: zarr.Group) -> Calibration | None:
    try:
        return Calibration(scale=store.read_whole(group[SCALE]), shift=store.read_whole(group[SHIFT]))
    except store.UNREADABLE:
        return None


def _write(group: zarr.Group, calibration: Calibration) -> None:
    for name, values in ((SCALE, calibration.scale), (SHIFT, calibration.shift)):
        # Zeros alone must be written too: existing is being whole.
        group[name].with_config({"write_empty_chunks": True})[:] = values
