"""Rows of one file as Arrow columns: collected a chunk at a time, each with the line it came from.

Knows positions and types; no format of a file, and not which column is text and which a label.
"""

import json
from array import array
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from jaxtyping import Int32

from pipeline.errors import PipelineError

CHUNK_ROWS = 16_384


@dataclass(frozen=True, kw_only=True)
class Rows:
    """The rows of one file."""

    file: str
    """The file's name, as messages give it."""

    table: pa.Table

    lines: Int32[np.ndarray, " row"] | None = None
    """The line each row starts on, from 1; None where a format has no lines."""

    class_names: dict[str, tuple[str, ...]] = field(default_factory=dict)
    """Names of the classes of integer columns, where the file itself carries them."""

    guessed: dict[str, pa.DataType] = field(default_factory=dict)
    """The types of columns that were told by their cells; null where all of them are empty."""

    def where(self, row: int) -> str:
        """The position of a row (counted from 0) as messages give it: ``train.jsonl:17``."""
        return position(self.file, self.lines, row)


def position(file: str, lines: Int32[np.ndarray, " row"] | None, row: int) -> str:
    """The position of a row, counted from 0.

    >>> position("dev.jsonl", np.array([3, 4], np.int32), 1), position("dev.parquet", None, 1)
    ('dev.jsonl:4', 'dev.parquet:row 2')
    """
    return f"{file}:row {row + 1}" if lines is None else f"{file}:{lines[row]}"


def describe(kind: pa.DataType) -> str:
    """What a value of an Arrow type is called in messages.

    >>> describe(pa.list_(pa.string())), describe(pa.int64())
    ('a list of strings', 'an integer')
    """
    if pa.types.is_list(kind):
        inner = describe(kind.value_type).removeprefix("a ").removeprefix("an ")
        return "an empty list" if pa.types.is_null(kind.value_type) else f"a list of {inner}s"
    tests = {
        "a string": pa.types.is_string,
        "an integer": pa.types.is_integer,
        "a number": pa.types.is_floating,
        "a boolean": pa.types.is_boolean,
        "null": pa.types.is_null,
    }
    return next((name for name, test in tests.items() if test(kind)), f"a value of type {kind}")


class Columns:
    """Collects rows of Python values and turns them into Arrow, a chunk at a time."""

    def __init__(self, file: str, names: Iterable[str]) -> None:
        self.file = file
        self.names = list(names)
        self.lines = array("i")
        self.pending: list[Iterable[Any]] = []
        self.types: list[pa.DataType] = [pa.null()] * len(self.names)
        self.chunks: list[list[pa.Array]] = [[] for _ in self.names]

    def add(self, line: int, values: Iterable[Any]) -> None:
        """Adds one row, its values in the order of the columns."""
        self.lines.append(line)
        self.pending.append(values)
        if len(self.pending) == CHUNK_ROWS:
            self._flush()

    def finish(self) -> Rows:
        """The table of all rows added; the types of a column's chunks are made one."""
        self._flush()
        columns = [
            pa.chunked_array([chunk.cast(kind) for chunk in chunks], type=kind)
            for chunks, kind in zip(self.chunks, self.types, strict=True)
        ]
        table = pa.table(dict(zip(self.names, columns, strict=True)))
        return Rows(file=self.file, table=table, lines=np.array(self.lines, dtype=np.int32))

    def _flush(self) -> None:
        if not self.pending:
            return
        first = len(self.lines) - len(self.pending)
        for k, values in enumerate(zip(*self.pending, strict=True)):
            chunk = self._array(k, values, first)
            merged = merge(self.types[k], chunk.type)
            if merged is None:
                raise self._mixed(k, values, first)
            self.types[k] = merged
            self.chunks[k].append(chunk)
        self.pending = []

    def _array(self, k: int, values: tuple[Any, ...], first: int) -> pa.Array:
        try:
            chunk = pa.array(values)
        except (pa.ArrowException, OverflowError, ValueError):
            raise self._mixed(k, values, first) from None
        inner = chunk.type.value_type if pa.types.is_list(chunk.type) else chunk.type
        if pa.types.is_nested(inner):  # objects are kept, as JSON text: nothing here reads them
            return pa.array([None if v is None else json.dumps(v, ensure_ascii=False) for v in values])
        return chunk

    def _mixed(self, k: int, values: tuple[Any, ...], first: int) -> PipelineError:
        """The error of the first value that does not fit the ones before it."""
        seen = self.types[k]
        for offset, value in enumerate(values):
            where = f"{self.file}:{self.lines[first + offset]}: column {self.names[k]!r}"
            try:
                kind = pa.array([value]).type
            except (pa.ArrowException, OverflowError, ValueError):
                return PipelineError(
                    f"{where}: not one type, or out of range; make it a string, a number or a list"
                )
            merged = merge(seen, kind)
            if merged is None:
                return PipelineError(
                    f"{where}: {describe(kind)} where the rows before have {describe(seen)}; "
                    "make all values of a column one type"
                )
            seen = merged
        return PipelineError(f"{self.file}: column {self.names[k]!r} mixes types; make them one")


def merge(a: pa.DataType, b: pa.DataType) -> pa.DataType | None:
    """The type that holds values of both, or None where there is none."""
    if a == b or pa.types.is_null(b):
        return a
    if pa.types.is_null(a):
        return b
    if {a, b} == {pa.int64(), pa.float64()}:
        return pa.float64()
    if pa.types.is_list(a) and pa.types.is_list(b):
        inner = merge(a.value_type, b.value_type)
        return None if inner is None else pa.list_(inner)
    return None


def read_lines(path: Path) -> Iterator[tuple[int, str]]:
    """The lines of a UTF-8 file with their numbers and their ends; only a newline ends a line."""
    with path.open("rb") as file:
        for number, raw in enumerate(file, 1):
            try:
                yield number, raw.decode("utf-8-sig" if number == 1 else "utf-8")
            except UnicodeDecodeError as error:
                raise PipelineError(
                    f"{path.name}:{number}: byte {raw[error.start]:#04x} is not UTF-8; save it as UTF-8"
                ) from None
