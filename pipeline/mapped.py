"""What is long lies in a nameless temporary file, mapped, so that memory does not grow with the data."""

import contextlib
import mmap
from contextlib import ExitStack
from tempfile import SpooledTemporaryFile, TemporaryFile
from typing import Any

import numpy as np
import pyarrow as pa
from numpy import ndarray

IN_MEMORY_BYTES = 2**22
"""What is no longer than this stays in memory."""


def in_file(table: pa.Table) -> tuple[pa.Table, mmap.mmap | None]:
    """A long table in a temporary file, and the map of it.

    A short one as it is, and None; likewise where the folder of temporary files has no room for it.
    """
    if table.nbytes <= IN_MEMORY_BYTES:
        return table, None
    try:
        with TemporaryFile() as file:
            with pa.ipc.new_file(file, table.schema) as written:
                written.write_table(table)
            file.flush()
            mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    except OSError:
        return table, None
    return pa.ipc.open_file(pa.py_buffer(mapped)).read_all(), mapped


def let_go(mapped: mmap.mmap) -> None:
    """Lets go of the pages of a mapped file; they are read again when they are needed."""
    with contextlib.suppress(AttributeError, OSError):  # not every system can be told so
        mapped.madvise(mmap.MADV_DONTNEED)


class Column:
    """An array put together part by part: in memory at first, in a temporary file once it is long.

    Args:
        files: closes the file in the end; a map of it stays.
        dtype: of the array.
    """

    def __init__(self, files: ExitStack, dtype: Any) -> None:
        spool: Any = SpooledTemporaryFile(max_size=IN_MEMORY_BYTES)  # noqa: SIM115
        self._file = files.enter_context(spool)
        self._dtype = dtype

    def add(self, part: ndarray) -> None:
        """Puts some values behind the others."""
        self._file.write(np.ascontiguousarray(part, dtype=self._dtype).data)

    def array(self) -> ndarray:
        """All values added."""
        self._file.flush()
        if self._file.tell() <= IN_MEMORY_BYTES:
            self._file.seek(0)
            return np.frombuffer(self._file.read(), self._dtype)
        self._file.fileno()  # a file from here on, if it was none
        return np.memmap(self._file._file, self._dtype, mode="r")
