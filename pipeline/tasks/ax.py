"""AX: GLUE's diagnostic sentences, for a head trained on `mnli`.

A test set alone, on the Hub without labels.

Hub id and columns are as published; they have not been tried.
"""

from pipeline.tasks._base import Target, Task

TASK = Task(
    hub="nyu-mll/glue",
    config="ax",
    revision="bcdcba79d07bc864c1c254ccfcedcce55bcc9a8c",
    renames={"premise": "text", "hypothesis": "text_pair"},
    text="text",
    text_pair="text_pair",
    targets={
        "label": Target(kind="class", metric="matthews", names=("entailment", "neutral", "contradiction")),
    },
    citation="GLUE, Wang et al. 2019",
)
