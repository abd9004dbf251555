"""Questions: answers that are spans and options to choose from, from rows of text to predictions."""

import re
import string

import numpy as np
import pytest
import tiny
from hypothesis import given, settings
from hypothesis import strategies as st
from questions import choice_rows, question_rows, write

from cache import Kind, open_bank
from pipeline import answers as module
from pipeline.answers import context_offsets
from pipeline.convert import convert
from pipeline.corpus import load_corpus
from pipeline.encoder import Encoder
from pipeline.errors import PipelineError
from pipeline.evaluate import evaluate, open_bank_of
from pipeline.extract import extract
from pipeline.grading import AnswerTexts, exact_match, f1, normalise
from pipeline.grid import Grid
from pipeline.job import Schedule
from pipeline.label import label
from pipeline.labels import find_labels, read_labels
from pipeline.predict import open_predictor
from pipeline.raw_inputs import read_inputs
from pipeline.results import load_run
from pipeline.run import train_run
from pipeline.runner import Plan
from pipeline.sweep import sweep


def texts_of(split):
    return AnswerTexts(lambda: split.target_extra("answer"))


@pytest.fixture(scope="module")
def encoder(tmp_path_factory):
    return tiny.encoder(tmp_path_factory.mktemp("encoder"))


SIZES = {"train": 60, "dev": 24, "test": 12}


@pytest.fixture(scope="module")
def squad_bank(tmp_path_factory, encoder):
    folder = tmp_path_factory.mktemp("squad")
    data = write(folder / "data", question_rows, SIZES)
    result = extract(load_corpus(f"squad@{data}"), Encoder(encoder), str(folder / "bank"), dtype="float32")
    return result


@pytest.fixture(scope="module")
def choice_bank(tmp_path_factory, encoder):
    folder = tmp_path_factory.mktemp("choice")
    corpus = load_corpus(write(folder / "data", choice_rows, SIZES), options="options")
    return extract(corpus, Encoder(encoder), str(folder / "bank"), dtype="float32")


@pytest.mark.parametrize(
    ("predicted", "answer", "exact", "overlap"),
    [
        ("The U.S. Navy", "us navy", 1, 1),
        ("in 1912,", "1912", 0, 2 / 3),
        ("an apple a day", "apples", 0, 0),
        ("cat cat", "cat", 0, 2 / 3),
        ("", "", 1, 0),
        ("the", "a", 1, 0),
        ("Santa-Clara", "Santa Clara", 0, 0),
    ],
)
def test_answers_are_compared_as_squad_compares_them(predicted, answer, exact, overlap):
    assert exact_match(predicted, answer) == exact
    assert f1(predicted, answer) == pytest.approx(overlap)
    assert f1(answer, predicted) == pytest.approx(overlap)


@given(st.text(alphabet="abthe AN,.'-\n", max_size=20))
@settings(max_examples=200)
def test_normalising_is_word_by_word(text):
    kept = "".join(c for c in text if c not in string.punctuation).lower()
    words = [word for word in re.split(r"\s+", kept) if word not in ("a", "an", "the", "")]
    assert normalise(text) == " ".join(words)


def test_the_gold_span_of_every_row_is_its_answer(squad_bank):
    bank = open_bank(squad_bank.store)
    for name, n in SIZES.items():
        split, rows = bank.split(name), question_rows(name, n)
        target = split.target("answer")
        assert (target.kind, target.metric, target.values.shape) == ("span", "span_f1", (n, 2))
        texts = texts_of(split)
        for example, row in enumerate(split.row):
            first, last = target.values[example].tolist()
            assert texts.span_text(example, first, last) == rows[row]["answers"]["text"][0]
        assert texts.score(target.values[None].astype(np.int64)) == {"span_f1": [100], "exact_match": [100]}
        wrong = np.stack([target.values, np.zeros_like(target.values), np.full_like(target.values, -1)])
        assert texts.score(wrong)["exact_match"].tolist()[1:] == [0, 0]
    assert squad_bank.splits["train"]["answers_cut"] == 0


def test_answers_cut_off_are_counted_and_have_no_span(tmp_path, encoder):
    rows = question_rows("train", 8)
    data = write(tmp_path / "data", lambda *_: rows, {"train": 8})
    result = extract(
        load_corpus(f"squad@{data}"),
        Encoder(encoder),
        str(tmp_path / "bank"),
        max_length=7,
        dtype="float32",
    )
    second = sum(
        row["context"].index(row["answers"]["text"][0]) > row["context"].index(",") for row in rows
    )
    split = open_bank(result.store).split("train")
    missing = (split.target("answer").values < 0).all(1)
    assert 0 < second < 8
    assert missing.sum() == second == result.splits["train"]["answers_cut"]
    assert texts_of(split).score(np.full((1, 8, 2), -1)) == {
        "span_f1": [0],
        "exact_match": [0],
    }


@given(data=st.data())
@settings(max_examples=60)
def test_an_answer_is_found_by_its_characters(data):
    context = data.draw(st.text(alphabet="ab -", min_size=1, max_size=24))
    first = data.draw(st.integers(0, len(context) - 1))
    text = context[first : data.draw(st.integers(first + 1, len(context)))]
    offsets = np.array([m.span() for m in re.finditer(r"[ab]{1,2}|-", context)], np.int32).reshape(-1, 2)
    found = module._find(context, [text], [first], offsets)
    inside = [k for k, (a, b) in enumerate(offsets) if b > first and a < first + len(text)]
    if not len(offsets) or offsets[-1, 1] < first + len(text):
        assert found == (-1, -1)
    else:
        assert found == ((inside[0], inside[-1]) if inside else (-1, -1))


def test_a_wrong_place_gives_way_to_the_first_that_fits():
    offsets = np.array([[0, 1], [2, 3], [4, 5]], np.int32)
    assert module._find("x y x", ["x"], [4], offsets) == (2, 2)
    assert module._find("x y x", ["x"], [1], offsets) == (0, 0)
    assert module._find("x y x", ["z", "y"], None, offsets) == (1, 1)


def test_a_head_learns_answers_and_says_them(squad_bank, encoder, tmp_path):
    run = str(tmp_path / "run")
    result = train_run(
        squad_bank.store,
        target="answer",
        out=run,
        fusion="attention",
        schedule=Schedule(epochs=30),
        options={"layers": "mlp"},
    )
    assert (result["decoder"], result["metric"]) == ("span", "span_f1")
    assert result["dev"] > 40  # two of three words before a comma or an end are no answer at all
    loaded = load_run(run)
    scored = evaluate(loaded, open_bank_of(loaded), "dev")
    assert scored["score"] == pytest.approx(result["dev"])
    assert set(scored["metrics"]) == {"span_f1", "exact_match"}
    rows = question_rows("dev", SIZES["dev"])
    predictor = open_predictor([run], encoder=encoder)
    said = list(predictor.predict([r["question"] for r in rows], [r["context"] for r in rows]))
    found = np.mean([f1(one["answer"], r["answers"]["text"][0]) for one, r in zip(said, rows, strict=True)])
    assert 100 * found == pytest.approx(result["dev"])


def test_a_head_learns_to_choose_and_says_which(choice_bank, encoder, tmp_path):
    run = str(tmp_path / "run")
    result = train_run(choice_bank.store, target="label", out=run, schedule=Schedule(epochs=20))
    assert (result["decoder"], result["metric"]) == ("choice", "accuracy")
    assert result["dev"] > 60  # chance is about 35
    rows = choice_rows("dev", SIZES["dev"])
    predictor = open_predictor([run], encoder=encoder)
    said = [
        one["label"] for one in predictor.predict([r["text"] for r in rows], [r["options"] for r in rows])
    ]
    right = np.mean([one == row["label"] for one, row in zip(said, rows, strict=True)])
    assert 100 * right == pytest.approx(result["dev"])
    loaded = load_run(run)
    assert evaluate(loaded, open_bank_of(loaded), "dev")["score"] == pytest.approx(result["dev"])
    inputs = read_inputs(loaded, ["open the lamp\tthe red door\tthe blue lamp"], None)
    (line,) = predictor.predict_rows(inputs)
    assert line["options"] == ["the red door", "the blue lamp"]
    with pytest.raises(PipelineError, match=r"input 1: .* give the text and the options with tabs"):
        read_inputs(loaded, ["open the lamp"], None)


@pytest.mark.parametrize("kind", ["span", "choice"])
def test_questions_are_swept(squad_bank, choice_bank, tmp_path, kind):
    store, target = {"span": (squad_bank.store, "answer"), "choice": (choice_bank.store, "label")}[kind]
    result = sweep(
        Plan(store=store, schedule=Schedule(epochs=2), memory_bytes=2**28),
        Grid(targets=[target], fusions=["last_layer", "attention"], lr=[1e-3, 1e-2], seeds=1),
        out=str(tmp_path / "sweep"),
    )
    assert result["heads"] == 4
    assert all(row["status"] == "ok" and row["test"] is not None for row in result["rows"])


def test_options_are_encoded_one_by_one_and_lie_together(choice_bank, encoder):
    split = open_bank(choice_bank.store).split("dev")
    rows, loaded = choice_rows("dev", SIZES["dev"]), Encoder(encoder)
    for example in (0, 5, 11):
        row = rows[split.row[example]]
        states, _ = split.gather([example])
        here = slice(split.start[example], split.start[example] + split.length[example])
        ids = [loaded.tokenizer(row["text"], option)["input_ids"] for option in row["options"]]
        assert split.input_ids[here].tolist() == [i for own in ids for i in own]
        opens = np.cumsum([0, *(len(own) for own in ids)])[:-1]
        assert np.flatnonzero(split.kind[here] == Kind.OPTION).tolist() == opens.tolist()
        assert split.word_id[here][opens].tolist() == list(range(len(ids)))
        for own, first in zip(row["options"], opens, strict=True):
            encoded = loaded.tokenizer(row["text"], own, return_tensors="pt")
            expected = loaded._model(**encoded, output_hidden_states=True).hidden_states[-1][0]
            np.testing.assert_allclose(
                states[-1, first : first + len(expected)], expected.detach().numpy(), atol=2e-5
            )


def test_a_question_longer_than_a_block_makes_blocks_larger(encoder, tmp_path, monkeypatch):
    monkeypatch.setattr("pipeline.extract.block_tokens_for", lambda _, longest: longest)
    corpus = load_corpus(write(tmp_path / "data", choice_rows, {"train": 30}), options="options")
    result = extract(corpus, Encoder(encoder), str(tmp_path / "bank"), max_length=14, dtype="float32")
    split = open_bank(result.store).split("train")
    assert split.length.max() > 14
    assert result.blocks > 3
    assert len(split.gather(range(30))[1]) == 30


def test_first_tokens_are_enough_to_choose(choice_bank, encoder, tmp_path):
    corpus = load_corpus(write(tmp_path / "data", choice_rows, SIZES), options="options")
    small = extract(corpus, Encoder(encoder), str(tmp_path / "bank"), keep="first", dtype="float32")
    assert small.tokens == sum(len(r["options"]) for name, n in SIZES.items() for r in choice_rows(name, n))
    scores = [
        train_run(store, target="label", out=str(tmp_path / name), schedule=Schedule(epochs=2))[
            "dev_metrics"
        ]
        for name, store in (("all", choice_bank.store), ("first", small.store))
    ]
    assert scores[0] == scores[1]


def test_answers_can_be_added_later(squad_bank, encoder, tmp_path):
    data = write(tmp_path / "data", question_rows, SIZES)
    corpus = load_corpus(f"squad@{data}")
    bare = extract(corpus, Encoder(encoder), str(tmp_path / "bank"), targets=[], dtype="float32")
    done = label(open_bank(bare.store), corpus, "answer")
    assert (done["kind"], done["splits"]) == ("span", ["train", "dev", "test"])
    for name in SIZES:
        late, early = (open_bank(path).split(name) for path in (bare.store, squad_bank.store))
        assert np.array_equal(late.target("answer").values, early.target("answer").values)
        texts = texts_of(late).score(late.target("answer").values[None].astype(np.int64))
        assert texts["exact_match"] == [100]


@pytest.mark.parametrize("kind", ["span", "choice"])
def test_a_smaller_bank_answers_alike(squad_bank, choice_bank, tmp_path, kind):
    store, target = {"span": (squad_bank.store, "answer"), "choice": (choice_bank.store, "label")}[kind]
    small = str(tmp_path / "small")
    convert(open_bank(store), small, dtype="bfloat16", keep="first" if kind == "choice" else None)
    one, other = (open_bank(path).split("dev") for path in (store, small))
    assert np.array_equal(one.row, other.row)
    assert np.array_equal(one.target(target).values, other.target(target).values)
    if kind == "choice":
        assert other.n_tokens == one.n_words.sum()
        return
    predictions = one.target("answer").values[None].astype(np.int64)
    assert texts_of(other).score(predictions) == {"span_f1": [100], "exact_match": [100]}


def test_rows_that_come_later_have_answers_too(encoder, tmp_path):
    rows = question_rows("train", 30)
    store = str(tmp_path / "bank")
    for n in (20, 30):
        data = write(tmp_path / f"data{n}", lambda *_, n=n: rows[30 - n :], {"train": n})
        result = extract(load_corpus(f"squad@{data}"), Encoder(encoder), store, dtype="float32")
    assert result.new_rows == {"train": 10}
    split = open_bank(store).split("train")
    predictions = split.target("answer").values[None].astype(np.int64)
    assert texts_of(split).score(predictions) == {"span_f1": [100], "exact_match": [100]}


def test_choices_can_be_added_later(choice_bank, encoder, tmp_path):
    corpus = load_corpus(write(tmp_path / "data", choice_rows, SIZES), options="options")
    bare = extract(corpus, Encoder(encoder), str(tmp_path / "bank"), targets=[], dtype="float32")
    assert label(open_bank(bare.store), corpus, "label")["kind"] == "choice"
    for name, n in SIZES.items():
        split, rows = open_bank(bare.store).split(name), choice_rows(name, n)
        right = [
            int(k == rows[row]["label"]) for row in split.row for k in range(len(rows[row]["options"]))
        ]
        early = open_bank(choice_bank.store).split(name).target("label").values
        assert split.target("label").values.tolist() == right == early.tolist()


def test_ones_own_columns_of_answers_and_choices_are_found(tmp_path):
    rows = [{"text": "who", "text_pair": "by Ann", "who": ["Ann", "ann"], "other": ["x"]}]
    corpus = load_corpus(write(tmp_path / "span", lambda *_: rows * 3, {"train": 3}))
    found, reasons = find_labels(corpus)
    assert [(one.name, one.kind) for one in found] == [("who", "span")]
    assert "other" in reasons
    corpus = load_corpus(write(tmp_path / "choice", choice_rows, {"train": 9}), options="options")
    assert [(one.name, one.kind) for one in find_labels(corpus)[0]] == [("label", "choice")]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"label": 4}, r"train\.jsonl:2: column 'label': option 4 of 2, counted from 0; correct the row"),
        ({"options": []}, r"train\.jsonl:2: column 'options': no option"),
        ({"options": ["a", None]}, r"train\.jsonl:2: column 'options': a word is null"),
    ],
)
def test_rows_that_cannot_be_chosen_from_are_errors(tmp_path, change, said):
    good = {"text": "a", "options": ["x", "y"], "label": 1}
    data = write(tmp_path, lambda *_: [good, {**good, **change}], {"train": 2})
    with pytest.raises(PipelineError, match=said):
        read_labels(load_corpus(data, options="options"), "label")


def test_flags_that_do_not_fit_are_errors(tmp_path):
    rows = [{"text": "a", "options": ["x", "y"], "label": flags} for flags in ([0, 1], [1, 2])]
    data = write(tmp_path, lambda *_: rows, {"train": 2})
    with pytest.raises(PipelineError, match=r"train\.jsonl:2: .* give each a 1 or a 0"):
        read_labels(load_corpus(data, options="options"), "label")
    with pytest.raises(PipelineError, match="the text's second half, drop one"):
        load_corpus(data, options="options", text_pair="text")


def test_a_task_whose_column_is_something_else_is_an_error(tmp_path):
    rows = [{"text": "a", "text_pair": "b", "answer": "b"}]
    data = write(tmp_path, lambda *_: rows, {"train": 1})
    with pytest.raises(PipelineError, match="column 'answer' must hold lists of texts"):
        read_labels(load_corpus(f"squad@{data}"), "answer")


def test_a_bank_without_every_token_refuses_spans(tmp_path, encoder):
    corpus = load_corpus(f"squad@{write(tmp_path / 'data', question_rows, SIZES)}")
    small = extract(corpus, Encoder(encoder), str(tmp_path / "bank"), keep="first")
    with pytest.raises(
        PipelineError, match=r"Span reads every token of the second text.*extract with --keep all"
    ):
        train_run(small.store, target="answer", out=str(tmp_path / "run"))


def test_offsets_of_contexts_leave_the_question_out(encoder):
    (offsets,) = context_offsets(Encoder(encoder).tokenizer, ["red door"], ["Open, door"], 32)
    assert [("Open, door")[a:b] for a, b in offsets] == ["Open", ",", "door"]
    assert offsets[-1, 1] == len("Open, door")
