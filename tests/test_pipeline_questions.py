"""Scores of whole questions (MultiRC) and of options by their texts (ReCoRD): brute force, whole runs."""

import json
import string

import numpy as np
import pytest
import tiny
from hypothesis import given
from hypothesis import strategies as st

from cache import open_bank
from pipeline.answers import grouped, packed
from pipeline.convert import convert
from pipeline.corpus import load_corpus
from pipeline.encoder import Encoder
from pipeline.evaluate import evaluate
from pipeline.extract import extract
from pipeline.grading import OptionTexts, Questions
from pipeline.job import Schedule
from pipeline.label import label
from pipeline.labels import find_labels, read_labels
from pipeline.results import load_run
from pipeline.run import train_run

WORDS = ("the Red fox", "red fox", "a dog", "Dog!", "dog house", "", "house of the red dog")


@given(
    st.lists(
        st.tuples(st.integers(0, 4), st.integers(-1, 1), st.integers(0, 1), st.integers(0, 1)), min_size=1
    )
)
def test_a_question_is_right_where_all_its_answers_are(rows):
    keys, gold, first, second = (list(column) for column in zip(*rows, strict=True))
    found = Questions(gold=np.array(gold), group=grouped([f"q{k}" for k in keys])["group"])
    scores = found.score(np.array([first, second]))["question_exact_match"]
    for guesses, score in zip((first, second), scores, strict=True):
        judged = {}
        for key, true, guess in zip(keys, gold, guesses, strict=True):
            if true >= 0:
                judged.setdefault(key, []).append(true == guess)
        right = [all(answers) for answers in judged.values()]
        assert score == pytest.approx(100 * np.mean(right) if right else 0)


def words_of(text):
    """SQuAD's words, another way than the code under test: letter by letter."""
    kept = "".join(c for c in text.lower() if c not in string.punctuation)
    return [word for word in kept.split() if word not in ("a", "an", "the")]


def text_scores(predicted, answer):
    ours, theirs = words_of(predicted), words_of(answer)
    rest, both = list(theirs), 0
    for word in ours:
        if word in rest:
            rest.remove(word)
            both += 1
    precision, recall = both / max(1, len(ours)), both / max(1, len(theirs))
    return float(ours == theirs), 2 * precision * recall / (precision + recall) if both else 0.0


@given(
    st.lists(
        st.lists(st.tuples(st.sampled_from(WORDS), st.booleans()), min_size=1, max_size=4), min_size=1
    ),
    st.data(),
)
def test_an_option_scores_by_its_text(questions, data):
    counts = np.array([len(options) for options in questions])
    gold = np.array([int(right) for options in questions for _, right in options])
    taken = [[data.draw(st.integers(0, n - 1)) for n in counts] for _ in range(2)]
    flags = np.array(
        [
            np.concatenate([np.eye(n, dtype=int)[k] for n, k in zip(counts, head, strict=True)])
            for head in taken
        ]
    )
    kept = packed([[text for text, _ in options] for options in questions])
    found = OptionTexts(gold=gold, counts=counts, **kept).score(flags)
    for head, choice in enumerate(taken):
        pairs = [
            (options[k][0], [text for text, right in options if right])
            for options, k in zip(questions, choice, strict=True)
        ]
        best = [
            [max(scores) for scores in zip(*(text_scores(text, answer) for answer in right), strict=True)]
            for text, right in pairs
            if right
        ]
        expected = np.mean(best, axis=0) * 100 if best else (0, 0)
        assert found["exact_match"][head] == pytest.approx(expected[0])
        assert found["answer_f1"][head] == pytest.approx(expected[1])


def multirc(random, n):
    rows = []
    for question in range(n):
        passage = f"the {random.choice(tiny.COLOURS)} {random.choice(tiny.NOUNS)}"
        for answer in tiny.COLOURS:
            row = {"paragraph": passage, "question": f"which lamp {question % 3}", "answer": answer}
            rows.append({**row, "label": int(random.integers(2))})
    return rows


def record(random, n):
    rows = []
    for _ in range(n):
        entities = [f"{colour} {random.choice(tiny.NOUNS)}" for colour in tiny.COLOURS]
        right = [str(entity) for entity in random.permutation(entities)[: random.integers(1, 3)]]
        rows.append(
            {
                "passage": "open the door",
                "query": "play @placeholder",
                "entities": entities,
                "answers": right,
            }
        )
    return rows


ROWS = {"multirc": multirc, "record": record}
SCORES = {"multirc": {"question_exact_match"}, "record": {"exact_match", "answer_f1"}}


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A bank of each task, of its source's own columns."""
    folder = tmp_path_factory.mktemp("questions")
    encoder = Encoder(tiny.encoder(folder / "encoder"))
    for task, rows_of in ROWS.items():
        random = np.random.default_rng(0)
        splits = {split: rows_of(random, n) for split, n in (("train", 12), ("dev", 8))}
        tiny.write_jsonl(folder / task, splits, list(splits["dev"][0]))
        extract(load_corpus(f"{task}@{folder / task}"), encoder, str(folder / f"{task}-bank"), keep="first")
    return folder


def brute_force(task, rows, guess):
    """The scores from the source's rows and a prediction for each, in their order."""
    if task == "multirc":
        judged = {}
        for row, flag in zip(rows, guess, strict=True):
            judged.setdefault((row["paragraph"], row["question"]), []).append(row["label"] == flag)
        return {"question_exact_match": 100 * np.mean([all(answers) for answers in judged.values()])}
    best = [
        [max(s) for s in zip(*(text_scores(row["entities"][k], a) for a in row["answers"]), strict=True)]
        for row, k in zip(rows, guess, strict=True)
    ]
    return dict(zip(("exact_match", "answer_f1"), 100 * np.mean(best, axis=0), strict=True))


@pytest.mark.parametrize("task", list(ROWS))
def test_from_the_rows_of_the_source_to_the_scores_of_a_run(made, tmp_path, task, monkeypatch):
    rows = [json.loads(line) for line in (made / task / "dev.jsonl").read_text().splitlines()]
    store, seen = str(made / f"{task}-bank"), []
    trained = train_run(
        store, target="label", out=str(tmp_path / "run"), fusion="last_layer", schedule=Schedule(epochs=1)
    )
    assert SCORES[task] <= set(trained["dev_metrics"])

    import pipeline.metrics

    report = pipeline.metrics.report
    monkeypatch.setattr("pipeline.metrics.report", lambda **found: seen.append(found) or report(**found))
    found = evaluate(load_run(str(tmp_path / "run")), open_bank(store), "dev")["metrics"]
    split, guess = open_bank(store).split("dev"), seen[0]["predictions"][0]
    if task == "record":  # flags of the options, as the number of the one that was taken
        guess = np.array([part.argmax() for part in np.split(guess, np.cumsum(split.n_words)[:-1])])
    by_row = np.empty_like(guess)
    by_row[split.row] = guess
    for name, score in brute_force(task, rows, by_row).items():
        assert found[name] == pytest.approx(score)


@pytest.mark.parametrize("task", list(ROWS))
def test_labels_written_again_and_banks_converted_score_alike(made, tmp_path, task):
    store = str(made / f"{task}-bank")
    extra = open_bank(store).split("dev").target_extra("label")
    convert(open_bank(store), str(tmp_path / "small"), layers=[0, 3])
    again = open_bank(str(tmp_path / "small"))
    label(again, load_corpus(f"{task}@{made / task}"), "label")
    for name, values in extra.items():
        assert again.split("dev").target_extra("label")[name].tolist() == values.tolist()


def test_what_tells_how_to_score_is_no_target(made):
    corpus = load_corpus(f"multirc@{made / 'multirc'}")
    found, reasons = find_labels(corpus)
    assert [one.name for one in found] == ["label"]
    assert reasons["question"] == "it tells how another column is scored"


def test_files_without_the_column_have_no_such_score(tmp_path):
    rows = [{"text": "which? red", "text_pair": "the lamp", "label": k % 2} for k in range(4)]
    tiny.write_jsonl(tmp_path / "data", {"train": rows, "dev": rows}, ["text", "text_pair", "label"])
    assert read_labels(load_corpus(f"multirc@{tmp_path / 'data'}"), "label").extra == {}
