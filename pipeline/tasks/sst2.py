"""SST-2: is the sentence of a film review positive? The Hub's test set has no labels."""

from pipeline.tasks._base import Target, Task

TASK = Task(
    hub="nyu-mll/glue",
    config="sst2",
    revision="bcdcba79d07bc864c1c254ccfcedcce55bcc9a8c",
    renames={"sentence": "text"},
    text="text",
    targets={"label": Target(kind="class", metric="accuracy", names=("negative", "positive"))},
    citation="Socher et al. 2013; GLUE, Wang et al. 2019",
)
