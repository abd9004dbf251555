"""Fingerprints of what is learned from: a run is used again only while all it was made of is the same."""

import hashlib
import json

from cache import open_bank
from pipeline.content import target_content
from pipeline.corpus import Corpus

_ROWS = 4096
"""Rows that are held as Python's values at a time."""


def bank_content(store: str, target: str) -> list[object]:
    """Of a bank, with the labels of one target.

    Raises:
        CacheError: there is no whole bank, or the labels are damaged.
    """
    bank = open_bank(store)
    labels = {}
    for name in bank.splits:
        split = bank.split(name)
        if target in split.target_names():
            labels[name] = target_content(split.target(target))
    return [bank.fingerprint, labels]


def data_content(corpus: Corpus, target: str) -> str:
    """Of a data set's texts and one column of labels."""
    digest = hashlib.sha256()
    for name, split in corpus.splits.items():
        columns = [c for c in (*corpus.inputs, target) if c in split.table.column_names]
        digest.update(json.dumps([name, columns]).encode())
        for batch in split.table.select(columns).to_batches(_ROWS):
            for row in batch.to_pylist():
                digest.update(json.dumps(row, default=str).encode())
    return digest.hexdigest()
