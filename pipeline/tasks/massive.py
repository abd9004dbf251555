"""MASSIVE: intents, scenarios and slots of spoken commands, the same rows in 52 locales: ``massive:en-US``.

The Hub's rows hold the slots in brackets inside the text. The data set there is a script, which `datasets`
no longer runs, so the Hub's own parquet copy is read.
"""

import re
from collections.abc import Mapping
from typing import Any

from pipeline.tasks._base import PARQUET_BRANCH, Target, Task

_SLOT = re.compile(r"\[\s*([^\[\]:]+?)\s*:([^\[\]]*)\]")

_NO_SPACES = ("ja-JP", "zh-CN", "zh-TW")
"""Locales written without spaces: there each character is a word, and a run of ASCII is one too."""


def parse(row: Mapping[str, Any]) -> dict[str, Any]:
    """Words and tags of a text with its slots in brackets.

    >>> parse({"annot_utt": "wake me at [time : nine am]", "locale": "en-US"})
    {'tokens': ['wake', 'me', 'at', 'nine', 'am'], 'tags': ['O', 'O', 'O', 'B-time', 'I-time']}
    """
    tokens: list[str] = []
    tags: list[str] = []
    end = 0
    for slot in _SLOT.finditer(row["annot_utt"]):
        outside = _words(row["annot_utt"][end : slot.start()], row["locale"])
        inside = _words(slot[2], row["locale"])
        tokens += outside + inside
        tags += ["O"] * len(outside) + [f"{'I' if k else 'B'}-{slot[1]}" for k in range(len(inside))]
        end = slot.end()
    rest = _words(row["annot_utt"][end:], row["locale"])
    return {"tokens": tokens + rest, "tags": tags + ["O"] * len(rest)}


def _words(text: str, locale: str) -> list[str]:
    words = text.split()
    if locale not in _NO_SPACES:
        return words
    return [part for word in words for part in ([word] if word.isascii() else word)]


TASK = Task(
    hub="AmazonScience/massive",
    config="{config}",
    example="en-US",
    revision=PARQUET_BRANCH,
    parse=parse,
    parse_from=("annot_utt", "locale"),
    words="tokens",
    targets={
        "intent": Target(kind="class", metric="accuracy"),
        "scenario": Target(kind="class", metric="accuracy"),
        "tags": Target(kind="tags", metric="f1"),
    },
    citation="FitzGerald et al. 2022; utterances of SLURP, Bastianelli et al. 2020",
)
