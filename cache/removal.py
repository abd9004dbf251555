"""Deletes a bank. Cut off half-way it is never taken for whole, and deleting goes on where it ended."""

import shutil
from pathlib import Path

from cache import skeleton, store
from cache.bank import is_bank
from cache.errors import CacheError
from cache.layout import OUTPUT_LAYER
from cache.place import place


def check_removable(path: str) -> Path:
    """The folder of a bank that may be deleted.

    Raises:
        CacheError: it is no bank in a local folder, or holds something that is no part of one.
    """
    folder = store.local_path(path)
    if folder is None:
        raise CacheError(
            f"{path}: only a bank in a local folder is removed here; use the store's own tools"
        )
    if not folder.is_dir() or not is_bank(folder):
        raise CacheError(f"{path} is no bank: nothing was removed; 'layerbank list DIR' shows the banks")
    for child in sorted(folder.iterdir()):
        ours = (
            child.name in ("zarr.json", OUTPUT_LAYER)
            or child.name.endswith(store.PARTIAL)
            or _is_part(child)
        )
        if not ours:
            raise CacheError(
                f"{path} also holds {child.name}, which is no part of the bank: move it away first"
            )
    return folder


def _is_part(child: Path) -> bool:
    """Whether a folder is a split, or what is left of one: arrays of that name alone."""
    return child.is_dir() and not child.is_symlink() and all(_is_array(inner) for inner in child.iterdir())


def _is_array(inner: Path) -> bool:
    known = inner.name in skeleton.MEMBERS or inner.name == "zarr.json" or inner.suffix == store.PARTIAL
    return known or (inner.is_dir() and inner.parent.name.startswith("."))


def remove(path: str) -> None:
    """Deletes a bank.

    Raises:
        CacheError: it is none, or the disk refuses.
        BankLocked: another process is writing into it.
    """
    folder = check_removable(path)
    with store.writing(folder):
        try:
            # What is left of it then is known for a plan that was cut off.
            store.open_root(str(folder), "r+").attrs.put(dict(skeleton.PLANNING))
            place(path).clear()
            shutil.rmtree(folder)
        except OSError as error:
            raise store.disk_error(folder, error) from error
