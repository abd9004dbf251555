"""A bank before its first block: its groups, its empty arrays, and where every example will lie."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import zarr
from jaxtyping import Int, UInt64
from numpy import ndarray

from cache import calibration, codecs, fingerprint, layout, store
from cache.errors import CacheError
from cache.layout import STATES, STATES_AXES, TOKEN_ARRAYS, Recipe
from cache.place import Place
from cache.plan import Plan

_DECISIVE = (
    "tokenizer_sha256",
    "columns",
    "max_length",
    "keep",
    "layers",
    "dtype",
    "precision",
    "rounded",
    "seed",
    "codec",
)

PLANNING = {"format_version": layout.FORMAT_VERSION, "complete": False}
"""The root's attributes while the plan is being written: a folder with just these may be cleared."""


MEMBERS = frozenset(
    {
        STATES,
        layout.TARGETS,
        layout.EXTRA,
        *TOKEN_ARRAYS,
        *layout.EXAMPLE_ARRAYS,
        layout.FULL_LENGTH,
        layout.SCALE,
        layout.SHIFT,
        layout.CLIPPED,
    }
)
"""What a split may hold."""


@dataclass(frozen=True, kw_only=True)
class Rows:
    """What must be known of a split's rows before its plan can be made; all in row order."""

    lengths: Int[
        ndarray, "keep row"
    ]  # tokens in each of the banks that are dealt alike, see `layout.ALIKE`
    n_words: Int[ndarray, " row"]
    text_hash: UInt64[ndarray, " row"]
    kept: int = 0  # which of those banks this is

    @property
    def length(self) -> Int[ndarray, " row"]:
        """Tokens that are kept."""
        return self.lengths[self.kept]


def is_planned(place: Place) -> bool:
    """Whether a bank's plan stands there whole; clears away one that was cut off.

    Raises:
        CacheError: the folder holds something that is no bank.
    """
    path = place.name
    if place.is_vacant():
        return False
    if place.size("zarr.json") is None:
        raise CacheError(f"--store {path}: the folder is not empty and no bank: name another folder")
    attrs = dict(store.open_root(path, "r").attrs)
    if attrs == PLANNING:
        place.clear()
        return False
    if "format_version" not in attrs:
        raise CacheError(f"--store {path}: a Zarr group, but no bank: name another folder")
    check_version(path, attrs)
    if "fingerprint" not in attrs:
        raise CacheError(f"--store {path}: a damaged bank or none: name another folder")
    return True


def make(
    path: str,
    recipe: Recipe,
    plans: Mapping[str, Plan],
    rows: Mapping[str, Rows],
    versions: Mapping[str, str],
) -> None:
    """Makes groups, arrays and plan; the fingerprint comes last and says that they are whole."""
    root = zarr.create_group(store.zarr_store(path), attributes=dict(PLANNING))
    for name, plan in plans.items():
        make_split(root, name, recipe, plan, rows[name])
    # Not `attrs.update`, which writes the file once for every key.
    root.update_attributes(
        {
            **recipe.to_attrs(),
            "versions": dict(versions),
            "fingerprint": fingerprint.bank_fingerprint(recipe, _row_fingerprints(rows)),
        }
    )


def split_attrs(plan: Plan, rows: Rows) -> dict[str, Any]:
    """A split's attributes before any of its blocks is there."""
    return {
        "n_examples": len(plan.row),
        "n_tokens": int(plan.length.sum()),
        "n_blocks": plan.n_blocks,
        "block_tokens": plan.block_tokens,
        "fingerprint": fingerprint.rows_fingerprint(rows.text_hash),
        "complete": False,
    }


def make_split(root: zarr.Group, name: str, recipe: Recipe, plan: Plan, rows: Rows) -> None:
    """Makes a split's arrays and its plan; its attributes come last and say that they are whole."""
    group = root.create_group(name, overwrite=True)
    fit_arrays(group, recipe, plan)
    write_examples(group, recipe, plan, rows)
    group.update_attributes(split_attrs(plan, rows))


def fit_arrays(group: zarr.Group, recipe: Recipe, plan: Plan) -> None:
    """Makes the arrays of states and tokens where they are not; gives them the length of the plan.

    An array whose ``zarr.json`` is lost or damaged gets another one: its chunks stay.
    """
    room, width = plan.block_tokens, recipe.encoder.width
    n_tokens = plan.n_blocks * room
    shape, chunks = (len(recipe.layers), n_tokens, width), (1, room, width)
    wanted: list[tuple[Any, ...]] = [
        (STATES, shape, chunks, codecs.numpy_dtype(recipe.dtype), recipe, STATES_AXES)
    ]
    for name, dtype in TOKEN_ARRAYS.items():
        wanted.append((name, (n_tokens,), (room,), np.dtype(dtype), recipe, ("token",)))
    for array in wanted:
        found = store.member(group, array[0])
        if found is None:
            store.forget_metadata(group, array[0])
            _make_array(group, *array)
        elif found.shape != array[1]:
            found.resize(array[1])
    if recipe.dtype == "int8":
        calibration.fit_arrays(group, recipe, plan.n_blocks)


def _make_array(
    group: zarr.Group,
    name: str,
    shape: tuple[int, ...],
    chunks: tuple[int, ...],
    dtype: np.dtype[Any],
    recipe: Recipe,
    axes: tuple[str, ...],
) -> None:
    group.create_array(
        name,
        shape=shape,
        chunks=chunks,
        dtype=dtype,
        compressors=codecs.bytes_codecs(recipe.codec, dtype),
        dimension_names=axes,
        # A chunk that happens to hold zeros alone must exist too: existing is being written.
        config={"write_empty_chunks": True},
    )


def write_examples(group: zarr.Group, recipe: Recipe, plan: Plan, rows: Rows) -> None:
    """Writes the arrays with one entry an example."""
    for array, values in _example_arrays(recipe, plan, rows).items():
        made = group.create_array(
            array,
            shape=values.shape,
            chunks=(max(1, min(2**20, len(values))),),
            dtype=values.dtype,
            compressors=codecs.bytes_codecs("none", values.dtype),
            dimension_names=("example",),
            overwrite=True,
            config={"write_empty_chunks": True},
        )
        made[:] = values


def _example_arrays(recipe: Recipe, plan: Plan, rows: Rows) -> dict[str, ndarray]:
    values = {
        "start": plan.start,
        "length": plan.length,
        "n_words": rows.n_words[plan.row],
        "row": plan.row,
        "text_hash": rows.text_hash[plan.row],
        layout.FULL_LENGTH: rows.lengths[0, plan.row],
    }
    wanted = layout.example_arrays(recipe.keep)
    return {array: values[array].astype(dtype) for array, dtype in wanted.items()}


def _row_fingerprints(rows: Mapping[str, Rows]) -> dict[str, str]:
    return {name: fingerprint.rows_fingerprint(split.text_hash) for name, split in rows.items()}


def check_same(path: str, root: zarr.Group, recipe: Recipe) -> None:
    """Refuses to go on with a bank of another making.

    Raises:
        CacheError: its format, encoder or choices are not those asked for.
    """
    attrs = dict(root.attrs)
    check_version(path, attrs)
    asked, found = recipe.to_attrs(), Recipe.from_attrs(attrs).to_attrs()
    if asked["encoder"]["weights_sha256"] != found["encoder"]["weights_sha256"]:
        raise CacheError(
            f"{path} was made with another encoder ({found['encoder']['name']}), asked for "
            f"{asked['encoder']['name']}: name another --store"
        )
    for name in (*_DECISIVE, "block_tokens"):
        if asked[name] != found[name]:
            raise CacheError(
                f"{path} was made with {name} = {found[name]}, asked for {asked[name]}: "
                "ask for the same, or name another --store"
            )


def restore(root: zarr.Group, recipe: Recipe, plans: Mapping[str, Plan], rows: Mapping[str, Rows]) -> None:
    """Writes the small arrays again where they do not read back, and metadata that is lost.

    Raises:
        CacheError: they read back, but as another plan, which the blocks follow that are there.
    """
    for name, plan in plans.items():
        group, expected = root[name], _example_arrays(recipe, plan, rows[name])
        fit_arrays(group, recipe, plan)
        try:
            found = {array: store.read_whole(group[array]) for array in expected}
        except store.UNREADABLE:
            write_examples(group, recipe, plan, rows[name])
            continue
        for array, values in expected.items():
            if not np.array_equal(found[array], values):
                raise CacheError(
                    f"split {name} of the bank was dealt another way ({array} differs), by other versions "
                    f"of its packages ({root.attrs['versions']}): use those, or name another --store"
                )


def check_version(path: str, attrs: Mapping[str, Any]) -> None:
    """Refuses a bank of a format this version does not know.

    Raises:
        CacheError: the version differs.
    """
    found = attrs.get("format_version")
    if found != layout.FORMAT_VERSION:
        raise CacheError(
            f"{path} has bank format {found}, this layerbank knows {layout.FORMAT_VERSION}: "
            "use the layerbank that made it, or extract again"
        )
