"""AX-g: pairs of sentences that differ in a gender, for a head trained on `rte`. A test set alone.

Hub id and columns are as published; they have not been tried.
"""

from pipeline.tasks._base import PARQUET_BRANCH, Target, Task

TASK = Task(
    hub="aps/super_glue",
    config="axg",
    revision=PARQUET_BRANCH,
    renames={"premise": "text", "hypothesis": "text_pair"},
    text="text",
    text_pair="text_pair",
    targets={"label": Target(kind="class", metric="accuracy", names=("entailment", "not_entailment"))},
    citation="Rudinger et al. 2018; SuperGLUE, Wang et al. 2019",
)
