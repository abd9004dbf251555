"""What is to be labelled, as the user gives it: texts, lines of a file, or rows with the data's columns."""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from pipeline.columns import Rows
from pipeline.errors import PipelineError, said_by
from pipeline.readers import read_file

_TABLES = (".jsonl", ".csv", ".parquet")
"""Files of rows with columns; a .tsv is text pairs, a line each."""


@runtime_checkable
class Reader(Protocol):
    """A run, as far as it tells what its inputs are."""

    @property
    def path(self) -> str:
        """Its folder."""

    @property
    def source(self) -> Any:
        """What it was trained on; has `columns`."""


def words_based(run: Reader) -> bool:
    """Whether a run was trained on lists of words."""
    return run.source.columns.get("words") is not None


@dataclass(frozen=True, kw_only=True)
class RawInputs:
    """Inputs to label, and how each is shown in the output."""

    texts: list[Any]  # strings or lists of words
    pairs: list[Any] | None
    shown: list[dict[str, Any]]


def read_inputs(run: Reader, texts: Sequence[str], file: str | None) -> RawInputs:
    """Reads what is to be labelled.

    Args:
        run: tells whether inputs are words, texts or pairs of texts.
        texts: given on the command line; words are cut at white space, a pair at its tab.
        file: rows in jsonl, csv or parquet with the columns of the bank, or one text a line; ``-`` is
            standard input.

    Raises:
        PipelineError: both or neither are given, the file cannot be read, or a row does not fit.
    """
    if bool(texts) == (file is not None):
        raise PipelineError("predict needs texts or --file, one of the two")
    if file is None:
        return _from_lines(run, texts)
    if file.endswith(_TABLES):
        return _from_table(run, file)
    if file.endswith(".json"):
        raise PipelineError(f"--file {file}: give rows as jsonl, or a file of one text a line")
    return _from_lines(run, _read_lines(file))


def _read_lines(file: str) -> list[str]:
    try:
        text = sys.stdin.read() if file == "-" else Path(file).read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise PipelineError(f"--file {file} cannot be read: {said_by(error)}") from error
    # Not `splitlines`: a text may hold a form feed or one of Unicode's line separators.
    return text.removesuffix("\n").split("\n") if text else []


def _from_lines(run: Reader, lines: Sequence[str]) -> RawInputs:
    if words_based(run):
        words = [line.split() for line in lines]
        return RawInputs(texts=words, pairs=None, shown=[{"tokens": row} for row in words])
    if run.source.columns.get("options") is not None:
        return _options_from_lines(run, lines)
    if run.source.columns.get("text_pair") is None:
        return RawInputs(texts=list(lines), pairs=None, shown=[{"text": line} for line in lines])
    halves = [line.split("\t") for line in lines]
    for number, half in enumerate(halves, start=1):
        if len(half) != 2:
            raise PipelineError(
                f"input {number}: {run.path} was trained on pairs: give the two texts with a tab between"
            )
    return RawInputs(
        texts=[half[0] for half in halves],
        pairs=[half[1] for half in halves],
        shown=[{"text": a, "text_pair": b} for a, b in halves],
    )


def _options_from_lines(run: Reader, lines: Sequence[str]) -> RawInputs:
    parts = [line.split("\t") for line in lines]
    for number, part in enumerate(parts, start=1):
        if len(part) < 2:
            raise PipelineError(
                f"input {number}: {run.path} chooses among options: give the text and the options with "
                "tabs between"
            )
    return RawInputs(
        texts=[part[0] for part in parts],
        pairs=[part[1:] for part in parts],
        shown=[{"text": part[0], "options": part[1:]} for part in parts],
    )


def _from_table(run: Reader, file: str) -> RawInputs:
    columns = run.source.columns
    rows = read_file(Path(file), keep_text=[c for c in columns.values() if c])
    for column in columns.values():
        if column is not None and column not in rows.table.column_names:
            found = ", ".join(rows.table.column_names)
            raise PipelineError(
                f"{file}: no column {column!r}, found {found}: {run.path} reads that column"
            )
    first = columns.get("words") or columns.get("text") or ""
    texts = rows.table[first].to_pylist()
    _check_types(rows, first, words=words_based(run))
    pair = columns.get("text_pair") or columns.get("options")
    pairs = None if pair is None else rows.table[pair].to_pylist()
    if pair is not None:
        _check_types(rows, pair, words=columns.get("options") is not None)
    shown = rows.table.select([c for c in columns.values() if c]).to_pylist()
    return RawInputs(texts=texts, pairs=pairs, shown=shown)


def _check_types(rows: Rows, column: str, *, words: bool) -> None:
    """Every value is a text, or a list of words."""
    for row, value in enumerate(rows.table[column].to_pylist()):
        fits = isinstance(value, list) and all(isinstance(word, str) for word in value)
        if not (fits if words else isinstance(value, str)):
            kind = "a list of words" if words else "a text"
            raise PipelineError(
                f"{rows.where(row)}: column {column!r}: {value!r} where {kind} was expected"
            )
