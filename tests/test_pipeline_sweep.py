"""Sweeps: every head of the grid, as it trains alone; resumed, split by memory, with failures."""

import json
from pathlib import Path

import pyarrow.parquet
import pytest
import tiny

from cache import open_bank
from pipeline import sweep as module
from pipeline.errors import PipelineError
from pipeline.results import load_run
from pipeline.sweep import Grid, Resident, stack_size, sweep
from pipeline.train import HeadRates, Schedule, fit, prepare

SCHEDULE = Schedule(epochs=3)
GIB = 2**30


def run(out, grid, *, memory_bytes=GIB, **choices):
    return sweep(tiny.shared().path, grid, SCHEDULE, out=str(out), memory_bytes=memory_bytes, **choices)


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


def test_single_layer_without_a_layer_is_a_probe_of_every_layer(tmp_path):
    result = run(tmp_path / "s", Grid(targets=["label"], fusions=["single_layer"], seeds=2))
    layers = sorted(json.loads(row["options"])["layer"] for row in result["rows"])
    assert layers == sorted([*tiny.shared().recipe.layers] * 2)


def test_finished_stacks_are_not_trained_again(tmp_path, monkeypatch):
    grid = Grid(targets=["label"], fusions=["linear", "attention", "average"], seeds=2)
    whole = run(tmp_path / "whole", grid)
    real, calls = module.fit, []

    def killed(job, *arguments):
        calls.append(job.spec.fusion)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return real(job, *arguments)

    monkeypatch.setattr(module, "fit", killed)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "cut", grid)
    calls.clear()
    monkeypatch.setattr(
        module, "fit", lambda job, *rest: (calls.append(job.spec.fusion), real(job, *rest))[1]
    )
    assert rows_of(run(tmp_path / "cut", grid)) == rows_of(whole)
    assert calls == ["attention", "average"]


def test_stack_that_does_not_fit_is_split_and_says_so(tmp_path):
    grid = Grid(targets=["label"], fusions=["attention"], lr=[1e-2, 1e-3, 1e-4], seeds=2)
    job = prepare(tiny.shared(), "label", fusion="attention")
    one = GIB // stack_size(job, 32, GIB)
    notes = []
    split = run(tmp_path / "a", grid, memory_bytes=2 * one + one // 2, note=notes.append)
    assert any("6 heads do not fit --memory, 2 at a time" in note for note in notes)
    together = run(tmp_path / "b", grid)
    for a, b in zip(split["rows"], together["rows"], strict=True):
        assert a["dev"] == pytest.approx(b["dev"], abs=2)
    with pytest.raises(PipelineError, match=r"one head of attention takes about .*GiB, give that much"):
        run(tmp_path / "c", grid, memory_bytes=1000)


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


def test_bank_is_read_once_for_all_stacks(tmp_path, monkeypatch):
    reads = []
    real = module.batches.load
    monkeypatch.setattr(
        module.batches, "load", lambda split, *rest: (reads.append(split.name), real(split, *rest))[1]
    )
    run(tmp_path / "s", Grid(targets=["tags"], fusions=["last_layer", "linear", "affine", "attention"]))
    assert sorted(reads) == sorted(s for s in ("train", "dev", "test") if s in tiny.shared().splits)


def test_resident_gives_the_layers_that_were_asked_for():
    bank = open_bank(tiny.shared().path)
    job = prepare(bank, "tags", fusion="attention")
    plain = prepare(bank, "tags", fusion="affine", load=Resident().load)
    kept = list(bank.recipe.layers)
    wanted = [kept.index(layer) for layer in plain.spec.layers]
    assert (plain.train.states == job.train.states[wanted]).all()


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
