"""Heads trained on joined banks, on part of the layers, and with snapshots in place of shorter runs."""

import json
import pickle
from dataclasses import replace

import numpy as np
import pytest
import tiny
import torch

from cache import JoinedBank, Piece
from pipeline.errors import PipelineError
from pipeline.grid import Grid
from pipeline.job import HeadRates, Schedule, prepare
from pipeline.runner import Plan
from pipeline.sweep import sweep
from pipeline.train import fit

WHOLE = Schedule(epochs=4, batch_size=500, warmup_frac=0.0)
"""One batch holds all examples, so their order does not matter."""


def weights(trained):
    return {name: value for name, value in trained.head.state_dict().items() if "positions" not in name}


def close(a, b):
    return all(torch.allclose(a[name], b[name], atol=1e-5) for name in a)


@pytest.mark.parametrize(("target", "fusion"), [("label", "attention"), ("tags", "transformer")])
def test_training_on_one_whole_bank_joined_is_training_on_it(target, fusion):
    main = tiny.shared()
    same, fewer = (
        JoinedBank(main, "train", [piece])
        for piece in (Piece(store=main.path), Piece(store=main.path, share=0.5))
    )
    found = [
        fit(prepare(bank, target, fusion=fusion), [HeadRates(lr=1e-2)], WHOLE)[0]
        for bank in (main, same, fewer)
    ]
    assert found[0].epochs[-1].loss == pytest.approx(found[1].epochs[-1].loss, abs=1e-5)
    assert close(weights(found[0]), weights(found[1]))
    assert not close(weights(found[0]), weights(found[2]))


def test_a_joined_bank_trains_alike_resident_and_streamed():
    from pipeline.batches import Feeds
    from pipeline.feed import Streamed

    main = tiny.shared()
    bank = JoinedBank(main, "train", [Piece(store=main.path), Piece(store=main.path, split="test")])
    found = []
    for memory in (2**30, 0):
        job = prepare(bank, "tags", fusion="attention", feeds=Feeds(memory_bytes=memory))
        assert isinstance(job.train.feed, Streamed) == (memory == 0)
        found.append(weights(fit(job, [HeadRates(lr=1e-2)], Schedule(epochs=2))[0]))
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])


def plan(*pieces, **choices):
    return Plan(store=tiny.shared().path, schedule=Schedule(epochs=2), train_on=pieces, **choices)


GRID = Grid(targets=["label"], fusions=["attention"], lr=[1e-2])


def test_a_sweep_on_pieces_says_so_and_is_never_mixed_up_with_another(tmp_path):
    half = Piece(store=tiny.shared().path, share=0.5, seed=2)
    rows = sweep(plan(half), GRID, out=str(tmp_path / "s"))["rows"]
    assert rows == sweep(plan(half), GRID, out=str(tmp_path / "s"))["rows"]
    assert (
        rows[0]["dev"]
        == sweep(pickle.loads(pickle.dumps(plan(half))), GRID, out=str(tmp_path / "t"))["rows"][0]["dev"]
    )
    [run] = (tmp_path / "s" / "heads").iterdir()
    config = json.loads((run / "config.json").read_text())
    said = {"store": tiny.shared().path, "split": "train", "share": 0.5, "n_examples": None, "seed": 2}
    assert config["source"]["train_on"] == [said]
    others = [plan(), plan(replace(half, seed=3)), plan(half, half), plan(half, depth=2)]
    for other in others:
        with pytest.raises(PipelineError, match="holds a sweep with another"):
            sweep(other, GRID, out=str(tmp_path / "s"))


def test_a_bank_cut_off_after_a_layer_is_an_encoder_of_that_depth(tmp_path):
    grid = replace(GRID, fusions=["last_layer", "dwatt", "affine", "transformer"])
    shallow = tiny.bank(tmp_path / "b", layers=(0, 1, 2))
    rows = sweep(plan(depth=2), grid, out=str(tmp_path / "s"))["rows"]
    read = {}
    for folder in (tmp_path / "s" / "heads").iterdir():
        head = json.loads((folder / "config.json").read_text())["head"]
        read[head["fusion"]] = head["layers"]
    assert read == {"last_layer": [2], "dwatt": [1, 2], "affine": [1, 2], "transformer": [2]}
    # The same states, as a bank without the layers above has them.
    alone = fit(
        prepare(shallow, "label", fusion="single_layer", options={"layer": 2}),
        [HeadRates(lr=1e-2)], Schedule(epochs=2),
    )  # fmt: skip
    assert next(r for r in rows if r["fusion"] == "last_layer")["dev"] == alone[0].dev
    with pytest.raises(PipelineError, match=r"depth 4: the encoder of .* has the layers 1 to 3"):
        sweep(plan(depth=4), grid, out=str(tmp_path / "t"))


CONSTANT = Schedule(epochs=12, warmup_steps=5, decay=False)


@pytest.mark.parametrize("epochs", [3, 7])
def test_a_snapshot_of_a_long_run_is_the_shorter_run(epochs):
    job = prepare(tiny.shared(), "label", fusion="attention", options={"dropout": 0.1})
    rates = [HeadRates(lr=1e-2, seed=s) for s in range(2)]
    long = fit(job, rates, replace(CONSTANT, dev_epochs=(3, 7, 12)))
    # The only dev score of this one is of its last epoch, so its weights are those after it.
    short = fit(job, rates, replace(CONSTANT, epochs=epochs, dev_epochs=(epochs,)))
    for a, b in zip(long, short, strict=True):
        assert a.epochs[epochs - 1].dev == b.epochs[-1].dev
        assert [e.loss for e in a.epochs[:epochs]] == [e.loss for e in b.epochs]
        assert [e.lr for e in a.epochs[:epochs]] == [e.lr for e in b.epochs]
    best_here = [k for k, one in enumerate(long) if one.best_epoch == epochs]
    for k in best_here:
        assert all(torch.equal(weights(long[k])[n], weights(short[k])[n]) for n in weights(long[k]))


def test_the_best_epoch_is_one_of_those_that_were_scored():
    job = prepare(tiny.shared(), "label", fusion="attention")
    [found] = fit(job, [HeadRates(lr=1e-2)], replace(CONSTANT, dev_epochs=(2, 12)))
    assert [bool(e.dev) for e in found.epochs] == [e in (2, 12) for e in range(1, 13)]
    assert found.best_epoch in (2, 12)
    assert found.dev == max(e.dev["accuracy"] for e in found.epochs if e.dev)
    every = fit(job, [HeadRates(lr=1e-2)], CONSTANT)[0]
    assert [e.loss for e in every.epochs] == [e.loss for e in found.epochs]


def test_the_learning_rate_rises_then_stays():
    rates = [CONSTANT.scale(step, steps=4) for step in range(8)]
    assert np.allclose(rates, [0.2, 0.4, 0.6, 0.8, 1, 1, 1, 1])
    falling = [replace(CONSTANT, decay=True, epochs=2).scale(step, steps=4) for step in range(8)]
    assert np.allclose(falling, [0.2, 0.4, 0.6, 0.8, 1, 1, 2 / 3, 1 / 3])


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"dev_epochs": (3, 2)}, "dev_epochs 3,2: give ascending epochs from 1 to 12"),
        ({"dev_epochs": (13,)}, "dev_epochs 13: give ascending"),
        ({"dev_epochs": (3,), "patience": 2}, "patience and rungs need the dev score of every epoch"),
        ({"dev_epochs": (3,), "rungs": (2,)}, "patience and rungs need"),
        ({"warmup_steps": -1}, "warmup_steps -1: give 0 or more"),
    ],
)
def test_schedules_that_cannot_be_are_refused(changes, said):
    with pytest.raises(PipelineError, match=said):
        replace(CONSTANT, **changes)


def test_rows_hold_the_history_and_heads_need_not_be_kept(tmp_path):
    chosen = replace(plan(), schedule=replace(CONSTANT, epochs=3, dev_epochs=(1, 3)))
    grid = replace(GRID, first_seed=4)
    [row] = sweep(chosen, grid, out=str(tmp_path / "s"), keep_heads=False)["rows"]
    history = json.loads(row["history"])
    assert [line["epoch"] for line in history] == [1, 2, 3]
    assert [line["dev"] is None for line in history] == [False, True, False]
    assert row["dev"] == max(line["dev"] for line in history if line["dev"] is not None)
    assert row["seed"] == 4
    assert not (tmp_path / "s" / "heads").exists()
