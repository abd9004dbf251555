"""Label columns beside the states.

A target is stored in the order in which examples were dealt to blocks, so that streaming a bank reads
its labels in sequence. Tags are flat: example i has ``n_words[i]`` of them, words that
``max_length`` cut off included. So are choices, one an option, and token ids, one a kept token.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import zarr
from jaxtyping import Int, Shaped
from numpy import ndarray
from zarr.codecs import Crc32cCodec
from zarr.core.sync import sync
from zarr.storage import MemoryStore

from cache import extras, store
from cache.errors import CacheError
from cache.layout import TARGETS

TargetKind = Literal["class", "tags", "float", "span", "choice", "token"]

_AXES = {"tags": ("word",), "choice": ("option",), "token": ("token",), "span": ("example", "end")}

_CHUNK = 2**20

_USUAL, _ASIDE = "/", "."
"""Separators in the keys of chunks: ``c/0``; and ``c.0``, where a new target lies until it is whole."""

_METADATA = "zarr.json"


@dataclass(frozen=True, kw_only=True)
class Target:
    """One column of labels."""

    name: str
    kind: TargetKind
    names: tuple[str, ...]  # names of the classes or tags; () for numbers
    values: Shaped[ndarray, "unit ..."]
    """int32 class id an example or tag id a word, -1 where there is none; float32, NaN where none.

    A span is the first and the last token of an answer, counted among the tokens of `text_pair`.
    """

    metric: str | None = None
    """The score its task is known by."""

    extra: Mapping[str, ndarray] = field(default_factory=dict)
    """Further arrays, such as the texts of answers: ``n_<name>`` says how many entries of ``<name>`` each
    example has. Not read back with the target: see `cache.extras`."""

    settings: Mapping[str, Any] = field(default_factory=dict)
    """Options that its decoder starts with where the user gives none."""


def spans(counts: Int[ndarray, " example"]) -> Int[ndarray, " boundary"]:
    """Boundaries of consecutive runs: run i is ``[spans[i], spans[i + 1])``.

    >>> spans(np.array([2, 0, 3])).tolist()
    [0, 2, 2, 5]
    """
    return np.concatenate([[0], np.cumsum(counts, dtype=np.int64)])


def ranges(start: Int[ndarray, " run"], count: Int[ndarray, " run"]) -> Int[ndarray, " entry"]:
    """The numbers start[i] .. start[i] + count[i] - 1 of every run, one run after the other.

    >>> ranges(np.array([7, 2]), np.array([2, 3])).tolist()
    [7, 8, 2, 3, 4]
    """
    ends = np.cumsum(count, dtype=np.int64)
    total = int(ends[-1]) if len(ends) else 0
    return np.repeat(start.astype(np.int64) - (ends - count), count) + np.arange(total)


def reorder_tags(
    tags: Int[ndarray, " word"], n_words: Int[ndarray, " example"], row: Int[ndarray, " example"]
) -> Int[ndarray, " word"]:
    """Tags in row order -> tags in dealt order; `n_words` counts the words of each row."""
    return tags[ranges(spans(n_words)[:-1][row], n_words[row])]


def reorder_extra(extra: Mapping[str, ndarray], row: Int[ndarray, " example"]) -> dict[str, ndarray]:
    """The further arrays of a target in row order -> in dealt order."""
    dealt: dict[str, ndarray] = {}
    for name in extra:
        if f"n_{name}" in extra:
            counts = extra[f"n_{name}"]
            dealt[name] = extra[name][ranges(spans(counts)[:-1][row], counts[row])]
            dealt[f"n_{name}"] = counts[row]
    return dealt


def check_name(name: str) -> None:
    """Refuses a name that cannot name an array.

    Raises:
        CacheError: it is empty, reserved, or a path.
    """
    reserved = name.startswith((".", "__")) or name in ("", "zarr.json")
    if reserved or "/" in name or "\\" in name:
        raise CacheError(f"target {name!r} cannot be stored under that name: rename the column")


def write_target(split: zarr.Group, target: Target, *, keep_extra: bool = False) -> None:
    """Writes a target, in dealt order, over an earlier one of that name.

    Its attributes come last: a target that was cut off half-way has none and does not count.

    Args:
        split: the group of the split.
        target: what to write.
        keep_extra: the arrays beside the earlier one are those of this one too, which comes without them.

    Raises:
        CacheError: the name cannot name an array, or the disk refused.
    """
    check_name(target.name)
    try:
        recover(split)
        if not _is_stored(split, target, keep_extra):
            _put(split, target, keep_extra)
        if not keep_extra:
            extras.drop_others(split, target.name, of_before=not target.extra)
    except OSError as error:
        raise store.disk_error(Path(split.path, TARGETS, target.name), error) from error


def recover(split: zarr.Group) -> None:
    """Brings back a target that a killed writer had just put aside."""
    folder = store.folder_of(split, TARGETS)
    if folder is not None:
        store.settle_switches(folder)


def _put(split: zarr.Group, target: Target, keep_extra: bool) -> None:
    extra = extras.group_of(split, target.name) if keep_extra else None
    if target.extra:
        extra = extras.write(split, target.name, target.extra)
    held = split.require_group(TARGETS)
    path, beside = store.folder_of(held, target.name), store.folder_of(held, store.BESIDE)
    if path is None and target.name in target_names(split):
        _write_over(held, target, extra)
        return
    if path is None or beside is None or not path.exists():
        _write(held, target.name, target, extra)
        return
    # An earlier target of that name is lost only when the new one is whole.
    _write(held, store.BESIDE, target, extra)
    store.switch(beside, path)


def _write_over(held: zarr.Group, target: Target, extra: str | None) -> None:
    """Writes over a target where nothing can be renamed: at any moment the one or the other is there whole.

    Its ``zarr.json``, which is one object, says under which keys its chunks are. The new chunks lie beside
    the old ones first, and come under the usual keys once nothing reads those any more.
    """
    was_cut_off = _separator(held[target.name]) == _ASIDE
    for separator in (_USUAL,) if was_cut_off else (_ASIDE, _USUAL):
        objects = _objects_of(target, extra, separator)
        for key in sorted(objects, key=lambda key: key == _METADATA):
            sync(held.store.set(f"{held.path}/{target.name}/{key}", objects[key]))
    below = f"{held.path}/{target.name}/"
    for key in sync(_keys(held, below)):
        if key.removeprefix(below) not in objects:
            sync(held.store.delete(key))


def _separator(array: Any) -> str:
    return str(array.metadata.chunk_key_encoding.separator)


def _objects_of(target: Target, extra: str | None, separator: str) -> dict[str, Any]:
    """What is stored of a target, by key below its own."""
    made: dict[str, Any] = {}
    _write(zarr.create_group(MemoryStore(made)), "made", target, extra, separator=separator)
    below = "made/"
    return {key.removeprefix(below): value for key, value in made.items() if key.startswith(below)}


async def _keys(held: zarr.Group, prefix: str) -> list[str]:
    return [key async for key in held.store.list_prefix(prefix)]


def _write(
    held: zarr.Group, name: str, target: Target, extra: str | None, *, separator: str = _USUAL
) -> None:
    array = held.create_array(
        name,
        shape=target.values.shape,
        chunks=(max(1, min(_CHUNK, len(target.values))), *target.values.shape[1:]),
        dtype=target.values.dtype,
        compressors=[Crc32cCodec()],
        dimension_names=_AXES.get(target.kind, ("example",)),
        chunk_key_encoding={"name": "default", "separator": separator},
        overwrite=True,
        config={"write_empty_chunks": True},
    )
    array[:] = target.values
    # Not `attrs.update`, which writes the file once for every key.
    attrs = {"kind": target.kind, "names": list(target.names), "metric": target.metric}
    further = {"settings": dict(target.settings), extras.GROUP: extra}
    array.update_attributes({**attrs, **{key: value for key, value in further.items() if value}})


def unfinished(split: zarr.Group) -> list[str]:
    """Names of targets that a writer was killed over: they do not count."""
    group = store.subgroup(split, TARGETS)
    held = {} if group is None else store.members(group)
    return [name for name, array in sorted(held.items()) if "kind" not in array.attrs]


def lengthen(target: Target, more: int) -> Target:
    """The target with units more that have no label."""
    nothing = np.nan if target.kind == "float" else -1
    added = np.full((more, *target.values.shape[1:]), nothing, dtype=target.values.dtype)
    return replace(target, values=np.concatenate([target.values, added]))


def _is_stored(split: zarr.Group, target: Target, keep_extra: bool) -> bool:
    """Whether the very same target is there already: writing it again could only lose it."""
    if target.name not in target_names(split):
        return False
    try:
        found = read_target(split, target.name)
    except CacheError:
        return False
    if _separator(split[f"{TARGETS}/{target.name}"]) != _USUAL:  # `_write_over` was cut off
        return False
    asked = (target.kind, target.names, target.metric, dict(target.settings))
    same = (found.kind, found.names, found.metric, dict(found.settings)) == asked
    if not same or found.values.tobytes() != target.values.tobytes():
        return False
    try:
        held = extras.read(split, target.name)
        return keep_extra or (bool(held) == bool(target.extra) and extras.same(held, target.extra))
    except CacheError:
        return False


def target_names(split: zarr.Group) -> dict[str, dict[str, Any]]:
    """Names of the targets a split has, each with its kind and its number of classes."""
    group = store.subgroup(split, TARGETS)
    return {
        name: {"kind": array.attrs["kind"], "classes": len(array.attrs.get("names", ()))}
        for name, array in sorted(({} if group is None else store.members(group)).items())
        if "kind" in array.attrs
    }


def read_target(split: zarr.Group, name: str) -> Target:
    """Reads a target, in dealt order.

    Raises:
        CacheError: the target is damaged.
    """
    array = split[f"{TARGETS}/{name}"]
    try:
        values = store.read_whole(array)
    except store.UNREADABLE as error:
        where = f"{split.path}/{TARGETS}/{name}"
        raise CacheError(f"{where} is damaged: write it again with 'layerbank label'") from error
    attrs = array.attrs
    return Target(
        name=name,
        kind=attrs["kind"],
        names=tuple(attrs["names"]),
        values=values,
        metric=attrs["metric"],
        settings=attrs.get("settings", {}),
    )
