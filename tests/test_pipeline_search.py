"""Searches: what is asked of the grid, what is told, and that a search is a function of its arguments."""

import pytest
import tiny

from pipeline.errors import PipelineError
from pipeline.grid import Grid, Range
from pipeline.job import HeadRates, Schedule
from pipeline.runner import Plan
from pipeline.search import Trials, extremes, search
from pipeline.sweep import sweep

GRID = Grid(
    targets=["label", "tags"],
    fusions=["linear", "attention"],
    lr=Range(1e-4, 1e-1),
    dropout=[0.0, 0.2],
    seeds=2,
)


def run(out, grid=GRID, trials=Trials(n=6, round=3), **choices):  # noqa: B008 (frozen)
    plan = Plan(store=tiny.shared().path, schedule=Schedule(epochs=2))
    return sweep(plan, grid, out=str(out), trials=trials, **choices)


def without_times(rows):
    return [{name: value for name, value in row.items() if name != "seconds"} for row in rows]


@pytest.mark.parametrize("wrong", [{"n": 0}, {"n": 1, "round": 0}, {"n": 1, "seed": -1}])
def test_numbers_out_of_range_are_refused(wrong):
    with pytest.raises(PipelineError, match="give"):
        Trials(**wrong)


def test_every_trial_is_a_setting_of_the_grid_with_all_seeds(tmp_path):
    result = run(tmp_path / "s")
    settings = {}
    for row in result["rows"]:
        assert 1e-4 <= row["lr"] <= 1e-1
        assert row["dropout"] in (0.0, 0.2)
        settings.setdefault((row["target"], row["fusion"], row["lr"], row["dropout"]), []).append(
            row["seed"]
        )
    assert all(seeds == [0, 1] for seeds in settings.values())
    assert len(settings) == 2 * 6
    assert len({row["lr"] for row in result["rows"]}) >= 6


def test_search_that_was_killed_goes_on_and_ends_the_same(tmp_path, monkeypatch):
    whole = run(tmp_path / "whole")
    import pipeline.train as train

    real, calls = train.train_epoch, []

    def dying(fittings, epoch):
        if len(calls) == 6:
            raise KeyboardInterrupt
        calls.append(epoch)
        return real(fittings, epoch)

    monkeypatch.setattr(train, "train_epoch", dying)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "cut")
    monkeypatch.undo()
    assert without_times(run(tmp_path / "cut")["rows"]) == without_times(whole["rows"])


def test_later_trials_look_where_the_score_is_high():
    """On a made-up score with one peak, the second half of the trials comes closer to it."""
    shapes = Grid(targets=["label"], fusions=["linear"]).shapes(tiny.shared(), "train")
    grid = Grid(targets=["label"], fusions=["linear"], lr=Range(1e-6, 1.0))
    seen = []

    def rows_of(stacks):
        rates = [rate for stack in stacks for rate in stack.rates]
        seen.extend(abs(_log(rate.lr) + 3) for rate in rates)
        return [{"dev": -abs(_log(rate.lr) + 3)} for rate in rates]

    search(Trials(n=60, round=10), grid, shapes, {"label": "accuracy"}, rows_of)
    assert sum(seen[30:]) < 0.6 * sum(seen[:30])


def _log(lr):
    import math

    return math.log10(lr)


def test_what_is_known_is_not_trained_again_and_failures_are_told():
    grid = Grid(targets=["label"], fusions=["linear"], lr=[1e-3, 1e-2])
    shapes = grid.shapes(tiny.shared(), "train")
    asked = []

    def rows_of(stacks):
        rates = [rate for stack in stacks for rate in stack.rates]
        asked.extend(rates)
        return [{"dev": None if rate.lr == 1e-2 else 50.0} for rate in rates]

    rows = search(Trials(n=12, round=4), grid, shapes, {"label": "accuracy"}, rows_of)
    assert sorted(rate.lr for rate in asked) == [1e-3, 1e-2]
    assert len(rows) == 2


def test_ranges_need_a_search_and_trials_are_positive(tmp_path):
    with pytest.raises(PipelineError, match=r"--lr 0.0001..0.1 is a range: .* --trials N"):
        run(tmp_path / "s", trials=None)
    assert not (tmp_path / "s").exists()
    with pytest.raises(PipelineError, match="--trials 0"):
        Trials(n=0)
    with pytest.raises(PipelineError, match="lower end first"):
        Range(1.0, 0.1)


def test_ends_of_ranges_are_checked_before_the_search(tmp_path):
    with pytest.raises(PipelineError, match="dropout"):
        run(tmp_path / "s", Grid(targets=["label"], fusions=["linear"], dropout=Range(0.0, 1.5)))
    assert not (tmp_path / "s").exists()
    [stack] = extremes(GRID, GRID.shapes(tiny.shared(), "train")[:1])
    assert stack.rates == (HeadRates(lr=1e-4, dropout=0.0), HeadRates(lr=1e-1, dropout=0.2))
