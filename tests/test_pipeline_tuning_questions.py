"""Questions through the encoder: options to choose from, against plain forwards and hand-written losses."""

import numpy as np
import pytest
import safetensors.torch
import tiny
import torch
import transformers
import tuning
from encoders import tiny_encoder
from questions import choice_rows, write

from pipeline.errors import PipelineError
from pipeline.predict import read_inputs
from pipeline.tuning import use
from pipeline.tuning.examples import in_order, make_batch
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


class ByHand:
    """The encoder by `transformers` alone, a soft prompt put in by hand, and a linear head's weights."""

    def __init__(self, tuned, encoder):
        self.model = transformers.AutoModel.from_pretrained(encoder).eval()
        self.tokenizer = transformers.AutoTokenizer.from_pretrained(encoder)
        self.prompt = getattr(tuned.method, "prompt", torch.empty(0, self.model.config.hidden_size))
        state = tuned.heads[0].decoder.state_dict()
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
    ("change", "said"),
    [
        ({"decoder": "classifier"}, "--decoder classifier learns class, target 'label' is choice"),
        ({"fusion": "nothing"}, "nothing"),
        ({"max_length": 3}, "--max-length 3: the encoder adds 3 special tokens, give 4 or more"),
        ({"options": {"longest": "4"}}, "has an option 'longest'"),
        ({"encoder": "t5"}, "is choice: a model from text to text learns classes"),
    ],
)
def test_what_does_not_fit_choices_is_refused(folder, change, said):
    if "encoder" in change:
        change = {"encoder": tiny_encoder(change["encoder"])}
    with pytest.raises(PipelineError, match=said) as caught:
        tuning.ready(folder, "fine_tune", **choices(folder, **change))
    assert "\n" not in str(caught.value)
