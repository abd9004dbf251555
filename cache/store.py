"""Where a bank lies: opening its Zarr groups, the files of its chunks, the lock of its writer."""

import errno
import fcntl
import mmap
import os
import platform
import resource
import shutil
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import google_crc32c
import numpy as np
import zarr
from jaxtyping import UInt8
from numpy import ndarray
from zarr.core.sync import sync

from cache import remote
from cache.errors import REPAIR, BankAbsent, BankLocked, CacheError, CorruptChunk

CRC_BYTES = 4
PARTIAL = ".partial"

UNREADABLE = (ValueError, RuntimeError, KeyError, OSError)
"""What Zarr raises on bytes that are not those that were written."""

_MAPS = 16_384
"""Files kept mapped at a time; Linux allows a process 65,530 maps by default."""


def local_path(store: str) -> Path | None:
    """The folder of a store on a local disk; None for a URL of anything else.

    Raises:
        CacheError: it is a URL with a slash too few, which would name a folder.
    """
    scheme, colon, rest = store.partition(":/")
    if colon and scheme in remote.OBSTORE and not rest.startswith("/"):
        raise CacheError(f"{store} is no URL: give {scheme}://{rest}")
    if store.startswith("file://"):
        return Path(unquote(urlsplit(store).path))
    if "://" in store:
        return None
    return Path(store)


def chunk_key(split: str, array: str, *index: int) -> str:
    """The key of one chunk, as Zarr v3's default chunk keys name it."""
    return "/".join((split, array, "c", *map(str, index)))


def zarr_store(store: str) -> Any:
    """What Zarr opens: a folder's path, or a URL's store."""
    path = local_path(store)
    return remote.connect(store) if path is None else str(path)


def members(group: zarr.Group) -> dict[str, Any]:
    """The groups and arrays right below a group. What a killed writer left is none of them.

    Raises:
        CacheError: the ``zarr.json`` of one is damaged.
    """
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Object at .* is not recognized", zarr.errors.ZarrUserWarning)
        try:
            return {name: node for name, node in group.members() if not name.startswith(".")}
        except (*UNREADABLE, TypeError, AttributeError) as error:
            raise CacheError(
                f"{_damaged_member(group)} is damaged ({one_line(error)}): remove that file, then run the "
                "same 'layerbank extract' again"
            ) from error


def _damaged_member(group: zarr.Group) -> str:
    """The ``zarr.json`` below a group that cannot be read, as far as it can be told."""
    folder = folder_of(group, "")
    for child in sorted(folder.glob("*/zarr.json")) if folder else []:
        try:
            group[child.parent.name]
        except (*UNREADABLE, TypeError, AttributeError):
            return str(child)
    return f"a zarr.json below {group.path or 'the root of the bank'}"


def subgroup(group: zarr.Group, name: str) -> Any:
    """A group below a group; None where there is none.

    Raises:
        CacheError: its ``zarr.json`` is damaged.
    """
    try:
        return group[name]
    except KeyError:
        return None
    except (*UNREADABLE, TypeError, AttributeError) as error:
        raise CacheError(
            f"{folder_of(group, name) or name}/zarr.json is damaged ({one_line(error)}): remove that file, "
            "then run the same 'layerbank extract' again"
        ) from error


def member(group: zarr.Group, name: str) -> Any:
    """An array of a group; None where there is none, or where its ``zarr.json`` is damaged."""
    try:
        found = group[name]
    except (*UNREADABLE, TypeError, AttributeError):
        return None
    return found if isinstance(found, zarr.Array) else None


def forget_metadata(group: zarr.Group, name: str) -> None:
    """Removes an array's damaged ``zarr.json``; its chunks stay."""
    folder = folder_of(group, name)
    if folder is not None:
        (folder / "zarr.json").unlink(missing_ok=True)


BESIDE, ASIDE = ".beside", ".aside-"
"""Names, in its parent, of a folder that is being written to take another's place, and of that other."""


def folder_of(group: zarr.Group, name: str) -> Path | None:
    """The folder of a member of a group; None where the store is no local disk."""
    root = getattr(group.store, "root", None)
    return root / group.path / name if isinstance(root, Path) else None


def switch(new: Path, path: Path) -> None:
    """Puts a folder in the place of another. Cut off between the renames, `settle_switches` goes back."""
    aside = path.with_name(ASIDE + path.name)
    path.rename(aside)
    new.rename(path)
    shutil.rmtree(aside)


def settle_switches(folder: Path) -> None:
    """Clears up after a writer that was killed in `switch`, or before it."""
    if not folder.is_dir():
        return
    for aside in folder.glob(f"{ASIDE}*"):
        path = folder / aside.name.removeprefix(ASIDE)
        if path.exists():
            shutil.rmtree(aside)
        else:
            aside.rename(path)
    shutil.rmtree(folder / BESIDE, ignore_errors=True)


def chunk_is_there(group: zarr.Group, array: str, *index: int) -> bool:
    """Whether a chunk is stored at all: Zarr reads an absent one as zeros."""
    return bool(sync(group.store.exists(chunk_key(group.path, array, *index))))


def read_whole(array: zarr.Array) -> ndarray:
    """Reads an array. All chunks of a bank are stored, so an absent one is damage and no fill.

    Raises:
        UNREADABLE: some of it is damaged.
    """
    if array.nchunks_initialized < array.nchunks:
        raise FileNotFoundError(f"{array.nchunks - array.nchunks_initialized} chunks are not there")
    return np.asarray(array[:])


def map_file(path: Path) -> UInt8[ndarray, " byte"]:
    """Maps a file, copy on write: torch takes writable memory only, and the file stays as it is."""
    untracked: dict[str, Any] = {"trackfd": False} if sys.version_info >= (3, 13) else {}
    with path.open("rb") as file:
        return np.frombuffer(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY, **untracked), np.uint8)


def mappable_files() -> int:
    """How many files a reader may keep mapped.

    Before Python 3.13 a map holds a file descriptor. A process gets 1,024 of them unless it asks for
    more, which is done here, as other language runtimes do when they start.
    """
    if sys.version_info >= (3, 13):
        return _MAPS
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = 4 * _MAPS if hard == resource.RLIM_INFINITY else min(hard, 4 * _MAPS)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
        soft = wanted
    return _MAPS if soft == resource.RLIM_INFINITY else min(_MAPS, soft // 4)


def open_root(store: str, mode: Any) -> zarr.Group:
    """Opens the root group.

    Raises:
        CacheError: there is no Zarr group there, or it cannot be read.
    """
    try:
        # Of the format that a bank has: to find it out costs an object store three requests more.
        return zarr.open_group(zarr_store(store), mode=mode, zarr_format=3)
    except (FileNotFoundError, zarr.errors.GroupNotFoundError) as error:
        raise BankAbsent(f"no bank at {store}: make one with 'layerbank extract'") from error
    except (ValueError, OSError, TypeError, KeyError, ImportError) as error:
        raise CacheError(f"{store} cannot be opened as a bank: {one_line(error)}") from error


def one_line(error: BaseException) -> str:
    """An exception's text as one line."""
    return " ".join(str(error).split()) or type(error).__name__


def write_chunk(path: Path, values: ndarray) -> None:
    """Writes an uncompressed chunk and its CRC-32C, whole or not at all.

    Makes the very bytes that Zarr's ``bytes`` and ``crc32c`` codecs make, without their copies.

    Raises:
        CacheError: the disk is full or the file cannot be written; an earlier file of that name stays.
    """
    data = np.ascontiguousarray(values).view(np.uint8).reshape(-1)
    write_file(path, data.data, checksum(data).data)


def write_file(path: Path, *parts: memoryview) -> None:
    """Writes a file of some parts under a temporary name, then renames it.

    Raises:
        CacheError: the disk is full or the file cannot be written; an earlier file of that name stays.
    """
    # A name of its own: a worker that was given up for dead may still be writing the same chunk.
    partial = path.with_name(f"{path.name}.{platform.node()}-{os.getpid()}{PARTIAL}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with partial.open("wb", buffering=0) as file:
            for part in parts:
                _write_all(file.fileno(), part)
        partial.replace(path)
    except OSError as error:
        with suppress(OSError):
            partial.unlink()
        raise disk_error(path, error) from error


def _write_all(descriptor: int, data: memoryview) -> None:
    while data:
        data = data[os.write(descriptor, data) :]


def disk_error(path: Path | str, error: OSError) -> CacheError:
    """What to say when the disk refuses."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return CacheError(
            f"the disk is full: {path} was not written. What is written is whole: make room, then run the "
            "same command again to go on"
        )
    return CacheError(f"cannot write {path}: {one_line(error)}")


def checksum(data: UInt8[ndarray, " byte"]) -> UInt8[ndarray, "4"]:
    """The CRC-32C of some bytes, as it stands behind them."""
    return np.frombuffer(int(google_crc32c.value(data)).to_bytes(CRC_BYTES, "little"), np.uint8)


def checksum_fits(stored: ndarray) -> bool:
    """Whether the last four bytes are the CRC-32C of those before."""
    found = int.from_bytes(stored[-CRC_BYTES:].tobytes(), "little")
    return len(stored) >= CRC_BYTES and int(google_crc32c.value(stored[:-CRC_BYTES])) == found


def corrupt(split: str, array: str, block: int, reason: str, layer: int | None = None) -> CorruptChunk:
    """Names a chunk that is not what was written, and the cure."""
    where = f"split {split}, " + (f"layer {layer}, " if layer is not None else f"{array}, ")
    return CorruptChunk(f"{where}block {block} is damaged ({reason}): {REPAIR}, it repairs just that block")


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Holds the bank's lock while it is written; a dead process holds none.

    Raises:
        BankLocked: another living process holds it.
    """
    # One bank has one lock, whichever of its names it was asked for under.
    path = path.resolve()
    lock = path.with_name(f".{path.name}.lock")
    try:
        lock.parent.mkdir(parents=True, exist_ok=True)
        descriptor = _take(lock)
    except OSError as error:
        raise disk_error(lock, error) from error
    try:
        yield
    finally:
        lock.unlink(missing_ok=True)
        os.close(descriptor)


def _take(lock: Path) -> int:
    """Locks the file; tries again when another process removed it between opening and locking."""
    while True:
        descriptor = os.open(lock, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            holder = os.pread(descriptor, 32, 0).decode().strip() or "unknown"
            os.close(descriptor)
            raise BankLocked(
                f"another process (pid {holder}) is writing into {lock.parent / lock.name[1:-5]}: "
                "wait for it, or end it and run this again"
            ) from error
        with suppress(FileNotFoundError):
            if os.fstat(descriptor).st_ino == lock.stat().st_ino:
                with suppress(OSError):  # on a full disk the lock holds without a name
                    os.pwrite(descriptor, str(os.getpid()).encode().ljust(32), 0)
                return descriptor
        os.close(descriptor)
