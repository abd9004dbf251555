"""QNLI: does the sentence hold the answer to the question? The Hub's test set has no labels."""

from pipeline.tasks._base import Target, Task

TASK = Task(
    hub="nyu-mll/glue",
    config="qnli",
    revision="bcdcba79d07bc864c1c254ccfcedcce55bcc9a8c",
    renames={"question": "text", "sentence": "text_pair"},
    text="text",
    text_pair="text_pair",
    targets={"label": Target(kind="class", metric="accuracy", names=("entailment", "not_entailment"))},
    citation="Rajpurkar et al. 2016; GLUE, Wang et al. 2019",
)
