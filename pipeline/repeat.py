"""The same extraction asked for again: told by its data, its encoder's files and its choices.

Neither is the encoder loaded for that, nor is the text tokenized, nor a byte of the states read.
"""

import hashlib
import json
import time
from collections.abc import Mapping
from typing import Any

import pyarrow as pa

from cache import receipt
from cache.bank import find_bank
from cache.place import place
from pipeline.checkpoint import files_sha256
from pipeline.corpus import Corpus
from pipeline.encoder import open_encoder
from pipeline.extract import Extraction, extract, report
from pipeline.versions import versions

_ROWS = 2**16
"""Rows that are hashed at a time, wherever the table's own chunks end."""

_DECISIVE = ("keep", "dtype", "layers", "codec", "max_length", "seed", "targets", "maskings")


def extract_once(
    corpus: Corpus, opening: Mapping[str, Any], store: str, *, repair: bool = False, **choices: Any
) -> Extraction:
    """Fills a bank as `extract` does; does nothing where the same command has filled it from the same data.

    A bank whose files are not as they were left is read whole, and what is damaged is made anew.

    Args:
        corpus: the data.
        opening: what opens the encoder, see `pipeline.encoder.open_encoder`.
        store: folder or URL of the bank.
        repair: read every byte of what is there.
        choices: of `extract`.

    Raises:
        PipelineError: the data, the encoder or a choice is wrong.
        StoppedError: Ctrl-C was pressed.
        CacheError: the bank cannot be written, or is of another making.
    """
    began = time.perf_counter()
    asked = tell(corpus, opening, choices)
    bank = find_bank(store) if asked is not None else None
    if asked and bank and not repair and receipt.is_for(bank.attrs, asked):
        with place(store).writing():
            as_left = receipt.fits(bank.attrs, place(store))
        if as_left:
            targets = receipt.targets(bank.attrs)
            return report(bank, began, targets=targets, batch_tokens=choices.get("batch_tokens"))
    encoder = open_encoder(**opening, store=store, words=corpus.words is not None)
    return extract(corpus, encoder, store, repair=repair, asked=asked, **choices)


def tell(corpus: Corpus, opening: Mapping[str, Any], choices: Mapping[str, Any]) -> str | None:
    """A digest of all that decides a bank, apart from the device.

    None where that cannot be known without the encoder: its code comes from elsewhere, or its files are not
    on this machine.

    Args:
        corpus: the data.
        opening: what opens the encoder.
        choices: of `extract`.
    """
    files = files_sha256(opening["name"], opening.get("revision"))
    if opening.get("trust_remote_code") or files is None:
        return None
    packages = versions()
    told = {
        "encoder": files,
        "precision": opening.get("precision", "auto"),
        "data": {name: _rows_sha256(split.table) for name, split in corpus.splits.items()},
        "inputs": [corpus.text, corpus.text_pair, corpus.words, corpus.options],
        "class_names": {name: list(names) for name, names in corpus.class_names.items()},
        "targets": {} if corpus.task is None else {k: str(v) for k, v in corpus.task.targets.items()},
        "choices": {name: choices.get(name) for name in _DECISIVE},
        "versions": {name: packages[name] for name in ("layerbank", "transformers", "tokenizers")},
    }
    corpus.release()
    return hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()


def _rows_sha256(table: pa.Table) -> str:
    """Digest of a table's columns and rows."""
    digest = hashlib.sha256(str(table.schema).encode())
    for first in range(0, len(table), _ROWS):
        for batch in table.slice(first, _ROWS).combine_chunks().to_batches():
            digest.update(batch.serialize())
    return digest.hexdigest()
