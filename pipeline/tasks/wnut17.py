"""WNUT-17: entities that are new and rare, in text from social media.

The id is an upload of the data itself: the older one is a script, which `datasets` no longer runs.
"""

from pipeline.tasks._base import Target, Task

TASK = Task(
    hub="flaitenberger/wnut_17",
    renames={"ner_tags": "tags"},
    words="tokens",
    targets={"tags": Target(kind="tags", metric="f1")},
    citation="Derczynski et al. 2017",
)
