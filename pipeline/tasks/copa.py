"""COPA: which of two sentences is the cause, or the effect, of a premise?

Hub id and columns are as published; they have not been tried.
"""

from collections.abc import Mapping
from typing import Any

from pipeline.tasks._base import PARQUET_BRANCH, Target, Task

_QUESTIONS = {"cause": "What was the cause of this?", "effect": "What happened as a result?"}
"""As the task's authors put them to people."""


def parse(row: Mapping[str, Any]) -> dict[str, Any]:
    """The premise with its question, and what to choose from.

    >>> parse({"premise": "It fell.", "question": "cause", "choice1": "Wind.", "choice2": "Rain."})
    {'text': 'It fell. What was the cause of this?', 'options': ['Wind.', 'Rain.']}
    """
    return {
        "text": f"{row['premise']} {_QUESTIONS.get(row['question'], row['question'])}",
        "options": [row["choice1"], row["choice2"]],
    }


TASK = Task(
    hub="aps/super_glue",
    config="copa",
    revision=PARQUET_BRANCH,
    parse=parse,
    parse_from=("premise", "question", "choice1", "choice2"),
    text="text",
    options="options",
    targets={"label": Target(kind="choice", metric="accuracy")},
    citation="Roemmele, Bejan and Gordon 2011; SuperGLUE, Wang et al. 2019",
)
