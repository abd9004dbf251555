"""What a target needs beside its labels: the texts of answers, offsets, groups. Arrays in dealt order.

They lie in a group named after their content, and an attribute of the labels says which: new labels and
their arrays take the place of earlier ones at once. Banks from before have them without such a group.
"""

import hashlib
import json
import shutil
from collections.abc import Mapping
from contextlib import suppress

import numpy as np
import zarr
from numpy import ndarray
from zarr.codecs import Crc32cCodec, ZstdCodec

from cache import store
from cache.errors import CacheError
from cache.layout import EXTRA, TARGETS

GROUP = "extra"
"""The attribute of a target that names their group."""

_CHUNK = 2**20


def write(split: zarr.Group, name: str, extra: Mapping[str, ndarray]) -> str:
    """Writes the arrays beside those of an earlier target, to which its labels still belong.

    Returns:
        The name of their group, which the new labels are to carry.
    """
    group = _content_name(extra)
    where = f"{EXTRA}/{name}/{group}"
    with suppress(CacheError, *store.UNREADABLE):  # of a writer that was killed
        if where in split and same(_arrays(split[where]), extra):
            return group
    for key, values in extra.items():
        array = split.require_group(where).create_array(
            key,
            shape=values.shape,
            chunks=(max(1, min(_CHUNK, len(values))), *values.shape[1:]),
            dtype=values.dtype,
            compressors=[ZstdCodec(level=3), Crc32cCodec()],
            overwrite=True,
            config={"write_empty_chunks": True},
        )
        array[:] = values
    return group


def _content_name(extra: Mapping[str, ndarray]) -> str:
    digest = hashlib.sha256()
    for key in sorted(extra):
        digest.update(json.dumps([key, str(extra[key].dtype), list(extra[key].shape)]).encode())
        digest.update(np.ascontiguousarray(extra[key]).data)
    return digest.hexdigest()[:16]


def group_of(split: zarr.Group, name: str) -> str | None:
    """The group of a target's arrays; None where it has none, or has them without a group."""
    labels = store.member(split, f"{TARGETS}/{name}")
    found = None if labels is None else labels.attrs.get(GROUP)
    return None if found is None else str(found)


def drop_others(split: zarr.Group, name: str, *, of_before: bool) -> None:
    """Removes the arrays of earlier targets of a name.

    Args:
        split: the group of the split.
        name: of the target.
        of_before: also where the target has no group, which may be one of a bank from before.
    """
    keep, where = group_of(split, name), f"{EXTRA}/{name}"
    if (keep is None and not of_before) or where not in split:
        return
    folder = store.folder_of(split, where)
    if folder is not None:
        for child in folder.iterdir():
            if child.is_dir() and child.name != keep:
                shutil.rmtree(child)
        return
    for key in store.members(split[where]):
        if key != keep:
            del split[where][key]


def read(split: zarr.Group, name: str) -> dict[str, ndarray]:
    """The arrays of a target. Rows that came later may have no entry.

    Raises:
        CacheError: one is damaged.
    """
    group = group_of(split, name)
    where = f"{EXTRA}/{name}" if group is None else f"{EXTRA}/{name}/{group}"
    try:
        if group is None and where not in split:
            return {}
        return _arrays(split[where])
    except store.UNREADABLE as error:
        raise _damaged(split, name) from error


def check(split: zarr.Group, name: str, n_examples: int) -> None:
    """Reads the arrays of a target and checks that they are all there and fit each other.

    Raises:
        CacheError: they are damaged.
    """
    found, group = read(split, name), group_of(split, name)
    counts = [(found[f"n_{key}"], len(found[key])) for key in found if f"n_{key}" in found]
    fit = all(len(n) <= n_examples and n.min(initial=0) >= 0 and n.sum() == total for n, total in counts)
    if not fit or (group is not None and group != _content_name(found)):
        raise _damaged(split, name)


def same(found: Mapping[str, ndarray], asked: Mapping[str, ndarray]) -> bool:
    """Whether the arrays asked for are all there."""
    return all(k in found and found[k].tobytes() == v.tobytes() for k, v in asked.items())


def _arrays(group: zarr.Group) -> dict[str, ndarray]:
    found = store.members(group).items()
    return {key: store.read_whole(array) for key, array in found if isinstance(array, zarr.Array)}


def _damaged(split: zarr.Group, name: str) -> CacheError:
    where = f"{split.path}/{EXTRA}/{name}"
    return CacheError(f"{where} is damaged: write it again with 'layerbank label'")
