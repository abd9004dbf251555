"""Sweeps: every head of the grid, as it trains alone; resumed, split by memory, with failures."""

import gc
import json
import weakref
from dataclasses import replace
from functools import cache
from pathlib import Path

import pyarrow.parquet
import pytest
import tiny

from cache import Split
from pipeline import fitting, runner, stack_checkpoints, train
from pipeline.errors import PipelineError
from pipeline.grid import Grid
from pipeline.job import HeadRates, Schedule, prepare
from pipeline.results import load_run
from pipeline.rungs import lots_of
from pipeline.runner import Plan, Runner
from pipeline.sweep import sweep
from pipeline.train import fit

SCHEDULE = Schedule(epochs=3)
GIB = 2**30


def run(out, grid, *, memory_bytes=GIB, schedule=SCHEDULE, **choices):
    plan = Plan(store=tiny.shared().path, schedule=schedule, memory_bytes=memory_bytes)
    return sweep(plan, grid, out=str(out), **choices)


def rows_of(result):
    """Rows without their times."""
    return [{k: v for k, v in row.items() if k != "seconds"} for row in result["rows"]]


def test_every_head_scores_as_it_does_alone(tmp_path):
    grid = Grid(targets=["label", "tags"], fusions=["linear", "attention"], lr=[1e-2, 1e-3], seeds=2)
    result = run(tmp_path / "s", grid)
    assert result["heads"] == 2 * 2 * 2 * 2
    for row in result["rows"]:
        job = prepare(tiny.shared(), row["target"], fusion=row["fusion"])
        alone = fit(job, [HeadRates(seed=row["seed"], lr=row["lr"])], SCHEDULE)[0]
        assert row["dev"] == pytest.approx(alone.dev, abs=2)
        assert row["parameters"] == alone.head.n_parameters()[0]
        assert row["status"] == "ok"
    assert set(result["best"]) == {"label", "tags"}
    for target, best in result["best"].items():
        assert best["dev"] == max(row["dev"] for row in result["rows"] if row["target"] == target)


def test_what_a_sweep_held_is_given_back_with_it():
    gc.disable()  # which would come round some time
    try:
        alone = Runner(Plan(store=tiny.shared().path, schedule=SCHEDULE), note=print)
        assert alone._feeds.note is print
        alone.tell(lambda _: None)
        held = weakref.ref(alone)
        del alone
        assert held() is None
    finally:
        gc.enable()


def test_results_are_a_table_and_the_best_head_of_each_shape_a_run(tmp_path):
    result = run(tmp_path / "s", Grid(targets=["tags"], fusions=["attention"], lr=[1e-2, 1e-9]))
    table = pyarrow.parquet.read_table(result["results"]).to_pylist()
    assert len(table) == 2
    assert {"target", "fusion", "lr", "seed", "dev", "test", "dev_f1", "test_f1", "seconds"} <= set(
        table[0]
    )
    [folder] = (tmp_path / "s" / "heads").iterdir()
    best = load_run(str(folder))
    assert best.result["dev"] == max(row["dev"] for row in table)


def test_a_row_has_all_that_decides_a_head_and_its_own_share_of_the_time(tmp_path, monkeypatch):
    schedule = Schedule(
        epochs=4, warmup_frac=0.2, patience=9, data_seed=7, rungs=(1, 3), precision="float32"
    )
    real = train.train_epoch

    def twelve_seconds(fittings, epoch):
        return [12.0 for _ in real(fittings, epoch)]

    monkeypatch.setattr(train, "train_epoch", twelve_seconds)
    result = run(tmp_path / "s", RANKED, schedule=schedule)
    rows = pyarrow.parquet.read_table(result["results"]).to_pylist()
    asked = {
        "epochs_asked": 4, "warmup_frac": 0.2, "patience": 9, "data_seed": 7, "rungs": "1,3",
        "precision": "float32", "train_split": "train", "dev_split": "dev", "test_split": "test",
    }  # fmt: skip
    assert all(asked.items() <= row.items() for row in rows)
    # An epoch of twelve heads, two of six, one of three.
    share = {1: 12 / 12, 3: 12 / 12 + 2 * 12 / 6, 4: 12 / 12 + 2 * 12 / 6 + 12 / 3}
    assert sorted(row["epochs"] for row in rows) == [1] * 6 + [3] * 3 + [4] * 3
    assert [row["seconds"] for row in rows] == pytest.approx([share[row["epochs"]] for row in rows])
    assert sum(row["seconds"] for row in rows) == pytest.approx(4 * 12)


def test_single_layer_without_a_layer_is_a_probe_of_every_layer(tmp_path):
    result = run(tmp_path / "s", Grid(targets=["label"], fusions=["single_layer"], seeds=2))
    layers = sorted(json.loads(row["options"])["layer"] for row in result["rows"])
    assert layers == sorted([*tiny.shared().recipe.layers] * 2)


class Killed(Exception):
    """Stands for a kill: nothing of the sweep catches it."""


def kill_after(monkeypatch, n_epochs):
    """Lets a sweep live for that many epochs of the stacks that train together; lists them."""
    real, calls = train.train_epoch, []

    def dying(fittings, epoch):
        if len(calls) == n_epochs:
            raise Killed
        calls.append((epoch, [fitting.job.spec.fusion for fitting in fittings]))
        return real(fittings, epoch)

    monkeypatch.setattr(train, "train_epoch", dying)
    return calls


@pytest.mark.parametrize(("n_epochs", "rungs"), [(1, ()), (2, (1, 2)), (4, ()), (5, (1, 2))])
def test_killed_sweep_goes_on_from_its_last_checkpoint(n_epochs, rungs, tmp_path, monkeypatch):
    grid = Grid(
        targets=["label", "tags"], fusions=["linear", "attention"], lr=[1e-2, 3e-3], dropout=[0.1], seeds=2
    )
    schedule = replace(SCHEDULE, rungs=rungs)
    monkeypatch.setattr(stack_checkpoints, "CHECKPOINT_S", 0)
    whole = run(tmp_path / "whole", grid, schedule=schedule)
    with monkeypatch.context() as patch:
        before = kill_after(patch, n_epochs)
        with pytest.raises(Killed):
            run(tmp_path / "cut", grid, schedule=schedule)
    after = kill_after(monkeypatch, 99)
    result = run(tmp_path / "cut", grid, schedule=schedule)
    assert rows_of(result) == rows_of(whole)
    assert len(before) + len(after) == 2 * SCHEDULE.epochs  # two streams: first tokens, and words
    assert not list((tmp_path / "cut" / "stacks").glob("*.safetensors"))
    a, b = (pyarrow.parquet.read_table(r["results"]).drop("seconds") for r in (result, whole))
    assert a.equals(b)


def test_damaged_checkpoint_is_as_good_as_none(tmp_path, monkeypatch):
    grid = Grid(targets=["label"], fusions=["linear"], seeds=2)
    whole = run(tmp_path / "whole", grid)
    with monkeypatch.context() as patch:
        patch.setattr(stack_checkpoints, "CHECKPOINT_S", 0)
        kill_after(patch, 2)
        with pytest.raises(Killed):
            run(tmp_path / "cut", grid)
    [file] = (tmp_path / "cut" / "stacks").glob("*.safetensors")
    file.write_bytes(file.read_bytes()[:-100])
    assert rows_of(run(tmp_path / "cut", grid)) == rows_of(whole)


def test_finished_stacks_are_not_trained_again(tmp_path, monkeypatch):
    grid = Grid(targets=["label"], fusions=["linear", "attention"], seeds=2)
    whole = run(tmp_path / "s", grid)
    calls = kill_after(monkeypatch, 0)
    assert rows_of(run(tmp_path / "s", grid)) == rows_of(whole)
    assert calls == []
    first = min((tmp_path / "s" / "stacks").glob("*.json"))
    first.write_text("[{")
    with pytest.raises(PipelineError, match="is damaged: remove it"):
        run(tmp_path / "s", grid)


def test_stacks_of_one_stream_step_on_the_same_batches(tmp_path, monkeypatch):
    calls = kill_after(monkeypatch, 99)
    grid = Grid(targets=["label", "value"], fusions=["linear", "attention"], batch_size=[16, 32])
    run(tmp_path / "s", grid)
    assert len(calls) == 2 * SCHEDULE.epochs  # one pass for each batch size
    assert all(sorted(fusions) == ["attention"] * 2 + ["linear"] * 2 for _, fusions in calls)


def whole_at(grid, n_pieces=1):
    """The least memory at which every stack of a grid is at most that many pieces."""
    plan = Plan(store=tiny.shared().path, schedule=SCHEDULE)

    def enough(memory_bytes):
        small = Runner(replace(plan, memory_bytes=memory_bytes))
        try:
            pieces = [small.fitting(stack) for stack in grid.stacks(grid.shapes(tiny.shared(), "train"))]
        except PipelineError:
            return False
        return all(len(each) <= n_pieces for each in pieces)

    low, high = 1, GIB
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if enough(middle) else (middle + 1, high)
    return low


def test_stack_that_does_not_fit_is_split_and_says_so(tmp_path):
    grid = Grid(targets=["label"], fusions=["attention"], lr=[1e-2, 1e-3, 1e-4], seeds=2)
    notes = []
    split = run(tmp_path / "a", grid, memory_bytes=whole_at(grid, 3), note=notes.append)
    assert any("6 heads do not fit --memory, 2 at a time" in note for note in notes)
    together = run(tmp_path / "b", grid)
    for a, b in zip(split["rows"], together["rows"], strict=True):
        assert a["dev"] == pytest.approx(b["dev"], abs=2)
    [folder] = (tmp_path / "a" / "heads").iterdir()
    assert load_run(str(folder)).result["dev"] == max(row["dev"] for row in split["rows"])
    with pytest.raises(PipelineError, match=r"one head of attention takes about .*GiB of the half"):
        run(tmp_path / "c", grid, memory_bytes=1000)


def test_stacks_whose_weights_do_not_fit_together_train_one_after_the_other(tmp_path, monkeypatch):
    grid = Grid(targets=["label"], fusions=["concat", "attention", "affine"], seeds=3)
    calls = kill_after(monkeypatch, 99)
    apart = run(tmp_path / "a", grid, memory_bytes=whole_at(grid))
    assert max(len(fusions) for _, fusions in calls) < 3
    together = run(tmp_path / "b", grid)
    assert max(len(fusions) for _, fusions in calls) == 3
    assert rows_of(apart) == rows_of(together)


def test_streamed_sweep_equals_a_resident_one(tmp_path):
    grid = Grid(
        targets=["tags"],
        fusions=["linear", "attention"],
        batch_size=[2],
        options={"hidden": ["4"]},
        seeds=2,
    )
    notes = []
    small = run(tmp_path / "a", grid, memory_bytes=whole_at(grid), note=notes.append)
    assert sum("they are streamed" in note for note in notes) >= 1
    assert rows_of(small) == rows_of(run(tmp_path / "b", grid))


def test_rungs_let_the_worse_half_leave(tmp_path):
    grid = Grid(targets=["label"], fusions=["attention"], lr=[1e-2, 1e-6], seeds=4)
    rows = run(tmp_path / "s", grid, schedule=Schedule(epochs=5, rungs=(1, 3)))["rows"]
    assert sorted(row["epochs"] for row in rows) == [1] * 4 + [3] * 2 + [5] * 2
    left = ["left after epoch 1"] * 4 + ["left after epoch 3"] * 2
    assert sorted(row["status"] for row in rows) == [*left, "ok", "ok"]
    assert all(row["lr"] == 1e-2 for row in rows if row["status"] == "ok")
    full = run(tmp_path / "t", grid, schedule=Schedule(epochs=5))["rows"]
    for a, b in zip(rows, full, strict=True):
        if a["status"] == "ok":  # in smaller company the same head
            assert a["dev"] == pytest.approx(b["dev"], abs=2)


RANKED = Grid(
    targets=["label"], fusions=["linear"], lr=[1e-2, 1e-6, 2e-2], seeds=4, options={"hidden": ["4"]}
)
RUNGS = Schedule(epochs=4, rungs=(1, 3))


@cache
def memory_of_four():
    """The memory that holds four heads of these twelve."""
    return whole_at(RANKED, 3)


@pytest.fixture
def pairs_at_once(monkeypatch):
    """Heads are computed two at a time, so that a stack in pieces of four has the groups of a whole one."""
    few = memory_of_four()
    monkeypatch.setattr(runner, "GROUP", 2)
    monkeypatch.setattr(fitting, "GROUP", 2)
    return few


def test_rungs_rank_the_pieces_of_a_stack_as_one(pairs_at_once, tmp_path):
    notes = []
    apart = run(tmp_path / "a", RANKED, memory_bytes=pairs_at_once, schedule=RUNGS, note=notes.append)
    assert any("12 heads do not fit --memory, 4 at a time" in note for note in notes)
    together = run(tmp_path / "b", RANKED, schedule=RUNGS)
    assert rows_of(apart) == rows_of(together)
    left = [row["lr"] for row in apart["rows"] if row["status"] == "left after epoch 1"]
    assert len(left) == 6
    assert left.count(1e-2) == 0  # ranked alone, that piece would have lost two


@pytest.mark.parametrize("n_epochs", [5, -1])
def test_killed_sweep_of_ranked_pieces_goes_on(n_epochs, pairs_at_once, tmp_path, monkeypatch):
    monkeypatch.setattr(stack_checkpoints, "CHECKPOINT_S", 0)
    whole = run(tmp_path / "whole", RANKED, schedule=RUNGS)
    epochs = [row["epochs"] for row in whole["rows"]]
    n_calls = sum(max(epochs[k : k + 4]) for k in (0, 4, 8))
    with monkeypatch.context() as patch:
        before = kill_after(patch, n_epochs % n_calls)
        with pytest.raises(Killed):
            run(tmp_path / "cut", RANKED, memory_bytes=pairs_at_once, schedule=RUNGS)
    after = kill_after(monkeypatch, 99)
    again = run(tmp_path / "cut", RANKED, memory_bytes=pairs_at_once, schedule=RUNGS)
    assert rows_of(again) == rows_of(whole)
    # A piece that was done is looked at again, for the ranking, from its last checkpoint.
    assert len(before) + len(after) == n_calls
    assert not list((tmp_path / "cut" / "stacks").glob("*.safetensors"))


def test_ranked_pieces_need_no_folder_for_checkpoints(pairs_at_once, tmp_path):
    plan = Plan(store=tiny.shared().path, schedule=RUNGS, memory_bytes=pairs_at_once)
    alone = Runner(plan)
    [stack] = RANKED.stacks(RANKED.shapes(tiny.shared(), "train"))
    [lot] = lots_of(alone.fitting(stack), RUNGS)
    found = [head.status for outcome in alone.train(lot) for head in outcome.trained]
    assert found == [row["status"] for row in run(tmp_path / "b", RANKED, schedule=RUNGS)["rows"]]


def test_rungs_out_of_range_are_refused():
    for rungs in ((0,), (5,), (3, 1), (2, 2)):
        with pytest.raises(PipelineError, match="--rungs"):
            Schedule(epochs=5, rungs=rungs)


def test_head_that_fails_is_marked_and_the_others_go_on(tmp_path):
    result = run(tmp_path / "s", Grid(targets=["label"], fusions=["attention"], lr=[1e-2, 1e30]))
    good, bad = result["rows"]
    assert good["status"] == "ok"
    assert bad["status"].startswith("failed at step ")
    assert bad["dev"] is None
    assert result["best"]["label"]["lr"] == 1e-2


def test_options_go_to_the_parts_that_have_them(tmp_path):
    grid = Grid(targets=["label", "tags"], fusions=["attention"], options={"crf": ["false", "true"]})
    result = run(tmp_path / "s", grid)
    assert [(row["target"], row["options"]) for row in result["rows"]] == [
        ("label", "{}"),
        ("tags", '{"crf": "false"}'),
        ("tags", '{"crf": "true"}'),
    ]
    with pytest.raises(PipelineError, match="no fusion and no decoder of the sweep has that option"):
        run(tmp_path / "t", Grid(targets=["label"], fusions=["attention"], options={"colour": ["red"]}))


@pytest.mark.parametrize(
    ("axis", "flag"), [("lr", "--lr"), ("fusions", "--fusion"), ("batch_size", "--batch-size")]
)
def test_empty_axis_is_refused(axis, flag):
    with pytest.raises(PipelineError, match=f"{flag} has no value"):
        Grid(**{"targets": ["label"], "fusions": ["linear"], axis: []})


def test_folder_of_another_sweep_is_refused(tmp_path):
    run(tmp_path / "s", Grid(targets=["label"], fusions=["linear"]))
    with pytest.raises(PipelineError, match="holds a sweep with another grid"):
        run(tmp_path / "s", Grid(targets=["label"], fusions=["average"]))
    Path(tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").write_text("x")
    with pytest.raises(PipelineError, match="not empty"):
        run(tmp_path / "full", Grid(targets=["label"], fusions=["linear"]))


@pytest.mark.parametrize(
    ("fusions", "layers"),
    [(["last_layer", "linear", "affine"], range(tiny.LAST + 1)), (["last_layer"], (tiny.LAST,))],
)
def test_bank_is_read_once_for_all_stacks_and_only_what_they_want(fusions, layers, tmp_path, monkeypatch):
    reads = []
    real = Split.take
    monkeypatch.setattr(
        Split, "take", lambda self, *rest: (reads.append((self.name, rest[1])), real(self, *rest))[1]
    )
    run(tmp_path / "s", Grid(targets=["tags"], fusions=fusions))
    splits = [name for name in ("train", "dev", "test") if name in tiny.shared().splits]
    assert sorted(reads) == sorted((name, tuple(layers)) for name in splits)


def test_table_has_the_scores_of_every_kind_of_target(tmp_path):
    result = run(tmp_path / "s", Grid(targets=["label", "tags", "value"], fusions=["linear"]))
    names = set(pyarrow.parquet.read_table(result["results"]).column_names)
    assert {"dev_accuracy", "dev_f1", "dev_spearman", "test_f1"} <= names


def test_nothing_is_trained_or_claimed_before_all_shapes_fit(tmp_path):
    out = tmp_path / "s"
    with pytest.raises(PipelineError, match="dropout"):
        run(out, Grid(targets=["label"], fusions=["linear"], dropout=[0.0, 2.0]))
    assert not out.exists()
    run(out, Grid(targets=["label"], fusions=["linear"], dropout=[0.0, 0.2]))
