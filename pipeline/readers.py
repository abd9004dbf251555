"""File formats in: one data file becomes one Arrow table whose rows know the line they came from.

A file is turned into Arrow a chunk of rows at a time, so that no file is ever held as Python objects.
This module knows formats and positions; it does not know which column is text and which is a label.
"""

import json
from collections.abc import Callable, Collection, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.cells import read_csv, read_tsv
from pipeline.columns import Columns, Rows, read_lines
from pipeline.conll import read_conll
from pipeline.errors import PipelineError, said_by


def read_file(path: Path, *, keep_text: Collection[str] = (), strings: Collection[str] = ()) -> Rows:
    """Reads one data file; the format is told by the name's ending, one of `READERS`.

    Args:
        path: the file.
        keep_text: columns of a csv or tsv file that stay text even where every cell is a number or a list.
        strings: others of its columns that are text, in which an empty cell is no value.

    Raises:
        PipelineError: the file cannot be read, has no rows, or a row of it is bad (with its position).
    """
    reader = READERS.get(path.suffix.lower())
    if reader is None:
        raise PipelineError(
            f"{path}: unknown format {path.suffix!r}; name the file by one of {', '.join(READERS)}"
        )
    try:
        rows = reader(path, keep_text, strings)
    except OSError as error:
        raise PipelineError(
            f"{path}: cannot be read ({said_by(error)}); check the path and its permissions"
        ) from error
    if rows.table.num_rows == 0:
        raise PipelineError(f"{path}: the file has no rows; fill it or remove it")
    return rows


def read_files(paths: Mapping[str, Path], *, keep_text: Collection[str] = ()) -> dict[str, Rows]:
    """Reads the files of a data set. A column of cells has one type in all of them.

    Args:
        paths: the file of each split.
        keep_text: as `read_file` takes it.

    Raises:
        PipelineError: see `read_file`.
    """
    found = {split: read_file(path, keep_text=keep_text) for split, path in paths.items()}
    kinds: dict[str, set[pa.DataType]] = {}
    for rows in found.values():
        for name, kind in rows.guessed.items():
            kinds.setdefault(name, set()).add(kind)
    # What is text in one file is text in all, also where its cells look like numbers.
    texts = {name for name, seen in kinds.items() if pa.string() in seen and len(seen - {pa.null()}) > 1}
    shared = {name: _shared(seen) for name, seen in kinds.items()}
    for split, rows in found.items():
        if texts & rows.guessed.keys():
            found[split] = rows = read_file(paths[split], keep_text=keep_text, strings=texts)
        found[split] = _with_types(rows, shared)
    return found


def _shared(seen: Collection[pa.DataType]) -> pa.DataType | None:
    """The type that a column has in all files; None where it may stay what it is in each."""
    some = set(seen) - {pa.null()}
    if pa.string() in some:
        return pa.string()
    if some == {pa.int64(), pa.float64()}:
        return pa.float64()
    return next(iter(some)) if len(some) == 1 else None


def _with_types(rows: Rows, shared: Mapping[str, pa.DataType | None]) -> Rows:
    """Casts integers to floats where another file has floats, and empty columns to what others have."""
    table = rows.table
    for name, kind in rows.guessed.items():
        wanted = shared[name]
        if wanted is None or kind == wanted:
            continue
        empty = kind == pa.null()
        column = pa.nulls(table.num_rows, wanted) if empty else table[name].cast(wanted)
        table = table.set_column(table.column_names.index(name), name, column)
    return replace(rows, table=table)


def _read_jsonl(path: Path, keep_text: Collection[str], strings: Collection[str]) -> Rows:
    columns, keys = Columns(path.name, []), None
    for number, line in read_lines(path):
        if not line.strip():
            continue
        row = _parse_object(line, f"{path.name}:{number}")
        if keys is None:
            columns, keys = Columns(path.name, row), row.keys()
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


def _read_parquet(path: Path, keep_text: Collection[str], strings: Collection[str]) -> Rows:
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


READERS: dict[str, Callable[[Path, Collection[str], Collection[str]], Rows]] = {
    ".jsonl": _read_jsonl,
    ".csv": read_csv,
    ".tsv": read_tsv,
    ".parquet": _read_parquet,
    **dict.fromkeys((".conll", ".txt", ".iob", ".iob2", ".bio"), read_conll),
}
