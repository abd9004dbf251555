"""WSC: does a pronoun mean that noun? SuperGLUE's form; the Hub's test set has no labels.

Hub id and columns are as published; they have not been tried.
"""

from collections.abc import Mapping
from typing import Any

from pipeline.tasks._base import PARQUET_BRANCH, Target, Task


def parse(row: Mapping[str, Any]) -> dict[str, Any]:
    """Asks for the pronoun and the noun in words.

    >>> parse({"text": "Sue met her.", "span1_text": "Sue", "span2_text": "her"})["text_pair"]
    'her refers to Sue'
    """
    return {"text": row["text"], "text_pair": f"{row['span2_text']} refers to {row['span1_text']}"}


TASK = Task(
    hub="aps/super_glue",
    config="wsc.fixed",
    revision=PARQUET_BRANCH,
    parse=parse,
    parse_from=("text", "span1_text", "span2_text"),
    text="text",
    text_pair="text_pair",
    targets={"label": Target(kind="class", metric="accuracy", names=("False", "True"))},
    citation="Levesque, Davis and Morgenstern 2012; SuperGLUE, Wang et al. 2019",
)
