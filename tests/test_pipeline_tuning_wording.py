"""Numbers, choices and answers from text to text: what is said, how it is read, and the scores."""

import json
import re

import numpy as np
import pytest
import tiny
import torch
import transformers
import tuning
from encoders import tiny_text_to_text
from hypothesis import given
from hypothesis import strategies as st
from questions import choice_rows, question_rows, write

from pipeline.errors import PipelineError
from pipeline.raw_inputs import read_inputs
from pipeline.tuning import use
from pipeline.tuning.batches import make_batch
from pipeline.tuning.wording import number_text, step_of

SIZES = {"train": 16, "dev": 8}
SAID = {0.04: "0.0", 1.11: "1.2", 2.0: "2.0", 3.95: "4.0"}
"""Numbers whose texts the tiny tokenizer can spell, rounded to multiples of 0.2 by hand."""


def number_rows(split, n):
    """A number for each row's verb."""
    numbers = dict(zip(tiny.VERBS, SAID, strict=False))
    rows = [{"text": r["text"], "score": numbers[r["tokens"][0]]} for r in tiny.rows_of_text(split, n - 1)]
    return [*rows, {"text": "the", "score": 3.95}]


def few_options(split, n):
    """Questions whose right option has a number that the tokenizer can spell."""
    return [row for row in choice_rows(split, 2 * n) if row["label"] < 3][:n]


ROWS = {"score": number_rows, "label": few_options, "answer": question_rows}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("wording")
    for target, rows in ROWS.items():
        write(folder / target, rows, SIZES)
    return folder


def asked(folder, target, **more):
    task = {"data": f"{'squad@' if target == 'answer' else ''}{folder / target}"}
    if target == "label":
        task["columns"] = {"options": "options"}
    return {"target": target, "task": task, "encoder": tiny_text_to_text(), **more}


def by_hand(row):
    """The two texts that the model is to read, and the one it is to say."""
    if "score" in row:
        return row["text"], None, SAID[row["score"]]
    if "options" in row:
        options = " ".join(f"option{k}: {option}" for k, option in enumerate(row["options"]))
        return row["text"], options, str(row["label"])
    return row["question"], row["context"], row["answers"]["text"][0]


@pytest.mark.parametrize("target", list(ROWS))
@pytest.mark.parametrize("length", [0, 3])
def test_loss_is_that_of_a_plain_forward(folder, target, length):
    method = "prompt_tuning" if length else "fine_tune"
    options = {"length": str(length)} if length else {}
    tuned, _, job = tuning.ready(folder, method, **asked(folder, target, options=options))
    tuned.eval()
    model = transformers.T5ForConditionalGeneration.from_pretrained(tiny_text_to_text()).eval()
    model.config.decoder_start_token_id = 0
    tokenizer = transformers.AutoTokenizer.from_pretrained(tiny_text_to_text())
    rows, losses = ROWS[target]("train", SIZES["train"]), []
    for number in (5, 0, 2):
        text, second, said = by_hand(rows[number])
        embedded = model.get_input_embeddings()(tokenizer(text, second, return_tensors="pt")["input_ids"])
        if length:
            embedded = torch.cat([tuned.method.prompt[None], embedded], 1)
        labels = torch.tensor([tokenizer(text_target=said)["input_ids"]])
        losses.append(model(inputs_embeds=embedded, labels=labels).loss)
    picked = [(job.train[0], np.array([5, 0, 2]))]
    loss = tuned(make_batch(picked, tuned.backbone, [], n_slots=length))
    assert loss.item() == pytest.approx(torch.stack(losses).mean().item(), rel=1e-4)


@pytest.mark.parametrize("target", list(ROWS))
def test_a_run_says_what_can_be_read_and_scores_alike_again(folder, target):
    plan = {"epochs": 3, "lr": 1e-2}
    result = tuning.run(folder, "fine_tune", out=f"run-{target}", plan=plan, **asked(folder, target))
    path, scores = str(folder / f"run-{target}"), result["dev_metrics"]
    lines = (folder / f"run-{target}" / "metrics.jsonl").read_text().splitlines()
    losses = [json.loads(line)["loss"] for line in lines]
    assert losses[-1] < 0.7 * losses[0]
    assert use.evaluate(path, "dev")["metrics"] == pytest.approx(scores, rel=1e-5)
    predictor, rows = use.TunedPredictor(path), ROWS[target]("dev", SIZES["dev"])
    inputs = ["\t".join(filter(None, by_hand(row)[:2])) for row in rows]
    if target == "label":
        inputs = ["\t".join([row["text"], *row["options"]]) for row in rows]
    said = [one[target] for one in predictor.predict_rows(read_inputs(predictor.runs[0], inputs, None))]
    true = [row["answers"]["text"][0] if target == "answer" else row[target] for row in rows]
    if target == "answer":
        assert scores["exact_match"] == pytest.approx(
            100 * np.mean([a == b for a, b in zip(said, true, strict=True)])
        )
        return
    assert scores["unparsable"] == pytest.approx(100 * np.mean([one is None for one in said]))
    if target == "label":
        assert scores["accuracy"] == pytest.approx(
            100 * np.mean([a == b for a, b in zip(said, true, strict=True)])
        )
        return
    farthest = [max(SAID, key=lambda other: abs(other - value)) for value in true]
    settled = [other if one is None else one for one, other in zip(said, farthest, strict=True)]
    assert scores["mse"] == pytest.approx(
        np.mean([(a - b) ** 2 for a, b in zip(settled, true, strict=True)]), rel=1e-5
    )


@pytest.fixture(scope="module")
def ready(folder):
    """Of each target, its wording and its dev examples."""
    found = {}
    for target in ROWS:
        tuned, _, job = tuning.ready(folder, "fine_tune", **asked(folder, target))
        found[target] = tuned.wordings[0], job.dev[0]
    return found


def test_a_number_that_cannot_be_read_counts_as_the_farthest_label(ready):
    wording, examples = ready["score"]
    gold = examples.target.values.astype(np.float64)
    said = ["two", "", "nan", "inf", *(f" {value:.1f} " for value in gold[4:])]
    guess = wording.read(said, examples)
    assert np.isnan(guess[:4]).all()
    assert guess[4:].tolist() == [round(float(value), 1) for value in gold[4:]]
    low, high = gold.min(), gold.max()
    worst = [low if value - low > high - value else high for value in gold[:4]]
    settled = np.concatenate([worst, guess[4:]])
    scores = wording.report(guess, examples)
    assert scores["mse"] == pytest.approx(np.mean((settled - gold) ** 2))
    assert scores["pearson"] == pytest.approx(100 * np.corrcoef(settled, gold)[0, 1])
    assert scores["unparsable"] == pytest.approx(100 * 4 / len(gold))


def test_an_option_that_is_not_there_is_none(ready):
    wording, examples = ready["label"]
    rows = few_options("dev", SIZES["dev"])
    said = [str(row["label"]) for row in rows]
    said[0], said[1], said[2] = str(len(rows[0]["options"])), "first", "-1"
    guess = wording.read(said, examples)
    assert guess.sum() == len(rows) - 3
    scores = wording.report(guess, examples)
    assert scores["accuracy"] == pytest.approx(100 * (1 - 3 / len(rows)))
    assert scores["unparsable"] == pytest.approx(100 * 3 / len(rows))


def test_answers_in_words_are_scored_as_spans_are(ready):
    wording, examples = ready["answer"]
    random = np.random.default_rng(0)
    first = random.integers(0, 6, len(examples))
    found = np.stack([first, first + random.integers(0, 3, len(examples))], axis=1)
    found[::3] = examples.target.values[::3]
    texts = [examples.grader.span_text(row, *span) for row, span in enumerate(found.tolist())]
    expected = {name: float(values[0]) for name, values in examples.grader.score(found[None]).items()}
    assert 0 < expected["exact_match"] < 100
    assert wording.report(wording.read(texts, examples), examples) == pytest.approx(expected)


@given(st.floats(-1e3, 1e3), st.sampled_from([0.01, 0.2, 0.5, 1.0, 20.0]))
def test_a_number_is_said_to_the_nearest_step(value, step):
    text = number_text(value, step)
    assert abs(float(text) - value) <= step / 2 + 1e-6
    assert float(text) / step == pytest.approx(round(float(text) / step), abs=1e-6)
    assert not text.startswith("-0") or float(text) < 0


@given(st.floats(0.01, 1e4), st.floats(-100, 100))
def test_labels_span_about_25_steps(spread, low):
    step = step_of(np.array([low, low + spread, np.nan]))
    assert 25 / 1.6 <= spread / step <= 25 * 1.6
    assert float(f"{step:.0e}") == pytest.approx(step)
    assert f"{step:.0e}"[0] in "125"


def test_answers_cut_off_are_not_said(folder):
    tuned, _, job = tuning.ready(folder, "fine_tune", **asked(folder, "answer", max_length=20))
    train, rows = job.train[0], question_rows("train", SIZES["train"])
    assert 0 < train.cut < SIZES["train"]
    said = tuned.wordings[0].say(train)
    assert said.count(None) == train.cut
    true = [row["answers"]["text"][0] for row in rows]
    assert all(text in (None, answer) for text, answer in zip(said, true, strict=True))
    assert train.trainable.tolist() == [k for k, text in enumerate(said) if text is not None]


def test_a_prompt_for_choices_leaves_the_model_as_it_was(folder):
    choices = asked(folder, "label", options={"length": "3"})
    tuning.run(folder, "prompt_tuning", out="prompt", plan={"epochs": 1}, **choices)
    model = use.TunedPredictor(str(folder / "prompt")).tuned.model.state_dict()
    plain = transformers.T5ForConditionalGeneration.from_pretrained(tiny_text_to_text()).state_dict()
    assert all(torch.equal(value, plain[name]) for name, value in model.items())
    weights = np.concatenate([value.flatten() for value in plain.values()])
    assert len(weights) > 10_000


def test_numbers_that_the_tokenizer_cannot_spell_are_one_line(folder, tmp_path):
    rows = [{"text": "the fox", "score": value} for value in (0.0, 3.6, 5.0)]
    write(tmp_path / "score", lambda *_: rows, {"train": 3, "dev": 3})
    said = "of '3.6', it cannot spell such numbers: use an encoder"
    with pytest.raises(PipelineError, match=re.escape(said)) as caught:
        tuning.ready(tmp_path, "fine_tune", **asked(tmp_path, "score"))
    assert "\n" not in str(caught.value)
