"""Run folders: what is in them, when they are refused, and that they come back as they were."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import disks
import numpy as np
import pytest
import safetensors.torch
import tiny
import torch

from pipeline import folders, parts, results
from pipeline.errors import PipelineError
from pipeline.job import HeadRates, Schedule, prepare
from pipeline.results import check_free, finite, load_run
from pipeline.run import train_run
from pipeline.train import fit, predictions

FILES = ["config.json", "head.safetensors", "metrics.jsonl", "result.json"]


def run(out, target="label", **choices):
    choices = {"schedule": Schedule(epochs=2), "rates": HeadRates(lr=1e-2), **choices}
    return train_run(tiny.shared().path, target=target, out=str(out), **choices)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A run folder that is only read, and what its making gave back."""
    out = tmp_path_factory.mktemp("runs") / "r"
    return out, run(out, "tags", options={"crf": True})


@pytest.fixture
def folder(finished, tmp_path):
    """A copy of it, to be damaged."""
    return shutil.copytree(finished[0], tmp_path / "r")


def strict(text):
    """JSON as the standard has it: no NaN, no Infinity."""

    def refuse(name):
        raise ValueError(name)

    return json.loads(text, parse_constant=refuse)


def test_folder_holds_four_files(finished):
    out, result = finished
    assert sorted(p.name for p in out.iterdir()) == FILES
    assert strict((out / "result.json").read_text()) == result
    assert [p.name for p in out.parent.iterdir()] == ["r"]


def test_result_has_the_promised_keys(finished):
    out, result = finished
    assert {
        "run",
        "fusion",
        "decoder",
        "target",
        "metric",
        "dev",
        "best_epoch",
        "epochs",
        "seconds",
        "seconds_per_epoch",
        "parameters",
        "fusion_parameters",
    } <= result.keys()
    assert (result["run"], result["fusion"], result["decoder"]) == (str(out), "attention", "tagger")
    assert (result["target"], result["metric"], result["epochs"]) == ("tags", "f1", 2)
    assert result["dev"] == result["dev_metrics"]["f1"]
    assert result["fusion_parameters"] == tiny.WIDTH
    assert 0 < result["seconds_per_epoch"] < result["seconds"]


def test_config_says_what_was_asked_and_on_what(finished):
    config = strict((finished[0] / "config.json").read_text())
    bank = tiny.shared()
    assert config["source"]["fingerprint"] == bank.fingerprint
    assert config["source"]["encoder"]["weights_sha256"] == tiny.ENCODER.weights_sha256
    assert config["source"]["splits"] == {"train": "train", "dev": "dev"}
    assert config["target"] == {"name": "tags", "kind": "tags", "names": list(tiny.TAGS)}
    assert config["head"]["decoder_options"] == {"crf": True}
    assert config["rates"] == {"seed": 0, "lr": 1e-2, "weight_decay": 0.01, "dropout": None}
    assert config["schedule"]["epochs"] == 2
    assert {"torch", "numpy"} <= config["versions"].keys()


def test_metrics_have_a_line_an_epoch(finished):
    lines = [strict(line) for line in (finished[0] / "metrics.jsonl").read_text().splitlines()]
    assert [line["epoch"] for line in lines] == [1, 2]
    for line in lines:
        assert line.keys() == {"epoch", "loss", "dev", "seconds", "lr"}
        assert set(line["dev"]) == {"f1", "precision", "recall", "accuracy"}


def test_weights_have_no_head_axis(finished):
    weights = safetensors.torch.load_file(str(finished[0] / "head.safetensors"))
    assert weights["decoder.crf.transitions"].shape == (len(tiny.TAGS), len(tiny.TAGS))
    head = load_run(str(finished[0])).head
    assert {name: value[0].shape for name, value in head.state_dict().items()} == {
        name: value.shape for name, value in weights.items()
    }


@pytest.mark.parametrize("target", ["label", "tags", "value"])
@pytest.mark.parametrize("fusion", parts.names("fusion"))
def test_run_comes_back_with_the_same_predictions(fusion, target, tmp_path):
    options = {
        "single_layer": {"layer": 2},
        "transformer": {"n": 1},
        "mixture": {"random_sources": 3},
    }.get(fusion, {})
    if target == "tags":
        options = {**options, "crf": True}
    out = tmp_path / "r"
    run(out, target, fusion=fusion, options=options, schedule=Schedule(epochs=1))
    job = prepare(tiny.shared(), target, fusion=fusion, options=options)
    trained = fit(job, [HeadRates(lr=1e-2)], Schedule(epochs=1))[0].head
    loaded = load_run(str(out))
    assert loaded.spec == job.spec
    assert not loaded.head.training
    found, expected = (predictions(head, job.dev)["predictions"] for head in (loaded.head, trained))
    assert np.array_equal(found, expected)
    given, *_ = next(job.dev.batches(np.arange(9), batch_size=9))
    assert torch.equal(loaded.head(given), trained(given))


def test_scores_that_are_not_finite_are_null(tmp_path, monkeypatch):
    waiting = iter([np.inf, np.inf])
    monkeypatch.setattr("pipeline.metrics.report", lambda **_: {"mse": np.array([next(waiting)])})
    result = run(tmp_path / "r", "value", metric="mse")
    assert result["dev"] is None
    for name in ("result.json", "metrics.jsonl"):
        for line in (tmp_path / "r" / name).read_text().splitlines() if name.endswith("l") else []:
            strict(line)
    assert strict((tmp_path / "r" / "result.json").read_text())["dev_metrics"] == {"mse": None}


def test_finite_goes_all_the_way_down():
    found = finite({"a": [1.0, float("nan")], "b": {"c": float("-inf"), "d": "NaN", "e": True}})
    assert found == {"a": [1.0, None], "b": {"c": None, "d": "NaN", "e": True}}


def test_folder_that_is_taken_is_refused_before_anything_is_read(tmp_path, monkeypatch):
    monkeypatch.setattr("pipeline.run.open_bank", None)
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "thesis.txt").write_text("years of work")
    (tmp_path / "file").write_text("")
    for out, said in [
        (tmp_path / "taken", "the folder is not empty, name another one"),
        (tmp_path / "file", "is a file"),
        (tmp_path / "file" / "below", "is a file"),
    ]:
        for overwrite in (False, True):
            with pytest.raises(PipelineError, match=said):
                run(out, overwrite=overwrite)
    assert (tmp_path / "taken" / "thesis.txt").read_text() == "years of work"


def test_overwrite_replaces_a_run(folder):
    with pytest.raises(PipelineError, match="give --overwrite"):
        run(folder)
    assert load_run(str(folder)).target.name == "tags"
    run(folder, overwrite=True)
    assert load_run(str(folder)).target.name == "label"
    assert sorted(p.name for p in folder.iterdir()) == FILES
    assert [p.name for p in folder.parent.iterdir()] == ["r"]


@pytest.mark.parametrize("strangers", [["model.safetensors", "tokenizer.json"], ["notes.md"]])
def test_overwrite_replaces_nothing_but_a_run(folder, strangers):
    for name in strangers:
        (folder / name).write_text("{}")
    with pytest.raises(PipelineError, match=r"name another one$"):
        run(folder, overwrite=True)
    assert {*FILES, *strangers} == {p.name for p in folder.iterdir()}


def test_folder_of_an_encoder_is_not_a_run(tmp_path):
    for name in ("config.json", "model.safetensors"):
        (tmp_path / name).write_text("{}")
    with pytest.raises(PipelineError, match=r"name another one$"):
        check_free(str(tmp_path), overwrite=True)


def test_run_that_fails_leaves_the_one_that_was_there(folder):
    before = {p.name: p.read_bytes() for p in folder.iterdir()}
    with pytest.raises(PipelineError, match="lower --lr"):
        run(folder, overwrite=True, rates=HeadRates(lr=1e30))
    assert {p.name: p.read_bytes() for p in folder.iterdir()} == before
    assert [p.name for p in folder.parent.iterdir()] == ["r"]


def test_disk_that_refuses_leaves_no_half_run(tmp_path):
    tiny.shared()  # made while there is room
    with (
        disks.small_files(4096),
        pytest.raises(PipelineError, match=r"cannot be written: .*File too large"),
    ):
        run(tmp_path / "r")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("out", ["r", "r/", "./r", "deep/er/r", "."])
def test_any_way_to_name_a_folder(out, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    assert run(out)["run"] == out
    where = tmp_path / "here" / out
    assert sorted(p.name for p in where.iterdir()) == FILES
    assert load_run(str(where)).path == str(where)


@pytest.mark.parametrize("name", ["config.json", "head.safetensors", "result.json"])
def test_half_a_run_is_refused(folder, name):
    (folder / name).unlink()
    with pytest.raises(PipelineError, match=f"no whole run folder, it lacks {name}: train it again"):
        load_run(str(folder))


@pytest.mark.parametrize("name", ["config.json", "head.safetensors", "result.json"])
@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"\xff\xfe", b"{}", b'"text"', b"null"])
def test_spoilt_file_is_one_line(folder, name, content):
    (folder / name).write_bytes(content)
    if name == "result.json" and content in (b"[]", b"{}", b'"text"', b"null"):
        return  # whatever is in there, the head is whole
    with pytest.raises(PipelineError, match="cannot be read as a run") as error:
        load_run(str(folder))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("key", ["source", "target", "metric", "head"])
def test_config_without_a_part_is_one_line(folder, key):
    config = json.loads((folder / "config.json").read_text())
    del config[key]
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(PipelineError, match="cannot be read as a run"):
        load_run(str(folder))


def test_weights_of_another_head_are_refused(folder, tmp_path):
    run(tmp_path / "other", "label")
    shutil.copy(tmp_path / "other" / "head.safetensors", folder / "head.safetensors")
    with pytest.raises(PipelineError, match="cannot be read as a run") as error:
        load_run(str(folder))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("part", ["subprocess.Popen", "os.system", "builtins.dict"])
def test_config_calls_nothing_but_parts(folder, part):
    config = json.loads((folder / "config.json").read_text())
    config["head"]["fusion"] = part
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(PipelineError, match="it is no fusion"):
        load_run(str(folder))


def test_no_run_there():
    with pytest.raises(PipelineError, match="layerbank train"):
        load_run("nowhere/at/all")


def test_a_run_is_replaced_only_by_a_whole_one(tmp_path, monkeypatch):
    path, partial = tmp_path / "run", tmp_path / "run.partial-1"
    for folder in (path, partial):
        folder.mkdir()
        (folder / "name").write_text(folder.name)
    rename, calls = Path.rename, []

    def die_at_the_second(self, target):
        calls.append(self)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", die_at_the_second)
    with pytest.raises(KeyboardInterrupt):
        folders.put(partial, path)
    monkeypatch.setattr(Path, "rename", rename)
    assert not path.exists()
    folders.clear_partials(path)  # its process id is this one's
    assert (path / "name").read_text() == "run"
    partial.mkdir(exist_ok=True)
    folders.put(partial, path)
    assert [p.name for p in tmp_path.iterdir()] == ["run"]


def test_what_dead_processes_left_is_cleared_and_what_living_ones_write_is_not(tmp_path):
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    for name in (f"run.partial-{dead.pid}", f"run.partial-{os.getppid()}", "run.partial-mine", "runs"):
        (tmp_path / name).mkdir()
    folders.clear_partials(tmp_path / "run")
    left = {p.name for p in tmp_path.iterdir()}
    assert left == {f"run.partial-{os.getppid()}", "run.partial-mine", "runs"}


@pytest.mark.parametrize("content", ["{", "[]", "null", ""])
def test_a_damaged_sweep_file_is_told_in_one_line(tmp_path, content):
    (tmp_path / "sweep.json").write_text(content)
    with pytest.raises(PipelineError, match=r"sweep.json is damaged") as error:
        results.check_free_sweep(str(tmp_path), {"a": 1}, store="bank")
    assert "\n" not in str(error.value)
