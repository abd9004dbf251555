"""WikiText-2: articles of Wikipedia, a paragraph a row, for `--keep masked`. It has no labels.

Hub id and columns are as published; they have not been tried.
"""

from pipeline.tasks._base import Task

TASK = Task(
    hub="Salesforce/wikitext",
    config="wikitext-2-raw-v1",
    text="text",
    targets={},
    citation="Merity et al. 2017",
)
