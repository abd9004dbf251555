import json
from pathlib import Path

import numpy as np
import pytest

from pipeline.corpus import load_corpus
from pipeline.errors import PipelineError
from pipeline.labels import find_labels, read_labels

REAL = Path(__file__).parents[2] / "shared" / "data"


@pytest.fixture
def corpus_of(tmp_path):
    """Writes splits as jsonl files and loads them."""

    def make(task="", **splits):
        for name, rows in splits.items():
            text = "".join(json.dumps(row) + "\n" for row in rows)
            (tmp_path / f"{name}.jsonl").write_text(text, encoding="utf-8")
        return load_corpus(f"{task}@{tmp_path}" if task else str(tmp_path))

    return make


def column(values, name="label"):
    return [{"text": f"text {k}", name: value} for k, value in enumerate(values)]


def tagged(*lists, name="tags"):
    return [{"tokens": ["w"] * len(tags), name: tags} for tags in lists]


def message(corpus, name):
    with pytest.raises(PipelineError) as caught:
        read_labels(corpus, name)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(
    ("train", "names", "codes"),
    [
        (["b", "a", None, "b"], ("a", "b"), [1, 0, -1, 1]),
        ([10, 9, None, 9], ("9", "10"), [1, 0, -1, 0]),
        ([True, False, None, True], ("false", "true"), [1, 0, -1, 1]),
        ([1, -1, 1, -1], ("-1", "1"), [1, 0, 1, 0]),
    ],
)
def test_classes_are_sorted_and_null_is_missing(corpus_of, train, names, codes):
    labels = read_labels(corpus_of(train=column(train)), "label")
    assert (labels.kind, labels.names) == ("class", names)
    np.testing.assert_array_equal(labels.values["train"], np.array(codes, np.int32))
    assert labels.values["train"].dtype == np.int32


def test_minus_one_is_missing_where_train_has_no_such_class(corpus_of):
    labels = read_labels(corpus_of(train=column([0, 1, 1]), test=column([-1, -1])), "label")
    assert labels.names == ("0", "1")
    assert labels.values["test"].tolist() == [-1, -1]


def test_a_split_without_the_column_has_no_labels(corpus_of):
    labels = read_labels(corpus_of(train=column(["a", "b"]), test=[{"text": "t"}]), "label")
    assert labels.values["test"].tolist() == [-1]


def test_floats_with_nan_for_null(corpus_of):
    labels = read_labels(corpus_of(train=column([0.5, None, 2]), dev=column([1, 2])), "label")
    assert (labels.kind, labels.names) == ("float", ())
    np.testing.assert_array_equal(labels.values["train"], np.array([0.5, np.nan, 2], np.float32))
    assert labels.values["dev"].dtype == np.float32


def test_iob_tags_have_begin_and_inside_of_every_type_of_train(corpus_of):
    train = tagged(["B-b", "O"], [], ["B-a", "I-a", "O"])
    corpus = corpus_of(train=train, dev=tagged(["B-b", "I-b"]))
    labels = read_labels(corpus, "tags")
    assert (labels.kind, labels.names) == ("tags", ("O", "B-a", "I-a", "B-b", "I-b"))
    assert labels.values["train"].tolist() == [3, 0, 1, 2, 0]
    assert labels.values["dev"].tolist() == [3, 4]
    assert labels.values["dev"].dtype == np.int32


def test_tags_that_are_no_spans_are_sorted(corpus_of):
    labels = read_labels(corpus_of(train=tagged(["VERB", "DET"], ["NOUN"])), "tags")
    assert (labels.kind, labels.names) == ("tags", ("DET", "NOUN", "VERB"))
    assert labels.values["train"].tolist() == [2, 0, 1]


def test_integer_tags_are_sorted_as_numbers(corpus_of):
    assert read_labels(corpus_of(train=tagged([10, 9], [9])), "tags").names == ("9", "10")


def test_a_row_without_tags_is_missing_word_by_word(corpus_of):
    rows = [{"tokens": ["a", "b"], "tags": None}, {"tokens": ["c", "d"], "tags": ["O", None]}]
    assert read_labels(corpus_of(train=rows), "tags").values["train"].tolist() == [-1, -1, 0, -1]


@pytest.mark.parametrize(("n_tags", "n_words"), [(1, 2), (3, 2)])
def test_a_wrong_number_of_tags_is_an_error_with_its_position(corpus_of, n_tags, n_words):
    rows = [*tagged(["O"] * 3), {"tokens": ["w"] * n_words, "tags": ["O"] * n_tags}]
    corpus = corpus_of(train=rows)
    said = f"train.jsonl:2: column 'tags': {n_tags} tags for {n_words} tokens"
    assert message(corpus, "tags").startswith(said)
    with pytest.raises(PipelineError, match=said):
        find_labels(corpus)


def test_lists_that_never_fit_the_words_are_no_target(corpus_of):
    rows = [{"tokens": ["a", "b"], "spans": ["x"]}] * 3
    found, reasons = find_labels(corpus_of(train=rows))
    assert found == []
    assert reasons["spans"] == "its lists are not as long as the words"


@pytest.mark.parametrize("odd", ["PER", "E-x", "B-"])
def test_tags_of_which_only_some_are_iob_are_an_error_with_its_position(corpus_of, odd):
    corpus = corpus_of(train=tagged(["B-x", "O"]), dev=tagged(["O"], ["O", odd]))
    said = f"dev.jsonl:2: column 'tags': tag '{odd}' is not O"
    assert message(corpus, "tags").startswith(said)
    with pytest.raises(PipelineError, match=said):
        find_labels(corpus)


@pytest.mark.parametrize(
    ("train", "dev", "name", "said"),
    [
        (
            column(["a", "b"]),
            column(["a", "c"]),
            "label",
            "dev.jsonl:2: column 'label': class 'c' is not in train",
        ),
        (
            tagged(["B-x"]),
            tagged(["O"], ["O", "I-y"]),
            "tags",
            "dev.jsonl:2: column 'tags': class 'I-y' is not in",
        ),
    ],
)
def test_an_unseen_class_is_an_error_if_asked_for_and_else_a_reason(corpus_of, train, dev, name, said):
    corpus = corpus_of(train=train * 4, dev=dev)
    assert message(corpus, name).startswith(said)
    found, reasons = find_labels(corpus)
    assert found == []
    assert reasons[name].startswith(said)


def test_without_train_all_splits_name_the_classes(corpus_of):
    labels = read_labels(corpus_of(dev=column(["b", "b"]), test=column(["a"])), "label")
    assert labels.names == ("a", "b")


def test_find_labels_gives_a_reason_for_every_other_column(corpus_of):
    rows = [
        {
            "text": "t",
            "label": "ab"[k % 2],
            "id": k,
            "note": f"n{k}",
            "same": "s",
            "score": k / 10,
            "lists": ["a"],
            "none": None,
            "object": [0.5],
        }
        for k in range(10)
    ]
    found, reasons = find_labels(corpus_of(train=rows))
    assert [(labels.name, labels.kind) for labels in found] == [("label", "class"), ("score", "float")]
    assert reasons == {
        "text": "it is the input",
        "id": "it has 10 different values in 10 rows: ids or free text",
        "note": "it has 10 different values in 10 rows: ids or free text",
        "same": "it is 's' in every row that has it",
        "lists": "its values are lists, and the input is text: tags need a column of words",
        "none": "it has no value in any row",
        "object": "lists of floats are no labels: strings, numbers and lists of tags are",
    }


def test_a_column_asked_for_may_have_any_number_of_classes(corpus_of):
    assert len(read_labels(corpus_of(train=column([f"c{k}" for k in range(10)])), "label").names) == 10


def test_more_than_a_thousand_classes_are_ids(corpus_of):
    corpus = corpus_of(train=column([f"c{k % 1001}" for k in range(2100)]))
    assert "1,001 different values" in find_labels(corpus)[1]["label"]


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("lable", "no column 'lable': did you mean 'label'?"),
        ("text", "column 'text' is the input"),
        ("mixed", "column 'mixed' cannot be a target: it holds integers in train and strings in dev"),
    ],
)
def test_a_column_that_cannot_be_read_says_why(corpus_of, name, said):
    train, dev = [{"text": "a", "label": "x", "mixed": 1}], [{"text": "a", "label": "x", "mixed": "y"}]
    assert said in message(corpus_of(train=train, dev=dev), name)


def test_numbers_of_a_task_get_the_names_of_its_record(corpus_of):
    rows = [{"sentence": "fine", "label": 1}, {"sentence": "poor", "label": 0}]
    labels = read_labels(corpus_of("sst2", train=rows, test=[{"sentence": "so", "label": -1}]), "label")
    assert labels.names == ("negative", "positive")
    assert labels.metric == "accuracy"
    assert [labels.values[name].tolist() for name in ("train", "test")] == [[1, 0], [-1]]


def test_a_number_without_a_name_is_an_error(corpus_of):
    corpus = corpus_of("sst2", train=[{"sentence": "a", "label": 1}, {"sentence": "b", "label": 2}])
    assert message(corpus, "label").startswith(
        "train.jsonl:2: column 'label': class 2, only 0 to 1 have names"
    )


def test_a_tasks_columns_are_of_the_kind_of_its_record(corpus_of):
    corpus = corpus_of("sst2", train=[{"sentence": "a", "label": 0.5}])
    assert "holds values of kind 'float', the task's record says 'class'" in message(corpus, "label")


def test_a_task_may_have_classes_that_only_test_has(corpus_of):
    def row(intent, tag):
        return {"text": "to boston", "slots": f"O {tag}", "intent": intent}

    corpus = corpus_of("matis", train=[row("flight", "B-to")], test=[row("day_name", "B-day")])
    found, _ = find_labels(corpus)
    assert {labels.name: labels.names for labels in found} == {
        "intent": ("day_name", "flight"),
        "tags": ("O", "B-day", "I-day", "B-to", "I-to"),
    }


@pytest.mark.real
@pytest.mark.parametrize(
    ("folder", "targets"),
    [
        ("massive/en-US", {"tags": 111, "intent": 60, "scenario": 18}),
        ("snips", {"tags": 79, "intent": 7}),
        ("wnut17", {"tags": 13}),
        ("wsc", {"label": 2}),
        ("boolq", {"label": 2}),
    ],
)
def test_real_data_has_its_published_classes(folder, targets):
    if not REAL.is_dir():
        pytest.skip(f"needs the data folder {REAL}")
    found, reasons = find_labels(load_corpus(str(REAL / folder)))
    assert targets.items() <= {labels.name: len(labels.names) for labels in found}.items()
    assert not reasons.keys() & targets.keys()
