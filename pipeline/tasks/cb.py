"""CB: does a text commit its speaker to the hypothesis? SuperGLUE scores it by accuracy and macro F1.

Hub id and columns are as published; they have not been tried.
"""

from pipeline.tasks._base import PARQUET_BRANCH, Target, Task

TASK = Task(
    hub="aps/super_glue",
    config="cb",
    revision=PARQUET_BRANCH,
    renames={"premise": "text", "hypothesis": "text_pair"},
    text="text",
    text_pair="text_pair",
    targets={
        "label": Target(kind="class", metric="macro_f1", names=("entailment", "contradiction", "neutral")),
    },
    citation="De Marneffe, Simons and Tonhauser 2019; SuperGLUE, Wang et al. 2019",
)
