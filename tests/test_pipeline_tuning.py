"""The house of early fusion: batches, loss, loop, resuming, run folders."""

import json
from contextlib import ExitStack, nullcontext
from dataclasses import replace
from pathlib import Path

import disks
import numpy as np
import pytest
import safetensors.torch
import tiny
import torch
import tuning
from encoders import tiny_encoder

from pipeline.errors import PipelineError
from pipeline.folders import clear_partials
from pipeline.raw_inputs import read_inputs
from pipeline.tuning import folder as tuned
from pipeline.tuning import use
from pipeline.tuning.batches import deal, in_order, make_batch
from pipeline.tuning.loop import Plan, make_accelerator
from pipeline.tuning.run import TaskAsked, make_plan, recompute


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("tuning")


def batch_of(tuned, examples, rows, **choices):
    heads = list(tuned.heads)
    return make_batch([(examples, rows)], tuned.backbone, heads, n_slots=tuned.method.n_slots, **choices)


def test_epoch_holds_every_row_once_and_is_a_function_of_its_number():
    lengths = np.random.default_rng(0).integers(3, 40, 533)
    dealt = deal(lengths, batch_size=8, seed=1, epoch=2)
    assert sorted(np.concatenate(dealt).tolist()) == list(range(533))
    again, other = (deal(lengths, batch_size=8, seed=1, epoch=e) for e in (2, 3))
    assert all(np.array_equal(a, b) for a, b in zip(dealt, again, strict=True))
    assert not all(np.array_equal(a, b) for a, b in zip(dealt, other, strict=True))


def test_batches_of_like_lengths_have_little_padding():
    lengths = np.random.default_rng(0).integers(3, 80, 2_000)
    dealt = deal(lengths, batch_size=16, seed=0, epoch=1)
    padded = sum(lengths[b].max() * len(b) for b in dealt)
    assert padded < 1.1 * lengths.sum()
    random = np.random.default_rng(1).permutation(2_000).reshape(-1, 16)
    assert sum(lengths[b].max() * 16 for b in random) > 1.5 * lengths.sum()


@pytest.mark.parametrize("target", ["intent", "tags", "score"])
@pytest.mark.parametrize("fusion", ["last_layer", "dwatt", "transformer"])
def test_loss_is_that_of_each_example_alone(folder, target, fusion):
    tuned, _, job = tuning.ready(folder, "fine_tune", target, fusion=fusion)
    tuned.eval()
    rows = np.arange(7)
    whole = tuned(batch_of(tuned, job.train[0], rows))
    alone = [tuned(batch_of(tuned, job.train[0], rows[i : i + 1])) for i in rows]
    # Every row has one unit, or four words: the mean over rows is the mean over units.
    assert torch.stack(alone).mean().item() == pytest.approx(whole.item(), rel=1e-5)


def test_states_that_the_head_reads_are_a_plain_forward(folder):
    tuned, _, job = tuning.ready(folder, "fine_tune", "tags", fusion="last_layer")
    tuned.eval()
    examples, rows = job.dev[0], np.array([3, 0, 5])
    batch = batch_of(tuned, examples, rows)
    read = tuned._read(tuned._states(batch), batch.parts[0]).states[0]
    expected = []
    for row in rows:
        here = slice(examples.tokens.start[row], examples.tokens.start[row + 1])
        ids = torch.from_numpy(examples.tokens.input_ids[here].astype(np.int64))[None]
        states = tuned.model(input_ids=ids).last_hidden_state[0]
        expected.append(states[torch.from_numpy(examples.tokens.kind[here] == 2)])
    assert torch.allclose(read, torch.cat(expected), atol=1e-5)


def test_pieces_of_a_step_add_up_to_the_step(folder):
    from pipeline.tuning.loop import Progress, _Trainer, make_optimizer

    gradients = []
    for pieces in (1, 3):
        plan = Plan(accumulation=pieces, batch_size=10, lr=1e-3)
        tuned, _, job = tuning.ready(folder, "fine_tune", "tags", plan=plan)
        tuned.eval()  # without dropout, which differs by piece
        accelerator = make_accelerator(torch.device("cpu"), "float32")
        wrapped, optimizer = accelerator.prepare(tuned, make_optimizer(tuned, plan))
        trainer = _Trainer(wrapped, tuned, optimizer, job, plan, accelerator, Progress())
        loss, _ = trainer._step(np.arange(10))
        weights = [p for p in tuned.parameters() if p.grad is not None]
        gradients.append((loss.item(), torch.cat([p.grad.flatten() for p in weights])))
    assert gradients[0][0] == pytest.approx(gradients[1][0], rel=1e-5)
    assert torch.allclose(gradients[0][1], gradients[1][1], atol=1e-6)


@pytest.mark.parametrize("target", ["intent", "tags", "score"])
def test_result_folder_evaluate_and_predict_agree(folder, target):
    out = f"run-{target}"
    result = tuning.run(folder, "fine_tune", target, out=out)
    path = str(folder / out)
    keys = {"run", "fusion", "decoder", "target", "metric", "dev", "best_epoch", "epochs", "seconds"}
    keys |= {"seconds_per_epoch", "parameters", "fusion_parameters", "method", "seconds_per_step"}
    assert keys | {"peak_memory_bytes", "trainable_frac"} <= set(result)
    assert json.loads(Path(path, "result.json").read_text()) == result
    assert len(Path(path, "metrics.jsonl").read_text().splitlines()) == result["epochs"]
    assert use.evaluate(path, "dev")["metrics"] == pytest.approx(result["dev_metrics"], rel=1e-5)
    predictor = use.TunedPredictor(path)
    row = next(iter(predictor.predict_rows(read_inputs(predictor.runs[0], ["open the red door"], None))))
    kind = {"intent": str, "tags": list, "score": float}[target]
    assert row["tokens"] == ["open", "the", "red", "door"]
    assert isinstance(row[target], kind)
    assert target != "tags" or len(row[target]) == 4


def test_fine_tune_learns(folder):
    # The small encoder of `tiny` says next to nothing of its words; this one does.
    plan, encoder = {"epochs": 8, "lr": 1e-3, "head_lr": 1e-2}, tiny_encoder("bert")
    result = tuning.run(folder, "fine_tune", "tags", out="learned", plan=plan, encoder=encoder)
    assert result["dev"] > 90
    assert result["trainable_frac"] == 1


class KilledError(Exception):
    pass


@pytest.mark.parametrize("fusion", ["last_layer", "dwatt"])
def test_resumed_run_equals_an_undisturbed_one(folder, tmp_path, fusion):
    plan = {"epochs": 4, "lr": 1e-3}
    choices = {"fusion": fusion, "options": {"dropout": 0.1}}
    names = {}
    for kills in ((), (2,), (1, 3)):
        out = f"resumed-{fusion}-{'-'.join(map(str, kills))}"
        for kill in kills:

            def stop(epoch, lines, kill=kill):
                if epoch == kill:
                    raise KilledError

            with pytest.raises(KilledError):
                tuning.run(folder, "fine_tune", out=out, plan=plan, progress=stop, **choices)
            assert (folder / f"{out}.partial").is_dir()
        result = tuning.run(folder, "fine_tune", out=out, plan=plan, **choices)
        assert not (folder / f"{out}.partial").exists()
        weights = safetensors.torch.load_file(folder / out / "tuned.safetensors")
        names[kills] = (result["dev_metrics"], weights)
    for scores, weights in names.values():
        assert scores == names[()][0]
        assert all(torch.equal(value, names[()][1][name]) for name, value in weights.items())


def test_unfinished_run_of_other_choices_is_refused(folder):
    def stop(epoch, lines):
        raise KilledError

    with pytest.raises(KilledError):
        tuning.run(folder, "fine_tune", out="other", progress=stop)
    with pytest.raises(PipelineError, match="unfinished run with another seed"):
        tuning.run(folder, "fine_tune", out="other", plan={"seed": 5})


@pytest.mark.parametrize("what", ["rows of the data", "weights of the encoder"])
def test_unfinished_run_of_files_that_have_changed_is_refused(tmp_path, what):
    def stop(epoch, lines):
        raise KilledError

    with pytest.raises(KilledError):
        tuning.run(tmp_path, "bitfit", progress=stop)
    before = {path: path.read_bytes() for path in tmp_path.glob("*/*") if ".partial" not in str(path)}
    if what == "rows of the data":
        lines = (tmp_path / "data" / "dev.jsonl").read_text().splitlines(keepends=True)
        (tmp_path / "data" / "dev.jsonl").write_text("".join(lines[1:]))
    else:
        tiny.encoder(tmp_path / "encoder", seed=1)
    with pytest.raises(PipelineError, match=f"the {what} changed since the unfinished run in .* began"):
        tuning.run(tmp_path, "bitfit")
    for path, content in before.items():
        path.write_bytes(content)
    assert tuning.run(tmp_path, "bitfit")["epochs"] == 2


def test_loss_that_is_not_finite_is_one_line(folder):
    with pytest.raises(PipelineError, match=r"loss became NaN or infinite at step \d+: lower --lr"):
        tuning.run(folder, "fine_tune", out="nan", plan={"lr": 1e30, "head_lr": 1e30})


def test_of_several_tasks_a_lower_error_is_the_better_epoch(folder, monkeypatch):
    errors, shares = iter([9.0, 1.0]), iter([51.0, 50.0])  # the mean alone would take the first epoch

    def reported(tuned, examples):
        if examples.target.kind == "float":
            return {"mse": next(errors)}
        return {"accuracy": next(shares)}

    monkeypatch.setattr("pipeline.tuning.loop.report", reported)
    first = tuning.asked(folder, "bitfit").tasks[0]
    result = tuning.run(
        folder, "bitfit", "score", out="signs", task={"metric": "mse"},
        further=[replace(first, metric="accuracy")],
    )  # fmt: skip
    assert result["best_epoch"] == 2
    assert result["dev"] == (50.0 - 1.0) / 2


def test_taken_folder_is_refused_and_may_be_replaced(folder):
    tuning.run(folder, "bitfit", out="taken", plan={"epochs": 1})
    with pytest.raises(PipelineError, match="not empty, name another one, or give --overwrite"):
        tuning.run(folder, "bitfit", out="taken", plan={"epochs": 1})
    tuning.run(folder, "bitfit", out="taken", plan={"epochs": 1}, overwrite=True)
    with pytest.raises(PipelineError, match="not empty, name another one"):
        tuning.run(folder, "bitfit", out="data", overwrite=True)


def test_a_run_is_replaced_only_by_a_whole_one(tmp_path, monkeypatch):
    def save(number):
        out = str(tmp_path / "run")
        weights = {"a": torch.zeros(1)}
        tuned.save(out, {"number": number}, weights=weights, lines=[], result={}, further={})

    rename = Path.rename

    def die(self, target):
        if ".partial-" in self.name:
            raise KilledError
        return rename(self, target)

    save(1)
    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", die)
        with pytest.raises(KilledError):
            save(2)
    clear_partials(tmp_path / "run")
    assert json.loads((tmp_path / "run" / "config.json").read_text())["number"] == 1
    save(3)
    assert json.loads((tmp_path / "run" / "config.json").read_text())["number"] == 3
    assert [p.name for p in tmp_path.iterdir()] == ["run"]


@pytest.mark.parametrize("epoch", [1, 2])
def test_disk_that_refuses_is_one_line_and_costs_at_most_an_epoch(folder, epoch):
    out = f"full-{epoch}"
    tuning.asked(folder, "bitfit")  # makes the encoder, while there is room
    with ExitStack() as disk:

        def fill(done, lines):
            if done == epoch:
                disk.enter_context(disks.small_files(8192))

        with pytest.raises(PipelineError, match=rf"{out}.* cannot be written: .*File too large"):
            tuning.run(folder, "bitfit", out=out, progress=fill)
    assert [p.name for p in folder.glob(f"{out}*")] == [f"{out}.partial"]
    assert [p.name for p in (folder / f"{out}.partial").glob("epoch-*")] == [f"epoch-0000{epoch}"]
    assert tuning.run(folder, "bitfit", out=out)["epochs"] == 2


def test_mixed_precision_and_checkpointing_train(folder):
    plan = {"precision": "bfloat16", "checkpointing": True, "accumulation": 2, "epochs": 1}
    result = tuning.run(folder, "fine_tune", "tags", out="bf16", plan=plan)
    plain = tuning.run(folder, "fine_tune", "tags", out="plain", plan={"epochs": 1})
    losses = [json.loads((folder / out / "metrics.jsonl").read_text())["loss"] for out in ("bf16", "plain")]
    assert losses[0] == pytest.approx(losses[1], rel=0.1)
    assert result["steps"] == plain["steps"]


def test_evaluate_computes_in_the_precision_of_the_run(folder, monkeypatch):
    result = tuning.run(folder, "bitfit", "score", out="short", plan={"precision": "bfloat16", "epochs": 1})
    asked = str(folder / "short"), "dev"
    assert use.evaluate(*asked)["metrics"] == pytest.approx(result["dev_metrics"], rel=1e-6)
    monkeypatch.setattr(use, "products_in", lambda *_: nullcontext())
    assert use.evaluate(*asked)["metrics"]["mse"] != pytest.approx(result["dev_metrics"]["mse"], rel=1e-6)


def test_checkpointing_changes_no_gradient(folder):
    found = []
    for checkpointing in (False, True):
        tuned, _, job = tuning.ready(folder, "fine_tune")
        if checkpointing:
            recompute(tuned, "fine_tune")
        torch.manual_seed(0)
        tuned.train()
        tuned(batch_of(tuned, job.train[0], np.arange(6))).backward()
        found.append(tuned.model.embeddings.word_embeddings.weight.grad)
    assert torch.allclose(found[0], found[1], atol=1e-6)


def test_words_cut_off_count_as_wrong(folder):
    tuned, _, job = tuning.ready(folder, "fine_tune", "tags", max_length=4)
    from pipeline.tuning.loop import predictions

    guess = predictions(tuned, job.dev[0])
    assert len(guess) == 4 * len(job.dev[0])
    assert (guess == -1).mean() >= 0.5  # two sub-words are left of each row's four words


def test_evaluate_refuses_what_is_not_for_it(folder):
    tuning.run(folder, "bitfit", out="asked", plan={"epochs": 1})
    with pytest.raises(PipelineError, match="reads text and no bank: leave out --store"):
        use.evaluate(str(folder / "asked"), "dev", store="bank")
    with pytest.raises(PipelineError, match="no split 'nowhere'"):
        use.evaluate(str(folder / "asked"), "nowhere")
    with pytest.raises(PipelineError, match="give it alone"):
        use.open_tuned_predictor([str(folder / "asked")] * 2)


def test_other_encoder_is_refused(folder, tmp_path):
    import tiny

    tuning.run(folder, "bitfit", out="own", plan={"epochs": 1})
    other = tiny.encoder(tmp_path / "other", seed=5)
    with pytest.raises(PipelineError, match="has other weights than the one of"):
        use.TunedPredictor(str(folder / "own"), encoder=other)


@pytest.mark.parametrize(
    ("plan", "said"),
    [
        ({"epochs": 0}, "--epochs 0: give 1 or more"),
        ({"lr": -1.0}, "--lr -1.0: give a number above 0"),
        ({"weight_decay": -1.0}, "--weight-decay -1.0: give 0 or more"),
        ({"warmup_steps": -1}, "--warmup-steps -1: give 0 or more"),
        ({"patience": 0}, "--patience 0: give 1 or more epochs"),
        ({"seed": -1}, "--seed -1: give 0 to"),
        ({"accumulation": 0}, "--accumulation 0: give 1 or more"),
    ],
)
def test_bad_plan_is_one_line(plan, said):
    with pytest.raises(PipelineError, match=said):
        make_plan("fine_tune", **plan)


def test_unknown_names_list_the_known(folder):
    with pytest.raises(PipelineError, match="did you mean 'bitfit'"):
        make_plan("bitfitt")
    with pytest.raises(PipelineError, match="neither method bitfit nor its head has an option 'sise'"):
        tuning.ready(folder, "bitfit", options={"sise": "1"})


def test_patience_ends_a_run(folder):
    result = tuning.run(
        folder, "bitfit", out="patient", plan={"epochs": 6, "patience": 1, "lr": 1e-12, "head_lr": 1e-12}
    )
    assert (result["best_epoch"], result["epochs"]) == (1, 2)


def test_every_row_is_scored(folder):
    _, _, job = tuning.ready(folder, "fine_tune")
    rows = np.concatenate([rows for picked in in_order(job.dev[0]) for _, rows in picked])
    assert sorted(rows.tolist()) == list(range(len(job.dev[0])))


def test_each_of_several_tasks_is_used_with_its_own_columns(tmp_path):
    # The tokenizer of the whole run is one that takes words, which the first task has none of.
    tuning.data(tmp_path / "data", ["text", "intent"])
    words = TaskAsked(data=tuning.data(tmp_path / "words", ["tokens", "intent"]), target="intent")
    choices = {"further": [words], "encoder": tiny_encoder("roberta"), "plan": {"epochs": 1}}
    result = tuning.run(tmp_path, "bitfit", out="mixed", **choices)
    path = str(tmp_path / "mixed")
    for task, column in (("data.intent", "text"), ("words.intent", "tokens")):
        found = use.evaluate(path, "dev", target=task)
        assert found["score"] == pytest.approx(result["dev_metrics"][f"{task}.accuracy"], abs=1e-3)
        predictor = use.TunedPredictor(path, target=task)
        (row,) = predictor.predict_rows(read_inputs(predictor.runs[0], ["open the red door"], None))
        assert set(row) == {column, "intent"}
    with pytest.raises(PipelineError, match=r"name one by --target, of data\.intent, words\.intent"):
        use.evaluate(path, "dev", target="intent")
