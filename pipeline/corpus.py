"""Data in: a folder, a named task or a Hub id becomes splits of rows, with the columns that are the input.

Rows stay in Arrow, long tables in a mapped file, and are turned into Python objects only a batch at a time.
This module knows which columns are the input; what the other columns mean as labels is `pipeline.labels`'
business.
"""

import mmap
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from jaxtyping import Int32

from pipeline.columns import CHUNK_ROWS, Rows, describe, position
from pipeline.errors import PipelineError, nearest, said_by
from pipeline.mapped import in_file, let_go
from pipeline.quiet import HUB, quiet
from pipeline.readers import READERS, plain, read_class_names, read_files
from pipeline.tasks._base import PARQUET_BRANCH, Task, load_task, task_names

ORDER = ("train", "dev", "test")
"""The splits that come first, in this order; others follow by name."""

_OTHER_NAMES = {"validation": "dev", "valid": "dev"}

_HUB_ID = re.compile(r"(?P<id>[\w-][\w.-]*/[\w.-]+)(:(?P<config>[^/\\]+))?")

_TASK = re.compile(r"(?P<name>\w+(\.\w+)*)(:(?P<config>[^@/\\]+))?(@(?P<folder>.+))?")


@dataclass(frozen=True, kw_only=True)
class Split:
    """The rows of one split."""

    name: str
    table: pa.Table
    file: str = ""
    """What messages call the source of the rows; the split's name if empty."""

    lines: Int32[np.ndarray, " row"] | None = None
    """The line each row starts on, from 1; None where the source has no lines."""

    mapped: mmap.mmap | None = None
    """The file that a long table lies in."""

    def __len__(self) -> int:
        return self.table.num_rows

    def where(self, row: int) -> str:
        """The position of a row (counted from 0) as messages give it: ``train.jsonl:17``."""
        return position(self.file or self.name, self.lines, row)


@dataclass(frozen=True, kw_only=True)
class Corpus:
    """A data set: its splits, and which columns are the input. Either `text` or `words` is set."""

    name: str
    splits: dict[str, Split]
    """By name: train, dev and test first."""

    text: str | None = None
    """The column of whole texts."""

    text_pair: str | None = None
    """The column of the texts' second halves."""

    words: str | None = None
    """The column of lists of words."""

    options: str | None = None
    """The column of lists of texts, one of which is to be chosen; each makes a pair with the text."""

    class_names: dict[str, tuple[str, ...]] = field(default_factory=dict)
    """Names of the classes of integer columns, where the source or the task has them."""

    task: Task | None = None

    @property
    def inputs(self) -> tuple[str, ...]:
        """The columns that are the input."""
        return tuple(c for c in (self.text, self.text_pair, self.words, self.options) if c is not None)

    @property
    def columns(self) -> list[str]:
        """The columns of any split, in order of appearance."""
        return list(dict.fromkeys(c for split in self.splits.values() for c in split.table.column_names))

    def split(self, name: str) -> Split:
        """The split of that name.

        Raises:
            PipelineError: there is none.
        """
        if name not in self.splits:
            raise PipelineError(f"{self.name}: no split {name!r}: {nearest(name, self.splits)}")
        return self.splits[name]

    def release(self) -> None:
        """Lets go of the memory of tables that lie in files; they are read again when they are needed."""
        for split in self.splits.values():
            if split.mapped is not None:
                let_go(split.mapped)

    def texts(self, split: str, rows: slice = slice(None)) -> list[str] | list[list[str]]:
        """Inputs in row order: a string a row, or a list of words a row where `words` is set."""
        return self._values(split, self.words or self.text or "", rows)

    def pairs(self, split: str, rows: slice = slice(None)) -> list[str] | list[list[str]] | None:
        """The second texts in row order, or None where the corpus has none; with options, a list a row."""
        column = self.options or self.text_pair
        return None if column is None else self._values(split, column, rows)

    def reader(self, split: str) -> Callable[[int, int], tuple[list[Any], list[Any] | None]]:
        """What reads rows of a split, from one number up to another, as the tokenizer takes them.

        Raises:
            PipelineError: there is no such split.
        """
        self.split(split)

        def read(first: int, stop: int) -> tuple[list[Any], list[Any] | None]:
            rows = slice(first, stop)
            return self.texts(split, rows), self.pairs(split, rows)

        return read

    def _values(self, split: str, column: str, rows: slice) -> list[Any]:
        start, stop, step = rows.indices(len(self.split(split)))
        if step != 1:
            raise ValueError(f"rows are read in order, a step of {step} was asked")
        return self.split(split).table[column].slice(start, max(0, stop - start)).to_pylist()


def load_corpus(
    data: str,
    *,
    text: str | None = None,
    text_pair: str | None = None,
    words: str | None = None,
    options: str | None = None,
    revision: str | None = None,
) -> Corpus:
    """Loads a data set.

    Args:
        data: a folder of files named after their splits; a task, ``NAME`` or ``NAME:CONFIG``; the same with
            local files of the task's columns, ``NAME@FOLDER``; or a Hub id, ``org/name`` or
            ``org/name:config``. A folder that is there wins over a task of its name.
        text: the column of texts, if it is not called ``text``.
        text_pair: the column of second texts, if it is not called ``text_pair``.
        words: the column of lists of words, if it is not called ``tokens``.
        options: the column of lists of texts to choose from, for multiple choice.
        revision: the Hub's branch, tag or commit, instead of the task's own.

    Raises:
        PipelineError: there is no such data, a file or a row is bad, or no column is an input.
    """
    if words is not None and (text is not None or text_pair is not None):
        raise PipelineError(
            "both --words and --text were given: the input is either words or text, drop one"
        )
    if options is not None and (words is not None or text_pair is not None):
        raise PipelineError(
            "--options and --words or --text-pair were given: the options are the text's second half, "
            "drop one"
        )
    task, found = _find(data, {c for c in (text, text_pair) if c}, revision)
    splits, class_names = _named_splits(found, data, task)
    if text is words is text_pair is options is None and task is not None:
        text, text_pair, words, options = task.text, task.text_pair, task.words, task.options
    inputs = _choose_inputs(next(iter(splits.values())), text, text_pair, words, options)
    for split in splits.values():
        for role, column in inputs.items():
            if column is not None:
                _check_input(split, role, column)
    splits = {name: _in_file(split) for name, split in splits.items()}
    return Corpus(name=data, splits=splits, class_names=class_names, task=task, **inputs)


def _in_file(split: Split) -> Split:
    table, mapped = in_file(split.table)
    return replace(split, table=table, mapped=mapped)


def _find(data: str, keep_text: set[str], revision: str | None) -> tuple[Task | None, dict[str, Rows]]:
    """The task, if DATA names one, and the rows of each split under the split's name in the source."""
    if Path(data).expanduser().is_dir():
        return None, _read_folder(Path(data).expanduser(), keep_text)
    named = _TASK.fullmatch(data)
    if named and (named["name"] in task_names() or _is_module(named["name"])):
        task = load_task(named["name"])
        if named["folder"] is not None:
            rows = _read_folder(Path(named["folder"]).expanduser(), keep_text | _text_columns(task))
        else:
            config = task.hub_config(named["name"], named["config"])
            rows = _read_hub(task.hub, config, revision or task.revision)
        return task, _selected(rows, task, named["config"], data)
    if Path(data).expanduser().is_file():
        raise PipelineError(f"{data} is a file: give the folder that holds it")
    hub = _HUB_ID.fullmatch(data)
    if hub:
        return None, _read_hub(hub["id"], hub["config"], revision)
    if named and named["folder"] is None:
        raise PipelineError(f"no folder and no task {data!r}: {nearest(named['name'], task_names())}")
    raise PipelineError(
        f"no folder {data!r}: give a folder with {_looked_for()}, a task ({', '.join(task_names())}) "
        "or a Hub id org/name"
    )


def _selected(found: dict[str, Rows], task: Task, value: str | None, data: str) -> dict[str, Rows]:
    """The rows whose `select` column has the value asked for; splits without such a row are left out."""
    if task.select is None or value is None:
        return found
    kept, values = {}, set()
    for split, rows in found.items():
        if task.select not in rows.table.column_names:
            raise PipelineError(
                f"{rows.file}: no column {task.select!r}, which tells what {data!r} asks for"
            )
        column = rows.table[task.select]
        values |= set(pc.unique(column).to_pylist())
        mask = pc.fill_null(pc.equal(column, value), False)
        if pc.any(mask).as_py():
            lines = None if rows.lines is None else rows.lines[mask.to_numpy()]
            kept[split] = replace(rows, table=rows.table.filter(mask), lines=lines)
    if not kept:
        raise PipelineError(
            f"{data}: no row has {task.select} {value!r}: {nearest(value, map(str, values))}"
        )
    return kept


def _is_module(name: str) -> bool:
    """Whether a name can be the dotted path of a task outside the project, and is not a missing file's."""
    return "." in name and Path(name).suffix.lower() not in READERS


def _text_columns(task: Task) -> set[str]:
    """The columns of a task's source that stay text in a csv file, whatever their cells look like."""
    texts = {task.text, task.text_pair, *task.parse_from} - {None}
    return {c for c in texts if c} | {old for old, new in task.renames.items() if new in texts}


def _looked_for() -> str:
    return f"train|dev|validation|test files ({', '.join(READERS)})"


def _read_folder(folder: Path, keep_text: set[str]) -> dict[str, Rows]:
    try:
        paths = sorted(path for path in folder.iterdir() if _is_data(path))
        folders = sorted(path.name for path in folder.iterdir() if path.is_dir())
    except OSError as error:
        raise PipelineError(f"{folder}: cannot be read ({said_by(error)}); check the path") from error
    if not paths:
        inside = f"; it holds the folders {', '.join(folders[:8])}: give one of them" if folders else ""
        raise PipelineError(f"{folder}: no data file found, looked for {_looked_for()}{inside}")
    by_split: dict[str, Path] = {}
    for path in paths:
        split = _OTHER_NAMES.get(path.stem, path.stem)
        if split in by_split:
            raise PipelineError(
                f"{folder}: two files for split {split!r}, {by_split[split].name} and {path.name}; keep one"
            )
        by_split[split] = path
    return read_files(by_split, keep_text=keep_text | {"text", "text_pair"})


def _is_data(path: Path) -> bool:
    """Whether a file holds rows. A .txt file does only if named after a split: it may be a read-me."""
    if path.name.startswith(".") or path.suffix.lower() not in READERS or not path.is_file():
        return False
    return path.suffix.lower() != ".txt" or path.stem.startswith(("train", "dev", "valid", "test"))


def _read_hub(hub: str, config: str | None, revision: str | None) -> dict[str, Rows]:
    import datasets  # here because it takes seconds to import, and only the Hub needs it

    on_parquet_branch = revision == PARQUET_BRANCH
    asked = f"Hub data set {hub!r}" + (f", config {config!r}" if config else "")
    try:
        with quiet(*HUB):
            loaded = datasets.load_dataset(
                hub,
                name=None if on_parquet_branch else config,
                data_dir=config if on_parquet_branch else None,
                revision=revision,
            )
    except (
        Exception
    ) as error:  # whatever network, Hub and files have to say: its classes are many and change
        said = next(iter(str(error).splitlines()), type(error).__name__)
        hint = "check the id, the config and the network, or give a folder of local files"
        if "scripts are no longer supported" in said:
            hint = f"its parquet copy may load: --revision {PARQUET_BRANCH}"
        raise PipelineError(f"no folder and no {asked}: {said.rstrip('.')}; {hint}") from error
    rows = {}
    for split, part in loaded.items():
        if part.num_rows == 0:
            raise PipelineError(f"{asked}: split {split!r} has no rows; name another config or revision")
        rows[str(split)] = Rows(
            file=f"{hub}/{split}",
            table=plain(part.with_format("arrow")[:]),
            class_names=read_class_names(part.features.to_dict()),
        )
    return rows


def _named_splits(
    found: Mapping[str, Rows], data: str, task: Task | None
) -> tuple[dict[str, Split], dict[str, tuple[str, ...]]]:
    """Brings splits and columns to the names they have here, and the splits into order."""
    splits: dict[str, Split] = {}
    class_names: dict[str, tuple[str, ...]] = {}
    other_names = {**_OTHER_NAMES, **(task.splits if task else {})}
    for source, rows in found.items():
        name = other_names.get(source, source)
        if name in splits:
            raise PipelineError(
                f"{data}: two sources for split {name!r}, the second is {source!r}; keep one"
            )
        renamed = _renames(rows.table.column_names, task)
        table = rows.table.rename_columns([renamed.get(c, c) for c in rows.table.column_names])
        splits[name] = Split(name=name, table=table, file=rows.file, lines=rows.lines)
        if task is not None:
            splits[name] = _parsed(splits[name], task)
        class_names |= {renamed.get(c, c): names for c, names in rows.class_names.items()}
    if task is not None:
        class_names = {c: t.names for c, t in task.targets.items() if t.names} | class_names
    ordered = sorted(splits, key=lambda s: (ORDER.index(s) if s in ORDER else len(ORDER), s))
    return {name: splits[name] for name in ordered}, class_names


def _renames(columns: Iterable[str], task: Task | None) -> dict[str, str]:
    """The renames of a task that apply: local files may have the columns by their names here already."""
    there = set(columns)
    renames = task.renames if task else {}
    return {old: new for old, new in renames.items() if old in there and new not in there}


def _parsed(split: Split, task: Task) -> Split:
    """Replaces the columns that the task parses by what it makes of them, unless that is there already."""
    columns = set(split.table.column_names)
    made_already = {*_inputs_of(task), *task.targets} <= columns or task.words in columns
    if task.parse is None or made_already or not set(task.parse_from) <= columns:
        return split
    made: dict[str, list[Any]] = {}
    row = 0
    for batch in split.table.select(task.parse_from).to_batches(max_chunksize=CHUNK_ROWS):
        results = []
        for values in batch.to_pylist():
            if any(value is None for value in values.values()):
                raise PipelineError(
                    f"{split.where(row)}: null in {', '.join(task.parse_from)}; fill or drop the row"
                )
            results.append(task.parse(values))
            row += 1
        for name in results[0]:
            made.setdefault(name, []).extend(r[name] for r in results)
    kept = split.table.drop_columns(list(task.parse_from))
    for name, values in made.items():
        kind = pa.infer_type(values)
        # A list without an entry in any row; what it would hold is text in every task but those of numbers.
        kind = pa.list_(pa.string()) if kind == pa.list_(pa.null()) else kind
        kept = kept.append_column(name, pa.chunked_array([pa.array(values, kind)]))
    return Split(name=split.name, table=kept, file=split.file, lines=split.lines)


def _inputs_of(task: Task) -> set[str]:
    return {c for c in (task.text, task.text_pair, task.words, task.options) if c}


def _choose_inputs(
    split: Split, text: str | None, text_pair: str | None, words: str | None, options: str | None
) -> dict[str, str | None]:
    """The input columns by role: those asked for, else ``tokens``, else ``text`` and ``text_pair``."""
    columns = split.table.column_names
    if options is not None:
        return {"words": None, "text": text or "text", "text_pair": None, "options": options}
    if words is None and text is None and text_pair is None:
        if "tokens" in columns:
            words = "tokens"
        elif "text" not in columns:
            parted_otherwise = len(columns) == 1 and any(sign in columns[0] for sign in ";\t|")
            cure = "part the cells by commas" if parted_otherwise else "name the input by --words or --text"
            raise PipelineError(
                f"{split.file}: neither a column 'tokens' nor 'text', found {', '.join(columns)}; {cure}"
            )
    if words is not None:
        return {"words": words, "text": None, "text_pair": None}
    text = text or "text"
    if text_pair is None and "text_pair" in columns and text != "text_pair":
        text_pair = "text_pair"
    return {"words": None, "text": text, "text_pair": text_pair}


def _check_input(split: Split, role: str, column: str) -> None:
    """Checks that an input column is there, of the right type, and without nulls; empty texts are fine."""
    if column not in split.table.column_names:
        raise PipelineError(
            f"{split.file or split.name}: no column {column!r}: "
            f"{nearest(column, split.table.column_names)}; name the input by --{role.replace('_', '-')}"
        )
    values = split.table[column]
    if values.null_count:
        row = pc.index(pc.is_null(values), True).as_py()
        raise PipelineError(
            f"{split.where(row)}: column {column!r}: null; give a value, an empty one if need be"
        )
    lists = role in ("words", "options")
    expected = pa.list_(pa.string()) if lists else pa.string()
    if role == "words" and values.type == pa.list_(pa.null()):  # every list is empty
        return
    if not values.type.equals(expected):
        raise PipelineError(
            f"{split.where(0)}: column {column!r}: {describe(values.type)} where {describe(expected)} "
            f"was expected; change the file, or name another column by --{role.replace('_', '-')}"
        )
    if lists and (flat := pc.list_flatten(values)).null_count:
        parents = pc.list_parent_indices(values).filter(pc.is_null(flat))
        raise PipelineError(
            f"{split.where(parents[0].as_py())}: column {column!r}: a word is null; give a string"
        )
    if role == "options" and pc.min(pc.list_value_length(values)).as_py() < 1:
        row = pc.index(pc.list_value_length(values), 0).as_py()
        raise PipelineError(f"{split.where(row)}: column {column!r}: no option; give each row one or more")
