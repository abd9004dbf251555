"""A bank: its splits, and what opens and finds one."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import zarr

from cache import receipt, store
from cache.errors import BankIncomplete, CacheError, StoreRefused, StoreUnreachable
from cache.layout import Recipe
from cache.place import Folder, place
from cache.reader import Split
from cache.skeleton import check_version


class Bank:
    """An extraction, read only. Made by `open_bank`."""

    def __init__(self, path: str, root: zarr.Group) -> None:
        self.path = path
        self.attrs: dict[str, Any] = dict(root.attrs)
        self.recipe = Recipe.from_attrs(self.attrs)
        self.fingerprint: str = self.attrs["fingerprint"]
        self._root = root

    @property
    def splits(self) -> list[str]:
        """Names of the splits, train, dev and test first."""
        usual = {"train": 0, "dev": 1, "test": 2}
        return sorted(store.members(self._root), key=lambda name: (usual.get(name, 3), name))

    def split(self, name: str) -> Split:
        """Opens a split.

        Raises:
            CacheError: there is no such split.
        """
        if name not in self.splits:
            raise CacheError(f"{self.path} has no split {name!r}, it has: {', '.join(self.splits)}")
        try:
            return Split(name, self._root[name], self.recipe, self.path)
        except (KeyError, TypeError, ValueError) as error:
            raise CacheError(
                f"{self.path}/{name}/zarr.json lacks {store.one_line(error)}: run the same "
                "'layerbank extract' again"
            ) from error

    def writable_split(self, name: str) -> zarr.Group:
        """The Zarr group of a split, to add a target to."""
        return store.open_root(self.path, "r+")[name]

    @contextmanager
    def relabelled(self, column: str) -> Iterator[None]:
        """Held while labels are written: by one process at a time, and known for a change of the bank."""
        where = place(self.path)
        with where.writing(), receipt.set_aside(store.open_root(self.path, "r+"), where, column):
            yield

    @property
    def n_bytes(self) -> int:
        """Bytes the bank takes."""
        return sum(place(self.path).sizes().values())


def open_bank(path: str, *, allow_incomplete: bool = False) -> Bank:
    """Opens a bank to read.

    Args:
        path: its folder, or a URL that Zarr opens.
        allow_incomplete: also open a bank whose extraction has not ended.

    Raises:
        CacheError: there is no bank, or one of another format version.
        BankIncomplete: its extraction has not ended.
    """
    root = store.open_root(path, "r")
    attrs = dict(root.attrs)
    if "format_version" not in attrs:
        raise CacheError(f"{path} is a Zarr group, but no bank: make one with 'layerbank extract'")
    check_version(path, attrs)
    if "fingerprint" not in attrs or not (attrs.get("complete") or allow_incomplete):
        raise BankIncomplete(f"{path} is not complete: run the same 'layerbank extract' again to end it")
    return Bank(path, root)


def find_bank(path: str) -> Bank | None:
    """The bank that lies there, whole or in part; None where there is none that could be read.

    Raises:
        CacheError: an object store refuses, or does not answer.
    """
    try:
        return open_bank(path, allow_incomplete=True)
    except (StoreRefused, StoreUnreachable):
        raise
    except CacheError:
        return None


def find_twin(path: str, recipe: Recipe, fingerprint: str) -> Bank | None:
    """A complete bank of the same states beside a place on a local disk where none is yet.

    Args:
        path: where the bank would lie.
        recipe: what it would be made with.
        fingerprint: what it would have.
    """
    local = store.local_path(path)
    if local is None or find_bank(path):
        return None
    for sibling in Folder(local.parent).folders():
        bank = find_bank(sibling.name)
        if bank is None or not bank.attrs.get("complete"):
            continue
        if (bank.fingerprint, bank.recipe.codec) == (fingerprint, recipe.codec):
            return bank
    return None


def is_bank(path: Path | str) -> bool:
    """Whether a folder or a URL holds a bank, complete or not.

    Raises:
        CacheError: an object store refuses, or does not answer.
    """
    if place(str(path)).size("zarr.json") is None:
        return False
    try:
        return "format_version" in dict(store.open_root(str(path), "r").attrs)
    except (StoreRefused, StoreUnreachable):
        raise
    except CacheError:
        return False
