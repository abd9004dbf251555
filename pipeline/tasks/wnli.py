"""WNLI: does the sentence with its pronoun replaced follow? The Hub's test set has no labels.

GLUE's dev set is adversarial: a head that learns train scores below the majority class.

Hub id and columns are as published; they have not been tried.
"""

from pipeline.tasks._base import Target, Task

TASK = Task(
    hub="nyu-mll/glue",
    config="wnli",
    revision="bcdcba79d07bc864c1c254ccfcedcce55bcc9a8c",
    renames={"sentence1": "text", "sentence2": "text_pair"},
    text="text",
    text_pair="text_pair",
    targets={"label": Target(kind="class", metric="accuracy", names=("not_entailment", "entailment"))},
    citation="Levesque, Davis and Morgenstern 2012; GLUE, Wang et al. 2019",
)
