"""CoNLL-2003: persons, organisations, places and others in English news; parts of speech and chunks too.

The id is an upload of the data itself: the older one is a script, which `datasets` no longer runs.
"""

from pipeline.tasks._base import Target, Task

TASK = Task(
    hub="tomaarsen/conll2003",
    renames={"ner_tags": "tags", "pos_tags": "pos", "chunk_tags": "chunk"},
    words="tokens",
    targets={
        "tags": Target(kind="tags", metric="f1"),
        "chunk": Target(kind="tags", metric="f1"),
        "pos": Target(kind="tags", metric="accuracy"),
    },
    citation="Tjong Kim Sang and De Meulder 2003",
)
