"""The few-shot experiment: what is trained on what, and that a cut-off one goes on."""

import json
import threading
from dataclasses import replace
from itertools import pairwise
from statistics import mean

import pyarrow.parquet
import pytest
import tiny
import torch

from cache import JoinedBank, Piece, open_bank
from pipeline import train
from pipeline.errors import PipelineError
from pipeline.experiments import _base as sweeps
from pipeline.experiments._base import Data, Lab, perform
from pipeline.experiments.few_shot import LR
from pipeline.job import HeadRates, Schedule, prepare
from pipeline.train import fit

OPTIONS = {"sizes": "2,4", "epochs": "1,3", "trials": "2", "batch_size": "4", "warmup_steps": "2"}


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A data set, an encoder and a folder of banks that the tests share."""
    folder = tmp_path_factory.mktemp("few")
    rows = {split: tiny.rows_of_text(split, n) for split, n in (("train", 20), ("dev", 8))}
    data = tiny.write_jsonl(folder / "data", rows, ["tokens", "tags", "intent", "score"])
    return folder, tiny.encoder(folder / "encoder"), data


def few_shot(made, out, target="tags", **options):
    folder, encoder, data = made
    lab = Lab(
        out=out, encoder=encoder, data=(Data(path=data, targets=(target,)),), banks=folder / "banks",
        device="cpu", precision="float32",
    )  # fmt: skip
    return perform("few-shot", {**OPTIONS, **options}, lab)


def scores(result, name="scores"):
    return next(table["rows"] for table in result["tables"] if table["name"] == name)


def count_epochs(monkeypatch, most=10**9):
    """Counts passes over training examples, and dies after some."""
    real, calls = train.train_epoch, []

    def counting(fittings, epoch):
        if len(calls) == most:
            raise KeyboardInterrupt
        calls.append(epoch)
        return real(fittings, epoch)

    monkeypatch.setattr(train, "train_epoch", counting)
    return calls


def test_one_that_was_cut_off_goes_on_to_the_best_of_every_epoch_setting(made, tmp_path, monkeypatch):
    few = {"fusions": "transformer,dwatt", "sizes": "4"}
    with monkeypatch.context() as patch:
        count_epochs(patch, most=7)
        with pytest.raises(KeyboardInterrupt):
            few_shot(made, tmp_path, **few)
    with monkeypatch.context() as patch:
        after = count_epochs(patch)
        result = few_shot(made, tmp_path, **few)
    assert len(after) == 6  # of the second trial alone: three epochs of every token, three of the words
    lines = scores(result)
    assert [(line["fusion"], line["size"], line["examples"]) for line in lines] == [
        (fusion, 4, 8)
        for fusion in ("transformer", "dwatt")  # two types of entity
    ]
    assert lines[1]["dev"] == pytest.approx(mean(alone("dwatt", 8, trial, made) for trial in range(2)))
    verb = "beats" if lines[1]["dev"] > lines[0]["dev"] else "does not beat"
    assert result["notes"][0].startswith(f"data tags: dwatt {verb} transformer, {lines[1]['dev']:.2f}")
    assert not list(tmp_path.rglob("head.safetensors"))

    chart = json.loads((tmp_path / "figures" / "curve-data-tags.json").read_text())["chart"]
    [points] = chart["datasets"].values()
    assert sorted({point["step"] for point in points}) == [2, 6]  # 8 examples are 2 steps an epoch
    assert all(point["low"] <= point["dev"] <= point["high"] for point in points)
    assert any(path.endswith("figures/scores-data-tags.svg") for path in result["files"])

    again = count_epochs(monkeypatch)
    assert scores(few_shot(made, tmp_path, **few)) == lines
    assert not again


def test_a_curve_has_more_points_and_leaves_the_scores_alone(made, tmp_path):
    few = {"fusions": "attention,linear", "epochs": "2,7", "trials": "1"}
    plain = few_shot(made, tmp_path / "plain", **few)
    result = few_shot(made, tmp_path / "curve", **few, curve="1")
    assert scores(result) == scores(plain)
    heads = [
        head
        for table in (tmp_path / "curve").rglob("results.parquet")
        for head in pyarrow.parquet.read_table(table).to_pylist()
    ]
    assert any(head["best_epoch"] not in (2, 7) for head in heads)  # which would have been another score
    histories = [json.loads(head["history"]) for head in heads]
    scored = {tuple(line["epoch"] for line in lines if line["dev"] is not None) for lines in histories}
    assert scored == {(2, 7), (1, 2, 3, 4, 5, 6, 7)}  # of the smaller N, and of the largest
    charts = [
        json.loads((tmp_path / out / "figures" / "curve-data-tags.json").read_text())["chart"]
        for out in ("plain", "curve")
    ]
    steps = [{p["step"] for p in next(iter(chart["datasets"].values()))} for chart in charts]
    assert steps == [{2 * 2, 7 * 2}, {2 * epoch for epoch in range(1, 8)}]  # 8 examples, batches of 4


@pytest.fixture
def two_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("two_threads")
def test_draws_side_by_side_are_what_they_are_one_by_one(made, tmp_path, monkeypatch):
    few = {"fusions": "dwatt,attention", "sizes": "4"}
    threads, real = set(), train.train_epoch

    def seen(fittings, epoch):
        threads.add(threading.current_thread())
        assert torch.get_num_threads() == 1
        return real(fittings, epoch)

    with monkeypatch.context() as patch:
        patch.setattr(train, "train_epoch", seen)
        beside = scores(few_shot(made, tmp_path / "beside", **few))
    assert threads
    assert threading.main_thread() not in threads
    assert torch.get_num_threads() == 2
    torch.set_num_threads(1)
    assert scores(few_shot(made, tmp_path / "alone", **few)) == beside


@pytest.mark.usefixtures("two_threads")
def test_a_draw_that_fails_ends_the_others(made, tmp_path, monkeypatch):
    begun, real = [], sweeps.sweep

    def one_fails(plan, grid, **options):
        begun.append(grid.first_seed)
        if grid.first_seed == 1:
            raise PipelineError("no room")
        return real(plan, grid, **options)

    monkeypatch.setattr(sweeps, "sweep", one_fails)
    with pytest.raises(PipelineError, match="no room"):
        few_shot(made, tmp_path, sizes="2", trials="4", epochs="400", fusions="attention")
    assert set(begun) == {0, 1}


def alone(fusion, n_examples, trial, made):
    """The best of separate runs, one of each epoch setting, each scored at its end alone."""
    store = str(made[0] / "banks" / "data-all")
    bank = JoinedBank(open_bank(store), "train", [Piece(store=store, n_examples=n_examples, seed=trial)])
    job = prepare(bank, "tags", fusion=fusion, options={"layers": "linear"})
    constant = Schedule(batch_size=4, warmup_steps=2, decay=False)
    schedules = [replace(constant, epochs=epochs, dev_epochs=(epochs,)) for epochs in (1, 3)]
    return max(fit(job, [HeadRates(seed=trial, lr=LR[fusion])], one)[0].dev for one in schedules)


def test_depth_cuts_the_bank_off_after_each_layer(made, tmp_path):
    result = few_shot(made, tmp_path, fusions="affine,attention", sizes="2", trials="1", depth="all")
    lines = scores(result, "depth")
    assert [(line["depth"], line["fusion"]) for line in lines] == [
        (depth, fusion) for depth in (1, 2, 3) for fusion in ("affine", "attention")
    ]
    affine = [line["parameters"] for line in lines if line["fusion"] == "affine"]
    assert [b - a for a, b in pairwise(affine)] == [16 * 16] * 2
    whole = next(line for line in scores(result) if line["fusion"] == "affine")
    assert lines[-2]["dev"] == whole["dev"]  # all layers are the encoder as it is
    assert any(path.endswith("figures/depth-data-tags.svg") for path in result["files"])


def test_classes_are_counted_and_sizes_that_are_not_there_are_said(made, tmp_path):
    result = few_shot(made, tmp_path, target="intent", fusions="attention", sizes="2,400", trials="1")
    assert [line["examples"] for line in scores(result)] == [6]
    assert result["notes"] == ["data intent: no N = 400, 1200 of 20 examples asked for"]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"sizes": "20"}, "20 times 2 classes of 'tags' are more than the 20 training examples"),
        ({"target": "score"}, "few-shot counts examples by class, target 'score' is float"),
        ({"sizes": "a"}, "--set sizes=a: give numbers"),
        ({"epochs": "0"}, "--set epochs=0: give numbers"),
        ({"rates": "affine"}, "--set rates=affine: give NAME=RATE"),
        ({"trials": "0"}, "--set trials=0"),
        ({"curve": "-1"}, "--set curve=-1: give a number of epochs, or 0"),
        ({"n": "0"}, "--set n=0: give 1 or more"),
        ({"depth": "9"}, "depth 9: the encoder of"),
    ],
)
def test_what_cannot_be_is_refused_in_one_line(made, tmp_path, options, said):
    few = {"fusions": "attention", "sizes": "2", "trials": "1", "epochs": "1"}
    with pytest.raises(PipelineError, match=said) as caught:
        few_shot(made, tmp_path, **{**few, **options})
    assert "\n" not in str(caught.value)
