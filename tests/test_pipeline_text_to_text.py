"""Early fusion from text to text: verbalised labels, generation, parsing, and what is refused."""

import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
import transformers
import tuning
from encoders import tiny_encoder, tiny_text_to_text

from pipeline.errors import PipelineError
from pipeline.raw_inputs import read_inputs
from pipeline.tuning import use
from pipeline.tuning.batches import make_batch
from pipeline.tuning.loop import predictions, report
from pipeline.tuning.verbalizer import spell, verbalize

WORDS = {"move": "able", "sound": "fox", "switch": "the lazy"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Data, and a T5."""
    folder = tmp_path_factory.mktemp("text")
    shutil.copytree(tiny_text_to_text(), folder / "encoder")
    return folder


def ready(folder, method="fine_tune", **choices):
    task = choices.pop("task", {"verbalizer": WORDS})
    return tuning.ready(folder, method, task=task, **choices)


def batch_of(tuned, examples, rows):
    return make_batch([(examples, np.array(rows))], tuned.backbone, [], n_slots=tuned.method.n_slots)


@pytest.mark.parametrize(("method", "length"), [("fine_tune", 0), ("prompt_tuning", 3)])
def test_loss_is_that_of_a_plain_forward(folder, method, length):
    options = {"length": str(length)} if length else {}
    tuned, _, job = ready(folder, method, options=options)
    tuned.eval()
    examples, rows = job.train[0], [3, 0, 6, 1]
    assert tuned.backbone.slot_at == 0
    losses = []
    for row in rows:
        here = slice(examples.tokens.start[row], examples.tokens.start[row + 1])
        ids = torch.from_numpy(examples.tokens.input_ids[here].astype(np.int64))[None]
        text = WORDS[examples.target.names[examples.target.values[row]]]
        labels = torch.tensor([tuned.backbone.tokenizer(text_target=text)["input_ids"]])
        embedded = tuned.model.get_input_embeddings()(ids)
        if length:
            embedded = torch.cat([tuned.method.prompt[None], embedded], 1)
        losses.append(tuned.model(inputs_embeds=embedded, labels=labels).loss)
    assert tuned(batch_of(tuned, examples, rows)).item() == pytest.approx(
        torch.stack(losses).mean().item(), rel=1e-5
    )


def test_predictions_are_what_is_generated_for_each_row_alone(folder):
    tuned, _, job = ready(folder, "prompt_tuning", options={"length": "3"})
    tuned.eval()
    tokenizer = tuned.backbone.tokenizer
    made = []
    for row in range(4):
        batch = batch_of(tuned, job.dev[0], [row])
        out = tuned.model.generate(
            inputs_embeds=tuned.inputs(batch)["inputs_embeds"].detach(), max_new_tokens=6, do_sample=False
        )
        made.append(" ".join(tokenizer.decode(out[0], skip_special_tokens=True).split()))
    # Two rows' answers are called classes; all else is none.
    spelled = [made[0], "not generated", made[1] if made[1] != made[0] else "nor this"]
    spelled = [text or "empty" for text in spelled]
    tuned.wordings = [replace(tuned.wordings[0], longest=6, spelled=tuple(spelled))]
    expected = [spelled.index(text) if text in spelled else -1 for text in made]
    assert predictions(tuned, job.dev[0])[:4].tolist() == expected


def test_output_that_is_no_class_is_wrong(folder):
    tuned, _, job = ready(folder)
    tuned.wordings = [replace(tuned.wordings[0], spelled=("never", "ever", "said"))]
    scores = report(tuned, job.dev[0])
    assert (scores["unparsable"], scores["accuracy"]) == (100.0, 0.0)


def test_run_evaluate_and_predict(folder):
    task = {"verbalizer": WORDS}
    plan = {"epochs": 12, "lr": 1e-2}
    result = tuning.run(folder, "fine_tune", out="run", task=task, plan=plan)
    assert (result["fusion"], result["decoder"], result["fusion_parameters"]) == ("none", "text", 0)
    assert result["dev_metrics"]["unparsable"] < 50
    assert result["dev"] > 40
    assert use.evaluate(str(folder / "run"), "dev")["score"] == pytest.approx(result["dev"])
    predictor = use.TunedPredictor(str(folder / "run"))
    rows = read_inputs(predictor.runs[0], ["open the red door", "play the red radio"], None)
    for row in predictor.predict_rows(rows):
        assert row["intent"] in {*WORDS, None}


@pytest.mark.parametrize("method", ["adapter", "prefix_tuning", "diff_prune"])
def test_methods_train_on_it(folder, method):
    result = tuning.run(folder, method, out=f"run-{method}", task={"verbalizer": WORDS}, plan={"epochs": 1})
    assert use.evaluate(str(folder / f"run-{method}"), "dev")["metrics"] == result["dev_metrics"]


def test_attempt_trains_on_it(folder):
    task = {"verbalizer": WORDS}
    for name in "ab":
        options = {"length": "3"}
        tuning.run(
            folder, "prompt_tuning", out=f"sources/{name}", task=task, options=options, plan={"epochs": 1}
        )
    result = tuning.run(
        folder, "attempt", out="attempt", task=task, prompts=str(folder / "sources"), plan={"epochs": 1}
    )
    assert result["method_parameters"] == 3 * 32 + 2 * 100 * 32 + 2 * 32


def test_classes_are_their_own_words():
    assert verbalize("intent", ["move", "sound"], {"move": "go  now"}) == ["go now", "sound"]


@pytest.mark.parametrize(
    ("names", "given", "said"),
    [
        (["0", "1"], {}, "class '0' has no verbaliser"),
        (["0", "1"], {"0": "no"}, "class '1' has no verbaliser"),
        (["a", "b"], {"a": "b"}, "two classes are both 'b'"),
        (["a", "b"], {"c": "x"}, "--verbalizer c=...: no class of 'label'"),
    ],
)
def test_verbaliser_that_does_not_fit(names, given, said):
    with pytest.raises(PipelineError, match=said):
        verbalize("label", names, given)


def test_words_that_the_tokenizer_cannot_tell_apart():
    tokenizer = transformers.AutoTokenizer.from_pretrained(tiny_encoder("t5"))
    with pytest.raises(PipelineError, match="give another --verbalizer"):
        spell(tokenizer, "label", ["Ω", "Ψ"])


def test_what_a_model_from_text_to_text_cannot_take(folder):
    with pytest.raises(PipelineError, match="a t5 model has no bias terms"):
        ready(folder, "bitfit")
    with pytest.raises(PipelineError, match="is tags: a model from text to text learns classes"):
        ready(folder, target="tags", task={})
    with pytest.raises(PipelineError, match="--verbalizer is for classes, target 'score' is float"):
        ready(folder, target="score")
    with pytest.raises(PipelineError, match="--fusion and --decoder need an encoder"):
        ready(folder, fusion="dwatt")
    with pytest.raises(PipelineError, match="method fine_tune has no option 'pooling'"):
        ready(folder, options={"pooling": "mean"})
    with pytest.raises(PipelineError, match="--verbalizer is for models from text to text"):
        tuning.ready(folder, "fine_tune", encoder=tiny_encoder("bert"), task={"verbalizer": WORDS})
