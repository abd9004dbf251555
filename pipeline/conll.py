"""CoNLL column files: a word a line with its tags, an empty line after each sentence."""

import re
from collections.abc import Collection
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pipeline.columns import Columns, Rows, read_lines
from pipeline.errors import PipelineError

IOB = re.compile(r"O|[BI]-.+", re.DOTALL)
"""What a tag of a span scheme looks like: outside, begin, inside."""


def read_conll(path: Path, keep_text: Collection[str], strings: Collection[str]) -> Rows:
    """Reads a CoNLL file; nothing in it is typed by its looks."""
    columns: Columns | None = None
    tabs, start, sentence = False, 0, list[list[str]]()

    def end_sentence() -> None:
        if sentence and columns is not None:
            columns.add(start, [list(column) for column in zip(*sentence, strict=True)])
            sentence.clear()

    for number, line in read_lines(path):
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
            columns = Columns(path.name, _conll_names(len(cells)))
        if len(cells) != len(columns.names) or "" in cells:
            raise PipelineError(
                f"{path.name}:{number}: {sum(map(bool, cells))} columns where the rows before have "
                f"{len(columns.names)}; give every word all columns, and end a sentence by an empty line"
            )
        start = start if sentence else number
        sentence.append(cells)
    end_sentence()
    rows = (columns or Columns(path.name, ["tokens"])).finish()
    table = {
        name: rows.table[name] if name == "tokens" else _to_iob2(rows.table[name])
        for name in rows.table.column_names
    }
    return Rows(file=rows.file, table=pa.table(table), lines=rows.lines)


def _is_comment(line: str, cells: list[str], columns: Columns | None, *, inside: bool) -> bool:
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
