"""STS-B: how alike two sentences are, from 0 to 5. The Hub's test set has no labels. They are -1 there.

Hub id and columns are as published; they have not been tried.
"""

from pipeline.tasks._base import Target, Task

TASK = Task(
    hub="nyu-mll/glue",
    config="stsb",
    revision="bcdcba79d07bc864c1c254ccfcedcce55bcc9a8c",
    renames={"sentence1": "text", "sentence2": "text_pair"},
    text="text",
    text_pair="text_pair",
    targets={"label": Target(kind="float", metric="spearman", missing=-1.0)},
    citation="Cer et al. 2017; GLUE, Wang et al. 2019",
)
