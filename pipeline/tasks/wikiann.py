"""WikiAnn: persons, organisations and places in Wikipedia, a language each: ``wikiann:de``."""

from pipeline.tasks._base import Target, Task

TASK = Task(
    hub="unimelb-nlp/wikiann",
    config="{config}",
    example="de",
    renames={"ner_tags": "tags"},
    words="tokens",
    targets={"tags": Target(kind="tags", metric="f1")},
    citation="Pan et al. 2017; splits of Rahimi, Li and Cohn 2019",
)
