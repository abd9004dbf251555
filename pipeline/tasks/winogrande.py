"""WinoGrande: which of two nouns fills the blank of a sentence? The largest training set, ``xl``.

Hub id and columns are as published; they have not been tried.
"""

from collections.abc import Mapping
from typing import Any

from pipeline.tasks._base import PARQUET_BRANCH, Target, Task


def parse(row: Mapping[str, Any]) -> dict[str, Any]:
    """The sentence up to its blank, and its rest begun by either noun.

    >>> parse({"sentence": "A fits B as _ is big.", "option1": "A", "option2": "B", "answer": "2"})
    {'text': 'A fits B as', 'options': ['A is big.', 'B is big.'], 'label': 1}
    """
    before, _, after = row["sentence"].partition("_")
    return {
        "text": before.rstrip(),
        "options": [f"{row[option]}{after}" for option in ("option1", "option2")],
        "label": int(row["answer"]) - 1 if str(row["answer"]) else None,
    }


TASK = Task(
    hub="allenai/winogrande",
    config="winogrande_xl",
    revision=PARQUET_BRANCH,
    parse=parse,
    parse_from=("sentence", "option1", "option2", "answer"),
    text="text",
    options="options",
    targets={"label": Target(kind="choice", metric="accuracy")},
    citation="Sakaguchi et al. 2020",
)
