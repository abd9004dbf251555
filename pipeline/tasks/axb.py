"""AX-b: SuperGLUE's diagnostic sentences, for a head trained on `rte`. A test set alone.

Hub id and columns are as published; they have not been tried.
"""

from pipeline.tasks._base import PARQUET_BRANCH, Target, Task

TASK = Task(
    hub="aps/super_glue",
    config="axb",
    revision=PARQUET_BRANCH,
    renames={"sentence1": "text", "sentence2": "text_pair"},
    text="text",
    text_pair="text_pair",
    targets={"label": Target(kind="class", metric="matthews", names=("entailment", "not_entailment"))},
    citation="SuperGLUE, Wang et al. 2019",
)
