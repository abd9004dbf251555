"""SQuAD 1.1: the answer to a question is a span of a paragraph of Wikipedia. The Hub has no test set.

Hub id and columns are as published; they have not been tried.
"""

import json
from collections.abc import Mapping
from typing import Any

from pipeline.tasks._base import Target, Task


def parse(row: Mapping[str, Any]) -> dict[str, Any]:
    """The answers' texts, and the characters at which they start.

    >>> parse({"answers": {"text": ["in 1912"], "answer_start": [7]}})
    {'answer': ['in 1912'], 'answer_start': [7]}
    """
    answers = json.loads(row["answers"]) if isinstance(row["answers"], str) else row["answers"]
    return {"answer": list(answers["text"]), "answer_start": list(answers["answer_start"])}


TASK = Task(
    hub="rajpurkar/squad",
    renames={"question": "text", "context": "text_pair"},
    parse=parse,
    parse_from=("answers",),
    text="text",
    text_pair="text_pair",
    targets={"answer": Target(kind="span", metric="span_f1")},
    citation="Rajpurkar et al. 2016",
)
