"""Questions through the encoder, against plain forwards of `transformers` and losses written by hand."""

import numpy as np
import pytest
import safetensors.torch
import tiny
import torch
import transformers
import tuning
from encoders import tiny_encoder
from questions import choice_rows, question_rows, write

from pipeline.errors import PipelineError
from pipeline.raw_inputs import read_inputs
from pipeline.tuning import use
from pipeline.tuning.batches import in_order, make_batch
from pipeline.tuning.loop import predictions, report
from pipeline.tuning.run import TaskAsked

SIZES = {"train": 24, "dev": 12}


def easy_rows(split, n):
    """The red option is right: what a tiny encoder can learn in a few epochs."""
    random = np.random.default_rng([len(split), 8])
    rows = []
    for _ in range(n):
        colours = random.permutation(tiny.COLOURS)[: random.integers(1, 3)]
        colours = [str(colour) for colour in random.permutation([*(set(colours) - {"red"}), "red"])]
        options = [f"{colour} {random.choice(tiny.NOUNS)}" for colour in colours]
        rows.append({"text": "open", "options": options, "label": colours.index("red")})
    return rows


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("questions")
    write(folder / "choices", choice_rows, SIZES)
    write(folder / "answers", question_rows, SIZES)
    tiny.encoder(folder / "encoder")
    return folder


def choices(folder, **more):
    """How a run on the options is asked for."""
    task = {"data": str(folder / "choices"), "columns": {"options": "options"}}
    return {"target": "label", "task": task, "encoder": tiny_encoder("bert"), **more}


def batch_of(tuned, examples, rows, **more):
    heads = list(tuned.heads)
    return make_batch(
        [(examples, np.array(rows))], tuned.backbone, heads, n_slots=tuned.method.n_slots, **more
    )


def answers(folder, **more):
    """How a run on the answers is asked for; the encoder knows the words."""
    data = f"squad@{folder / 'answers'}"
    return {"target": "answer", "task": {"data": data}, "encoder": str(folder / "encoder"), **more}


def easy_answers(split, n):
    """The first colour is the answer."""
    rows = question_rows(split, 4 * n)
    return [row for row in rows if row["answers"]["answer_start"] == [len("The ")]][:n]


class ByHand:
    """The encoder by `transformers` alone, a soft prompt put in by hand, and a linear head's weights."""

    def __init__(self, tuned, encoder):
        self.model = transformers.AutoModel.from_pretrained(encoder).eval()
        self.tokenizer = transformers.AutoTokenizer.from_pretrained(encoder)
        self.prompt = torch.empty(0, self.model.config.hidden_size)
        if hasattr(tuned.method, "prompt"):
            self.prompt = tuned.method.prompt.detach()
        state = tuned.heads[0].decoder.state_dict()
        self.model.requires_grad_(False)
        (self.weight,) = (value[0] for name, value in state.items() if name.endswith("weight"))
        (self.bias,) = (value[0] for name, value in state.items() if name.endswith("bias"))

    def scores(self, text, second, **cut):
        """Scores of every token of the two texts, without the prompt's, and the tokenizer's output."""
        encoded = self.tokenizer(text, second, return_tensors="pt", return_offsets_mapping=True, **cut)
        embedded = self.model.get_input_embeddings()(encoded["input_ids"])
        whole = torch.cat([embedded[:, :1], self.prompt[None], embedded[:, 1:]], 1)
        types = encoded.get("token_type_ids", torch.zeros_like(encoded["input_ids"]))
        filled = torch.zeros(1, len(self.prompt), dtype=torch.long)
        more = {"token_type_ids": torch.cat([types[:, :1], filled, types[:, 1:]], 1)}
        if "token_type_ids" not in encoded:
            more = {}
        states = self.model(inputs_embeds=whole, **more).last_hidden_state[0]
        kept = torch.cat([states[:1], states[1 + len(self.prompt) :]])
        weight = self.weight if self.weight.shape[0] == kept.shape[1] else self.weight.T
        return kept @ weight + self.bias, encoded

    def option_scores(self, row):
        """One score for each option of a row: that of its first token."""
        return torch.stack([self.scores(row["text"], option)[0][0, 0] for option in row["options"]])

    def span_scores(self, row, **cut):
        """Scores as first and as last, and the characters, of every token of the context."""
        scores, encoded = self.scores(row["question"], row["context"], **cut)
        inside = [k for k, part in enumerate(encoded.sequence_ids(0)) if part == 1]
        return scores[inside], encoded["offset_mapping"][0][inside].tolist()


def brute_force(scores, longest=30):
    """The span of the highest sum, every one tried."""
    n = len(scores)
    pairs = [(i, j) for i in range(n) for j in range(i, min(n, i + longest))]
    return max(pairs, key=lambda pair: float(scores[pair[0], 0] + scores[pair[1], 1]))


def gold(row, characters):
    """First and last token that have a character of the answer; None where it is cut off."""
    start = row["answers"]["answer_start"][0]
    stop = start + len(row["answers"]["text"][0])
    touched = [k for k, (a, b) in enumerate(characters) if a < stop and b > start]
    return (touched[0], touched[-1]) if characters[-1][1] >= stop else None


LINEAR = {"layers": "linear"}
TAKES = [
    ("fine_tune", {}, "bert"),
    ("prompt_tuning", {"length": "5"}, "bert"),
    ("prompt_tuning", {"length": "2"}, "roberta"),
]


@pytest.mark.parametrize(("method", "options", "family"), TAKES)
def test_loss_of_choices_is_a_softmax_over_plain_forwards(folder, method, options, family):
    asked = choices(folder, encoder=tiny_encoder(family), options={**LINEAR, **options})
    tuned, _, job = tuning.ready(folder, method, **asked)
    tuned.eval()
    by_hand, rows = ByHand(tuned, asked["encoder"]), choice_rows("train", SIZES["train"])
    losses = []
    for number in (3, 0, 7):
        scores = by_hand.option_scores(rows[number])
        losses.append(scores.exp().sum().log() - scores[rows[number]["label"]])
    loss = tuned(batch_of(tuned, job.train[0], [3, 0, 7]))
    assert loss.item() == pytest.approx(torch.stack(losses).mean().item(), rel=1e-4)


@pytest.mark.parametrize(("method", "options", "family"), TAKES[:2])
def test_the_option_taken_is_the_one_of_the_highest_score(folder, method, options, family):
    asked = choices(folder, encoder=tiny_encoder(family), options={**LINEAR, **options})
    tuned, _, job = tuning.ready(folder, method, **asked)
    by_hand, rows = ByHand(tuned, asked["encoder"]), choice_rows("dev", SIZES["dev"])
    best = [int(by_hand.option_scores(row).argmax()) for row in rows]
    flags = [np.eye(len(row["options"]), dtype=int)[k] for row, k in zip(rows, best, strict=True)]
    assert predictions(tuned, job.dev[0]).tolist() == np.concatenate(flags).tolist()
    right = [k == row["label"] for row, k in zip(rows, best, strict=True)]
    assert report(tuned, job.dev[0])["accuracy"] == pytest.approx(100 * np.mean(right))


def test_a_question_without_a_right_option_is_not_learned_from_and_several_may_be_right(folder, tmp_path):
    rows = [
        {"text": "open the lamp", "options": ["the lamp", "a door", "lamp"], "label": label}
        for label in ([1, 0, 1], [0, 0, 0], None, [0, 1, 0])
    ]
    write(tmp_path / "choices", lambda *_: rows, {"train": 4, "dev": 4})
    asked = choices(tmp_path, options=LINEAR)
    tuned, _, job = tuning.ready(tmp_path, "fine_tune", **asked)
    tuned.eval()
    assert job.train[0].trainable.tolist() == [0, 3]
    shares = ByHand(tuned, asked["encoder"]).option_scores(rows[0]).softmax(0)
    expected = -(shares[0] + shares[2]).log() - shares[1].log()
    assert tuned(batch_of(tuned, job.train[0], [0, 3])).item() == pytest.approx(
        expected.item() / 2, rel=1e-4
    )


def test_few_questions_of_many_options_are_scored_at_once(folder):
    job = tuning.ready(folder, "fine_tune", **choices(folder))[2]
    dealt = [rows for picked in in_order(job.dev[0], 8) for _, rows in picked]
    assert sorted(np.concatenate(dealt).tolist()) == list(range(SIZES["dev"]))
    assert max(map(len, dealt)) == 8 // 4  # four options at most


def test_a_run_learns_to_choose_and_evaluate_and_predict_agree(folder):
    write(folder / "easy" / "choices", easy_rows, {"train": 40, "dev": 16})
    plan = {"epochs": 4, "lr": 1e-3, "head_lr": 1e-2}
    result = tuning.run(folder, "fine_tune", out="chosen", plan=plan, **choices(folder / "easy"))
    assert (result["metric"], result["decoder"]) == ("accuracy", "choice")
    assert result["dev"] > 90
    path = str(folder / "chosen")
    assert use.evaluate(path, "dev")["metrics"] == pytest.approx(result["dev_metrics"], rel=1e-4)
    predictor, rows = use.TunedPredictor(path), easy_rows("dev", 16)
    lines = ["\t".join([row["text"], *row["options"]]) for row in rows]
    said = list(predictor.predict_rows(read_inputs(predictor.runs[0], lines, None)))
    assert said[0]["options"] == rows[0]["options"]
    right = [one["label"] == row["label"] for one, row in zip(said, rows, strict=True)]
    assert 100 * np.mean(right) == pytest.approx(result["dev"])


class KilledError(Exception):
    pass


def test_a_prompt_for_choices_leaves_the_encoder_as_it_was_and_resumes(folder):
    asked = choices(folder, options={"length": "3"})
    whole = tuning.run(folder, "prompt_tuning", out="whole", **asked)

    def stop(epoch, lines):
        raise KilledError

    with pytest.raises(KilledError):
        tuning.run(folder, "prompt_tuning", out="killed", progress=stop, **asked)
    again = tuning.run(folder, "prompt_tuning", out="killed", **asked)
    assert again["dev_metrics"] == whole["dev_metrics"]
    loaded = use.TunedPredictor(str(folder / "killed")).tuned
    plain = transformers.AutoModel.from_pretrained(asked["encoder"], add_pooling_layer=False).state_dict()
    frozen = {name: value for name, value in loaded.model.state_dict().items() if name in plain}
    assert len(frozen) > 20
    assert all(torch.equal(value, plain[name]) for name, value in frozen.items())


def test_choices_and_classes_are_learned_together_with_weights_of_prompts_for_each_row(folder):
    classes = TaskAsked(data=tuning.data(folder / "classes"), target="intent")
    asked, plan = choices(folder, options={"length": "3"}), {"epochs": 1}
    for name in "ab":
        tuning.run(folder, "prompt_tuning", out=f"prompts/{name}", plan=plan, **asked)
    asked = choices(folder, prompts=str(folder / "prompts"), further=[classes])
    result = tuning.run(folder, "attempt", out="mixed", plan=plan, **asked)
    assert set(result["tasks"]) == {"choices.label", "classes.intent"}
    found = safetensors.torch.load_file(folder / "mixed" / "attentions.safetensors")
    assert found["choices.label"].shape == (SIZES["dev"], 3)
    torch.testing.assert_close(found["choices.label"].sum(1), torch.ones(SIZES["dev"]))


@pytest.mark.parametrize(
    ("method", "options", "family"),
    [("fine_tune", {}, None), ("prompt_tuning", {"length": "5"}, None), TAKES[2]],
)
def test_loss_of_answers_is_that_of_plain_forwards(folder, method, options, family):
    asked = answers(folder, options=options)
    if family:
        asked["encoder"] = tiny_encoder(family)
    tuned, _, job = tuning.ready(folder, method, **asked)
    tuned.eval()
    by_hand, rows, losses = ByHand(tuned, asked["encoder"]), question_rows("train", SIZES["train"]), []
    for number in (3, 0, 7):
        scores, characters = by_hand.span_scores(rows[number])
        first, last = gold(rows[number], characters)
        shares = scores.softmax(0)
        losses.append(-(shares[first, 0].log() + shares[last, 1].log()) / 2)
    loss = tuned(batch_of(tuned, job.train[0], [3, 0, 7]))
    assert loss.item() == pytest.approx(torch.stack(losses).mean().item(), rel=1e-4)


@pytest.mark.parametrize("length", [None, "4"])
def test_predicted_answers_are_the_best_of_all_spans_and_never_a_soft_token(folder, length):
    method = "prompt_tuning" if length else "fine_tune"
    asked = answers(folder, options={"longest": "2", **({"length": length} if length else {})})
    tuned, _, job = tuning.ready(folder, method, **asked)
    by_hand, rows = ByHand(tuned, asked["encoder"]), question_rows("dev", SIZES["dev"])
    found, texts = [], []
    for row in rows:
        scores, characters = by_hand.span_scores(row)
        first, last = brute_force(scores, longest=2)
        found.append([first, last])
        texts.append(row["context"][characters[first][0] : characters[last][1]])
    assert predictions(tuned, job.dev[0]).tolist() == found
    right = [text == row["answers"]["text"][0] for text, row in zip(texts, rows, strict=True)]
    assert report(tuned, job.dev[0])["exact_match"] == pytest.approx(100 * np.mean(right))


def test_answers_cut_off_are_not_learned_and_count_as_wrong(folder):
    cut = {"truncation": True, "max_length": 8}
    asked = answers(folder, max_length=cut["max_length"])
    result = tuning.run(folder, "bitfit", out="cut", plan={"epochs": 1}, **asked)
    tuned, _, job = tuning.ready(folder, "bitfit", **asked)
    by_hand = ByHand(tuned, asked["encoder"])
    lost = {}
    for role, examples in (("train", job.train[0]), ("dev", job.dev[0])):
        rows = question_rows(role, SIZES[role])
        spans = [gold(row, by_hand.span_scores(row, **cut)[1]) for row in rows]
        assert examples.trainable.tolist() == [k for k, span in enumerate(spans) if span]
        lost[role] = spans.count(None)
    assert 0 < lost["dev"] < SIZES["dev"]
    assert result["answers_cut"] == {"answers.answer": lost}
    scores = job.dev[0].grader.score(job.dev[0].target.values[None].astype(np.int64))
    assert scores["exact_match"][0] == pytest.approx(100 * (1 - lost["dev"] / SIZES["dev"]))


def test_a_run_learns_answers_and_says_them(folder):
    plan = {"epochs": 2, "lr": 1e-2, "head_lr": 1e-1}
    write(folder / "easy" / "answers", easy_answers, {"train": 40, "dev": 16})
    asked = answers(folder / "easy", encoder=tiny_encoder("bert"))
    result = tuning.run(folder, "fine_tune", out="answered", plan=plan, **asked)
    assert (result["metric"], result["decoder"]) == ("span_f1", "span")
    assert result["dev"] > 90
    path = str(folder / "answered")
    assert use.evaluate(path, "dev")["metrics"] == pytest.approx(result["dev_metrics"], rel=1e-4)
    predictor, rows = use.TunedPredictor(path), easy_answers("dev", 16)
    lines = [f"{row['question']}\t{row['context']}" for row in rows]
    said = list(predictor.predict_rows(read_inputs(predictor.runs[0], lines, None)))
    assert all(one["answer"] in row["context"] for one, row in zip(said, rows, strict=True))
    right = [one["answer"] == row["answers"]["text"][0] for one, row in zip(said, rows, strict=True)]
    assert 100 * np.mean(right) == pytest.approx(result["dev_metrics"]["exact_match"])


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"decoder": "classifier"}, "--decoder classifier learns class, target 'answer' is span"),
        ({"max_length": 5}, "of .*answers has all 24 answers beyond --max-length 5: give a larger one"),
        ({"options": {"longest": "0"}}, "longest is 0: give 1 token or more"),
    ],
)
def test_what_does_not_fit_answers_is_refused(folder, change, said):
    with pytest.raises(PipelineError, match=said) as caught:
        tuning.ready(folder, "fine_tune", **answers(folder, **change))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"decoder": "classifier"}, "--decoder classifier learns class, target 'label' is choice"),
        ({"fusion": "nothing"}, "nothing"),
        ({"max_length": 3}, "--max-length 3: the encoder adds 3 special tokens, give 4 or more"),
        ({"options": {"longest": "4"}}, "has an option 'longest'"),
    ],
)
def test_what_does_not_fit_choices_is_refused(folder, change, said):
    with pytest.raises(PipelineError, match=said) as caught:
        tuning.ready(folder, "fine_tune", **choices(folder, **change))
    assert "\n" not in str(caught.value)
