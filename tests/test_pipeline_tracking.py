"""Tracking, read back with the trackers' own libraries."""

import json
import socket
import sys
import warnings

import pytest
import tiny
import tuning
from typer.testing import CliRunner

import cli
from pipeline import sweep, tracking
from pipeline.records import read_record
from pipeline.tuning.run import TaskAsked


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """One run and one sweep, each tracked by both."""
    folder = tmp_path_factory.mktemp("tracked")
    grid = ["--fusion", "linear,attention", "--lr", "1e-2,1e-3"]
    for tool in ("tensorboard", "mlflow"):
        common = [
            tiny.shared().path,
            "--target",
            "label",
            "--epochs",
            "2",
            "--threads",
            "1",
            "--track",
            tool,
        ]
        assert command(["train", *common, "--out", str(folder / f"run-{tool}")]).exit_code == 0
        assert command(["sweep", *common, *grid, "--out", str(folder / f"sweep-{tool}")]).exit_code == 0
    return folder


def command(words):
    done = CliRunner().invoke(cli.app, [*words, "--json"])
    assert done.exit_code == 0, done.stderr
    assert len(done.stdout.splitlines()) == 1
    return done


def client(folder):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from mlflow.tracking import MlflowClient

        return MlflowClient(tracking_uri=f"sqlite:///{folder / 'mlflow.db'}")


def runs_of(folder, parent=None):
    """The runs of a store, those of one parent or those that have none."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        reader = client(folder)
        experiment = reader.get_experiment_by_name("layerbank")
        runs = reader.search_runs([experiment.experiment_id])
    newest_last = [run for run in reversed(runs) if run.data.tags.get("mlflow.parentRunId") == parent]
    return {run.info.run_name: run for run in newest_last}


def scalars(folder):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder)).Reload()
    return {tag: {e.step: e.value for e in events.Scalars(tag)} for tag in events.Tags()["scalars"]}


def test_the_curves_of_a_run_are_those_of_its_folder(folder):
    lines = read_record(folder / "run-tensorboard").lines
    found = scalars(folder / "tensorboard" / "run-tensorboard")
    assert found["loss"] == pytest.approx({line["epoch"]: line["loss"] for line in lines})
    assert found["dev/accuracy"] == pytest.approx({ln["epoch"]: ln["dev"]["accuracy"] for ln in lines})
    run = runs_of(folder)["run-mlflow"]
    lines = read_record(folder / "run-mlflow").lines
    assert losses(folder, "mlflow", "run-mlflow") == {line["epoch"]: line["loss"] for line in lines}
    assert run.info.status == "FINISHED"
    assert (run.data.params["method"], run.data.params["lr"]) == ("attention", "0.001")
    assert run.data.metrics["best/dev"] == max(line["dev"]["accuracy"] for line in lines)


def test_every_head_of_a_sweep_is_a_child_with_its_settings_and_scores(folder):
    for tool in ("tensorboard", "mlflow"):
        stacks = (folder / f"sweep-{tool}" / "stacks").glob("*.json")
        rows = [row for file in stacks for row in json.loads(file.read_text())]
        asked = {(row["fusion"], row["lr"]): row["dev"] for row in rows}
        assert len(asked) == 4
        if tool == "mlflow":
            children = runs_of(folder, runs_of(folder)["sweep-mlflow"].info.run_id).values()
            seen = {
                (run.data.params["fusion"], float(run.data.params["lr"])): run.data.metrics["best/dev"]
                for run in children
            }
        else:
            heads = [
                one for one in (folder / "tensorboard" / "sweep-tensorboard").iterdir() if one.is_dir()
            ]
            seen = {_named(one.name): scalars(one)["best/dev"][0] for one in heads}
        assert seen == pytest.approx(asked)


def _named(name):
    """Fusion and learning rate of a head, by its folder."""
    parts = name.split("-lr=")
    return parts[0].split("-")[1], float(parts[1].partition("-weight")[0])


def test_a_run_through_the_encoder_is_tracked_too(tmp_path):
    out = tmp_path / "run"
    with tracking.tracked("tensorboard", str(out)) as log:
        tags = [TaskAsked(data=str(tmp_path / "data"), target="tags")]
        progress = tracking.epochs(log, lambda *_: None)
        result = tuning.run(tmp_path, "bitfit", progress=progress, further=tags)
        tracking.finished(log, str(out))
    found = scalars(tmp_path / "tensorboard" / "run")
    assert found["loss"] == pytest.approx({ln["epoch"]: ln["loss"] for ln in read_record(out).lines})
    for name in ("data.intent.accuracy", "data.tags.f1"):
        (best,) = found[f"best/dev/{name.rpartition('.')[0]}"].values()
        assert best == pytest.approx(result["dev_metrics"][name])


def losses(folder, tool, name):
    """The loss by epoch that a tool shows for the newest run of a name."""
    if tool == "tensorboard":
        return scalars(folder / "tensorboard" / name)["loss"]
    run = runs_of(folder)[name]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        history = client(folder).get_metric_history(run.info.run_id, "loss")
    return {one.step: one.value for one in history}


def cut_off(out, tool):
    """A run that is killed after its first epoch."""
    with tracking.tracked(tool, str(out)) as log:
        log.scalars(1, {"loss": 2.0})
        raise KeyboardInterrupt


@pytest.mark.parametrize("tool", ["tensorboard", "mlflow"])
@pytest.mark.parametrize(("goes_on", "seen"), [(True, {1: 2.0, 2: 1.0}), (False, {2: 1.0})])
def test_only_a_resumed_run_goes_on_with_the_curves_of_its_name(tool, goes_on, seen, folder):
    name = f"cut-off-{goes_on}"
    with pytest.raises(KeyboardInterrupt):
        cut_off(folder / name, tool)
    assert losses(folder, tool, name) == {1: 2.0}
    with tracking.tracked(tool, str(folder / name), goes_on=goes_on) as log:
        log.scalars(2, {"loss": 1.0})
    assert losses(folder, tool, name) == seen
    if tool == "mlflow":
        assert runs_of(folder)[name].info.status == "FINISHED"


def test_fresh_curves_take_nothing_away_but_curves(tmp_path):
    with pytest.raises(KeyboardInterrupt):
        cut_off(tmp_path / "r", "tensorboard")
    (tmp_path / "tensorboard" / "r" / "notes.txt").write_text("the user's")
    with tracking.tracked("tensorboard", str(tmp_path / "r" / "deeper")) as log:
        log.scalars(1, {"loss": 3.0})
    with tracking.tracked("tensorboard", str(tmp_path / "r")) as log:
        log.child("head").scalars(1, {"loss": 1.0})
    assert (tmp_path / "tensorboard" / "r" / "notes.txt").exists()
    assert scalars(tmp_path / "tensorboard" / "r") == {}
    assert scalars(tmp_path / "tensorboard" / "r" / "head") == {"loss": {1: 1.0}}
    assert losses(tmp_path / "r", "tensorboard", "deeper") == {1: 3.0}


def test_a_command_that_is_refused_leaves_the_curves_of_the_run_there(folder):
    before = losses(folder, "tensorboard", "run-tensorboard")
    words = ["train", tiny.shared().path, "--target", "label", "--out", str(folder / "run-tensorboard")]
    done = CliRunner().invoke(cli.app, [*words, "--track", "tensorboard"])
    assert done.exit_code == 1
    assert "not empty" in done.stderr
    assert losses(folder, "tensorboard", "run-tensorboard") == before


def test_a_sweep_that_was_cut_off_goes_on_as_one_run(folder, monkeypatch):
    words = ["sweep", tiny.shared().path, "--target", "label", "--fusion", "linear,last_layer"]
    words += ["--epochs", "1", "--threads", "1", "--track", "mlflow", "--out", str(folder / "cut-sweep")]
    whole, kept = sweep._Keeper._keep_best, []

    def keep_one(self, outcome):
        if kept:
            raise KeyboardInterrupt
        kept.append(outcome.stack.shape.name)
        whole(self, outcome)

    with monkeypatch.context() as patch:
        patch.setattr(sweep._Keeper, "_keep_best", keep_one)
        assert CliRunner().invoke(cli.app, words).exit_code == 130
    command(words)
    children = runs_of(folder, runs_of(folder)["cut-sweep"].info.run_id)
    assert len(children) == 2
    assert any(name.startswith(kept[0]) for name in children)


def test_a_run_through_the_encoder_that_was_cut_off_goes_on(tmp_path, monkeypatch):
    tuning.data(tmp_path / "data")
    tiny.encoder(tmp_path / "encoder")
    words = ["tune", str(tmp_path / "data"), "--encoder", str(tmp_path / "encoder"), "--target", "intent"]
    words += ["--method", "bitfit", "--epochs", "2", "--out", str(tmp_path / "r"), "--track", "tensorboard"]
    words += ["--device", "cpu", "--threads", "1"]
    with monkeypatch.context() as patch:
        patch.setattr("pipeline.terminal.epoch_note", _killed)
        assert CliRunner().invoke(cli.app, words).exit_code == 130
    assert losses(tmp_path, "tensorboard", "r").keys() == {1}
    command(words)
    lines = read_record(tmp_path / "r").lines
    found = losses(tmp_path, "tensorboard", "r")
    assert found == pytest.approx({line["epoch"]: line["loss"] for line in lines})
    assert found.keys() == {1, 2}


def _killed(*_):
    raise KeyboardInterrupt


@pytest.mark.parametrize(
    ("tool", "module"), [("tensorboard", "torch.utils.tensorboard"), ("mlflow", "mlflow.tracking")]
)
def test_a_tracker_that_is_not_installed_is_one_line(tool, module, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, module, None)
    words = [
        "train",
        tiny.shared().path,
        "--target",
        "label",
        "--out",
        str(tmp_path / "r"),
        "--track",
        tool,
    ]
    done = CliRunner().invoke(cli.app, words)
    assert done.exit_code == 1
    assert f"layerbank[{tool}]" in done.stderr
    assert done.stderr.count("\n") == 1
    assert not (tmp_path / "r").exists()


def test_another_place_is_taken_from_the_environment(folder, tmp_path, monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{folder / 'mlflow.db'}")
    with tracking.tracked("mlflow", str(tmp_path / "elsewhere")) as log:
        log.scalars(1, {"loss": 2.0})
    assert "elsewhere" in runs_of(folder)
    assert list(tmp_path.iterdir()) == []


def tracked_training(tmp_path, tool):
    words = ["train", tiny.shared().path, "--target", "label", "--epochs", "3", "--threads", "1"]
    return CliRunner().invoke(cli.app, [*words, "--out", str(tmp_path / "r"), "--track", tool])


@pytest.mark.parametrize("uri", ["http://127.0.0.1:{port}", "htp://nowhere"])
def test_a_server_that_is_not_there_is_one_line(tmp_path, monkeypatch, uri):
    with socket.socket() as bound:  # bound and not listening: connections are refused
        bound.bind(("127.0.0.1", 0))
        monkeypatch.setenv("MLFLOW_TRACKING_URI", uri.format(port=bound.getsockname()[1]))
        monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
        done = tracked_training(tmp_path, "mlflow")
    assert done.exit_code == 1
    assert "MLFLOW_TRACKING_URI" in done.stderr
    assert done.stderr.count("\n") == 1
    assert not (tmp_path / "r").exists()


def test_a_tracker_that_fails_ends_no_training(tmp_path, monkeypatch):
    def fails(*_):
        raise OSError("the disk of the\ntracker is full")

    monkeypatch.setattr(tracking._TensorBoard, "scalars", fails)
    done = tracked_training(tmp_path, "tensorboard")
    assert done.exit_code == 0, done.stderr
    assert done.stderr.count("the disk of the tracker is full") == 1
    assert len(read_record(tmp_path / "r").lines) == 3


def test_a_tracker_that_is_lost_with_one_head_is_not_asked_about_the_next(monkeypatch, tmp_path):
    asked, notes = [], []

    def fails(self, step, values):
        asked.append(step)
        raise OSError

    monkeypatch.setattr(tracking._TensorBoard, "scalars", fails)
    with tracking.tracked("tensorboard", str(tmp_path / "r"), note=notes.append) as log:
        for step in (1, 2):
            child = log.child(f"head-{step}")
            child.scalars(step, {"loss": 1.0})
            child.close()
    assert asked == [1]
    assert len(notes) == 1
    assert "OSError" in notes[0]
