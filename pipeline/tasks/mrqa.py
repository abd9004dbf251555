"""MRQA 2019: questions whose answer is a span of a text, six sets for training, each in one form.

``mrqa`` is all of them, ``mrqa:NewsQA`` the rows of one: SQuAD, NewsQA, TriviaQA-web, SearchQA, HotpotQA,
NaturalQuestionsShort. The six sets of test are others: BioASQ, DROP, DuoRC.ParaphraseRC, RACE,
RelationExtraction, TextbookQA.

Hub id and columns are as published; they have not been tried.
"""

import json
from collections.abc import Mapping
from typing import Any

from pipeline.tasks._base import Target, Task


def parse(row: Mapping[str, Any]) -> dict[str, Any]:
    """The answers as they stand in the text, and the character at which each stands first.

    >>> found = [{"text": "in 1912", "char_spans": [{"start": 7, "end": 13}]}]
    >>> parse({"detected_answers": found})
    {'answer': ['in 1912'], 'answer_start': [7]}
    """
    found = row["detected_answers"]
    found = json.loads(found) if isinstance(found, str) else found
    if isinstance(found, Mapping):  # the Hub's rows hold a list for each field
        texts, spans = found["text"], found["char_spans"]
    else:
        texts, spans = [one["text"] for one in found], [one["char_spans"] for one in found]
    return {"answer": list(texts), "answer_start": [_first_start(each) for each in spans]}


def _first_start(spans: Any) -> int:
    start = spans["start"] if isinstance(spans, Mapping) else spans[0]["start"]
    return int(start[0] if isinstance(start, list) else start)


TASK = Task(
    hub="mrqa-workshop/mrqa",
    select="subset",
    example="NewsQA",
    renames={"question": "text", "context": "text_pair"},
    parse=parse,
    parse_from=("detected_answers",),
    text="text",
    text_pair="text_pair",
    targets={"answer": Target(kind="span", metric="span_f1")},
    citation="Fisch et al. 2019",
)
