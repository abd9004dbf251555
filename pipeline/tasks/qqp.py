"""QQP: do two questions of Quora ask the same? The Hub's test set has no labels."""

from pipeline.tasks._base import Target, Task

TASK = Task(
    hub="nyu-mll/glue",
    config="qqp",
    revision="bcdcba79d07bc864c1c254ccfcedcce55bcc9a8c",
    renames={"question1": "text", "question2": "text_pair"},
    text="text",
    text_pair="text_pair",
    targets={"label": Target(kind="class", metric="accuracy", names=("not_duplicate", "duplicate"))},
    citation="Iyer, Dandekar and Csernai 2017; GLUE, Wang et al. 2019",
)
