"""Single runs that were killed: they go on, end the same, or are refused."""

import pytest
import tiny
from killed import KilledError, content_of, killed_after

from pipeline import unfinished
from pipeline.errors import PipelineError
from pipeline.job import HeadRates, Schedule
from pipeline.run import train_run

CHOICES = {
    "target": "tags",
    "fusion": "attention",
    "options": {"crf": True, "dropout": 0.1},
    "rates": HeadRates(lr=1e-2),
    "schedule": Schedule(epochs=4, batch_size=12, patience=3),
}


@pytest.fixture(scope="module")
def store():
    return tiny.shared().path


@pytest.fixture(scope="module")
def undisturbed(store, tmp_path_factory):
    out = tmp_path_factory.mktemp("undisturbed") / "run"
    train_run(store, out=str(out), **CHOICES)
    return content_of(out)


@pytest.fixture(autouse=True)
def _a_checkpoint_after_every_epoch(monkeypatch):
    monkeypatch.setattr(unfinished, "CHECKPOINT_S", 0)


@pytest.mark.parametrize("kills", [(1,), (1, 3), (4,)])
def test_a_run_that_was_killed_goes_on_and_ends_as_an_undisturbed_one(store, tmp_path, undisturbed, kills):
    out, notes, epochs = tmp_path / "run", [], []
    for kill in kills:
        with pytest.raises(KilledError):
            train_run(store, out=str(out), **CHOICES, progress=killed_after(kill))
        assert not out.exists()
    train_run(
        store, out=str(out), **CHOICES, note=notes.append, progress=lambda done, _: epochs.append(done)
    )
    assert content_of(out) == undisturbed
    assert epochs == list(range(kills[-1] + 1, 5))
    assert notes == [f"{out}: goes on after epoch {kills[-1]}"]
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_an_unfinished_run_of_other_choices_is_refused_until_it_is_removed(store, tmp_path):
    out = str(tmp_path / "run")
    with pytest.raises(KilledError):
        train_run(store, out=out, **CHOICES, progress=killed_after(1))
    with pytest.raises(
        PipelineError, match="an unfinished run that differs in lr: ask for the same"
    ) as error:
        train_run(store, out=out, **CHOICES | {"rates": HeadRates(lr=1e-3)})
    assert "\n" not in str(error.value)
    unfinished.drop_partial(out)
    train_run(store, out=out, **CHOICES | {"rates": HeadRates(lr=1e-3)})


def test_a_run_killed_before_its_first_checkpoint_may_be_asked_for_otherwise(store, tmp_path, monkeypatch):
    monkeypatch.setattr(unfinished, "CHECKPOINT_S", 60)
    out = str(tmp_path / "run")
    with pytest.raises(KilledError):
        train_run(store, out=out, **CHOICES, progress=killed_after(1))
    train_run(store, out=out, **CHOICES | {"rates": HeadRates(lr=1e-3)})


def test_a_run_that_failed_leaves_nothing_to_go_on_with(store, tmp_path):
    with pytest.raises(PipelineError, match="NaN or infinite at step"):
        train_run(store, out=str(tmp_path / "run"), **CHOICES | {"rates": HeadRates(lr=1e30)})
    assert list(tmp_path.iterdir()) == []
