"""Stage 2 on states whose labels can be read off them: what is learned, kept, repeated and refused."""

import dataclasses
import json
import math

import numpy as np
import pytest
import tiny
import torch

from cache import BankIncomplete, CacheError, Target
from cache.targets import write_target
from pipeline import metrics
from pipeline.batches import Feeds
from pipeline.errors import PipelineError
from pipeline.fitting import Fitting
from pipeline.job import HeadRates, Schedule, open_target, prepare
from pipeline.optimizer import linear_schedule
from pipeline.results import load_run
from pipeline.run import train_run
from pipeline.train import fit, fit_together, predictions

FAST = HeadRates(lr=1e-2)


def job(target="label", fusion="attention", bank=None, **choices):
    return prepare(bank or tiny.shared(), target, fusion=fusion, **choices)


def values(head):
    return {name: value.clone() for name, value in head.state_dict().items()}


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("fusion", ["attention", "last_layer"])
@pytest.mark.parametrize(
    ("target", "options", "at_least"),
    [
        ("label", {}, 95),
        ("label", {"layers": "linear"}, 95),
        ("label", {"pooling": "mean", "dropout": 0.1}, 70),
        # Of every fifth example two words are cut off and count as wrong, so 100 is out of reach.
        ("tags", {}, 80),
        ("tags", {"crf": True}, 80),
        ("value", {}, 90),
        ("value", {"layers": "linear"}, 80),
    ],
    ids=str,
)
def test_learns_what_can_be_learned(target, options, at_least, fusion):
    rates = HeadRates(lr=5e-2) if "layers" in options else FAST
    found = fit(job(target, fusion, options=options), [rates], Schedule(epochs=8))[0]
    assert found.dev >= at_least
    assert found.epochs[-1].loss < found.epochs[0].loss


def test_tags_on_words_with_a_token_are_all_right():
    what = job("tags")
    trained = fit(what, [FAST], Schedule(epochs=8))[0]
    found = predictions(trained.head, what.dev)
    seen = found["predictions"][0] >= 0
    assert seen.sum() == len(what.dev.unit) < len(seen)
    labelled = seen & (found["gold"] >= 0)
    assert (found["predictions"][0] == found["gold"])[labelled].mean() > 0.97


def test_word_without_a_token_counts_as_wrong():
    what = job("tags")
    trained = fit(what, [FAST], Schedule(epochs=4))[0]
    found = predictions(trained.head, what.dev)
    perfect = {**found, "predictions": np.where(found["predictions"] < 0, -1, found["gold"][None])}
    whole = {**found, "predictions": found["gold"][None]}
    names = what.target.names
    assert metrics.report(**whole, names=names)["f1"][0] == 100
    assert metrics.report(**perfect, names=names)["f1"][0] < 100
    assert metrics.report(**perfect, names=names)["accuracy"][0] < 100


@pytest.mark.parametrize(
    ("scores", "patience", "best", "epochs"),
    [
        ([1, 3, 3, 2, 3], None, 2, 5),
        ([5, 1, 1, 1, 1], None, 1, 5),
        ([1, 2, 3, 4, 5], 1, 5, 5),
        ([1, 3, 2, 3, 1], 2, 2, 4),
        ([3, 3, 3, 3, 3], 1, 1, 2),
        ([0, 0, 0, 1, 0], 3, 4, 5),
        ([1, 0, 2, 0, 0], 2, 3, 5),
    ],
)
def test_best_epoch_is_the_first_of_the_best(scores, patience, best, epochs, monkeypatch):
    what, seen, waiting = job(), [], iter(scores)

    def report(**found):
        seen.append(found["predictions"])
        return {"accuracy": np.array([float(next(waiting))])}

    monkeypatch.setattr(metrics, "report", report)
    schedule = Schedule(epochs=len(scores), patience=patience)
    trained = fit(what, [HeadRates(lr=3e-2)], schedule)[0]
    assert (trained.best_epoch, len(trained.epochs)) == (best, epochs)
    assert trained.dev == scores[best - 1]
    assert [line.epoch for line in trained.epochs] == list(range(1, epochs + 1))
    assert np.array_equal(predictions(trained.head, what.dev)["predictions"], seen[best - 1])


def test_weights_are_those_of_the_best_epoch_and_not_of_the_last(monkeypatch):
    what, kept, waiting = job(), [], iter([1.0, 9.0, 2.0, 9.0])
    monkeypatch.setattr(metrics, "report", lambda **_: {"accuracy": np.array([next(waiting)])})
    monkeypatch.setattr(
        "pipeline.train.dev_scores",
        lambda fittings: [kept.append(values(fittings[0].groups[0].heads)) or metrics.report()],
    )
    trained = fit(what, [FAST], Schedule(epochs=4))[0]
    assert trained.best_epoch == 2
    assert same(values(trained.head), kept[1])
    assert not same(values(trained.head), kept[3])


def test_low_error_is_the_best(monkeypatch):
    waiting = iter([3.0, 1.0, 2.0, 1.0])
    monkeypatch.setattr(metrics, "report", lambda **_: {"mse": np.array([next(waiting)])})
    assert fit(job("value", metric="mse"), [FAST], Schedule(epochs=4))[0].best_epoch == 2


def test_each_head_of_a_stack_has_its_own_best_epoch(monkeypatch):
    waiting = iter([[1.0, 5.0], [2.0, 4.0], [3.0, 4.0]])
    monkeypatch.setattr(metrics, "report", lambda **_: {"accuracy": np.array(next(waiting))})
    what = job()
    trained = fit(what, [FAST, dataclasses.replace(FAST, seed=1)], Schedule(epochs=3))
    assert [head.best_epoch for head in trained] == [3, 1]
    assert [head.dev for head in trained] == [3.0, 5.0]


def test_dev_score_is_that_of_the_weights_kept():
    what = job("tags", options={"dropout": 0.2})
    trained = fit(what, [FAST], Schedule(epochs=4))[0]
    scores = metrics.report(**predictions(trained.head, what.dev), names=what.target.names)
    assert {name: float(score[0]) for name, score in scores.items()} == (
        trained.epochs[trained.best_epoch - 1].dev
    )


def test_epoch_lines_say_what_was_done():
    told = []
    schedule = Schedule(epochs=3, batch_size=50, warmup_frac=0.5)
    trained = fit(job(), [FAST], schedule, lambda epoch, lines: told.append((epoch, lines[0])))[0]
    assert told == list(enumerate(trained.epochs, 1))
    # 120 examples in batches of 50 are 3 steps an epoch; the last step of epoch e is 3 e - 1.
    expected = [1e-2 * linear_schedule(3 * e - 1, n_steps=9, warmup_steps=4) for e in (1, 2, 3)]
    assert [line.lr for line in trained.epochs] == pytest.approx(expected)
    for line in trained.epochs:
        assert set(line.dev) == {"accuracy", "macro_f1", "matthews"}
        assert math.isfinite(line.loss)
        assert line.seconds > 0


def test_loss_is_the_mean_over_the_batches():
    what = job(fusion="average")
    line = fit(what, [HeadRates(lr=1e-12)], Schedule(epochs=1, batch_size=40))[0].epochs[0]
    head = fit(what, [HeadRates(lr=1e-12)], Schedule(epochs=1))[0].head
    stream = what.train.batches(what.train.feed.order(seed=0, epoch=1), batch_size=40)
    losses = [head.decoder.loss(head(given), labels, given.lengths).item() for given, labels, _ in stream]
    assert line.loss == pytest.approx(np.mean(losses), rel=1e-5)


RUNS = [
    ("label", "attention", {"dropout": 0.3}),
    ("tags", "dwatt", {"crf": True, "dropout": 0.1}),
    ("value", "transformer", {"n": 1, "pooling": "mean"}),
]


def files(folder):
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    plain = [{name: value for name, value in line.items() if name != "seconds"} for line in lines]
    return (folder / "head.safetensors").read_bytes(), plain


@pytest.mark.parametrize(("target", "fusion", "options"), RUNS, ids=[r[1] for r in RUNS])
def test_a_run_is_a_function_of_its_arguments(target, fusion, options, tmp_path):
    def run(name, **seeds):
        schedule = Schedule(epochs=2, data_seed=seeds.pop("data_seed", 0))
        train_run(
            tiny.shared().path,
            target=target,
            out=str(tmp_path / name),
            fusion=fusion,
            options=options,
            rates=HeadRates(lr=5e-3, **seeds),
            schedule=schedule,
        )
        return files(tmp_path / name)

    first = run("a")
    torch.rand(3)  # the global random state plays no part
    assert run("b") == first
    assert run("c", seed=1)[0] != first[0]
    assert run("d", data_seed=1)[0] != first[0]


def test_dropout_is_of_the_seed_and_of_training_alone():
    what = job(options={"dropout": 0.5}, fusion="average")
    plain = job(fusion="average")
    schedule = Schedule(epochs=1)
    a, b = (values(fit(what, [FAST], schedule)[0].head) for _ in range(2))
    assert same(a, b)
    assert not same(a, values(fit(plain, [FAST], schedule)[0].head))
    head = fit(what, [FAST], schedule)[0].head
    found = [predictions(head.train(), what.dev)["predictions"] for _ in range(2)]
    assert np.array_equal(*found)


@pytest.mark.parametrize("target", ["label", "tags", "value"])
def test_example_without_a_label_teaches_nothing(target):
    before, after = job(target), job(target)
    row = tiny.shared().split("train").row
    lacking = int(np.flatnonzero(row == 4)[0])
    feed = after.train.feed
    feed.states[:, feed.start[lacking] : feed.start[lacking + 1]] += 3.0
    assert not torch.equal(before.train.feed.states, feed.states)
    schedule = Schedule(epochs=1)
    heads = [fit(what, [FAST], schedule)[0].head for what in (before, after)]
    for a, b in zip(*(head.parameters() for head in heads), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


def test_unlabelled_example_of_dev_does_not_count():
    what = job()
    trained = fit(what, [FAST], Schedule(epochs=2))[0]
    found = predictions(trained.head, what.dev)
    assert (found["gold"] == -1).sum() == 1
    right = (found["predictions"][0] == found["gold"])[found["gold"] >= 0]
    assert trained.epochs[trained.best_epoch - 1].dev["accuracy"] == pytest.approx(100 * right.mean())


@pytest.mark.parametrize(
    ("choices", "said"),
    [
        ({"target": "lable"}, "did you mean 'label'"),
        ({"target": "nothing_like_it"}, "layerbank label"),
        ({"target": "notes"}, "column 'notes' was not taken as a target: 300 different values"),
        ({"train_split": "tran"}, "did you mean 'train'"),
        ({"dev_split": "validation"}, "has no split 'validation'"),
        ({"fusion": "linaer"}, "did you mean 'linear'"),
        ({"decoder": "tagger"}, "use --decoder classifier"),
        ({"options": {"hiddn": 3}}, "did you mean 'hidden'"),
        ({"options": {"hidden": 0}}, "sizes of 1 or more"),
        ({"metric": "acuracy"}, "did you mean 'accuracy'"),
        ({"metric": "f1"}, "does not apply"),
        ({"target": "tags", "fusion": "transformer"}, "extract with --keep all"),
        ({"options": {"pooling": "mean"}}, "extract with --keep all"),
    ],
    ids=str,
)
def test_wrong_choice_is_said_before_the_first_step(choices, said, monkeypatch):
    bank = tiny.shared(keep="words", skipped=(("notes", "300 different values"),))
    monkeypatch.setattr("pipeline.train.train_epoch", None)
    with pytest.raises(PipelineError) as error:
        prepare(bank, choices.pop("target", "label"), fusion=choices.pop("fusion", "attention"), **choices)
    assert said in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: HeadRates(lr=0.0), "--lr 0"),
        (lambda: HeadRates(lr=math.nan), "--lr nan"),
        (lambda: HeadRates(weight_decay=-1.0), "--weight-decay -1"),
        (lambda: HeadRates(seed=-1), "--seed -1"),
        (lambda: HeadRates(seed=2**70), "--seed"),
        (lambda: Schedule(epochs=0), "--epochs 0"),
        (lambda: Schedule(batch_size=0), "--batch-size 0"),
        (lambda: Schedule(warmup_frac=1.5), "--warmup-frac 1.5"),
        (lambda: Schedule(patience=0), "--patience 0"),
        (lambda: Schedule(data_seed=-1), "--data-seed -1"),
    ],
)
def test_range_of_each_number_is_checked(make, said):
    with pytest.raises(PipelineError, match=said):
        make()


@pytest.mark.parametrize("split", ["train", "dev"])
@pytest.mark.parametrize("kind", ["label", "value"])
def test_split_without_a_label_is_refused(kind, split, tmp_path):
    bank = tiny.bank(tmp_path / "bank", sizes={"train": 12, "dev": 8})
    old = bank.split(split).target(kind)
    missing = np.full_like(old.values, -1 if kind == "label" else np.nan)
    write_target(bank.writable_split(split), dataclasses.replace(old, values=missing))
    with pytest.raises(PipelineError, match=f"split {split} .* has no label of target '{kind}'"):
        job(kind, bank=bank)


def test_classes_of_the_splits_must_agree(tmp_path):
    bank = tiny.bank(tmp_path / "bank", sizes={"train": 12, "dev": 8})
    old = bank.split("dev").target("label")
    other = Target(name="label", kind="class", names=("a", "b", "c"), values=old.values)
    write_target(bank.writable_split("dev"), other)
    with pytest.raises(PipelineError, match="not the same classes on train and dev"):
        job(bank=bank)


def test_target_of_one_split_only(tmp_path):
    bank = tiny.bank(tmp_path / "bank", sizes={"train": 12, "dev": 8}, only=())
    write_target(bank.writable_split("train"), tiny.targets(tiny.examples("train", 12))[0])
    with pytest.raises(PipelineError, match="has no target 'label' on split dev"):
        job(bank=bank)
    assert open_target(bank, "label", "train")[1].names == tiny.CLASSES
    assert job(bank=bank, dev_split="train").dev.n_examples == 12


def test_loss_that_is_not_finite_is_one_line(tmp_path):
    with pytest.raises(PipelineError, match=r"NaN or infinite at step \d+: lower --lr") as error:
        train_run(tiny.shared().path, target="value", out=str(tmp_path / "r"), rates=HeadRates(lr=1e25))
    assert "\n" not in str(error.value)
    assert list(tmp_path.iterdir()) == []


def test_failed_head_leaves_its_neighbours_alone():
    rates = [HeadRates(seed=1, lr=1e-2), HeadRates(seed=2, lr=1e30), HeadRates(seed=3, lr=1e-2)]
    first, failed, last = fit(job(), rates, Schedule(epochs=3))
    assert failed.failed_step is not None
    assert failed.failed_step > 1
    assert len(failed.epochs) == 1
    for trained, rate in ((first, rates[0]), (last, rates[2])):
        alone = fit(job(), [rate], Schedule(epochs=3))[0]
        assert trained.failed_step is None
        assert trained.best_epoch == alone.best_epoch
        torch.testing.assert_close(values(trained.head), values(alone.head), rtol=1e-4, atol=1e-6)


def test_patience_ends_each_head_for_itself():
    rates = [HeadRates(seed=k, lr=lr) for k, lr in enumerate((1e-2, 1e-7, 1e-3))]
    schedule = Schedule(epochs=12, patience=2)
    for trained, rate in zip(fit(job(), rates, schedule), rates, strict=True):
        alone = fit(job(), [rate], schedule)[0]
        assert (len(trained.epochs), trained.best_epoch) == (len(alone.epochs), alone.best_epoch)


def test_dropout_of_a_head_is_its_own():
    a, b = fit(job(), [HeadRates(dropout=0.0), HeadRates(dropout=0.5)], Schedule(epochs=2))
    plain = fit(job(), [HeadRates()], Schedule(epochs=2))[0]
    torch.testing.assert_close(values(a.head), values(plain.head), rtol=1e-4, atol=1e-6)
    assert not same(values(b.head), values(plain.head))


def test_damaged_and_unfinished_banks_are_refused(tmp_path):
    bank = tiny.bank(tmp_path / "bank", sizes={"train": 12, "dev": 8})
    chunk = tmp_path / "bank" / "train" / "states" / "c" / "2" / "0" / "0"
    content = bytearray(chunk.read_bytes())
    content[3] ^= 1
    chunk.write_bytes(content)
    with pytest.raises(CacheError, match="split train, layer 2, block 0 is damaged"):
        job(bank=bank)
    attrs = tmp_path / "bank" / "zarr.json"
    attrs.write_text(attrs.read_text().replace('"complete": true', '"complete": false'))
    with pytest.raises(BankIncomplete, match="is not complete"):
        train_run(bank.path, target="label", out=str(tmp_path / "r"))


def test_splits_in_other_roles(tmp_path):
    splits = {"train": "dev", "dev": "test"}
    train_run(tiny.shared().path, target="label", out=str(tmp_path / "r"), splits=splits)
    assert load_run(str(tmp_path / "r")).source.splits == splits


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_bank_of_16_bits_trains_as_well(dtype):
    assert fit(job(bank=tiny.shared(dtype=dtype)), [FAST], Schedule(epochs=5))[0].dev >= 90


@pytest.mark.parametrize("fusion", ["attention", "linear"])
def test_a_bank_of_words_trains_the_same_tagger_as_one_of_all_tokens(fusion):
    banks = [tiny.shared(keep=keep) for keep in ("all", "words")]
    whole, words = (bank.split("train") for bank in banks)
    assert whole.n_blocks == words.n_blocks > 3
    assert words.block_tokens < 0.8 * whole.block_tokens
    found = [
        fit(job("tags", fusion, bank), [FAST, HeadRates(lr=3e-3, seed=5)], Schedule(epochs=3))
        for bank in banks
    ]
    for one, other in zip(*found, strict=True):
        assert same(values(one.head), values(other.head))
        assert [line.dev for line in one.epochs] == [line.dev for line in other.epochs]
        assert [line.loss for line in one.epochs] == [line.loss for line in other.epochs]


def test_stacks_that_train_side_by_side_become_what_they_are_alone():
    feeds, schedule = Feeds(), Schedule(epochs=3, batch_size=8)
    jobs = [job(fusion=fusion, feeds=feeds) for fusion in ("linear", "attention", "concat")]
    rates = [[HeadRates(seed=k, lr=1e-2, dropout=0.2), HeadRates(seed=9, lr=2e-2)] for k in range(3)]
    alone = [fit(one, some, schedule) for one, some in zip(jobs, rates, strict=True)]
    torch.set_num_threads(3)
    together = [Fitting(one, some, schedule) for one, some in zip(jobs, rates, strict=True)]
    fit_together(together)
    for expected, fitting in zip(alone, together, strict=True):
        for a, b in zip(expected, fitting.trained(), strict=True):
            assert [line.dev for line in a.epochs] == [line.dev for line in b.epochs]
            for x, y in zip(a.head.parameters(), b.head.parameters(), strict=True):
                torch.testing.assert_close(x, y, rtol=1e-5, atol=1e-6)
    assert min(head.seconds for fitting in together for head in fitting.trained()) > 0


def test_an_error_in_one_of_several_stacks_is_raised(monkeypatch):
    torch.set_num_threads(2)
    jobs = [job(fusion=fusion) for fusion in ("linear", "attention")]
    fittings = [Fitting(one, [HeadRates()], Schedule(epochs=2)) for one in jobs]
    monkeypatch.setattr(fittings[1].groups[0].heads, "forward", lambda _: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        fit_together(fittings)
    assert torch.get_num_threads() == 2
