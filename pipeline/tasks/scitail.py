"""SciTail: does a sentence of science entail the answer to an exam question?

Hub id and columns are as published; they have not been tried.
"""

from pipeline.tasks._base import PARQUET_BRANCH, Target, Task

TASK = Task(
    hub="allenai/scitail",
    config="tsv_format",
    revision=PARQUET_BRANCH,
    renames={"premise": "text", "hypothesis": "text_pair"},
    text="text",
    text_pair="text_pair",
    targets={"label": Target(kind="class", metric="accuracy")},
    citation="Khot, Sabharwal and Clark 2018",
)
