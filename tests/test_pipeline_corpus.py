import json
import subprocess
import sys
import types
from pathlib import Path

import pyarrow as pa
import pytest

from pipeline.corpus import Corpus, Split, load_corpus
from pipeline.errors import PipelineError

REAL = Path(__file__).parents[2] / "shared" / "data"


def write_jsonl(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def message(*args, **options):
    with pytest.raises(PipelineError) as caught:
        load_corpus(*args, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_folder_of_files_becomes_splits_in_order(tmp_path):
    for name in ("test", "zeta", "valid", "train", "alpha"):
        write_jsonl(tmp_path / f"{name}.jsonl", [{"text": name, "label": 1}])
    (tmp_path / "README.txt").write_text("not data\n")
    (tmp_path / ".train.jsonl").write_text("not data\n")
    (tmp_path / "notes.md").write_text("not data\n")
    corpus = load_corpus(str(tmp_path))
    assert list(corpus.splits) == ["train", "dev", "test", "alpha", "zeta"]
    assert corpus.texts("dev") == ["valid"]
    assert (corpus.text, corpus.text_pair, corpus.words) == ("text", None, None)
    assert corpus.splits["dev"].where(0) == "valid.jsonl:1"


def test_formats_mix_in_a_folder(tmp_path):
    write_jsonl(tmp_path / "train.jsonl", [{"tokens": ["a", "b"], "tags": ["O", "O"]}])
    (tmp_path / "dev.conll").write_text("a O\n\n")
    (tmp_path / "test.csv").write_text('tokens,tags\n"[""a""]","[""O""]"\n')
    corpus = load_corpus(str(tmp_path))
    assert [corpus.texts(name) for name in corpus.splits] == [[["a", "b"]], [["a"]], [["a"]]]


def test_batches_come_in_row_order(tmp_path):
    rows = [{"text": f"t{k}", "text_pair": f"p{k}"} for k in range(10)]
    write_jsonl(tmp_path / "train.jsonl", rows)
    corpus = load_corpus(str(tmp_path))
    assert corpus.texts("train", slice(3, 5)) == ["t3", "t4"]
    assert corpus.pairs("train", slice(8, 99)) == ["p8", "p9"]
    assert corpus.pairs("train", slice(5, 3)) == []
    with pytest.raises(ValueError, match="step"):
        corpus.texts("train", slice(None, None, 2))


def test_empty_texts_and_words_are_rows(tmp_path):
    write_jsonl(tmp_path / "train.jsonl", [{"text": ""}, {"text": "a"}])
    assert load_corpus(str(tmp_path)).texts("train") == ["", "a"]
    write_jsonl(tmp_path / "train.jsonl", [{"tokens": []}, {"tokens": ["a"]}])
    assert load_corpus(str(tmp_path)).texts("train") == [[], ["a"]]
    write_jsonl(tmp_path / "train.jsonl", [{"tokens": []}])
    assert load_corpus(str(tmp_path)).texts("train") == [[]]


def test_tokens_win_over_text_unless_a_flag_says_otherwise(tmp_path):
    write_jsonl(
        tmp_path / "train.jsonl", [{"text": "a b", "tokens": ["a", "b"], "other": "o", "text_pair": "p"}]
    )
    assert load_corpus(str(tmp_path)).inputs == ("tokens",)
    assert load_corpus(str(tmp_path), text="other").inputs == ("other", "text_pair")
    assert load_corpus(str(tmp_path), text="text_pair").inputs == ("text_pair",)
    assert load_corpus(str(tmp_path), text_pair="other").inputs == ("text", "other")
    assert "drop one" in message(str(tmp_path), text="text", words="tokens")


def test_a_text_of_digits_in_a_csv_file_is_text(tmp_path):
    (tmp_path / "train.csv").write_text("text,title,n\n12,7,1\n13,8,2\n")
    corpus = load_corpus(str(tmp_path))
    assert corpus.texts("train") == ["12", "13"]
    assert corpus.splits["train"].table["title"].to_pylist() == [7, 8]
    assert load_corpus(str(tmp_path), text="title").texts("train") == ["7", "8"]


@pytest.mark.parametrize(
    ("rows", "options", "said"),
    [
        ([{"text": "a"}, {"text": None}], {}, "train.jsonl:2: column 'text': null"),
        (
            [{"text": "a", "text_pair": "b"}, {"text": "a", "text_pair": None}],
            {},
            "train.jsonl:2: column 'text_pair'",
        ),
        ([{"text": 5}], {}, "train.jsonl:1: column 'text': an integer where a string was expected"),
        (
            [{"tokens": "a b"}],
            {},
            "train.jsonl:1: column 'tokens': a string where a list of strings was expected",
        ),
        ([{"tokens": [1]}], {}, "train.jsonl:1: column 'tokens': a list of integers where"),
        ([{"tokens": ["a"]}, {"tokens": None}], {}, "train.jsonl:2: column 'tokens': null"),
        (
            [{"tokens": ["a"]}, {"tokens": ["a", None]}],
            {},
            "train.jsonl:2: column 'tokens': a word is null",
        ),
        ([{"sentence": "a"}], {}, "train.jsonl: neither a column 'tokens' nor 'text', found sentence"),
        (
            [{"sentence": "a"}],
            {"text": "sentense"},
            "train.jsonl: no column 'sentense': did you mean 'sentence'?",
        ),
        ([{"text": "a"}], {"words": "tokens"}, "train.jsonl: no column 'tokens'"),
    ],
)
def test_a_bad_input_column_is_named(tmp_path, rows, options, said):
    write_jsonl(tmp_path / "train.jsonl", rows)
    assert message(str(tmp_path), **options).startswith(said)


def test_a_csv_file_of_semicolons_is_told_from_one_of_other_names(tmp_path):
    (tmp_path / "train.csv").write_text("text;label\nhello;a\n", encoding="utf-8")
    assert message(str(tmp_path)).endswith("found text;label; part the cells by commas")


def test_an_input_column_is_in_every_split(tmp_path):
    write_jsonl(tmp_path / "train.jsonl", [{"tokens": ["a"]}])
    write_jsonl(tmp_path / "dev.jsonl", [{"text": "a"}])
    assert message(str(tmp_path)).startswith("dev.jsonl: no column 'tokens'")


def test_two_files_for_a_split_are_refused(tmp_path):
    for name in ("dev", "validation"):
        write_jsonl(tmp_path / f"{name}.jsonl", [{"text": "a"}])
    assert "two files for split 'dev', dev.jsonl and validation.jsonl" in message(str(tmp_path))


def test_a_folder_without_data_lists_its_folders(tmp_path):
    (tmp_path / "en-US").mkdir()
    assert "it holds the folders en-US" in message(str(tmp_path))


def test_missing_data_says_what_was_looked_for(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert message(str(tmp_path / "nowhere")).startswith(
        f"no folder '{tmp_path}/nowhere': give a folder with"
    )
    assert "did you mean 'wikiann'?" in message("wikian")
    assert "no folder and no task 'data.jsonl'" in message("data.jsonl")
    assert message("snips@nowhere").startswith("nowhere: cannot be read")
    (tmp_path / "a.jsonl").write_text("{}\n")
    assert "is a file: give the folder that holds it" in message("a.jsonl")


def test_a_folder_wins_over_a_task_of_its_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "snips").mkdir()
    write_jsonl(tmp_path / "snips" / "train.jsonl", [{"text": "mine"}])
    corpus = load_corpus("snips")
    assert corpus.texts("train") == ["mine"]
    assert corpus.task is None


def test_a_corpus_can_be_made_in_memory():
    split = Split(name="train", table=pa.table({"text": ["a", "b"]}))
    corpus = Corpus(name="made", splits={"train": split}, text="text")
    assert corpus.texts("train") == ["a", "b"]
    assert split.where(1) == "train:row 2"
    with pytest.raises(PipelineError, match="no split 'trian': did you mean 'train'"):
        corpus.texts("trian")


@pytest.fixture
def hub(monkeypatch):
    """A stand-in for the Hub: what `load_dataset` was asked for, and what it gives back."""
    datasets = pytest.importorskip("datasets")
    asked = []

    def load_dataset(path, **options):
        asked.append((path, options))
        if isinstance(asked_for := stand_in.gives, Exception):
            raise asked_for
        return asked_for

    stand_in = types.SimpleNamespace(asked=asked, gives=None, datasets=datasets)
    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    return stand_in


def test_hub_rows_keep_class_names(hub):
    ds = hub.datasets
    features = ds.Features(
        {
            "tokens": ds.List(ds.Value("string")),
            "ner_tags": ds.List(ds.ClassLabel(names=["O", "B-x", "I-x"])),
            "label": ds.ClassLabel(names=["no", "yes"]),
        }
    )
    rows = {"tokens": [["a", "b"]], "ner_tags": [[1, 2]], "label": [1]}
    part = ds.Dataset.from_dict(rows, features=features)
    hub.gives = ds.DatasetDict({"validation": part, "train": part})
    corpus = load_corpus("org/name:conf", revision="v1")
    assert hub.asked == [("org/name", {"name": "conf", "data_dir": None, "revision": "v1"})]
    assert list(corpus.splits) == ["train", "dev"]
    assert corpus.texts("dev") == [["a", "b"]]
    assert corpus.class_names == {"ner_tags": ("O", "B-x", "I-x"), "label": ("no", "yes")}
    assert corpus.splits["dev"].where(0) == "org/name/validation:row 1"

    corpus = load_corpus("wikiann:de")
    assert hub.asked[-1] == ("unimelb-nlp/wikiann", {"name": "de", "data_dir": None, "revision": "main"})
    assert corpus.class_names["tags"] == ("O", "B-x", "I-x")
    assert "tags" in corpus.columns


def test_a_config_is_a_folder_on_the_hubs_parquet_branch(hub):
    part = hub.datasets.Dataset.from_dict(
        {"annot_utt": ["at [time : nine am]"], "locale": ["en-US"], "intent": [0]}
    )
    hub.gives = hub.datasets.DatasetDict({"test": part})
    corpus = load_corpus("massive:en-US")
    options = {"name": None, "data_dir": "en-US", "revision": "refs/convert/parquet"}
    assert hub.asked == [("AmazonScience/massive", options)]
    assert corpus.texts("test") == [["at", "nine", "am"]]


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (ConnectionError("Couldn't reach 'org/name' on the Hub\nmore"), "or give a folder of local files"),
        (ValueError("BuilderConfig 'x' not found."), "check the id, the config and the network"),
        (
            RuntimeError("Dataset scripts are no longer supported, but found x.py"),
            "--revision refs/convert/parquet",
        ),
    ],
)
def test_what_the_hub_says_becomes_one_line(hub, error, said):
    hub.gives = error
    text = message("org/name")
    assert text.startswith("no folder and no Hub data set 'org/name': ")
    assert said in text


def test_local_files_need_no_hub_library(tmp_path):
    write_jsonl(tmp_path / "train.jsonl", [{"text": "a"}])
    code = (
        "import sys; from pipeline.corpus import load_corpus; load_corpus(sys.argv[1]); "
        "sys.exit('datasets' in sys.modules or 'torch' in sys.modules)"
    )
    root = Path(__file__).parents[1]
    assert subprocess.run([sys.executable, "-c", code, str(tmp_path)], cwd=root).returncode == 0


@pytest.mark.real
@pytest.mark.parametrize(
    ("folder", "sizes"),
    [
        ("massive/en-US", {"train": 11_514, "dev": 2_033, "test": 2_974}),
        ("snips", {"train": 13_084, "dev": 700, "test": 700}),
        ("wnut17", {"train": 3_394, "dev": 1_009, "test": 1_287}),
        ("boolq", {"dev": 3_270, "dev32": 32, "train32": 32}),
        ("wsc", {"train": 554, "dev": 104}),
        ("wikitext2", {"dev": 2_461, "test": 2_891}),
    ],
)
def test_real_data_has_its_published_sizes(folder, sizes):
    if not REAL.is_dir():
        pytest.skip(f"needs the data folder {REAL}")
    corpus = load_corpus(str(REAL / folder))
    assert {name: len(split) for name, split in corpus.splits.items()} == sizes
