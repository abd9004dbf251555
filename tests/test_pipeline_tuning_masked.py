"""Masked text through the encoder: the bank's masks, `transformers`' own perplexity, what is learned."""

import json
import math

import numpy as np
import pytest
import torch
import transformers
from encoders import SENTENCES, tiny_encoder, tiny_masked_lm

from cache import open_bank
from pipeline.corpus import load_corpus
from pipeline.encoder import Encoder
from pipeline.errors import PipelineError
from pipeline.extract import extract
from pipeline.tuning import use
from pipeline.tuning.loop import predictions, report
from pipeline.tuning.run import Asked, TaskAsked, make_plan, prepare, tune_run

LINES = [*SENTENCES, "", *reversed(SENTENCES)] * 3


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    for split, lines in (("train", LINES), ("dev", LINES[4:])):
        rows = "".join(json.dumps({"text": line}) + "\n" for line in lines)
        (folder / f"{split}.jsonl").write_text(rows, encoding="utf-8")
    return str(folder)


def asked(data, out="run", *, encoder=None, target="token", maskings=2, **choices):
    task = TaskAsked(data=data, target=target, maskings=maskings)
    choices = {"method": "fine_tune", "max_length": 20, **choices}
    return Asked(tasks=[task], encoder=encoder or tiny_masked_lm("bert"), out=str(out), **choices)


def ready(*args, **choices):
    return prepare(asked(*args, **choices), make_plan("fine_tune", batch_size=4))


def reference_nats(encoder, tokens, gold):
    """`transformers`' own negative log-likelihood of each token to predict."""
    model = transformers.AutoModelForMaskedLM.from_pretrained(encoder).eval()
    nats, first = [], 0
    for a, b in zip(tokens.start[:-1], tokens.start[1:], strict=True):
        logits = model(input_ids=torch.from_numpy(tokens.input_ids[a:b])[None].long()).logits[0]
        chosen = logits[torch.from_numpy(tokens.predicted[a:b])]
        true = torch.from_numpy(gold[first : first + len(chosen)]).long()
        nats.append(torch.nn.functional.cross_entropy(chosen, true, reduction="none").detach().numpy())
        first += len(chosen)
    return np.concatenate(nats)


@pytest.mark.parametrize("family", ["bert", "roberta"])
def test_untouched_it_is_the_model_of_transformers_on_the_bank_s_masks(data, tmp_path, family):
    encoder = tiny_masked_lm(family)
    tuned, _, job = ready(data, encoder=encoder)
    dev = job.dev[0]
    options = {"keep": "masked", "maskings": 2, "max_length": 20}
    made = extract(load_corpus(data), Encoder(encoder), str(tmp_path / "bank"), **options)
    split = open_bank(made.store).split("dev")
    ends = np.cumsum(dev.tokens.kept_length("masked"))
    by_row = np.split(dev.target.values, ends[:-1])
    assert split.target("token").values.tolist() == np.concatenate([by_row[i] for i in split.row]).tolist()
    nats = reference_nats(encoder, dev.tokens, dev.target.values)
    np.testing.assert_allclose(predictions(tuned, dev), nats, rtol=1e-4, atol=1e-5)
    assert report(tuned, dev)["perplexity"] == pytest.approx(math.exp(nats.mean()), rel=1e-4)


def test_loss_of_a_batch_is_the_mean_over_its_tokens(data):
    from pipeline.tuning.batches import make_batch

    tuned, _, job = ready(data)
    train = job.train[0]
    rows = np.array([5, 0, 3])
    heads = list(tuned.heads)
    batch = make_batch([(train, rows)], tuned.backbone, heads, n_slots=0)
    ends = np.concatenate([[0], np.cumsum(train.tokens.kept_length("masked"))])
    nats = reference_nats(tiny_masked_lm("bert"), train.tokens, train.target.values)
    expected = np.concatenate([nats[ends[row] : ends[row + 1]] for row in rows]).mean()
    assert tuned.eval()(batch).item() == pytest.approx(expected, rel=1e-4)


def test_fine_tuning_lowers_it_and_the_run_scores_the_same_again(data, tmp_path):
    before = report(ready(data)[0], ready(data)[2].dev[0])["perplexity"]
    plan = make_plan("fine_tune", epochs=2, batch_size=4, lr=1e-3)
    result = tune_run(asked(data, tmp_path / "run"), plan)
    assert (result["metric"], result["decoder"]) == ("perplexity", "masked_lm")
    assert result["dev"] < 0.9 * before
    assert result["parameters"] == result["method_parameters"]  # the output layer stays as it was
    again = use.evaluate(str(tmp_path / "run"), "dev")
    assert again["score"] == pytest.approx(result["dev"])
    with pytest.raises(PipelineError, match="predicts masked tokens"):
        use.TunedPredictor(str(tmp_path / "run"))


def test_the_transform_can_learn_along_and_other_methods_and_fusions_take_it(data, tmp_path):
    choices = {"method": "bitfit", "fusion": "attention", "options": {"learn": "transform"}}
    plan = make_plan("bitfit", epochs=1, batch_size=8)
    result = tune_run(asked(data, tmp_path / "run", **choices), plan)
    width = 32
    head = result["parameters"] - result["method_parameters"]
    vocabulary = len(transformers.AutoTokenizer.from_pretrained(tiny_masked_lm("bert")))
    assert head == width + width * width + 3 * width + vocabulary
    assert use.evaluate(str(tmp_path / "run"), "dev")["score"] == pytest.approx(result["dev"])


@pytest.mark.parametrize(
    ("choices", "said"),
    [
        ({"target": "text"}, "makes the target 'token', 'text' was asked: give --target token"),
        ({"maskings": None}, "token"),
        ({"encoder": "gpt2"}, "--maskings: the tokenizer has no mask token"),
        ({"max_length": 2}, "adds 2 special tokens, give 3 or more"),
        ({"fusion": "concat"}, r"this head needs .* use another fusion"),
        ({"decoder": "tagger"}, "learns tags, target 'token' is token: use --decoder masked_lm"),
    ],
)
def test_what_does_not_fit_is_refused(data, choices, said):
    if "encoder" in choices:
        choices = {**choices, "encoder": tiny_encoder(choices["encoder"])}
    with pytest.raises(PipelineError, match=said):
        ready(data, **choices)
