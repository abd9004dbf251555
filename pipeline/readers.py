"""File formats in: one data file becomes one Arrow table whose rows know the line they came from.

A file is turned into Arrow a chunk of rows at a time, so that no file is ever held as Python objects.
This module knows formats and positions; it does not know which column is text and which is a label.
"""

import csv
import json
import re
from array import array
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from jaxtyping import Int32

from pipeline.errors import PipelineError

CHUNK_ROWS = 16_384

IOB = re.compile(r"O|[BI]-.+", re.DOTALL)
"""What a tag of a span scheme looks like: outside, begin, inside."""


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

    def where(self, row: int) -> str:
        """The position of a row (counted from 0) as messages give it: ``train.jsonl:17``."""
        return position(self.file, self.lines, row)


def position(file: str, lines: Int32[np.ndarray, " row"] | None, row: int) -> str:
    """The position of a row, counted from 0.

    >>> position("dev.jsonl", np.array([3, 4], np.int32), 1), position("dev.parquet", None, 1)
    ('dev.jsonl:4', 'dev.parquet:row 2')
    """
    return f"{file}:row {row + 1}" if lines is None else f"{file}:{lines[row]}"


def read_file(path: Path, *, keep_text: Collection[str] = ()) -> Rows:
    """Reads one data file; the format is told by the name's ending, one of `READERS`.

    Args:
        path: the file.
        keep_text: columns of a csv or tsv file that stay text even where every cell is a number or a list.

    Raises:
        PipelineError: the file cannot be read, has no rows, or a row of it is bad (with its position).
    """
    reader = READERS.get(path.suffix.lower())
    if reader is None:
        raise PipelineError(
            f"{path}: unknown format {path.suffix!r}; name the file by one of {', '.join(READERS)}"
        )
    try:
        rows = reader(path, keep_text)
    except OSError as error:
        said = error.strerror or next(iter(str(error).splitlines()), "")
        raise PipelineError(
            f"{path}: cannot be read ({said}); check the path and its permissions"
        ) from error
    if rows.table.num_rows == 0:
        raise PipelineError(f"{path}: the file has no rows; fill it or remove it")
    return rows


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


class _Columns:
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
            merged = _merge(self.types[k], chunk.type)
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
            merged = _merge(seen, kind)
            if merged is None:
                return PipelineError(
                    f"{where}: {describe(kind)} where the rows before have {describe(seen)}; "
                    "make all values of a column one type"
                )
            seen = merged
        return PipelineError(f"{self.file}: column {self.names[k]!r} mixes types; make them one")


def _merge(a: pa.DataType, b: pa.DataType) -> pa.DataType | None:
    """The type that holds values of both, or None where there is none."""
    if a == b or pa.types.is_null(b):
        return a
    if pa.types.is_null(a):
        return b
    if {a, b} == {pa.int64(), pa.float64()}:
        return pa.float64()
    if pa.types.is_list(a) and pa.types.is_list(b):
        inner = _merge(a.value_type, b.value_type)
        return None if inner is None else pa.list_(inner)
    return None


def _read_lines(path: Path) -> Iterator[tuple[int, str]]:
    """The lines of a UTF-8 file with their numbers and their ends; only a newline ends a line."""
    with path.open("rb") as file:
        for number, raw in enumerate(file, 1):
            try:
                yield number, raw.decode("utf-8-sig" if number == 1 else "utf-8")
            except UnicodeDecodeError as error:
                raise PipelineError(
                    f"{path.name}:{number}: byte {raw[error.start]:#04x} is not UTF-8; save the file so"
                ) from None


def _read_jsonl(path: Path, keep_text: Collection[str]) -> Rows:
    columns, keys = _Columns(path.name, []), None
    for number, line in _read_lines(path):
        if not line.strip():
            continue
        row = _parse_object(line, f"{path.name}:{number}")
        if keys is None:
            columns, keys = _Columns(path.name, row), row.keys()
        elif row.keys() != keys:
            raise _wrong_keys(row, columns.names, f"{path.name}:{number}")
        columns.add(number, [row[name] for name in columns.names])
    return columns.finish()


def _parse_object(line: str, where: str) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except (json.JSONDecodeError, RecursionError) as error:
        said = error.msg if isinstance(error, json.JSONDecodeError) else "nested too deep"
        raise PipelineError(f"{where}: not JSON ({said}); write one JSON object on each line") from None
    if not isinstance(row, dict):
        raise PipelineError(
            f"{where}: {type(row).__name__} where an object should be; write one JSON object on each line"
        )
    return row


def _wrong_keys(row: Mapping[str, Any], names: list[str], where: str) -> PipelineError:
    missing = [name for name in names if name not in row]
    if missing:
        what = f"column {missing[0]!r} is missing"
    else:
        what = f"column {next(k for k in row if k not in names)!r} is in no row before"
    return PipelineError(f"{where}: {what}; give every row the same columns, null where there is no value")


def _read_csv(path: Path, keep_text: Collection[str]) -> Rows:
    # The limit is the whole process's and 131,072 characters at first: too few for documents.
    csv.field_size_limit(1 << 30)
    reader = csv.reader((line for _, line in _read_lines(path)), strict=True)
    return _read_records(path, _csv_records(path, reader), keep_text)


def _csv_records(path: Path, reader: Any) -> Iterator[tuple[int, list[str]]]:
    start = 1
    try:
        for cells in reader:
            if cells:
                yield start, cells
            start = reader.line_num + 1
    except csv.Error as error:
        raise PipelineError(
            f"{path.name}:{start}: not a csv record ({error}); quote cells with commas, quotes or newlines"
        ) from None


def _read_tsv(path: Path, keep_text: Collection[str]) -> Rows:
    """Reads tab-separated cells, in which a quote is a character, unless a csv writer quoted them."""
    quoted = next((line.startswith('"') for _, line in _read_lines(path) if line.strip()), False)
    if quoted:
        reader = csv.reader((line for _, line in _read_lines(path)), delimiter="\t", strict=True)
        return _read_records(path, _csv_records(path, reader), keep_text)
    cells = (
        (number, [_unquote(cell) for cell in line.rstrip("\r\n").split("\t")])
        for number, line in _read_lines(path)
        if line.rstrip("\r\n")
    )
    return _read_records(path, cells, keep_text)


def _unquote(cell: str) -> str:
    """Takes off the quotes of a csv writer, who puts them on where the cell itself holds quotes, doubled.

    >>> _unquote('"[""a""]"'), _unquote('"so be it"'), _unquote('"open')
    ('["a"]', '"so be it"', '"open')
    """
    inner = cell[1:-1]
    if cell[:1] != '"' or cell[-1:] != '"' or '""' not in inner or '"' in inner.replace('""', ""):
        return cell
    return inner.replace('""', '"')


def _read_records(path: Path, records: Iterator[tuple[int, list[str]]], keep_text: Collection[str]) -> Rows:
    number, header = next(records, (1, []))
    if len(set(header)) < len(header) or "" in header:
        raise PipelineError(
            f"{path.name}:{number}: a column name is empty or there twice; name each column once"
        )
    columns = _Columns(path.name, header)
    for number, cells in records:
        if len(cells) != len(header):
            raise PipelineError(
                f"{path.name}:{number}: {len(cells)} cells where the header has {len(header)}; "
                "check separators and quotes"
            )
        columns.add(number, cells)
    rows = columns.finish()
    typed = {
        name: rows.table[name] if name in keep_text else _typed(rows, name)
        for name in rows.table.column_names
    }
    return Rows(file=rows.file, table=pa.table(typed), lines=rows.lines)


def _typed(rows: Rows, name: str) -> pa.ChunkedArray:
    """A column of cells as integers, floats or lists where all its cells are; else as it is."""
    cells = rows.table[name]
    filled = pc.if_else(pc.equal(cells, ""), pa.scalar(None, pa.string()), cells)
    if rows.table.num_rows == 0 or filled.null_count == len(filled):
        return cells
    if pc.all(pc.starts_with(filled, "[")).as_py():
        return _parse_lists(rows, name, filled)
    try:
        numbers = filled.cast(pa.int64())
        # A code such as 01 is no number: read as one it would be the same as 1.
        return numbers if numbers.cast(pa.string()).equals(filled) else filled
    except pa.ArrowInvalid:
        pass
    try:
        return filled.cast(pa.float64())
    except pa.ArrowInvalid:
        return filled


def _parse_lists(rows: Rows, name: str, cells: pa.ChunkedArray) -> pa.ChunkedArray:
    parsed = _Columns(rows.file, [name])
    row = 0
    for chunk in cells.chunks:
        for cell in chunk.to_pylist():
            try:
                parsed.add(0 if rows.lines is None else int(rows.lines[row]), [cell and json.loads(cell)])
            except json.JSONDecodeError as error:
                if row == 0:  # a text that happens to start with a bracket
                    return rows.table[name]
                raise PipelineError(
                    f"{rows.where(row)}: column {name!r}: not a JSON list ({error.msg}), as those before "
                    'are; write lists as ["a", "b"]'
                ) from None
            row += 1
    return parsed.finish().table[name]


def _read_conll(path: Path, keep_text: Collection[str]) -> Rows:
    columns: _Columns | None = None
    tabs, start, sentence = False, 0, list[list[str]]()

    def end_sentence() -> None:
        if sentence and columns is not None:
            columns.add(start, [list(column) for column in zip(*sentence, strict=True)])
            sentence.clear()

    for number, line in _read_lines(path):
        line = line.rstrip("\r\n")
        if columns is None:
            tabs = "\t" in line
        cells = line.split("\t") if tabs else [cell for cell in re.split("[ \t]", line) if cell]
        if not line.strip() or cells[0] == "-DOCSTART-":
            end_sentence()
            continue
        if _is_comment(line, cells, columns, inside=bool(sentence)):
            continue
        if columns is None:
            columns = _Columns(path.name, _conll_names(len(cells)))
        if len(cells) != len(columns.names) or "" in cells:
            raise PipelineError(
                f"{path.name}:{number}: {sum(map(bool, cells))} columns where the rows before have "
                f"{len(columns.names)}; give every word all columns, and end a sentence by an empty line"
            )
        start = start if sentence else number
        sentence.append(cells)
    end_sentence()
    rows = (columns or _Columns(path.name, ["tokens"])).finish()
    table = {
        name: rows.table[name] if name == "tokens" else _to_iob2(rows.table[name])
        for name in rows.table.column_names
    }
    return Rows(file=rows.file, table=pa.table(table), lines=rows.lines)


def _is_comment(line: str, cells: list[str], columns: _Columns | None, *, inside: bool) -> bool:
    """Tells a comment from a word that starts with a number sign, such as a hashtag."""
    if not line.startswith("#"):
        return False
    if len(cells) > 1 and (columns is None or len(cells) == len(columns.names)):
        return not inside and not IOB.fullmatch(cells[-1])
    return not inside or line.startswith("# ")


def _conll_names(n_columns: int) -> list[str]:
    if n_columns == 1:
        return ["tokens"]
    inner = ["pos", "chunk"] if n_columns == 4 else [f"column_{k}" for k in range(2, n_columns)]
    return ["tokens", *inner, "tags"]


def _to_iob2(column: pa.ChunkedArray) -> pa.ChunkedArray:
    """Turns IOB1 tags into IOB2: every span starts with B. Other tags, and IOB2, stay as they are."""
    names = pc.unique(pc.list_flatten(column)).to_pylist()
    if not names or not all(IOB.fullmatch(name) for name in names):
        return column
    inside = np.array([name[0] == "I" for name in names])
    types = [name[2:] for name in names]
    type_id = np.array([types.index(kind) for kind in types])
    begins = pa.array([*names, *(f"B-{kind}" for kind in types)])
    chunks = []
    for chunk in column.chunks:
        code = pc.index_in(chunk.flatten(), value_set=pa.array(names)).to_numpy()
        offsets = chunk.offsets.to_numpy() - chunk.offsets[0].as_py()
        follows = np.zeros(len(code), dtype=bool)
        follows[1:] = type_id[code[1:]] == type_id[code[:-1]]  # O has a type of its own, ""
        follows[offsets[:-1]] = False
        code = np.where(inside[code] & ~follows, code + len(names), code)
        chunks.append(pa.ListArray.from_arrays(pa.array(offsets, pa.int32()), begins.take(pa.array(code))))
    return pa.chunked_array(chunks, type=column.type)


def _read_parquet(path: Path, keep_text: Collection[str]) -> Rows:
    try:
        with pq.ParquetFile(path, memory_map=True) as file:
            table = file.read()
    except pa.ArrowException as error:
        said = str(error).splitlines()[0]
        raise PipelineError(f"{path.name}: not a parquet file ({said}); write it again") from None
    stored = json.loads((table.schema.metadata or {}).get(b"huggingface", b"{}"))
    features = stored.get("info", {}).get("features") or {}
    return Rows(file=path.name, table=plain(table), class_names=read_class_names(features))


def read_class_names(features: Mapping[str, Any]) -> dict[str, tuple[str, ...]]:
    """The class names of the columns that have them, from features as `datasets` writes them in JSON.

    >>> read_class_names({"label": {"names": ["no", "yes"], "_type": "ClassLabel"}, "n": {"dtype": "int8"}})
    {'label': ('no', 'yes')}
    """
    names = {}
    for column, feature in features.items():
        inner = feature[0] if isinstance(feature, list) else feature
        if isinstance(inner, dict) and isinstance(inner.get("feature"), dict):
            inner = inner["feature"]
        if isinstance(inner, dict) and inner.get("names"):
            names[column] = tuple(str(name) for name in inner["names"])
    return names


def plain(table: pa.Table) -> pa.Table:
    """Gives columns of large, view or dictionary types the plain type of the same values."""
    fields = [pa.field(f.name, _plain_type(f.type)) for f in table.schema]
    return table.replace_schema_metadata(None).cast(pa.schema(fields))


def _plain_type(kind: pa.DataType) -> pa.DataType:
    if pa.types.is_dictionary(kind):
        return _plain_type(kind.value_type)
    if pa.types.is_large_string(kind) or pa.types.is_string_view(kind):
        return pa.string()
    if pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind):
        return pa.list_(_plain_type(kind.value_type))
    return kind


READERS: dict[str, Callable[[Path, Collection[str]], Rows]] = {
    ".jsonl": _read_jsonl,
    ".csv": _read_csv,
    ".tsv": _read_tsv,
    ".parquet": _read_parquet,
    **dict.fromkeys((".conll", ".txt", ".iob", ".iob2", ".bio"), _read_conll),
}
