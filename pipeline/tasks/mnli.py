"""MNLI: does the premise entail or contradict the hypothesis?

Dev and test are the matched sets; the mismatched ones are the splits `dev_mismatched` and
`test_mismatched`. The Hub's test sets have no labels.

Hub id and columns are as published; they have not been tried.
"""

from pipeline.tasks._base import Target, Task

TASK = Task(
    hub="nyu-mll/glue",
    config="mnli",
    revision="bcdcba79d07bc864c1c254ccfcedcce55bcc9a8c",
    splits={
        "validation_matched": "dev",
        "validation_mismatched": "dev_mismatched",
        "test_matched": "test",
    },
    renames={"premise": "text", "hypothesis": "text_pair"},
    text="text",
    text_pair="text_pair",
    targets={
        "label": Target(kind="class", metric="accuracy", names=("entailment", "neutral", "contradiction")),
    },
    citation="Williams, Nangia and Bowman 2018; GLUE, Wang et al. 2019",
)
