"""ATIS and mATIS: intents and slots of questions to a flight information system.

The Hub has the English rows, without a dev split. The other languages (MultiATIS++, Xu et al. 2020) are
licensed: put their tsv files (columns `utterance`, `slot_labels`, `intent`), or files with `tokens`, `tags`
and `intent`, into a folder and name it ``matis@FOLDER``.

Test has a few intents and slots that train has not; they count as wrong, as in the published scores.
"""

from collections.abc import Mapping
from typing import Any

from pipeline.tasks._base import Target, Task


def parse(row: Mapping[str, Any]) -> dict[str, Any]:
    """Splits the strings of words and tags.

    >>> parse({"text": "flights to boston", "slots": "O O B-toloc.city_name"})["tags"]
    ['O', 'O', 'B-toloc.city_name']
    """
    return {"tokens": row["text"].split(), "tags": row["slots"].split()}


TASK = Task(
    hub="tuetschek/atis",
    revision="d44649dde31b4c9d2104aac42a35ed83956e7dec",
    renames={"utterance": "text", "slot_labels": "slots"},
    parse=parse,
    parse_from=("text", "slots"),
    words="tokens",
    targets={
        "intent": Target(kind="class", metric="accuracy", names_from="all"),
        "tags": Target(kind="tags", metric="f1", names_from="all"),
    },
    citation="Hemphill, Godfrey and Doddington 1990; Xu, Haider and Mansour 2020",
)
