"""BoolQ: is the answer to a question about a passage yes? The Hub's test set has no labels.

Hub id and columns are as published; they have not been tried.
"""

from pipeline.tasks._base import PARQUET_BRANCH, Target, Task

TASK = Task(
    hub="aps/super_glue",
    config="boolq",
    revision=PARQUET_BRANCH,
    renames={"question": "text", "passage": "text_pair"},
    text="text",
    text_pair="text_pair",
    targets={"label": Target(kind="class", metric="accuracy", names=("False", "True"))},
    citation="Clark et al. 2019; SuperGLUE, Wang et al. 2019",
)
