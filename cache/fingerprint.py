"""What makes two banks the same: the weights, the tokenizer, the rows and the choices that shape them.

The device, the size of the forward batches, compression, the number of workers and the name under
which the encoder was found do not take part.
"""

import hashlib
import json
from collections.abc import Iterable, Mapping
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


def bank_fingerprint(recipe: Recipe, rows: Mapping[str, str]) -> str:
    """Fingerprint of a bank: of its recipe and of the rows of its splits."""
    attrs: dict[str, Any] = recipe.to_attrs()
    kept = {name: value for name, value in attrs.items() if name not in _IRRELEVANT}
    if recipe.rounded is None:  # so that banks from before conversions keep their fingerprint
        del kept["rounded"]
    encoder = {k: v for k, v in attrs["encoder"].items() if k not in ("name", "revision")}
    whole = {**kept, "encoder": encoder, "format_version": FORMAT_VERSION, "rows": dict(rows)}
    return hashlib.sha256(_canonical(whole)).hexdigest()


def _canonical(value: object) -> bytes:
    return json.dumps(value, sort_keys=True, ensure_ascii=False, separators=(",", ":")).encode(
        "utf-8", "surrogatepass"
    )
