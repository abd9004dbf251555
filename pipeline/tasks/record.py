"""ReCoRD: which entity of a news article fills the blank of a statement about it?

Each entity fills the blank in turn. Several entities may be right (names of one thing); a head is right if
it chooses one of them. Beside this accuracy stand the published scores, which compare texts: exact match
and F1 of the chosen entity and the right one that it is nearest to.

Hub id and columns are as published; they have not been tried.
"""

import json
from collections.abc import Mapping
from typing import Any

from pipeline.tasks._base import PARQUET_BRANCH, Target, Task


def parse(row: Mapping[str, Any]) -> dict[str, Any]:
    r"""The passage, the statement with each entity, and which of these are right.

    >>> row = {"passage": "X beat Y.\n@highlight\nAgain", "query": "@placeholder won"}
    >>> parse({**row, "entities": ["X", "Y"], "answers": ["X"]})
    {'text': 'X beat Y.\nAgain', 'options': ['X won', 'Y won'], 'entity': ['X', 'Y'], 'label': [1, 0]}
    """
    entities, answers = _list(row["entities"]), _list(row["answers"])
    return {
        "text": row["passage"].replace("@highlight\n", ""),
        "options": [row["query"].replace("@placeholder", entity) for entity in entities],
        "entity": entities,
        "label": [int(entity in answers) for entity in entities] if answers else None,
    }


def _list(cell: Any) -> list[str]:
    """A list, or a cell of a file that holds one as JSON."""
    return list(json.loads(cell) if isinstance(cell, str) else cell)


TASK = Task(
    hub="aps/super_glue",
    config="record",
    revision=PARQUET_BRANCH,
    parse=parse,
    parse_from=("passage", "query", "entities", "answers"),
    text="text",
    options="options",
    targets={"label": Target(kind="choice", metric="accuracy", option_texts="entity")},
    citation="Zhang et al. 2018; SuperGLUE, Wang et al. 2019",
)
