"""Raw text in, labels out: the same labels as from the bank, one forward for several runs."""

import io
import json
import shutil

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import tiny
import torch

from cache import open_bank
from pipeline import batches, parts, predict
from pipeline.corpus import load_corpus
from pipeline.encoder import Encoder
from pipeline.errors import PipelineError
from pipeline.extract import extract
from pipeline.job import HeadRates, Schedule, open_target
from pipeline.predict import Predictor, open_predictor
from pipeline.raw_inputs import read_inputs
from pipeline.results import load_run
from pipeline.run import train_run
from pipeline.train import predictions

SIZES = {"train": 40, "dev": 25}
FUSIONS = parts.names("fusion")
OPTIONS = {"single_layer": {"layer": 2}, "transformer": {"n": 1}, "mixture": {"random_sources": 3}}
COLUMNS = {
    "words": ["tokens", "tags", "intent", "score"],
    "text": ["text", "intent", "score"],
    "pairs": ["text", "text_pair", "intent"],
}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """An encoder, the same rows as words, texts and pairs of texts, and a float16 bank of each."""
    folder = tmp_path_factory.mktemp("predict")
    tiny.encoder(folder / "encoder")
    rows = {split: tiny.rows_of_text(split, n) for split, n in SIZES.items()}
    for split in rows:  # one row of many words, one of none, for the words
        rows[split][3] |= {"tokens": ["open"] * 40, "tags": ["O"] * 40}
        rows[split][5] |= {"tokens": [], "tags": [], "text": ""}
    for name, columns in COLUMNS.items():
        data = load_corpus(tiny.write_jsonl(folder / name, rows, columns))
        encoder = Encoder(str(folder / "encoder"), words=name == "words", device="cpu")
        extract(data, encoder, str(folder / f"bank-{name}"))
    return folder


def train(place, out, target, kind="words", **choices):
    """Trains a head in a folder of its own, once."""
    path = place / out
    if not path.exists():
        choices = {"schedule": Schedule(epochs=6), "rates": HeadRates(lr=1e-2), **choices}
        train_run(str(place / f"bank-{kind}"), target=target, out=str(path), **choices)
    return str(path)


def rows_of(place, kind="words", split="dev"):
    return [json.loads(line) for line in (place / kind / f"{split}.jsonl").read_text().splitlines()]


def from_bank(run, place, kind="words", split="dev"):
    """The run's labels of a split's rows, in row order, from the states of the bank."""
    part, target = open_target(open_bank(str(place / f"bank-{kind}")), run.target.name, split)
    data = batches.load(part, run.head, run.spec.layers, target)
    found = predictions(run.head, data)["predictions"][0]
    if target.kind == "tags":
        cuts = np.cumsum(part.n_words)[:-1]
        dealt = [[target.names[i] if i >= 0 else "O" for i in tags] for tags in np.split(found, cuts)]
    else:
        dealt = [target.names[i] for i in found] if target.kind == "class" else found.tolist()
    return [dealt[i] for i in np.argsort(part.row)]


@pytest.mark.parametrize("fusion", FUSIONS)
def test_labels_are_those_of_the_bank(place, fusion):
    choices = {"fusion": fusion, "options": OPTIONS.get(fusion, {})}
    crf = {"fusion": fusion, "options": {**OPTIONS.get(fusion, {}), "crf": True}}
    paths = [
        train(place, f"tags-{fusion}", "tags", **crf),
        train(place, f"intent-{fusion}", "intent", **choices),
        train(place, f"score-{fusion}", "score", **choices),
    ]
    predictor = open_predictor(paths, device="cpu")
    found = list(predictor.predict([row["tokens"] for row in rows_of(place)]))
    tags, intents, scores = (from_bank(run, place) for run in predictor.runs)
    assert [row["tags"] for row in found] == tags
    assert [row["intent"] for row in found] == intents
    assert min(len(set(intents)), len({tag for row in tags for tag in row})) > 1
    assert [row["score"] for row in found] == pytest.approx(scores, abs=2e-3)
    assert [len(row["tags"]) for row in found] == [len(row["tokens"]) for row in rows_of(place)]


@pytest.mark.parametrize("pooling", ["first", "mean", "max"])
@pytest.mark.parametrize("kind", ["text", "pairs"])
def test_texts_and_pairs_of_texts(place, kind, pooling):
    run = train(place, f"{kind}-{pooling}", "intent", kind, options={"pooling": pooling})
    predictor, rows = open_predictor([run], device="cpu"), rows_of(place, kind)
    pairs = [row["text_pair"] for row in rows] if kind == "pairs" else None
    found = list(predictor.predict([row["text"] for row in rows], pairs))
    assert [row["intent"] for row in found] == from_bank(predictor.runs[0], place, kind)
    assert all(row.keys() == {"intent"} for row in found)


def test_several_runs_share_one_forward(place, monkeypatch):
    counts = []
    forward = Encoder._forward

    def counted(self, padded, types, size, layers):
        counts.append(len(size))
        return forward(self, padded, types, size, layers)

    paths = [train(place, f"{target}-attention", target) for target in ("tags", "intent", "score")]
    texts = [row["tokens"] for row in rows_of(place)]
    predictors = [open_predictor(chosen, device="cpu") for chosen in (paths, *([p] for p in paths))]
    monkeypatch.setattr(Encoder, "_forward", counted)
    together = list(predictors[0].predict(texts))
    assert sum(counts) == len(texts)
    forwards = len(counts)
    alone = [list(predictor.predict(texts)) for predictor in predictors[1:]]
    assert len(counts) == 4 * forwards
    for row, *others in zip(together, *alone, strict=True):
        merged = {name: value for other in others for name, value in other.items()}
        assert row == {**merged, "score": pytest.approx(merged["score"], abs=1e-3)}


def test_long_inputs_come_in_chunks_and_in_order(place, monkeypatch):
    monkeypatch.setattr("pipeline.predict.CHUNK_ROWS", 7)
    predictor = open_predictor([train(place, "tags-attention", "tags")], device="cpu")
    texts = [row["tokens"] for row in rows_of(place)]
    found = list(predictor.predict(texts))
    assert [row["tags"] for row in found] == from_bank(predictor.runs[0], place)
    # A row's labels do not depend on its neighbours.
    assert [next(predictor.predict([text])) for text in texts[:6]] == found[:6]


def test_words_that_are_cut_off_are_counted(place):
    predictor = open_predictor([train(place, "tags-attention", "tags")], device="cpu")
    many, few, none, empty = predictor.predict([["open"] * 40, ["open", "the"], [], ["", "the", "", ""]])
    assert many["words_cut"] == 10  # 32 tokens, [CLS] and [SEP] among them
    assert len(many["tags"]) == 40
    assert many["tags"][30:] == ["O"] * 10
    assert few.keys() == {"tags"}
    assert none == {"tags": []}
    assert empty.keys() == {"tags", "words_empty"}
    assert empty["words_empty"] == 3


def test_no_input_no_output(place):
    predictor = open_predictor([train(place, "tags-attention", "tags")], device="cpu")
    assert list(predictor.predict([])) == []


def test_encoder_that_moved_is_named(place, tmp_path):
    run = train(place, "intent-attention", "intent")
    moved = shutil.copytree(place / "encoder", tmp_path / "moved")
    config = json.loads((place / "intent-attention" / "config.json").read_text())
    assert config["source"]["encoder"]["name"] == str((place / "encoder").resolve())
    lost = shutil.copytree(run, tmp_path / "run")
    config["source"]["encoder"]["name"] = str(tmp_path / "gone")
    (lost / "config.json").write_text(json.dumps(config))
    with pytest.raises(PipelineError, match=r"--encoder .*gone"):
        open_predictor([str(lost)], device="cpu")
    found = list(open_predictor([str(lost)], encoder=str(moved), device="cpu").predict([["open", "the"]]))
    assert found == list(open_predictor([run], device="cpu").predict([["open", "the"]]))


def test_encoder_named_by_a_relative_path_is_found_from_elsewhere(place, tmp_path, monkeypatch):
    monkeypatch.chdir(place)
    data = load_corpus("words")
    extract(data, Encoder("encoder", words=True, device="cpu"), str(tmp_path / "bank"), keep="first")
    train_run(str(tmp_path / "bank"), target="intent", out=str(tmp_path / "r"), schedule=Schedule(epochs=1))
    monkeypatch.chdir(tmp_path)
    assert list(open_predictor(["r"], device="cpu").predict([["open"]]))


def test_another_encoder_is_refused(place, tmp_path):
    run = train(place, "intent-attention", "intent")
    other = tiny.encoder(tmp_path / "other", seed=1)
    with pytest.raises(PipelineError, match="other weights") as error:
        open_predictor([run], encoder=other, device="cpu")
    assert "\n" not in str(error.value)
    same = shutil.copytree(place / "encoder", tmp_path / "cased")
    whole = json.loads((same / "tokenizer.json").read_text())
    whole["normalizer"]["lowercase"] = False
    (same / "tokenizer.json").write_text(json.dumps(whole))
    with pytest.raises(PipelineError, match="another tokenizer"):
        open_predictor([run], encoder=str(same), device="cpu")


def test_runs_that_do_not_go_together(place):
    words = train(place, "intent-attention", "intent")
    text, pairs = (
        train(place, "text-first", "intent", "text"),
        train(place, "pairs-first", "intent", "pairs"),
    )
    score = train(place, "text-score", "score", "text")
    for a, b, said in [
        (words, text, "predict with each alone"),
        (score, pairs, "predict with each alone"),
        (pairs, score, "predict with each alone"),
        (words, words, "two runs predict the target 'intent'"),
    ]:
        with pytest.raises(PipelineError, match=said):
            open_predictor([a, b], device="cpu")


def test_runs_of_two_encoders(place, tmp_path):
    other = Encoder(tiny.encoder(tmp_path / "other", seed=1), words=True, device="cpu")
    data = load_corpus(str(place / "words"))
    extract(data, other, str(tmp_path / "bank"), keep="words")
    train_run(str(tmp_path / "bank"), target="tags", out=str(tmp_path / "r"), schedule=Schedule(epochs=1))
    with pytest.raises(PipelineError, match="other weights"):
        open_predictor([train(place, "intent-attention", "intent"), str(tmp_path / "r")], device="cpu")


def test_only_the_layers_and_tokens_that_are_read_are_computed_on(place):
    runs = [load_run(train(place, f"tags-{fusion}", "tags", fusion=fusion)) for fusion in ("last_layer",)]
    predictor = Predictor(runs, Encoder(str(place / "encoder"), words=True, device="cpu"))
    assert predictor._layers == (3,)
    assert predictor._keep == "words"


def file(tmp_path, name, content):
    path = tmp_path / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return str(path)


@pytest.fixture(scope="module")
def loaded(place):
    """A run of each kind of input."""
    names = {"words": "intent-attention", "text": "text-first", "pairs": "pairs-first"}
    return {kind: load_run(train(place, name, "intent", kind)) for kind, name in names.items()}


def test_texts_of_the_command_line(loaded):
    assert read_inputs(loaded["words"], ["open  the door", ""], None).texts == [["open", "the", "door"], []]
    assert read_inputs(loaded["text"], ["open  the door"], None).texts == ["open  the door"]
    pair = read_inputs(loaded["pairs"], ["open\tdoor"], None)
    assert (pair.texts, pair.pairs) == (["open"], ["door"])
    assert pair.shown == [{"text": "open", "text_pair": "door"}]


@pytest.mark.parametrize(
    ("content", "lines"),
    [
        ("a\nb\n", ["a", "b"]),
        ("a\nb", ["a", "b"]),
        ("a\n\nb\n", ["a", "", "b"]),
        ("a\r\nb\r\n", ["a", "b"]),
        ("\n", [""]),
        ("", []),
        ("\ufeffa\n", ["a"]),
        ("a\u2028b\x0cc\x85d\n", ["a\u2028b\x0cc\x85d"]),
        ("ä ☃\n", ["ä ☃"]),
    ],
)
def test_one_text_a_line(loaded, tmp_path, content, lines, monkeypatch):
    assert read_inputs(loaded["text"], [], file(tmp_path, "in.txt", content)).texts == lines
    monkeypatch.setattr("sys.stdin", io.StringIO(content.replace("\r\n", "\n").removeprefix("\ufeff")))
    assert read_inputs(loaded["text"], [], "-").texts == lines


def test_rows_of_jsonl(loaded, tmp_path):
    path = file(tmp_path, "in.jsonl", '{"id": 1, "tokens": ["a", "b"]}\n\n{"id": 2, "tokens": []}\n')
    rows = read_inputs(loaded["words"], [], path)
    assert rows.texts == [["a", "b"], []]
    assert rows.shown == [{"tokens": ["a", "b"]}, {"tokens": []}]
    path = file(tmp_path, "pair.jsonl", '{"text": "a b", "text_pair": "c"}\n')
    pairs = read_inputs(loaded["pairs"], [], path)
    assert (pairs.texts, pairs.pairs) == (["a b"], ["c"])


def test_rows_of_tables(loaded, tmp_path):
    for name, content in (("in.csv", 'id,text\n1,"a, b"\n2,12\n'), ("long.csv", "text\n" + "a\n" * 3)):
        found = read_inputs(loaded["text"], [], file(tmp_path, name, content))
        assert found.texts == (["a, b", "12"] if name == "in.csv" else ["a"] * 3)
    pq.write_table(pa.table({"tokens": [["a", "b"], ["c"]]}), tmp_path / "in.parquet")
    words = read_inputs(loaded["words"], [], str(tmp_path / "in.parquet"))
    assert words.texts == [["a", "b"], ["c"]]


@pytest.mark.parametrize(
    ("kind", "name", "content", "said"),
    [
        ("text", "in.jsonl", '{"txt": "a"}\n', "no column 'text', found txt"),
        (
            "text",
            "in.jsonl",
            '{"text": "a"}\n\n{"text": null}\n',
            "in.jsonl:3: column 'text': None where a text",
        ),
        ("text", "in.jsonl", '{"text": 3}\n', "in.jsonl:1: column 'text': 3 where a text"),
        (
            "words",
            "in.jsonl",
            '{"tokens": "a b"}\n',
            "in.jsonl:1: column 'tokens': 'a b' where a list of words",
        ),
        ("words", "in.jsonl", '{"tokens": [1]}\n', r"in.jsonl:1: .* where a list of words"),
        (
            "words",
            "in.jsonl",
            '{"tokens": ["a"]}\n{"tokens": ["a", null]}\n',
            "in.jsonl:2: .*list of words",
        ),
        ("pairs", "in.jsonl", '{"text": "a", "text_pair": null}\n', "in.jsonl:1: column 'text_pair'"),
        ("pairs", "in.jsonl", '{"text": "a"}\n', "no column 'text_pair'"),
        ("text", "in.jsonl", '{"text": "a"}\n{"text"\n', "in.jsonl:2: not JSON"),
        ("text", "in.jsonl", "", "has no rows"),
        ("text", "in.txt", b"a\xff\n", "cannot be read"),
        ("pairs", "in.txt", "a\tb\na\n", "input 2: .* with a tab between"),
        ("pairs", "in.txt", "a\tb\tc\n", "input 1: .* with a tab between"),
        ("text", "in.json", '[{"text": "a"}]', "give rows as jsonl"),
        ("text", "in.csv", "txt\na\n", "no column 'text', found txt"),
        ("words", "in.csv", "tokens\na b\n", "in.csv:2: column 'tokens': 'a b' where a list of words"),
    ],
)
def test_bad_input_is_one_line(loaded, tmp_path, kind, name, content, said):
    with pytest.raises(PipelineError, match=said) as error:
        read_inputs(loaded[kind], [], file(tmp_path, name, content))
    assert "\n" not in str(error.value)


def test_texts_or_a_file_one_of_the_two(loaded, tmp_path):
    path = file(tmp_path, "in.txt", "a\n")
    for texts, name in ([], None), (["a"], path):
        with pytest.raises(PipelineError, match="one of the two"):
            read_inputs(loaded["text"], texts, name)
    for name in ("none.txt", "none.jsonl"):
        with pytest.raises(PipelineError, match="cannot be read"):
            read_inputs(loaded["text"], [], str(tmp_path / name))


def test_each_row_is_shown_with_its_labels(place, loaded):
    predictor = open_predictor([loaded["words"].path], device="cpu")
    rows = read_inputs(loaded["words"], ["open the door", "play"], None)
    first, second = predictor.predict_rows(rows)
    assert list(first) == ["tokens", "intent"]
    assert second["tokens"] == ["play"]
    assert first["intent"] in tiny.VERBS.values()


def test_a_head_predicts_in_the_precision_of_its_training(place, monkeypatch):
    run = train(place, "short", "tags", schedule=Schedule(epochs=1, precision="bfloat16"))
    seen, real = [], predict.scores_of

    def scores_of(head, inputs, precision):
        seen.append((inputs.states.dtype, precision))
        return real(head, inputs, precision)

    monkeypatch.setattr(predict, "scores_of", scores_of)
    assert list(open_predictor([run], device="cpu").predict([["open", "the", "door"]]))
    assert seen == [(torch.bfloat16, "bfloat16")]
