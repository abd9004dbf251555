"""CoLA: is the sentence English as a linguist would accept it? The Hub's test set has no labels.

Hub id and columns are as published; they have not been tried.
"""

from pipeline.tasks._base import Target, Task

TASK = Task(
    hub="nyu-mll/glue",
    config="cola",
    revision="bcdcba79d07bc864c1c254ccfcedcce55bcc9a8c",
    renames={"sentence": "text"},
    text="text",
    targets={"label": Target(kind="class", metric="matthews", names=("unacceptable", "acceptable"))},
    citation="Warstadt, Singh and Bowman 2019; GLUE, Wang et al. 2019",
)
