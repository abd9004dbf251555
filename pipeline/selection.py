"""Which tokens of a bank, or of raw text, a head reads, and which of them its decoder sees."""

from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import numpy as np
from jaxtyping import Int, UInt8
from numpy import ndarray

from cache import Kind
from cache.targets import ranges, spans
from pipeline.errors import PipelineError
from pipeline.head import Head

_SHORT = {
    "all": "every token",
    "words": "the first sub-word of every word",
    "first": "the first token",
    "pair": "every token of the second text",
    "options": "the first token of every option",
    "masked": "the predicted positions",
}

_KEPT_BY = {
    "all": ("all",),
    "words": ("all", "words"),
    "first": ("all", "words", "first"),
    "pair": ("all",),
    "options": ("all", "words", "first"),
    "masked": ("masked",),
}
"""The `--keep` of the banks that have some tokens, the smallest last."""

KINDS_READ: dict[str, tuple[Kind, ...]] = {
    "words": (Kind.WORD,),
    "pair": (Kind.PAIR_WORD, Kind.PAIR_CONTINUATION),
    "options": (Kind.OPTION,),
}
"""Kinds of the tokens that are told by their kind."""


@runtime_checkable
class TokenTable(Protocol):
    """Where tokens lie and what they are: a split of a bank, or a batch of raw text."""

    @property
    def keep(self) -> str:
        """Which tokens are there."""

    @property
    def start(self) -> Int[ndarray, " example"]:
        """First token of each example."""

    @property
    def length(self) -> Int[ndarray, " example"]:
        """Number of tokens of each example."""

    @property
    def kind(self) -> UInt8[ndarray, " token"]:
        """What each token is, see `cache.layout.Kind`."""


@dataclass(frozen=True, kw_only=True)
class TokenSet:
    """Some tokens of each example, in the order of the examples."""

    position: Int[ndarray, " token"]  # on the table's token axis
    count: Int[ndarray, " example"]


@dataclass(frozen=True, kw_only=True)
class Selection:
    """What one head reads: the tokens its fusion sees, and which of them its decoder sees."""

    read: TokenSet
    decoded: TokenSet
    chosen: Int[ndarray, " chosen"] | None  # places of the decoded among the read; None for all


def token_set(table: TokenTable, tokens: str, *, why: str) -> TokenSet:
    """Chooses tokens of every example.

    Args:
        table: where the tokens are.
        tokens: which, see `pipeline.decoders._base.Tokens`.
        why: the part that needs them, for the message.

    Raises:
        PipelineError: the bank does not keep them.
    """
    enough = _KEPT_BY[tokens]
    if table.keep not in enough:
        raise PipelineError(
            f"{why} reads {_SHORT[tokens]}, the bank has --keep {table.keep}: "
            f"extract with --keep {enough[-1]}"
        )
    if tokens == "first":
        count = np.minimum(table.length, 1)
        return TokenSet(position=table.start[count > 0], count=count)
    position = ranges(table.start, table.length)
    if tokens in ("all", "masked"):
        return TokenSet(position=position, count=table.length)
    wanted = np.isin(table.kind[position], KINDS_READ[tokens])
    before, ends = spans(wanted.view(np.int8)), spans(table.length)
    return TokenSet(position=position[wanted], count=np.diff(before[ends]))


def select(table: TokenTable, head: Head) -> Selection:
    """Chooses the tokens that a head reads.

    Raises:
        PipelineError: the bank does not keep them.
    """
    needy = head.fusion if head.fusion.mixes_tokens else head.decoder
    read = token_set(table, head.reads, why=type(needy).__name__)
    if head.reads == head.decoder.tokens:
        return Selection(read=read, decoded=read, chosen=None)
    decoded = token_set(table, head.decoder.tokens, why=type(head.decoder).__name__)
    chosen = np.flatnonzero(np.isin(read.position, decoded.position))
    return Selection(read=read, decoded=decoded, chosen=chosen)
