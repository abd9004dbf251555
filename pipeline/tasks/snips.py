"""SNIPS: intents and slots of spoken commands in English, in the split of Goo et al. 2018.

The Hub's rows hold the words and the tags as two strings; its copy has no dev split.
"""

from collections.abc import Mapping
from typing import Any

from pipeline.tasks._base import Target, Task


def parse(row: Mapping[str, Any]) -> dict[str, Any]:
    """Splits the strings of words and tags.

    >>> parse({"input": "play jazz", "slots": "O B-genre"})
    {'tokens': ['play', 'jazz'], 'tags': ['O', 'B-genre']}
    """
    return {"tokens": row["input"].split(), "tags": row["slots"].split()}


TASK = Task(
    hub="bkonkle/snips-joint-intent",
    parse=parse,
    parse_from=("input", "slots"),
    words="tokens",
    targets={
        "intent": Target(kind="class", metric="accuracy"),
        "tags": Target(kind="tags", metric="f1"),
    },
    citation="Coucke et al. 2018; split of Goo et al. 2018",
)
