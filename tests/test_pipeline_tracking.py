"""Tracking, read back with the trackers' own libraries."""

import json
import sys
import warnings

import pytest
import tiny
import tuning
from typer.testing import CliRunner

import cli
from pipeline import tracking
from pipeline.records import read_record


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
    return {run.info.run_name: run for run in runs if run.data.tags.get("mlflow.parentRunId") == parent}


def scalars(folder):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder)).Reload()
    return {tag: {e.step: e.value for e in events.Scalars(tag)} for tag in events.Tags()["scalars"]}


def test_the_curves_of_a_run_are_those_of_its_folder(folder):
    lines = read_record(folder / "run-tensorboard").lines
    found = scalars(folder / "tensorboard" / "run-tensorboard")
    assert found["loss"] == pytest.approx({line["epoch"]: line["loss"] for line in lines})
    assert found["dev/accuracy"] == pytest.approx({ln["epoch"]: ln["dev"]["accuracy"] for ln in lines})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        run = runs_of(folder)["run-mlflow"]
        history = client(folder).get_metric_history(run.info.run_id, "loss")
    lines = read_record(folder / "run-mlflow").lines
    assert {one.step: one.value for one in history} == {line["epoch"]: line["loss"] for line in lines}
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
        tuning.run(tmp_path, "bitfit", progress=tracking.epochs(log, lambda *_: None))
        tracking.finished(log, str(out))
    found = scalars(tmp_path / "tensorboard" / "run")
    assert found["loss"] == pytest.approx({ln["epoch"]: ln["loss"] for ln in read_record(out).lines})


def test_a_run_that_was_cut_off_goes_on_in_mlflow(folder):
    def cut_off():
        with tracking.tracked("mlflow", str(folder / "r")) as log:
            log.scalars(1, {"loss": 2.0})
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        cut_off()
    assert runs_of(folder)["r"].info.status == "RUNNING"
    with tracking.tracked("mlflow", str(folder / "r")) as log:
        log.scalars(2, {"loss": 1.0})
    run = runs_of(folder)["r"]
    history = client(folder).get_metric_history(run.info.run_id, "loss")
    assert [(one.step, one.value) for one in history] == [(1, 2.0), (2, 1.0)]
    assert run.info.status == "FINISHED"


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
