"""A place a bank lies in: a folder, or a prefix of an object store. One interface for both.

A bank is written and checked through `Place` alone, so nothing else asks where it is.
"""

import os
import shutil
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager
from functools import cached_property
from pathlib import Path
from typing import TypeVar

import numpy as np
from jaxtyping import UInt8
from numpy import ndarray
from zarr.core.buffer import default_buffer_prototype
from zarr.core.sync import sync

from cache import remote, store

_REQUESTS = 16
"""Requests that one command sends to an object store at a time."""

T = TypeVar("T")
R = TypeVar("R")


class Place(ABC):
    """Where a bank lies. Keys are those of Zarr: ``train/states/c/0/3/0``."""

    name: str
    """The folder or URL, for messages and to open it again."""

    maps: bool
    """Whether a stored chunk is mapped rather than fetched."""

    trusted: bool
    """Whether an object of the right size is whole: a PUT is, a file on a disk that lost power is not."""

    @property
    @abstractmethod
    def absolute(self) -> str:
        """The name that another process knows the place by."""

    @abstractmethod
    def writing(self) -> AbstractContextManager[None]:
        """Held while the bank is written."""

    @abstractmethod
    def is_writable(self) -> bool:
        """Whether this process may write there, as far as can be told beforehand."""

    @abstractmethod
    def is_vacant(self) -> bool:
        """Whether nothing is there but what a killed writer left."""

    @abstractmethod
    def tidy(self) -> None:
        """Removes what a killed writer left."""

    @abstractmethod
    def clear(self) -> None:
        """Removes a plan that was cut off, its root last: cut off again, it is still known for one."""

    @abstractmethod
    def remove(self, key: str) -> None:
        """Removes what is stored under a key, if anything is."""

    @abstractmethod
    def vanish(self) -> None:
        """Removes the place itself, with what `clear` left."""

    @abstractmethod
    def all_keys(self) -> list[str]:
        """The keys of all that is stored, whoever put it there. A link is one, wherever it leads."""

    @abstractmethod
    def size(self, key: str) -> int | None:
        """Bytes stored under a key, None where there is nothing."""

    @abstractmethod
    def sizes(self, prefix: str = "") -> Mapping[str, int]:
        """Bytes of all that is stored below a prefix, by key."""

    @abstractmethod
    def changed_since(self, key: str) -> bool:
        """Whether anything was written after what is stored under a key, as far as the place can tell."""

    @abstractmethod
    def folders(self) -> list["Place"]:
        """The places right below this one."""

    @abstractmethod
    def put(self, key: str, values: ndarray) -> None:
        """Stores an uncompressed chunk and its CRC-32C, whole or not at all.

        Raises:
            CacheError: the place refused.
        """

    @abstractmethod
    def fetch(self, key: str) -> UInt8[ndarray, " byte"]:
        """What is stored under a key, mapped or read into writable memory.

        Raises:
            FileNotFoundError: nothing is.
            ValueError: it has no bytes.
            CacheError: the place does not answer.
        """

    @abstractmethod
    def put_file(self, key: str, content: bytes) -> None:
        """Stores what is no chunk, without a checksum; whole or not at all.

        Raises:
            CacheError: the place refused.
        """

    @abstractmethod
    def read_file(self, key: str) -> bytes:
        """What is stored under a key, however large.

        Raises:
            FileNotFoundError: nothing is.
            CacheError: the place does not answer.
        """

    @abstractmethod
    def each(self, function: Callable[[T], R], items: Iterable[T]) -> list[R]:
        """The function's results; on an object store many run at a time."""

    def is_whole(self, key: str, n_bytes: int) -> bool:
        """Whether a chunk is what was written: its size and its CRC-32C fit."""
        try:
            stored = self.fetch(key)
        except (OSError, ValueError):
            return False
        return len(stored) == n_bytes + store.CRC_BYTES and store.checksum_fits(stored)


class Folder(Place):
    """A folder of a local disk."""

    maps, trusted = True, False

    def __init__(self, path: Path) -> None:
        self.path = path
        self.name = str(path)

    @property
    def absolute(self) -> str:
        """The path from the root, links followed."""
        return str(self.path.resolve())

    def writing(self) -> AbstractContextManager[None]:
        """Holds the folder's lock."""
        return store.writing(self.path)

    def is_writable(self) -> bool:
        """What the folder's permissions say."""
        return os.access(self.path, os.W_OK)

    def is_vacant(self) -> bool:
        """Whether nothing is there but Zarr's unfinished root metadata, and nobody's own file."""
        if not self.path.exists():
            return True
        return all(
            child.name.startswith("zarr.") and child.suffix == store.PARTIAL
            for child in self.path.iterdir()
        )

    def tidy(self) -> None:
        """Removes files under temporary names."""
        for leftover in self.path.rglob(f"*{store.PARTIAL}"):
            leftover.unlink(missing_ok=True)

    def clear(self) -> None:
        """Removes the folders, then the root's metadata."""
        for child in self.path.iterdir():
            if child.is_dir():
                shutil.rmtree(child)
        (self.path / "zarr.json").unlink()

    def remove(self, key: str) -> None:
        """Removes a file."""
        (self.path / key).unlink(missing_ok=True)

    def vanish(self) -> None:
        """Removes the folder."""
        shutil.rmtree(self.path)

    def all_keys(self) -> list[str]:
        """The paths of all that is no folder."""
        found = (path for path in self.path.rglob("*") if path.is_symlink() or not path.is_dir())
        return sorted(path.relative_to(self.path).as_posix() for path in found)

    def size(self, key: str) -> int | None:
        """Bytes of a file."""
        try:
            return (self.path / key).stat().st_size
        except (FileNotFoundError, NotADirectoryError):
            return None

    def sizes(self, prefix: str = "") -> Mapping[str, int]:
        """Bytes of the files below a folder."""
        files = (path for path in (self.path / prefix).rglob("*") if path.is_file())
        return {path.relative_to(self.path).as_posix(): path.stat().st_size for path in files}

    def changed_since(self, key: str) -> bool:
        """By the times of files; those whose name starts with a dot are no part of a bank."""
        last = (self.path / key).stat().st_mtime_ns
        files = (path for path in self.path.rglob("[!.]*") if path.is_file())
        return any(path.stat().st_mtime_ns > last for path in files)

    def folders(self) -> list[Place]:
        """The folders right below; what may not be looked into holds nothing."""
        try:
            children = sorted(child for child in self.path.iterdir() if child.is_dir())
        except OSError:
            return []
        return [Folder(child) for child in children]

    def put(self, key: str, values: ndarray) -> None:
        """Writes a file under a temporary name, then renames it."""
        store.write_chunk(self.path / key, values)

    def fetch(self, key: str) -> UInt8[ndarray, " byte"]:
        """Maps a file."""
        return store.map_file(self.path / key)

    def put_file(self, key: str, content: bytes) -> None:
        """Writes a file under a temporary name, then renames it."""
        store.write_file(self.path / key, memoryview(content))

    def read_file(self, key: str) -> bytes:
        """Reads a file."""
        return (self.path / key).read_bytes()

    def each(self, function: Callable[[T], R], items: Iterable[T]) -> list[R]:
        """One after the other: a local disk is quickest in sequence."""
        return [function(item) for item in items]


class Objects(Place):
    """A prefix of an object store, or of any file system that fsspec knows."""

    maps, trusted = False, True

    def __init__(self, url: str) -> None:
        self._store = remote.connect(url)
        self.name = url.rstrip("/")

    @property
    def absolute(self) -> str:
        """The URL."""
        return self.name

    @contextmanager
    def writing(self) -> Iterator[None]:
        """Locks nothing: object stores have no lock that dies with its holder.

        Two writers of one bank do the same work twice and PUT the same bytes; completion is marked by
        each after all blocks are there.
        """
        yield

    def is_writable(self) -> bool:
        """Always: a store tells nobody's rights, the first PUT finds them out."""
        return True

    def is_vacant(self) -> bool:
        """Whether no object is there."""
        return bool(sync(self._store.is_empty("")))

    def tidy(self) -> None:
        """Nothing to remove: a PUT that was cut off leaves no object."""

    def clear(self) -> None:
        """Removes the splits, then the root's metadata."""
        # A request each: that for a whole prefix would take longer than a request may.
        self.each(self.remove, [key for key in self.all_keys() if "/" in key])
        for folder in sync(self._store.folders()):  # empty ones, on a file system that has such
            sync(self._store.delete_dir(folder))
        self.remove("zarr.json")

    def remove(self, key: str) -> None:
        """Removes an object."""
        sync(self._store.delete(key))

    def vanish(self) -> None:
        """Nothing to remove: a prefix without objects is not there."""

    def all_keys(self) -> list[str]:
        """The keys of the objects."""
        return sorted(self.sizes())

    def size(self, key: str) -> int | None:
        """Bytes of an object."""
        return int(sync(self._store.getsize(key))) if sync(self._store.exists(key)) else None

    def sizes(self, prefix: str = "") -> Mapping[str, int]:
        """Bytes of the objects below a prefix."""
        return dict(sync(self._store.sizes(prefix)))

    def changed_since(self, key: str) -> bool:
        """Never: an object is put whole by who knows the bank, and nothing else touches it."""
        return False

    def folders(self) -> list[Place]:
        """The prefixes right below."""
        return [Objects(f"{self.name}/{folder}") for folder in sync(self._store.folders())]

    def put(self, key: str, values: ndarray) -> None:
        """One PUT."""
        data = np.ascontiguousarray(values).view(np.uint8).reshape(-1)
        chunk = np.concatenate([data, store.checksum(data)])
        sync(self._store.set(key, default_buffer_prototype().buffer.from_array_like(chunk)))

    def fetch(self, key: str) -> UInt8[ndarray, " byte"]:
        """One GET."""
        found = sync(self._store.get(key, default_buffer_prototype()))
        if found is None:
            raise FileNotFoundError("it is not there")
        # Copied, because torch takes writable memory only.
        return np.array(found.as_numpy_array(), dtype=np.uint8)

    def put_file(self, key: str, content: bytes) -> None:
        """One PUT."""
        sync(self._store.set(key, default_buffer_prototype().buffer.from_bytes(content)))

    def read_file(self, key: str) -> bytes:
        """One GET, which has the time that so many bytes need."""
        prototype, n_bytes = default_buffer_prototype(), self.size(key)
        found = None if n_bytes is None else sync(self._store.get(key, prototype, n_bytes=n_bytes))
        if found is None:
            raise FileNotFoundError("it is not there")
        return bytes(found.to_bytes())

    def each(self, function: Callable[[T], R], items: Iterable[T]) -> list[R]:
        """Many at a time: a request waits far longer than it works."""
        return list(self._threads.map(function, items))

    @cached_property
    def _threads(self) -> ThreadPoolExecutor:
        return ThreadPoolExecutor(_REQUESTS, thread_name_prefix="bank-requests")


def place(path: str) -> Place:
    """The place that a folder or a URL names.

    Raises:
        CacheError: the URL cannot be used.
    """
    local = store.local_path(path)
    return Folder(local) if local is not None else Objects(path)
