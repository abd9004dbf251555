"""What makes two banks the same: the weights, the tokenizer, the rows and the choices that shape them.

The device, the size of the forward batches, compression, the number of workers and the name under
which the encoder was found do not take part.
"""

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import UInt64
from numpy import ndarray

from cache.layout import FORMAT_VERSION, Recipe

_IRRELEVANT = ("batch_tokens", "codec")


def hash_texts(texts: Iterable[object]) -> UInt64[ndarray, " row"]:
    """A 64-bit hash of each row's text: a string, a list of words, or a pair of them."""
    digests = [hashlib.blake2b(_canonical(text), digest_size=8).digest() for text in texts]
    return np.frombuffer(b"".join(digests), dtype="<u8").astype(np.uint64)


def rows_fingerprint(text_hash: UInt64[ndarray, " row"]) -> str:
    """Fingerprint of a split's rows, in source order."""
    return hashlib.sha256(text_hash.astype("<u8").tobytes()).hexdigest()


def bank_fingerprint(
    recipe: Recipe, rows: Mapping[str, str], grown: Mapping[str, Sequence[Any]] | None = None
) -> str:
    """Fingerprint of a bank: of its recipe and of the rows of its splits.

    Args:
        recipe: what the bank is made with.
        rows: the fingerprint of each split's rows.
        grown: for a split that no single deal of these rows makes, see `dealt_fingerprint`.
    """
    attrs: dict[str, Any] = recipe.to_attrs()
    kept = {name: value for name, value in attrs.items() if name not in _IRRELEVANT}
    if recipe.precision == "float32":  # so that banks from before it was a choice keep their fingerprint
        del kept["precision"]
    if recipe.rounded is None:  # so that banks from before conversions keep their fingerprint
        del kept["rounded"]
    encoder = {k: v for k, v in attrs["encoder"].items() if k not in ("name", "revision")}
    whole = {**kept, "encoder": encoder, "format_version": FORMAT_VERSION, "rows": dict(rows)}
    if grown:
        whole["grown"] = dict(grown)
    return hashlib.sha256(_canonical(whole)).hexdigest()


def dealt_fingerprint(text_hash: UInt64[ndarray, " example"], generations: Sequence[Any]) -> list[Any]:
    """What tells the deal of a split that has grown: its texts in dealt order, and its generations."""
    return [rows_fingerprint(text_hash), list(generations)]


def _canonical(value: object) -> bytes:
    return json.dumps(value, sort_keys=True, ensure_ascii=False, separators=(",", ":")).encode(
        "utf-8", "surrogatepass"
    )
