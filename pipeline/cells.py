"""Files of cells, csv and tab-separated: which are numbers or lists is told by the cells themselves."""

import csv
import json
from collections.abc import Collection, Iterable, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from pipeline.columns import Columns, Rows, read_lines
from pipeline.errors import PipelineError


def read_csv(path: Path, keep_text: Collection[str], strings: Collection[str]) -> Rows:
    """Reads a csv file."""
    # The limit is the whole process's and 131,072 characters at first: too few for documents.
    csv.field_size_limit(1 << 30)
    reader = csv.reader((line for _, line in read_lines(path)), strict=True)
    return _read_records(path, _csv_records(path, reader), keep_text, strings)


def _csv_records(path: Path, reader: Any) -> Iterator[tuple[int, list[str]]]:
    start = 1
    try:
        for cells in reader:
            yield start, cells
            start = reader.line_num + 1
    except csv.Error as error:
        raise PipelineError(
            f"{path.name}:{start}: not a csv record ({error}); quote cells with commas, quotes or newlines"
        ) from None


def read_tsv(path: Path, keep_text: Collection[str], strings: Collection[str]) -> Rows:
    """Reads tab-separated cells, in which a quote is a character, unless a csv writer quoted them."""
    quoted = next((line.startswith('"') for _, line in read_lines(path) if line.strip()), False)
    if quoted:
        reader = csv.reader((line for _, line in read_lines(path)), delimiter="\t", strict=True)
        return _read_records(path, _csv_records(path, reader), keep_text, strings)
    cells = (
        (number, [_unquote(cell) for cell in line.split("\t")] if line else [])
        for number, line in ((number, line.rstrip("\r\n")) for number, line in read_lines(path))
    )
    return _read_records(path, cells, keep_text, strings)


def _unquote(cell: str) -> str:
    """Takes off the quotes of a csv writer, who puts them on where the cell itself holds quotes, doubled.

    >>> _unquote('"[""a""]"'), _unquote('"so be it"'), _unquote('"open')
    ('["a"]', '"so be it"', '"open')
    """
    inner = cell[1:-1]
    if cell[:1] != '"' or cell[-1:] != '"' or '""' not in inner or '"' in inner.replace('""', ""):
        return cell
    return inner.replace('""', '"')


def _read_records(
    path: Path,
    records: Iterator[tuple[int, list[str]]],
    keep_text: Collection[str],
    strings: Collection[str],
) -> Rows:
    number, header = next(((number, cells) for number, cells in records if cells), (1, []))
    if len(set(header)) < len(header) or "" in header:
        raise PipelineError(
            f"{path.name}:{number}: a column name is empty or there twice; name each column once"
        )
    columns = Columns(path.name, header)
    for number, cells in _without_blank_lines(records, len(header)):
        if len(cells) != len(header):
            raise PipelineError(
                f"{path.name}:{number}: {len(cells)} cells where the header has {len(header)}; "
                "check separators and quotes"
            )
        columns.add(number, cells)
    rows = columns.finish()
    typed, guessed = dict[str, pa.ChunkedArray](), dict[str, pa.DataType]()
    for name in rows.table.column_names:
        typed[name] = rows.table[name]
        if name not in keep_text:
            typed[name], guessed[name] = _typed(rows, name, as_text=name in strings)
    return Rows(file=rows.file, table=pa.table(typed), lines=rows.lines, guessed=guessed)


def _without_blank_lines(
    records: Iterable[tuple[int, list[str]]], n_columns: int
) -> Iterator[tuple[int, list[str]]]:
    """Drops blank lines; of one column they are empty cells, but for those at the file's end."""
    blank: list[int] = []
    for number, cells in records:
        if cells:
            yield from ((line, [""]) for line in blank)
            blank.clear()
            yield number, cells
        elif n_columns == 1:
            blank.append(number)


def _typed(rows: Rows, name: str, *, as_text: bool) -> tuple[pa.ChunkedArray, pa.DataType]:
    """A column of cells as integers, floats or lists where all its cells are; else as it is."""
    cells = rows.table[name]
    filled = pc.if_else(pc.equal(cells, ""), pa.scalar(None, pa.string()), cells)
    if rows.table.num_rows == 0 or filled.null_count == len(filled):
        return cells, pa.null()
    if as_text:
        return filled, pa.string()
    found = _parse_lists(rows, name, filled) if pc.all(pc.starts_with(filled, "[")).as_py() else None
    found = _numbers(filled) if found is None else found
    return found, found.type


def _numbers(cells: pa.ChunkedArray) -> pa.ChunkedArray:
    """Cells as integers or floats where all of them are; else as they are."""
    try:
        numbers = cells.cast(pa.int64())
        # A code such as 01 is no number: read as one it would be the same as 1.
        return numbers if numbers.cast(pa.string()).equals(cells) else cells
    except pa.ArrowInvalid:
        pass
    try:
        return cells.cast(pa.float64())
    except pa.ArrowInvalid:
        return cells


def _parse_lists(rows: Rows, name: str, cells: pa.ChunkedArray) -> pa.ChunkedArray | None:
    """The cells as lists; None where the first is a text that happens to start with a bracket."""
    parsed = Columns(rows.file, [name])
    row = 0
    for chunk in cells.chunks:
        for cell in chunk.to_pylist():
            try:
                parsed.add(0 if rows.lines is None else int(rows.lines[row]), [cell and json.loads(cell)])
            except json.JSONDecodeError as error:
                if row == 0:
                    return None
                raise PipelineError(
                    f"{rows.where(row)}: column {name!r}: not a JSON list ({error.msg}), as those before "
                    'are; write lists as ["a", "b"]'
                ) from None
            row += 1
    return parsed.finish().table[name]
