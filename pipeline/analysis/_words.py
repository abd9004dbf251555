"""Tokens as people read them, and the kind of each. The bank keeps ids; the tokenizer has the text."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Int, UInt8
from numpy import ndarray

from cache import Kind, Recipe
from pipeline import checkpoint
from pipeline.errors import PipelineError
from pipeline.tokens import tokenizer_sha256

KIND_NAMES = ("special token", "word", "number", "punctuation", "later sub-word", "option")
"""A word's first sub-word decides: a letter makes it a word, else a digit a number, else punctuation."""

_CONTINUES = (Kind.CONTINUATION, Kind.PAIR_CONTINUATION)


def open_tokenizer(recipe: Recipe, name: str | None = None, *, trust_remote_code: bool = False) -> Any:
    """The tokenizer that a bank was made with; nothing is downloaded unless a name is given.

    Args:
        recipe: of the bank.
        name: where the encoder is, if not where it was.
        trust_remote_code: whether code that comes with it may run.

    Raises:
        PipelineError: it cannot be loaded, or is another one.
    """
    known = recipe.encoder
    tokenizer = checkpoint.load_tokenizer(
        name or known.name,
        None if name else known.revision,
        words=recipe.columns.get("words") is not None,
        trust_remote_code=trust_remote_code,
        download=name is not None,
    )
    if tokenizer_sha256(tokenizer) != recipe.tokenizer_sha256:
        raise PipelineError(f"the tokenizer of {name or known.name} is not the one the bank was made with")
    return tokenizer


def kinds(
    kind: UInt8[ndarray, " token"], input_ids: Int[ndarray, " token"], tokenizer: Any
) -> Int[ndarray, " token"]:
    """The place in `KIND_NAMES` of each token; without a tokenizer every first sub-word is a word."""
    found = np.full(len(kind), KIND_NAMES.index("word"))
    if tokenizer is not None and len(input_ids):
        ids, place = np.unique(input_ids, return_inverse=True)
        found = np.array([KIND_NAMES.index(kind_of(text)) for text in texts(ids, tokenizer)])[place]
    found[kind == Kind.SPECIAL] = KIND_NAMES.index("special token")
    found[np.isin(kind, _CONTINUES)] = KIND_NAMES.index("later sub-word")
    found[kind == Kind.OPTION] = KIND_NAMES.index("option")
    return found


def kind_of(text: str) -> str:
    """The kind of a word by its characters.

    >>> kind_of("at"), kind_of("9"), kind_of("?"), kind_of("3rd")
    ('word', 'number', 'punctuation', 'word')
    """
    if any(character.isalpha() for character in text):
        return "word"
    return "number" if any(character.isdigit() for character in text) else "punctuation"


def texts(input_ids: Sequence[int] | Int[ndarray, " token"], tokenizer: Any) -> list[str]:
    """Each token alone, without the tokenizer's marks."""
    tokens = tokenizer.convert_ids_to_tokens([int(i) for i in input_ids])
    return [tokenizer.convert_tokens_to_string([token]).strip() for token in tokens]


def words(
    kind: UInt8[ndarray, " token"], input_ids: Int[ndarray, " token"], tokenizer: Any
) -> tuple[Int[ndarray, " word"], list[str]]:
    """The tokens that begin something, and the text of each with the sub-words that follow it."""
    first = np.flatnonzero(~np.isin(kind, _CONTINUES))
    tokens = tokenizer.convert_ids_to_tokens([int(i) for i in input_ids])
    ends = [*first[1:].tolist(), len(tokens)]
    whole = [_joined(tokens[a:b], tokenizer) for a, b in zip(first.tolist(), ends, strict=True)]
    return first, whole


def _joined(tokens: Sequence[str], tokenizer: Any) -> str:
    """The text of a word's sub-words; not every tokenizer takes off WordPiece's own mark."""
    plain = [*tokens[:1], *(token.removeprefix("##") for token in tokens[1:])]
    return str(tokenizer.convert_tokens_to_string(plain)).replace(" ", "")
