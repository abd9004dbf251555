"""WiC: has a word the same meaning in two sentences? The Hub's test set has no labels.

Hub id and columns are as published; they have not been tried.
"""

from collections.abc import Mapping
from typing import Any

from pipeline.tasks._base import PARQUET_BRANCH, Target, Task


def parse(row: Mapping[str, Any]) -> dict[str, Any]:
    """Puts the word before each of its sentences.

    >>> parse({"word": "bed", "sentence1": "a bed", "sentence2": "river bed"})["text_pair"]
    'bed: river bed'
    """
    return {
        "text": f"{row['word']}: {row['sentence1']}",
        "text_pair": f"{row['word']}: {row['sentence2']}",
    }


TASK = Task(
    hub="aps/super_glue",
    config="wic",
    revision=PARQUET_BRANCH,
    parse=parse,
    parse_from=("word", "sentence1", "sentence2"),
    text="text",
    text_pair="text_pair",
    targets={"label": Target(kind="class", metric="accuracy", names=("False", "True"))},
    citation="Pilehvar and Camacho-Collados 2019; SuperGLUE, Wang et al. 2019",
)
