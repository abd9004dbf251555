"""MultiRC: is this an answer to a question about a passage? Each answer is a row.

Scored by F1a, the F1 of the right answers over all rows. Reported beside it: the exact match, the share of
questions all of whose answers are judged rightly. The Hub's test set has no labels.

Hub id and columns are as published; they have not been tried.
"""

from collections.abc import Mapping
from typing import Any

from pipeline.tasks._base import PARQUET_BRANCH, Target, Task


def parse(row: Mapping[str, Any]) -> dict[str, Any]:
    """Question and answer as one text, and the question by itself.

    >>> parse({"question": "Who?", "answer": "Ann"})
    {'text': 'Who? Ann', 'question': 'Who?'}
    """
    return {"text": f"{row['question']} {row['answer']}", "question": row["question"]}


TASK = Task(
    hub="aps/super_glue",
    config="multirc",
    revision=PARQUET_BRANCH,
    renames={"paragraph": "text_pair"},
    parse=parse,
    parse_from=("question", "answer"),
    text="text",
    text_pair="text_pair",
    targets={
        "label": Target(
            kind="class",
            metric="binary_f1",
            names=("False", "True"),
            grouped_by=("text_pair", "question"),
        )
    },
    citation="Khashabi et al. 2018; SuperGLUE, Wang et al. 2019",
)
