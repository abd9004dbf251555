"""RTE: does the premise entail the hypothesis?

The same rows are in GLUE and SuperGLUE. The Hub's test set has no labels.

Hub id and columns are as published; they have not been tried.
"""

from pipeline.tasks._base import Target, Task

TASK = Task(
    hub="nyu-mll/glue",
    config="rte",
    revision="bcdcba79d07bc864c1c254ccfcedcce55bcc9a8c",
    renames={
        "sentence1": "text",
        "sentence2": "text_pair",
        "premise": "text",
        "hypothesis": "text_pair",
    },
    text="text",
    text_pair="text_pair",
    targets={"label": Target(kind="class", metric="accuracy", names=("entailment", "not_entailment"))},
    citation="Dagan, Glickman and Magnini 2005 and three later; GLUE, Wang et al. 2019",
)
