"""MRPC: do two sentences of the news say the same? GLUE's form; its score is the F1 of class 1.

Hub id and columns are as published; they have not been tried.
"""

from pipeline.tasks._base import Target, Task

TASK = Task(
    hub="nyu-mll/glue",
    config="mrpc",
    revision="bcdcba79d07bc864c1c254ccfcedcce55bcc9a8c",
    renames={"sentence1": "text", "sentence2": "text_pair"},
    text="text",
    text_pair="text_pair",
    targets={"label": Target(kind="class", metric="binary_f1", names=("not_equivalent", "equivalent"))},
    citation="Dolan and Brockett 2005; GLUE, Wang et al. 2019",
)
