"""Single runs that were killed: they go on, end the same, or are refused."""

import inspect
import zipfile

import pytest
import tiny
from killed import KilledError, content_of, killed_after

from pipeline import train, unfinished
from pipeline.errors import PipelineError
from pipeline.fusions import attention
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
    train_run(store, out=out, **CHOICES | {"rates": HeadRates(lr=1e-3)}, overwrite=True)
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_an_unfinished_run_of_another_code_is_refused(store, tmp_path, monkeypatch):
    package = tmp_path / "parts_of_mine"
    package.mkdir()
    monkeypatch.syspath_prepend(str(tmp_path))
    source = package / "fusion.py"
    source.write_text(inspect.getsource(attention))
    asked = CHOICES | {"fusion": "parts_of_mine.fusion", "out": str(tmp_path / "run")}
    with pytest.raises(KilledError):
        train_run(store, **asked, progress=killed_after(1))
    source.write_text(inspect.getsource(attention) + "# changed\n")
    with pytest.raises(PipelineError, match="the code of fusion or decoder changed since"):
        train_run(store, **asked)


def test_a_part_in_an_archive_trains_and_goes_on(store, tmp_path, monkeypatch):
    with zipfile.ZipFile(tmp_path / "parts.zip", "w") as archive:
        archive.writestr("in_an_archive/__init__.py", "")
        archive.writestr("in_an_archive/fusion.py", inspect.getsource(attention))
    monkeypatch.syspath_prepend(str(tmp_path / "parts.zip"))
    asked = CHOICES | {"fusion": "in_an_archive.fusion", "out": str(tmp_path / "run")}
    with pytest.raises(KilledError):
        train_run(store, **asked, progress=killed_after(1))
    notes = []
    train_run(store, **asked, note=notes.append)
    assert notes == [f"{tmp_path / 'run'}: goes on after epoch 1"]


def test_seconds_are_those_of_all_epochs(store, tmp_path, monkeypatch):
    real = train.train_epoch
    with monkeypatch.context() as patch:
        patch.setattr(train, "train_epoch", lambda *given: [100.0 for _ in real(*given)])
        with pytest.raises(KilledError):
            train_run(store, out=str(tmp_path / "run"), **CHOICES, progress=killed_after(2))
    assert 200 < train_run(store, out=str(tmp_path / "run"), **CHOICES)["seconds"] < 300


def test_a_full_disk_is_told_and_costs_the_checkpoint_alone(store, tmp_path, monkeypatch, undisturbed):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(unfinished, "write_tensors", full)
    notes = []
    train_run(store, out=str(tmp_path / "run"), **CHOICES, note=notes.append)
    [note] = notes
    assert "No space left on device; training goes on, and begins anew if it is killed" in note
    assert content_of(tmp_path / "run") == undisturbed


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
