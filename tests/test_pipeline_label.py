"""Labels that come after the states are those that would have come with them."""

import json

import numpy as np
import pytest
import tiny

from cache import BankLocked, CacheError, open_bank
from cache.store import writing
from pipeline.corpus import load_corpus
from pipeline.encoder import Encoder
from pipeline.errors import PipelineError
from pipeline.extract import extract
from pipeline.job import Schedule
from pipeline.label import label, load_labelled_corpus
from pipeline.run import train_run

COLUMNS = ["tokens", "tags", "intent", "score"]
SPLITS = {"train": 30, "dev": 12, "test": 8}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """An encoder, a data folder, and a bank with all the labels."""
    folder = tmp_path_factory.mktemp("label")
    tiny.encoder(folder / "encoder")
    rows = rows_of()
    tiny.write_jsonl(folder / "data", rows, COLUMNS)
    bank(folder, folder / "full")
    return folder


def rows_of():
    rows = {split: tiny.rows_of_text(split, n) for split, n in SPLITS.items()}
    rows["dev"][2] |= {"tokens": ["open"] * 40, "tags": ["O"] * 39 + ["B-thing"]}
    rows["dev"][7] |= {"tokens": [], "tags": []}
    rows["test"][1] |= {"intent": None, "score": None}
    return rows


def bank(place, path, targets=None, data="data", **choices):
    corpus = load_corpus(str(place / data))
    encoder = Encoder(str(place / "encoder"), words=True, device="cpu")
    extract(corpus, encoder, str(path), keep="words", targets=targets, **choices)
    return open_bank(str(path))


@pytest.mark.parametrize("column", ["tags", "intent", "score"])
def test_label_writes_what_extract_would_have(place, tmp_path, column):
    found = bank(place, tmp_path / "bank", targets=[], seed=3)
    assert found.split("dev").target_names() == {}
    said = label(found, load_labelled_corpus(found, str(place / "data")), column)
    full = bank(place, tmp_path / "other", seed=3)
    kind = {"tags": "tags", "intent": "class", "score": "float"}[column]
    assert said == {
        "store": found.path,
        "target": column,
        "kind": kind,
        "classes": len(full.split("train").target(column).names),
        "splits": ["train", "dev", "test"],
    }
    for split in SPLITS:
        a, b = (open_bank(path.path).split(split).target(column) for path in (found, full))
        assert (a.kind, a.names, a.metric) == (b.kind, b.names, b.metric)
        assert a.values.dtype == b.values.dtype
        assert np.array_equal(a.values, b.values, equal_nan=kind == "float")


def test_label_belongs_to_its_row(place, tmp_path):
    found = bank(place, tmp_path / "bank", targets=[])
    label(found, load_labelled_corpus(found, str(place / "data")), "intent")
    split = found.split("dev")
    target, rows = split.target("intent"), rows_of()["dev"]
    assert [target.names[v] for v in target.values] == [rows[i]["intent"] for i in split.row]


def test_label_may_be_written_again_and_trained_on(place, tmp_path):
    found = bank(place, tmp_path / "bank", targets=["tags"])
    rows = rows_of()
    for split in rows.values():
        for row in split:
            row["mood"] = row["intent"] and row["intent"].upper()
    tiny.write_jsonl(tmp_path / "moods", rows, ["tokens", "mood"])
    for _ in range(2):
        label(found, load_labelled_corpus(found, str(tmp_path / "moods")), "mood")
    assert set(found.split("train").target_names()) == {"tags", "mood"}
    assert found.split("test").target("mood").names == ("MOVE", "SOUND", "SWITCH")
    result = train_run(found.path, target="mood", out=str(tmp_path / "r"), schedule=Schedule(epochs=1))
    assert result["target"] == "mood"


def changed(rows):
    rows["dev"][4]["tokens"][1] = "a"


def swapped(rows):
    rows["dev"][4], rows["dev"][9] = rows["dev"][9], rows["dev"][4]


def shorter(rows):
    rows["dev"].pop()


def longer(rows):
    rows["dev"].append(rows["dev"][0])


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (changed, "dev.jsonl:5: its text is not that of the bank's row 4"),
        (swapped, "dev.jsonl:5: its text is not that of the bank's row 4"),
        (shorter, "split dev: .* has 11 rows, the bank 12"),
        (longer, "split dev: .* has 13 rows, the bank 12"),
    ],
)
def test_other_rows_are_refused(place, tmp_path, change, said):
    rows = rows_of()
    assert rows["dev"][4]["tokens"] != rows["dev"][9]["tokens"]
    change(rows)
    tiny.write_jsonl(tmp_path / "data", rows, COLUMNS)
    found = open_bank(str(place / "full"))
    before = found.split("dev").target("intent").values
    with pytest.raises(PipelineError, match=said) as error:
        label(found, load_labelled_corpus(found, str(tmp_path / "data")), "intent")
    assert "\n" not in str(error.value)
    assert np.array_equal(found.split("dev").target("intent").values, before)


def test_data_without_some_splits_labels_the_others(place, tmp_path):
    rows = rows_of()
    del rows["test"]
    found = bank(place, tmp_path / "bank", targets=[])
    tiny.write_jsonl(tmp_path / "data", rows, COLUMNS)
    assert label(found, load_labelled_corpus(found, str(tmp_path / "data")), "intent")["splits"] == [
        "train",
        "dev",
    ]
    assert found.split("test").target_names() == {}
    other = tiny.write_jsonl(tmp_path / "other", {"extra": rows["dev"]}, COLUMNS)
    with pytest.raises(PipelineError, match="share no split"):
        label(found, load_labelled_corpus(found, other), "intent")


def test_while_another_writes_it_is_refused(place):
    found = open_bank(str(place / "full"))
    corpus = load_labelled_corpus(found, str(place / "data"))
    with writing(place / "full"), pytest.raises(BankLocked, match="another process"):
        label(found, corpus, "intent")
    label(found, corpus, "intent")


@pytest.mark.parametrize(
    ("column", "said"),
    [("intnet", "did you mean 'intent'"), ("tokens", "is the input"), ("nothing", "known: ")],
)
def test_column_that_is_no_target(place, column, said):
    found = open_bank(str(place / "full"))
    with pytest.raises(PipelineError, match=said):
        label(found, load_labelled_corpus(found, str(place / "data")), column)


def test_input_columns_are_the_banks_unless_named(place, tmp_path, monkeypatch):
    rows = {
        "dev": [
            {"words": row["tokens"], "mood": "a" if i % 2 else "b"}
            for i, row in enumerate(rows_of()["dev"])
        ]
    }
    (tmp_path / "data").mkdir()
    lines = "".join(json.dumps(row) + "\n" for row in rows["dev"])
    (tmp_path / "data" / "dev.jsonl").write_text(lines)
    found = bank(place, tmp_path / "bank", targets=[])
    with pytest.raises(PipelineError, match="no column 'tokens'"):
        load_labelled_corpus(found, str(tmp_path / "data"))
    corpus = load_labelled_corpus(found, str(tmp_path / "data"), words="words")
    assert label(found, corpus, "mood")["splits"] == ["dev"]
    asked = []
    monkeypatch.setattr("pipeline.label.load_corpus", lambda data, **given: asked.append(given) or corpus)
    load_labelled_corpus(found, "org/name", revision="abc", words=None)
    assert asked == [{**found.recipe.columns, "revision": "abc"}]


def test_bank_absent_or_unfinished(place):
    with pytest.raises(CacheError, match="no bank at"):
        open_bank(str(place / "none"))
