"""Columns of labels as numpy: classes, tags of words, and numbers, checked before anything trains on them.

This module knows what a column means as a target. It knows no file format and no model.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from jaxtyping import Int

from cache.targets import Target as BankTarget
from cache.targets import TargetKind
from pipeline.answers import Answers, grouped, kind_of, locate, packed, read_answers, read_choices
from pipeline.conll import IOB
from pipeline.corpus import Corpus, Split
from pipeline.errors import PipelineError, nearest
from pipeline.tasks._base import Target

MAX_CLASSES = 1_000
"""A column with more different values is taken for ids or free text, unless it is asked for by name."""

LOOK_AT_ROWS = 100
"""Lists that fit the words in none of the first rows, this many, are taken for something else than tags."""

MISSING = -1
"""The label of a row that has none; a float has NaN."""


@dataclass(frozen=True, kw_only=True)
class Labels:
    """One target of a corpus."""

    name: str
    kind: TargetKind

    names: tuple[str, ...]
    """Names of the classes or tags in the order of their numbers; empty for other kinds."""

    values: dict[str, np.ndarray]
    """By split: int32 an example; tags int32 a word, example after example; floats float32 an example;
    choices int32 an option. None for spans, which a tokenizer must find first."""

    answers: dict[str, Answers] = field(default_factory=dict)
    """By split: the answers of a span target."""

    extra: dict[str, dict[str, np.ndarray]] = field(default_factory=dict)
    """By split: what the bank keeps beside the target, which scores of answers need."""

    cut: dict[str, int] = field(default_factory=dict)
    """By split: rows whose answer stands in no token, most of them because it was cut off."""

    metric: str | None = None
    """The score a named task reports; None elsewhere."""

    settings: dict[str, Any] = field(default_factory=dict)
    """Options that a decoder of it starts with."""

    def target(self, split: str) -> BankTarget:
        """The labels of one split as a bank takes them, in row order."""
        return BankTarget(
            name=self.name,
            kind=self.kind,
            names=self.names,
            values=self.values[split],
            metric=self.metric,
            extra=self.extra.get(split, {}),
            settings=self.settings,
        )


def locate_labels(corpus: Corpus, labels: Labels, *, tokenizer: Any, max_length: int) -> Labels:
    """The labels with the answers of a span target found in the tokens; others as they are.

    Raises:
        PipelineError: the tokenizer has no offsets.
    """
    if labels.kind != "span":
        return labels
    found = {
        split: locate(corpus, split, answers, tokenizer=tokenizer, max_length=max_length)
        for split, answers in labels.answers.items()
    }
    return replace(
        labels,
        values={split: one.values for split, one in found.items()},
        extra={split: one.extra for split, one in found.items()},
        cut={split: one.cut for split, one in found.items()},
    )


class NotATargetError(PipelineError):
    """A column that cannot be a target, though no row of it is bad."""


class UnseenClassError(NotATargetError):
    """A row of dev or test has a class that train has not; the text says where."""


def read_labels(corpus: Corpus, column: str) -> Labels:
    """The labels of one column.

    Raises:
        PipelineError: there is no such column, it cannot be a target, or a row of it is bad.
    """
    if column in corpus.inputs:
        raise PipelineError(
            f"{corpus.name}: column {column!r} is the input, it cannot be the target; name another"
        )
    if column not in corpus.columns:
        others = [c for c in corpus.columns if c not in corpus.inputs]
        raise PipelineError(f"{corpus.name}: no column {column!r}: {nearest(column, others)}")
    try:
        return _read(corpus, column, asked=True)
    except UnseenClassError:
        raise
    except NotATargetError as error:
        raise PipelineError(f"{corpus.name}: column {column!r} cannot be a target: {error}") from error


def find_labels(corpus: Corpus) -> tuple[list[Labels], dict[str, str]]:
    """The labels of every column that can be a target.

    Returns:
        The labels, and for each other column the reason why it is none.

    Raises:
        PipelineError: a column is a target but a row of it is bad.
    """
    found: list[Labels] = []
    reasons: dict[str, str] = {}
    declared = corpus.task.targets.values() if corpus.task else ()
    scoring = {name for target in declared for name in (*target.grouped_by, target.option_texts)}
    for column in corpus.columns:
        if column in scoring - {*corpus.inputs}:
            reasons[column] = "it tells how another column is scored"
            continue
        if column in {*corpus.inputs, "text", "text_pair"}:
            reasons[column] = "it is the input" if column in corpus.inputs else "it is text"
            continue
        try:
            found.append(_read(corpus, column, asked=False))
        except NotATargetError as error:
            reasons[column] = str(error)
    return found, reasons


@dataclass(frozen=True, kw_only=True)
class _Values:
    """A column's values in one split: one a row, or those of all its lists, one after the other."""

    column: str
    split: Split
    flat: pa.ChunkedArray
    lists: pa.ChunkedArray | None = None

    def where(self, value: int) -> str:
        """The position of a value, as messages start with it."""
        row = value if self.lists is None else pc.list_parent_indices(self.lists)[value].as_py()
        return f"{self.split.where(row)}: column {self.column!r}"


def _read(corpus: Corpus, column: str, *, asked: bool) -> Labels:
    target = corpus.task.targets.get(column) if corpus.task else None
    columns = _values(corpus, column)
    metric = target.metric if target else None
    of_questions = kind_of(corpus, column, target.kind if target else None, asked=asked)
    if of_questions == "choice":
        choices = read_choices(corpus, column)
        beside = _beside(corpus, target)
        return Labels(
            name=column, kind="choice", names=(), values=dict(choices), metric=metric, extra=beside
        )
    if of_questions == "span":
        answers = read_answers(corpus, column)
        return Labels(name=column, kind="span", names=(), values={}, answers=answers, metric=metric)
    kind = _kind(corpus, columns)
    if target is not None and target.kind != kind:
        whole = all(pa.types.is_integer(values.flat.type) for values in columns.values())
        if target.kind != "float" or not whole:
            raise PipelineError(
                f"{corpus.name}: column {column!r} holds values of kind {kind!r}, the task's record says "
                f"{target.kind!r}; use the task's own columns"
            )
        kind = "float"
    if kind == "float":
        floats = {name: _floats(split, columns.get(name)) for name, split in corpus.splits.items()}
        if target is not None and target.missing is not None:
            floats = {name: np.where(v == target.missing, np.nan, v) for name, v in floats.items()}
        return Labels(name=column, kind=kind, names=(), values=floats, metric=metric)
    if kind == "tags":
        _check_lengths(corpus, columns, asked=asked or target is not None)
        columns = {name: replace(v, flat=pc.list_flatten(v.lists)) for name, v in columns.items()}
    names, columns = _names(corpus, columns, kind, target, asked=asked or target is not None)
    codes = {
        name: _codes(corpus, split, columns.get(name), kind, names) for name, split in corpus.splits.items()
    }
    beside = _beside(corpus, target)
    return Labels(name=column, kind=kind, names=names, values=codes, metric=metric, extra=beside)


def _beside(corpus: Corpus, target: Target | None) -> dict[str, dict[str, np.ndarray]]:
    """By split, what a named task's scores of questions need; nothing where the files lack the columns."""
    if target is None or not (target.grouped_by or target.option_texts):
        return {}
    needed = {*target.grouped_by, *([target.option_texts] if target.option_texts else [])}
    having = {n: s.table for n, s in corpus.splits.items() if needed <= set(s.table.column_names)}
    if target.option_texts is not None:
        return {name: packed(table[target.option_texts].to_pylist()) for name, table in having.items()}
    keys = {name: [table[c].to_pylist() for c in target.grouped_by] for name, table in having.items()}
    return {name: grouped(list(zip(*columns, strict=True))) for name, columns in keys.items()}


def _values(corpus: Corpus, column: str) -> dict[str, _Values]:
    """The column in the splits that have it and where not every value is null."""
    found = {}
    for name, split in corpus.splits.items():
        values = split.table[column] if column in split.table.column_names else None
        if values is not None and values.null_count < len(values):
            lists = values if pa.types.is_list(values.type) else None
            found[name] = _Values(column=column, split=split, flat=values, lists=lists)
    return found


def _kind(corpus: Corpus, columns: Mapping[str, _Values]) -> Literal["class", "tags", "float"]:
    """What a column can be by the types of its values, which must agree over the splits."""
    kinds: dict[str, str] = {}
    for name, values in columns.items():
        kinds.setdefault(_family(values.flat.type), name)
    if not kinds:
        raise NotATargetError("it has no value in any row")
    if set(kinds) == {"integers", "floats"}:
        return "float"
    if len(kinds) > 1:
        (one, here), (other, there), *_ = kinds.items()
        raise NotATargetError(f"it holds {one} in {here} and {other} in {there}; make them one type")
    kind = next(iter(kinds))
    if kind in {"strings", "integers", "booleans"}:
        return "class"
    if kind == "floats":
        return "float"
    if kind not in {"lists of strings", "lists of integers"}:
        raise NotATargetError(f"{kind} are no labels: strings, numbers and lists of tags are")
    if corpus.words is None:
        raise NotATargetError("its values are lists, and the input is text: tags need a column of words")
    return "tags"


def _family(kind: pa.DataType) -> str:
    if pa.types.is_list(kind):
        return f"lists of {_family(kind.value_type)}"
    tests = {
        "strings": lambda t: pa.types.is_string(t) or pa.types.is_null(t),
        "integers": pa.types.is_integer,
        "booleans": pa.types.is_boolean,
        "floats": lambda t: pa.types.is_floating(t) or pa.types.is_decimal(t),
    }
    return next((name for name, test in tests.items() if test(kind)), f"values of type {kind}")


def _floats(split: Split, values: _Values | None) -> np.ndarray:
    if values is None:
        return np.full(len(split), np.nan, dtype=np.float32)
    return np.array(pc.cast(values.flat, pa.float32(), safe=False).to_numpy(), dtype=np.float32)


def _check_lengths(corpus: Corpus, columns: Mapping[str, _Values], *, asked: bool) -> None:
    """Every list is as long as its row's words; or, in a column nobody asked for, the lists are no tags."""
    for values in columns.values():
        words = _n_words(corpus, values.split)
        tags = pc.list_value_length(values.lists).fill_null(MISSING).to_numpy()
        wrong = (tags != words) & (tags != MISSING)
        looked_at = tags[:LOOK_AT_ROWS] != MISSING
        if not asked and looked_at.any() and wrong[:LOOK_AT_ROWS][looked_at].all():
            raise NotATargetError("its lists are not as long as the words")
        if wrong.any():
            row = int(wrong.argmax())
            raise PipelineError(
                f"{values.split.where(row)}: column {values.column!r}: {tags[row]} tags for "
                f"{words[row]} tokens; give every token one tag"
            )
        asked = True  # they are tags: from here on a wrong length is bad data


def _n_words(corpus: Corpus, split: Split) -> Int[np.ndarray, " example"]:
    return pc.list_value_length(split.table[corpus.words]).to_numpy()


def _names(
    corpus: Corpus,
    columns: dict[str, _Values],
    kind: Literal["class", "tags"],
    target: Target | None,
    *,
    asked: bool,
) -> tuple[tuple[str, ...], dict[str, _Values]]:
    """The names of the classes in the order of their numbers, and the columns as strings of these names."""
    known = corpus.class_names.get(next(iter(columns.values())).column, ())
    integers = all(pa.types.is_integer(values.flat.type) for values in columns.values())
    if known:
        columns = {name: _by_name(values, known) for name, values in columns.items()}
        names = known
    else:
        columns = {n: replace(v, flat=v.flat.cast(pa.string())) for n, v in columns.items()}
        naming = _naming(corpus, columns, target)
        if not asked and kind == "class":
            _check_variety(naming)
        found = {name for values in naming for name in pc.unique(values.flat).drop_null().to_pylist()}
        names = tuple(sorted(found, key=int if integers else None))
        if integers and "-1" not in found:  # how test sets of the Hub say that there is no label
            columns = {n: replace(v, flat=_null_where(v.flat, "-1")) for n, v in columns.items()}
    if kind == "tags" and _check_iob(columns):
        types = sorted({name[2:] for name in names if IOB.fullmatch(name) and name != "O"})
        names = ("O", *(f"{prefix}-{kind}" for kind in types for prefix in "BI"))
    return names, columns


def _null_where(values: pa.ChunkedArray, unwanted: str | int) -> pa.ChunkedArray:
    return pc.if_else(pc.equal(values, unwanted), pa.scalar(None, values.type), values)


def _by_name(values: _Values, names: tuple[str, ...]) -> _Values:
    """Integers as the names they stand for, and -1 as null; strings as they are."""
    if not pa.types.is_integer(values.flat.type):
        return replace(values, flat=values.flat.cast(pa.string()))
    numbers = _null_where(values.flat, MISSING)
    wrong = pc.or_(pc.less(numbers, 0), pc.greater_equal(numbers, len(names)))
    if pc.any(wrong).as_py():
        first = pc.index(wrong, True).as_py()
        raise PipelineError(
            f"{values.where(first)}: class {numbers[first].as_py()}, only 0 to {len(names) - 1} have "
            "names; correct the row"
        )
    taken = [pa.array(names).take(chunk) for chunk in numbers.chunks]
    return replace(values, flat=pa.chunked_array(taken, pa.string()))


def _naming(corpus: Corpus, columns: Mapping[str, _Values], target: Target | None) -> list[_Values]:
    """The columns whose values name the classes: train's; all if there is no train or the task says so."""
    if "train" not in corpus.splits or (target is not None and target.names_from == "all"):
        return list(columns.values())
    if "train" not in columns:
        raise NotATargetError("it has no value in train, where the classes are learned")
    return [columns["train"]]


def _check_variety(naming: list[_Values]) -> None:
    """Refuses constants, ids and free text."""
    rows = sum(len(values.flat) for values in naming)
    found = pc.unique(pa.chunked_array([c for v in naming for c in v.flat.chunks], pa.string())).drop_null()
    if len(found) == 1 < rows:
        raise NotATargetError(f"it is {found[0].as_py()!r} in every row that has it")
    if len(found) > MAX_CLASSES or 2 * len(found) > rows:
        raise NotATargetError(f"it has {len(found):,} different values in {rows:,} rows: ids or free text")


def _check_iob(columns: Mapping[str, _Values]) -> bool:
    """Whether the tags are IOB: all of them, or none."""
    found = {name: pc.unique(values.flat).drop_null().to_pylist() for name, values in columns.items()}
    others = {name: [tag for tag in tags if not IOB.fullmatch(tag)] for name, tags in found.items()}
    if not any(others.values()):
        return True
    if all(len(others[name]) == len(tags) for name, tags in found.items()):
        return False
    name = next(name for name in found if others[name])
    odd, values = others[name][0], columns[name]
    raise PipelineError(
        f"{values.where(pc.index(values.flat, odd).as_py())}: tag {odd!r} is not O, B-... or I-..., as "
        "other tags are; correct it, or rename all tags if they mark no spans"
    )


def _codes(
    corpus: Corpus, split: Split, values: _Values | None, kind: str, names: tuple[str, ...]
) -> Int[np.ndarray, " label"]:
    """Numbers of the names, one an example or one a word, and -1 where there is no label."""
    n_words = _n_words(corpus, split) if kind == "tags" else np.ones(len(split), dtype=np.int32)
    labels = np.full(int(n_words.sum()), MISSING, dtype=np.int32)
    if values is None:
        return labels
    found = pc.index_in(values.flat, value_set=pa.array(names, pa.string()))
    codes = found.fill_null(MISSING).to_numpy().astype(np.int32)
    unseen = (codes == MISSING) & pc.is_valid(values.flat).to_numpy()
    if unseen.any():
        first = int(unseen.argmax())
        where = "among its named classes" if values.column in corpus.class_names else "in train"
        raise UnseenClassError(
            f"{values.where(first)}: class {values.flat[first].as_py()!r} is not {where}; "
            "add a row of it to train, drop this row, or set its label to null"
        )
    has_label = True if values.lists is None else np.repeat(pc.is_valid(values.lists).to_numpy(), n_words)
    labels[has_label] = codes
    return labels
