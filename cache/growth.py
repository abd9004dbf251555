"""Rows that come to a bank that is there: which of them it has, and where the others will lie.

An example keeps its place for good; only its row in the source may change. Rows that are not in the bank
are dealt to further blocks. What is to be done is written down whole beside the splits before any of them
is touched (`_record`), and root attribute ``growing`` names that note: a growth that was cut off at any
moment is done again from it.
"""

import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import zarr
from jaxtyping import Int, UInt64
from numpy import ndarray

from cache import codecs, skeleton, store
from cache.errors import CacheError
from cache.fingerprint import bank_fingerprint, dealt_fingerprint, rows_fingerprint
from cache.layout import GENERATIONS, GROWING, Recipe
from cache.plan import Plan, grow, lay
from cache.skeleton import Rows

NOTES = (".growth-0", ".growth-1")
"""Where notes are kept, in turn: the one that counts is never written over."""


@dataclass(frozen=True, kw_only=True)
class Growth:
    """What a bank becomes."""

    plans: dict[str, Plan]
    fingerprint: str | None  # None where the bank stays what it was
    new_rows: dict[str, int]  # of each split that has any; a split that is new has only such


@dataclass(frozen=True, kw_only=True)
class _Order:
    """In which order a split's examples lie, as the bank or a note of its growth has it."""

    text_hash: UInt64[ndarray, " example"]
    row: Int[ndarray, " example"] | None  # in the source of that time
    sizes: tuple[int, ...]
    room: int


def settle(
    path: str, root: zarr.Group, recipe: Recipe, rows: Mapping[str, Rows], fresh: Mapping[str, Plan]
) -> Growth:
    """Brings a bank's record of its rows to the rows given; a growth begins here.

    Args:
        path: of the bank, for messages.
        root: its root group.
        recipe: what it is made with.
        rows: the rows of each split.
        fresh: the deal of these rows, if no bank were there.

    Returns:
        The plan that the bank follows from here on.

    Raises:
        CacheError: some of the bank's rows are not among those given.
    """
    noted: str | None = root.attrs.get(GROWING)
    forget(root, keep=noted)
    there = store.members(root[noted] if noted else root)
    lost = sorted(set(there) - set(rows))
    if lost:
        raise CacheError(
            f"split {lost[0]} of {path} is not in the data: give the data with that split, or name another "
            "--store"
        )
    plans, new_rows, changed = dict(fresh), {}, False
    for name, split in rows.items():
        if name in there:
            order = _order(path, there[name], name, split, fresh[name])
            plans[name], differs = _place(path, root, name, order, split, recipe)
        else:
            differs = True
        before = sum(order.sizes) if name in there else 0
        if len(split.length) > before:
            new_rows[name] = len(split.length) - before
        changed |= differs
    if not changed and not noted:
        return Growth(plans=plans, fingerprint=None, new_rows={})
    if changed:
        _record(root, rows, plans)
        forget(root, keep=root.attrs[GROWING])
    _apply(root, recipe, rows, plans, fresh)
    return Growth(plans=plans, fingerprint=_fingerprint(recipe, rows, plans, fresh), new_rows=new_rows)


def forget(root: zarr.Group, keep: str | None = None) -> None:
    """Removes the notes of growths that have ended, or never began."""
    for name in NOTES:
        if name == keep:
            continue
        folder = store.folder_of(root, name)
        if folder is not None and folder.exists():  # its group may be half gone
            shutil.rmtree(folder)
        elif folder is None and name in root:
            del root[name]


def _order(path: str, group: zarr.Group, name: str, rows: Rows, fresh: Plan) -> _Order:
    """A split's order. While the source is the same, its texts and its rows can be had from one another."""
    attrs = dict(group.attrs)
    sizes = tuple(part["examples"] for part in attrs.get(GENERATIONS, ())) or (int(attrs["n_examples"]),)
    text_hash, row = _read(group, "text_hash"), _read(group, "row")
    of_the_bank = rows.text_hash[: sum(sizes)]
    same_source = rows_fingerprint(of_the_bank) == attrs["fingerprint"]
    if text_hash is None and same_source:
        if row is not None:
            text_hash = of_the_bank[row]
        elif GENERATIONS not in attrs and len(of_the_bank) == len(rows.text_hash):
            row, text_hash = fresh.row, rows.text_hash[fresh.row]
    if text_hash is None:
        raise CacheError(
            f"{path}: the order of split {name} is lost (text_hash and row are damaged): extract into "
            "another --store"
        )
    return _Order(text_hash=text_hash, row=row, sizes=sizes, room=int(attrs["block_tokens"]))


def _read(group: zarr.Group, name: str) -> ndarray | None:
    found = store.member(group, name)
    try:
        return None if found is None else store.read_whole(found)
    except store.UNREADABLE:
        return None


def _place(
    path: str, root: zarr.Group, name: str, order: _Order, rows: Rows, recipe: Recipe
) -> tuple[Plan, bool]:
    """The plan of a split that is there, and whether it is another than the bank's."""
    row = match(order.text_hash, order.row, rows.text_hash)
    gone = int((row < 0).sum())
    if gone:
        raise CacheError(
            f"{path} was made from other rows ({gone} of {len(row)} of split {name} are not in the data): "
            "name another --store, or remove this bank"
        )
    room = recipe.block_tokens
    plan = lay(row, rows.lengths, sizes=order.sizes, block_tokens=room, kept=rows.kept)
    _check_deal(root, name, plan, order.room)
    new = np.setdiff1d(np.arange(len(rows.length)), row)
    if len(new):
        grown = grow(plan, new, rows.lengths, block_tokens=room, seed=recipe.seed, kept=rows.kept)
        return grown, True
    return plan, order.row is not None and not np.array_equal(row, order.row)


def match(
    text_hash: UInt64[ndarray, " example"],
    row: Int[ndarray, " example"] | None,
    hashes: UInt64[ndarray, " row"],
) -> Int[ndarray, " example"]:
    """Finds each example's row, -1 where there is none; no row twice.

    Args:
        text_hash: of the examples.
        row: where they were before: kept wherever the text there is still theirs.
        hashes: of the rows. Of rows with one text the first goes to the first of its examples.
    """
    found = np.full(len(text_hash), -1, dtype=np.int64)
    free = np.ones(len(hashes), dtype=bool)
    if row is not None:
        stays = np.flatnonzero((row >= 0) & (row < len(hashes)))
        stays = stays[hashes[row[stays]] == text_hash[stays]]
        stays = stays[np.unique(row[stays], return_index=True)[1]]
        found[stays] = row[stays]
        free[row[stays]] = False
    examples, rows = np.flatnonzero(found < 0), np.flatnonzero(free)
    examples = examples[np.argsort(text_hash[examples], kind="stable")]
    rows = rows[np.argsort(hashes[rows], kind="stable")]
    wanted, offered = text_hash[examples], hashes[rows]
    nth = np.arange(len(wanted)) - np.searchsorted(wanted, wanted)
    at = np.searchsorted(offered, wanted) + nth
    there = at < np.searchsorted(offered, wanted, side="right")
    found[examples[there]] = rows[at[there]]
    return found


def _check_deal(root: zarr.Group, name: str, plan: Plan, room: int) -> None:
    """Refuses a split whose blocks were filled another way than here: its states would be mistaken.

    Raises:
        CacheError: they were.
    """
    differ = [] if plan.block_tokens == room else ["block_tokens"]
    for array, expected in (("start", plan.start), ("length", plan.length)):
        found = _read(root[name], array) if name in root else None
        if found is not None:
            n = min(len(found), len(expected))
            differ += [] if np.array_equal(found[:n], expected[:n]) else [array]
    if differ:
        raise CacheError(
            f"split {name} of the bank was dealt another way ({differ[0]} differs), by other versions of "
            f"its packages ({root.attrs['versions']}): use those, or name another --store"
        )


def _generations(plan: Plan, fresh: Plan) -> list[dict[str, int]]:
    """A split's generations; none where it lies as a single deal of its rows lays it."""
    return [] if np.array_equal(plan.row, fresh.row) else plan.generations


def _fingerprint(
    recipe: Recipe, rows: Mapping[str, Rows], plans: Mapping[str, Plan], fresh: Mapping[str, Plan]
) -> str:
    grown = {}
    for name, plan in plans.items():
        if generations := _generations(plan, fresh[name]):
            grown[name] = dealt_fingerprint(rows[name].text_hash[plan.row], generations)
    return bank_fingerprint(
        recipe, {name: rows_fingerprint(split.text_hash) for name, split in rows.items()}, grown
    )


def _record(root: zarr.Group, rows: Mapping[str, Rows], plans: Mapping[str, Plan]) -> None:
    """Writes down what the splits are to become, then marks the bank as growing."""
    noted = root.attrs.get(GROWING)
    name = next(note for note in NOTES if note != noted)
    note = root.create_group(name, overwrite=True)
    for split, plan in plans.items():
        texts = rows[split].text_hash
        attrs = {
            "n_examples": len(plan.row),
            "block_tokens": plan.block_tokens,
            GENERATIONS: plan.generations,
            "fingerprint": rows_fingerprint(texts),
        }
        group = note.create_group(split, attributes=attrs)
        for array, values in (("text_hash", texts[plan.row]), ("row", plan.row)):
            made = group.create_array(
                array,
                shape=values.shape,
                chunks=(max(1, len(values)),),
                dtype=values.dtype,
                compressors=codecs.bytes_codecs("none", values.dtype),
                config={"write_empty_chunks": True},
            )
            made[:] = values
    root.update_attributes({"complete": False, GROWING: name})


def _apply(
    root: zarr.Group,
    recipe: Recipe,
    rows: Mapping[str, Rows],
    plans: Mapping[str, Plan],
    fresh: Mapping[str, Plan],
) -> None:
    """Makes the splits what was written down. Doing it twice does no harm."""
    there = store.members(root)
    for name, plan in plans.items():
        found = dict(there[name].attrs) if name in there else {}
        attrs: dict[str, Any] = skeleton.split_attrs(plan, rows[name])
        generations = _generations(plan, fresh[name])
        if generations or GENERATIONS in found:
            attrs[GENERATIONS] = generations
        if all(found.get(key) == value for key, value in attrs.items() if key != "complete"):
            continue
        if "fingerprint" in found:
            skeleton.fit_arrays(there[name], recipe, plan)
            skeleton.write_examples(there[name], recipe, plan, rows[name])
            there[name].update_attributes(attrs)
        else:
            skeleton.make_split(root, name, recipe, plan, rows[name])
