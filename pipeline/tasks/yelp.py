"""Yelp polarity: is a review one of few stars or of many? The source has no dev split.

Hub id and columns are as published; they have not been tried.
"""

from pipeline.tasks._base import Target, Task

TASK = Task(
    hub="fancyzhx/yelp_polarity",
    text="text",
    targets={"label": Target(kind="class", metric="accuracy", names=("negative", "positive"))},
    citation="Zhang, Zhao and LeCun 2015",
)
