"""PAWS-Wiki: do two sentences of Wikipedia, made of the same words, say the same?

Hub id and columns are as published; they have not been tried.
"""

from pipeline.tasks._base import Target, Task

TASK = Task(
    hub="google-research-datasets/paws",
    config="labeled_final",
    renames={"sentence1": "text", "sentence2": "text_pair"},
    text="text",
    text_pair="text_pair",
    targets={"label": Target(kind="class", metric="accuracy", names=("different", "paraphrase"))},
    citation="Zhang, Baldridge and He 2019",
)
