"""The format of a bank: names, axes, data types, attribute keys. The one place that knows them.

``docs/bank-format.md`` is the normative text; this module is its form in code.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from enum import IntEnum
from typing import Any, Literal

from cache.errors import CacheError

FORMAT_VERSION = 1

STATES = "states"
TARGETS = "targets"
EXTRA = "extra"
"""Group of what a target needs beside its labels."""

OUTPUT_LAYER = "output_layer.safetensors"
"""File beside the splits of masked text: the encoder's output layer."""

SCALE, SHIFT, CLIPPED = "scale", "shift", "clipped"
"""Arrays of an int8 bank: group layer width, group layer width, block layer (see `cache.calibration`)."""

CALIBRATION = "calibration"
"""Root attribute of an int8 bank: the digest of scale and shift."""

STATES_AXES = ("layer", "token", "width")

GENERATIONS = "generations"
"""Attribute of a split that has grown: examples and blocks of the first deal and of each growth."""

GROWING = "growing"
"""Root attribute of a bank whose growth has not ended: the group that says what it becomes."""

RECEIPT = "receipt"
"""Root attribute of a complete bank: what it was asked for with (see `cache.receipt`)."""

TOKEN_ARRAYS = {"input_ids": "int32", "word_id": "int32", "kind": "uint8"}
"""Arrays with one entry a token, chunked by block like the states."""

EXAMPLE_ARRAYS = {
    "start": "int64",
    "length": "int32",
    "n_words": "int32",
    "row": "int64",
    "text_hash": "uint64",
}
"""Arrays with one entry an example, in the order in which examples were dealt to blocks."""

FULL_LENGTH = "full_length"
"""One more such array in banks of `words`: without it they could not be dealt as one of all tokens is."""

Keep = Literal["all", "words", "first", "masked"]

ALIKE: Mapping[Keep, tuple[Keep, ...]] = {
    "all": ("all", "words"),
    "words": ("all", "words"),
    "first": ("first",),
    "masked": ("masked",),
}
"""For each choice of tokens, those whose banks are dealt alike: an example lies in the same block of each.
Blocks are filled by the tokens of the first of them."""

Codec = Literal["none", "lz4", "zstd"]

CHUNK_BYTES = 4 * 2**20
"""Aim for the size of a chunk of 16-bit states: large enough to read at the disk's rate."""


class Kind(IntEnum):
    """What a token is."""

    FILL = 0  # unused end of a block
    SPECIAL = 1  # [CLS], [SEP], <s>, ...
    WORD = 2  # first sub-word of a word
    CONTINUATION = 3  # further sub-word of a word
    PAIR_WORD = 4  # the same two for `text_pair`
    PAIR_CONTINUATION = 5
    OPTION = 6  # first token of one option of a multiple choice; its word is the option's number


@dataclass(frozen=True, kw_only=True)
class EncoderRecord:
    """Which encoder made the states."""

    name: str  # Hub id or directory, as it was asked for
    revision: str | None  # Hub revision
    weights_sha256: str  # of the weights that take part in the states
    n_layers: int  # L + 1: the embeddings and every block
    width: int  # hidden size


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """All that decides what a bank holds, apart from the rows."""

    encoder: EncoderRecord
    tokenizer_sha256: str
    columns: dict[str, str | None]  # source column of `text`, `text_pair` or `words`
    max_length: int  # longest example, in tokens, special tokens included
    keep: Keep
    layers: tuple[int, ...]  # numbers of the layers kept, ascending
    dtype: str  # float16, bfloat16, float32 or int8
    seed: int  # of the deal of examples to blocks
    block_tokens: int  # tokens a block has room for
    codec: Codec = "none"
    batch_tokens: int  # padded tokens in one forward; kept so that a resumed run rounds alike
    precision: str = "float32"  # of the encoder's products
    rounded: str | None = None  # coarsest data type that the states had before they got `dtype`

    def to_attrs(self) -> dict[str, Any]:
        """The recipe as the root group's attributes."""
        attrs = asdict(self)
        attrs["layers"] = list(self.layers)
        return attrs

    @classmethod
    def from_attrs(cls, attrs: dict[str, Any]) -> "Recipe":
        """The recipe of an existing bank.

        Raises:
            CacheError: an attribute of format version 1 is missing.
        """
        try:
            # Attributes that older banks have not: they were computed in float32, and rounded once.
            found = {"precision": "float32", "rounded": None, **attrs}
            known = {name: found[name] for name in cls.__dataclass_fields__}
            known["encoder"] = EncoderRecord(**attrs["encoder"])
        except (KeyError, TypeError) as error:
            raise CacheError(f"bank attribute {error} is missing or odd: extract the bank again") from error
        return cls(**{**known, "layers": tuple(attrs["layers"])})


def example_arrays(keep: Keep) -> dict[str, str]:
    """The arrays with one entry an example of a bank, each with its data type."""
    return {**EXAMPLE_ARRAYS, FULL_LENGTH: "int32"} if keep == "words" else EXAMPLE_ARRAYS


def block_tokens_for(width: int, max_length: int) -> int:
    """Room of a block, in tokens: a power of two that makes chunks of at most `CHUNK_BYTES`.

    Never less than the longest example, because an example lies whole inside one block.

    >>> block_tokens_for(384, 512), block_tokens_for(1024, 512)
    (4096, 2048)
    """
    fitting = max(512, CHUNK_BYTES // (2 * width))
    return max(max_length, 1 << (fitting.bit_length() - 1))
