import json
import sys

import numpy as np
import pytest

from pipeline.corpus import load_corpus
from pipeline.errors import PipelineError
from pipeline.labels import read_labels
from pipeline.metrics import METRICS
from pipeline.tasks._base import Target, Task, load_task, task_names

TAGS = ["O", "B-x"]

CLAUSES = {"premise": "a", "hypothesis": "b", "label": 1}
SENTENCES = {"sentence1": "a", "sentence2": "b", "label": 1}
QUESTION = {"question": "b", "context": "a b"}

HUB_ROWS = {
    "sst2": {"sentence": "a b", "label": 1},
    "qqp": {"question1": "a", "question2": "b", "label": 1},
    "qnli": {"question": "a", "sentence": "b", "label": 0},
    "conll2003": {"tokens": ["a", "b"], "pos_tags": [1, 2], "chunk_tags": TAGS, "ner_tags": TAGS},
    "wnut17": {"tokens": ["a", "b"], "ner_tags": TAGS},
    "wikiann": {"tokens": ["a", "b"], "ner_tags": TAGS, "langs": ["en", "en"], "spans": ["x: b"]},
    "snips": {"input": "a b", "slots": "O B-x", "intent": "PlayMusic"},
    "matis": {"text": "a b", "slots": "O B-x", "intent": "flight"},
    "massive": {"utt": "a b", "annot_utt": "a [x : b]", "locale": "en-US", "intent": 0, "scenario": 1},
    "cola": {"sentence": "a b", "label": 1},
    "mrpc": SENTENCES,
    "stsb": {**SENTENCES, "label": 2.5},
    "mnli": {**CLAUSES, "idx": 7},
    "rte": SENTENCES,
    "wnli": SENTENCES,
    "ax": CLAUSES,
    "boolq": {"question": "a", "passage": "b", "label": 1},
    "cb": CLAUSES,
    "axb": SENTENCES,
    "axg": CLAUSES,
    "copa": {"premise": "a", "choice1": "b", "choice2": "c", "question": "cause", "label": 1},
    "multirc": {"paragraph": "b", "question": "a", "answer": "c", "label": 1},
    "record": {
        "passage": "a",
        "query": "@placeholder won",
        "entities": ["b", "c"],
        "entity_spans": {"text": ["b", "c"], "start": [0, 1], "end": [1, 2]},
        "answers": ["c"],
    },
    "wic": {"word": "w", "sentence1": "a", "sentence2": "b", "start1": 0, "label": 1},
    "wsc": {"text": "a", "span1_text": "x", "span2_text": "b", "span1_index": 0, "label": 1},
    "paws": SENTENCES,
    "scitail": {"premise": "a", "hypothesis": "b", "label": "entails"},
    "yelp": {"text": "a b", "label": 1},
    "winogrande": {"sentence": "a _ b", "option1": "x", "option2": "y", "answer": "2"},
    "squad": {**QUESTION, "id": "1", "title": "t", "answers": {"text": ["b"], "answer_start": [2]}},
    "mrqa": {
        **QUESTION,
        "subset": "NewsQA",
        "answers": ["B"],
        "detected_answers": [
            {"text": "b", "char_spans": [{"start": 2, "end": 2}], "token_spans": [{"start": 1, "end": 1}]}
        ],
    },
    "wikitext2": {"text": "a b"},
}
"""A row of each task with the columns of its source. A new task needs a line here."""


INPUTS = (["a", "b"], "a b", "a", "b", "a c", "w: a", "a What was the cause of this?")
SECOND_INPUTS = ("b", "a b", "w: b", "b refers to x", ["b", "c"], ["b won", "c won"], ["x b", "y b"])


def write(folder, row, n_rows=4):
    (folder / "train.jsonl").write_text(f"{json.dumps(row)}\n" * n_rows, encoding="utf-8")


def test_the_folder_is_the_registry():
    assert task_names() == sorted(HUB_ROWS)


@pytest.mark.parametrize("name", task_names())
def test_a_record_says_where_what_and_by_whom(name):
    task = load_task(name)
    assert isinstance(task, Task)
    assert sys.modules[f"pipeline.tasks.{name}"].__doc__
    assert task.hub.count("/") == 1
    assert task.citation
    assert task.targets or name == "wikitext2"
    for target in task.targets.values():
        assert target.metric in METRICS[target.kind]
        assert target.kind != "tags" or task.words
        assert target.kind != "choice" or task.options
        assert target.kind != "span" or task.text_pair


@pytest.mark.parametrize("name", task_names())
def test_a_record_reads_local_files_of_the_sources_columns(tmp_path, name):
    write(tmp_path, HUB_ROWS[name])
    corpus = load_corpus(f"{name}@{tmp_path}")
    assert corpus.inputs
    assert corpus.texts("train")[0] in INPUTS
    assert (corpus.pairs("train") or ["b"])[0] in SECOND_INPUTS
    for column, target in corpus.task.targets.items():
        labels = read_labels(corpus, column)
        assert (labels.kind, labels.metric) == (target.kind, target.metric)
    if "tags" in corpus.task.targets:
        assert read_labels(corpus, "tags").values["train"][:2].tolist() == [0, 1]


@pytest.mark.parametrize("name", [name for name in task_names() if load_task(name).words])
def test_a_record_reads_files_that_have_its_columns_already(tmp_path, name):
    others = {c: "x" for c, t in load_task(name).targets.items() if t.kind == "class"}
    tags = {c: TAGS for c, t in load_task(name).targets.items() if t.kind == "tags"}
    write(tmp_path, {"tokens": ["a", "b"], **tags, **others})
    corpus = load_corpus(f"{name}@{tmp_path}")
    assert corpus.texts("train")[0] == ["a", "b"]
    assert corpus.columns == ["tokens", *tags, *others]


def test_multiatis_files_are_matis(tmp_path):
    (tmp_path / "train.tsv").write_text(
        "id\tutterance\tslot_labels\tintent\n1\tnach köln\tO B-to\tflight\n"
    )
    corpus = load_corpus(f"matis@{tmp_path}")
    assert corpus.texts("train") == [["nach", "köln"]]


def test_a_null_in_a_parsed_column_is_an_error_with_its_position(tmp_path):
    rows = [HUB_ROWS["snips"], {**HUB_ROWS["snips"], "slots": None}]
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(PipelineError, match=r"train\.jsonl:2: null in input, slots"):
        load_corpus(f"snips@{tmp_path}")


@pytest.mark.parametrize(
    ("annotated", "locale", "tokens", "tags"),
    [
        ("[time : nine am] and [date:today]", "en-US", "nine am and today", "B-time I-time O B-date"),
        ("no slots", "en-US", "no slots", "O O"),
        ("", "en-US", "", ""),
        ("五点 [app : wechat 群]", "zh-CN", "五 点 wechat 群", "O O B-app I-app"),
    ],
)
def test_slots_in_brackets_become_words_and_tags(annotated, locale, tokens, tags):
    made = load_task("massive").parse({"annot_utt": annotated, "locale": locale})
    assert made == {"tokens": tokens.split(), "tags": tags.split()}


def test_configs_are_asked_for_and_refused():
    assert load_task("sst2").hub_config("sst2", None) == "sst2"
    assert load_task("wikiann").hub_config("wikiann", "de") == "de"
    with pytest.raises(
        PipelineError, match=r"needs a config, none was given: use for example massive:en-US"
    ):
        load_corpus("massive")
    with pytest.raises(PipelineError, match="has no configs"):
        load_corpus("sst2:de")


def test_a_dotted_path_names_a_task_outside_the_project(tmp_path, monkeypatch):
    module = (
        "from pipeline.tasks._base import Target, Task\n"
        "TARGET = Target(kind='float', metric='spearman')\n"
        "TASK = Task(hub='a/b', text='text', targets={'y': TARGET}, citation='c')\n"
    )
    (tmp_path / "outside_tasks").mkdir()
    (tmp_path / "outside_tasks" / "mine.py").write_text(module)
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "data").mkdir()
    write(tmp_path / "data", {"text": "a", "y": 3})
    labels = read_labels(load_corpus(f"outside_tasks.mine@{tmp_path}/data"), "y")
    assert (labels.kind, labels.values["train"].tolist()) == ("float", [3.0] * 4)
    with pytest.raises(PipelineError, match="cannot be imported"):
        load_task("outside_tasks.yours")
    with pytest.raises(PipelineError, match="did you mean 'snips'"):
        load_task("snipps")


@pytest.mark.parametrize(
    "wrong",
    [
        {},
        {"text": "text", "words": "tokens"},
        {"text": "text", "parse": dict},
        {"text": "text", "config": "{config}"},
        {"text": "text", "example": "de"},
    ],
)
def test_a_record_that_contradicts_itself_is_refused(wrong):
    with pytest.raises(ValueError, match=r"task|parse|config"):
        Task(hub="a/b", targets={"y": Target(kind="class", metric="accuracy")}, citation="c", **wrong)


def test_the_tasks_of_three_papers_are_there():
    glue = "cola sst2 mrpc qqp stsb mnli qnli rte wnli ax"
    superglue = "boolq cb copa multirc record wic wsc axb axg"
    others = (
        "squad mrqa winogrande yelp scitail paws wikitext2 conll2003 wikiann massive matis snips wnut17"
    )
    assert sorted(f"{glue} {superglue} {others}".split()) == task_names()


def test_a_right_option_is_told_by_number_or_by_a_flag_each(tmp_path):
    for name, flags in (("copa", [0, 1]), ("winogrande", [0, 1]), ("record", [0, 1])):
        folder = tmp_path / name
        folder.mkdir()
        write(folder, HUB_ROWS[name], n_rows=2)
        assert read_labels(load_corpus(f"{name}@{folder}"), "label").values["train"].tolist() == flags * 2


@pytest.mark.parametrize(
    ("name", "change"),
    [("copa", {"label": -1}), ("winogrande", {"answer": ""}), ("record", {"answers": []})],
)
def test_a_row_of_a_test_set_has_no_right_option(tmp_path, name, change):
    write(tmp_path, HUB_ROWS[name], n_rows=1)
    (tmp_path / "test.jsonl").write_text(json.dumps({**HUB_ROWS[name], **change}) + "\n")
    assert read_labels(load_corpus(f"{name}@{tmp_path}"), "label").values["test"].tolist() == [-1, -1]


def test_similarity_of_minus_one_is_none(tmp_path):
    write(tmp_path, HUB_ROWS["stsb"])
    (tmp_path / "test.jsonl").write_text(json.dumps({**HUB_ROWS["stsb"], "label": -1.0}) + "\n")
    values = read_labels(load_corpus(f"stsb@{tmp_path}"), "label").values
    assert np.isnan(values["test"]).all()
    assert values["train"].tolist() == [2.5] * 4


@pytest.mark.parametrize("name", ["squad", "mrqa"])
def test_answers_are_texts_with_their_place(tmp_path, name):
    write(tmp_path, HUB_ROWS[name], n_rows=1)
    labels = read_labels(load_corpus(f"{name}@{tmp_path}"), "answer")
    assert labels.kind == "span"
    assert (labels.answers["train"].texts, labels.answers["train"].starts) == ([["b"]], [[2]])


def test_the_hubs_form_of_mrqa_has_lists_for_fields():
    found = {"text": ["in 1912", "1912"], "char_spans": [{"start": [7], "end": [13]}, {"start": [10, 40]}]}
    made = load_task("mrqa").parse({"detected_answers": found})
    assert made == {"answer": ["in 1912", "1912"], "answer_start": [7, 10]}


def test_one_set_of_mrqa_is_asked_for_by_its_name(tmp_path):
    row = HUB_ROWS["mrqa"]
    rows = [row, {**row, "subset": "SQuAD", "question": "other"}, row]
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    (tmp_path / "test.jsonl").write_text(json.dumps({**row, "subset": "RACE"}) + "\n")
    corpus = load_corpus(f"mrqa:SQuAD@{tmp_path}")
    assert list(corpus.splits) == ["train"]
    assert corpus.texts("train") == ["other"]
    assert corpus.split("train").where(0) == "train.jsonl:2"
    assert len(load_corpus(f"mrqa@{tmp_path}").split("train")) == 3
    with pytest.raises(PipelineError, match=r"no row has subset 'NewQA': did you mean 'NewsQA'"):
        load_corpus(f"mrqa:NewQA@{tmp_path}")


def test_mismatched_mnli_has_splits_of_its_own(tmp_path):
    for name in ("train", "validation_matched", "validation_mismatched"):
        (tmp_path / f"{name}.jsonl").write_text(json.dumps(HUB_ROWS["mnli"]) + "\n")
    assert list(load_corpus(f"mnli@{tmp_path}").splits) == ["train", "dev", "dev_mismatched"]


def test_parsed_files_are_read_as_they_are(tmp_path):
    write(tmp_path, {**HUB_ROWS["wsc"], "text_pair": "b is x"})
    assert load_corpus(f"wsc@{tmp_path}").pairs("train")[0] == "b is x"
