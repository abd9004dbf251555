import json
import sys

import pytest

from pipeline.corpus import load_corpus
from pipeline.errors import PipelineError
from pipeline.labels import read_labels
from pipeline.tasks._base import Target, Task, load_task, task_names

TAGS = ["O", "B-x"]

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
}
"""A row of each task with the columns of its source. A new task needs a line here."""


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
    assert task.targets
    for target in task.targets.values():
        assert target.metric in {"accuracy", "f1", "spearman"}
        assert target.kind in {"class", "tags", "float"}
        assert target.kind != "tags" or task.words


@pytest.mark.parametrize("name", task_names())
def test_a_record_reads_local_files_of_the_sources_columns(tmp_path, name):
    write(tmp_path, HUB_ROWS[name])
    corpus = load_corpus(f"{name}@{tmp_path}")
    assert corpus.inputs
    assert corpus.texts("train")[0] in (["a", "b"], "a b", "a")
    assert (corpus.pairs("train") or ["b"])[0] == "b"
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
