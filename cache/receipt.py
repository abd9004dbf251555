"""The note on a complete bank that says what it was made for, and how its files were left.

As long as the files are as they were left, nothing of them need be read again; and the same command has
nothing to do. Who may change a bank takes the note away first; who completes one gives a new one.
"""

import hashlib
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import zarr

from cache.layout import RECEIPT
from cache.place import Place
from cache.store import PARTIAL

ROOT = "zarr.json"
"""Key of the root's attributes; written last."""


def note(where: Place, asked: str | None, targets: Iterable[str]) -> dict[str, Any]:
    """The root attribute for a bank that has just been completed.

    Args:
        where: it lies.
        asked: what tells the command and its data; None where that is not known.
        targets: the columns of labels that the command writes.
    """
    known = [] if asked is None else list(targets)
    return {RECEIPT: {"asked": asked, "files": _files(where), "targets": known}}


def withdraw(root: zarr.Group) -> None:
    """Takes the note away, before anything is changed."""
    if RECEIPT in root.attrs:
        del root.attrs[RECEIPT]


@contextmanager
def set_aside(root: zarr.Group, where: Place, column: str) -> Iterator[None]:
    """Takes the note away while labels are written, and gives it back where it still holds.

    Args:
        root: of the bank.
        where: it lies.
        column: the labels; the command that the note tells would write its own over them if it has them.
    """
    before = dict(root.attrs.get(RECEIPT, {}))
    holds = fits(root.attrs, where) and column not in before["targets"]
    withdraw(root)
    yield
    if holds:
        root.update_attributes(note(where, before["asked"], before["targets"]))


def is_for(attrs: Mapping[str, Any], asked: str) -> bool:
    """Whether a bank with these root attributes was made by the same command from the same data."""
    return bool(attrs.get("complete") and RECEIPT in attrs and attrs[RECEIPT]["asked"] == asked)


def fits(attrs: Mapping[str, Any], where: Place) -> bool:
    """Whether every file is as it was left when the note was given, which was last. None is read."""
    if RECEIPT not in attrs or attrs[RECEIPT]["files"] != _files(where):
        return False
    return not where.changed_since(ROOT)


def targets(attrs: Mapping[str, Any]) -> list[str]:
    """The columns of labels that the command wrote."""
    return list(attrs[RECEIPT]["targets"])


def _files(where: Place) -> str:
    """Digest of the names and sizes of a bank's files; of the root's attributes, which hold it, not."""
    digest = hashlib.sha256()
    for key, n_bytes in sorted(where.sizes().items()):
        passing = key.endswith(PARTIAL) or any(part.startswith(".") for part in key.split("/"))
        if key != ROOT and not passing:
            digest.update(f"{key} {n_bytes}\n".encode())
    return digest.hexdigest()
