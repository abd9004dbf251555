"""Adds a column of labels to a bank that is there: the same rows, another task, no encoder."""

from dataclasses import replace
from typing import Any

import numpy as np

from cache import Bank, Split, Target
from cache.targets import reorder_extra, reorder_tags, write_target
from pipeline.checkpoint import load_tokenizer
from pipeline.corpus import Corpus, load_corpus
from pipeline.errors import PipelineError
from pipeline.extract import hash_rows
from pipeline.labels import Labels, locate_labels, read_labels
from pipeline.tokens import tokenizer_sha256


def load_labelled_corpus(
    bank: Bank, data: str, *, revision: str | None = None, **columns: str | None
) -> Corpus:
    """Loads a data set with the input columns of a bank, unless others are named.

    Args:
        bank: the bank.
        data: as `pipeline.corpus.load_corpus` takes it.
        revision: of the data on the Hub.
        columns: `text`, `text_pair`, `words` or `options`.

    Raises:
        PipelineError: the data cannot be read.
    """
    named: dict[str, str | None] = {name: c for name, c in columns.items() if c is not None}
    return load_corpus(data, revision=revision, **(named or bank.recipe.columns))


def label(bank: Bank, corpus: Corpus, column: str) -> dict[str, Any]:
    """Writes a column beside the states, for every split that has it.

    Args:
        bank: a complete bank.
        corpus: the same rows as the bank's, in the same order.
        column: the labels.

    Returns:
        What was written: target, kind, number of classes, splits.

    Raises:
        PipelineError: the rows are not the bank's, or the column cannot be a target.
        CacheError: the bank cannot be written.
    """
    if bank.recipe.keep == "masked":
        raise PipelineError(f"{bank.path}: a bank of --keep masked has chunks of text and takes no labels")
    labels = read_labels(corpus, column)
    if labels.kind == "span":
        labels = locate_labels(
            corpus, labels, tokenizer=_tokenizer_of(bank), max_length=bank.recipe.max_length
        )
    shared = [name for name in bank.splits if name in labels.values]
    if not shared:
        raise PipelineError(
            f"{corpus.name} and {bank.path} share no split with {column!r}: the bank has "
            f"{', '.join(bank.splits)}, the data {', '.join(labels.values)}"
        )
    for name in shared:
        _check_rows(bank.split(name), corpus)
    with bank.relabelled(column):
        for name in shared:
            write_target(bank.writable_split(name), _dealt(bank.split(name), labels))
    return {
        "store": bank.path,
        "target": column,
        "kind": labels.kind,
        "classes": len(labels.names),
        "splits": shared,
    }


def _tokenizer_of(bank: Bank) -> Any:
    """The tokenizer a bank was made with, which answers are found by; the encoder is not loaded."""
    encoder = bank.recipe.encoder
    tokenizer = load_tokenizer(encoder.name, encoder.revision, words=False, trust_remote_code=False)
    if tokenizer_sha256(tokenizer) != bank.recipe.tokenizer_sha256:
        raise PipelineError(
            f"the tokenizer at {encoder.name} is not the one {bank.path} was made with: put that one back"
        )
    return tokenizer


def _check_rows(split: Split, corpus: Corpus) -> None:
    found = hash_rows(corpus, split.name)
    if len(found) != split.n_examples:
        raise PipelineError(
            f"split {split.name}: {corpus.name} has {len(found)} rows, the bank {split.n_examples}: "
            "labels must come from the rows the bank was made from"
        )
    differing = np.flatnonzero(found[split.row] != split.text_hash)
    if len(differing):
        row = int(split.row[differing].min())
        raise PipelineError(
            f"{corpus.split(split.name).where(row)}: its text is not that of the bank's row {row}: "
            "labels must come from the rows the bank was made from, in their order"
        )


def _dealt(split: Split, labels: Labels) -> Target:
    """A split's labels in the bank's order."""
    values, target = labels.values[split.name], labels.target(split.name)
    target = replace(target, extra=reorder_extra(target.extra, split.row))
    if labels.kind not in ("tags", "choice"):
        return replace(target, values=values[split.row])
    n_words = np.empty_like(split.n_words)
    n_words[split.row] = split.n_words
    return replace(target, values=reorder_tags(values, n_words, split.row))
