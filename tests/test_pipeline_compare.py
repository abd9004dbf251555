"""Runs side by side: figures worked out by hand, both kinds of run, and what cannot be compared."""

import json
import shutil

import numpy as np
import pytest
import tiny

from pipeline.compare import compare, curves, seconds_to
from pipeline.errors import PipelineError
from pipeline.grid import Grid
from pipeline.job import HeadRates, Schedule
from pipeline.plot import loss_figure, save_pictures
from pipeline.run import train_run
from pipeline.runner import Plan
from pipeline.sweep import sweep

CLASSES = list(tiny.CLASSES)


def write(
    folder, *, scores, seconds, tuned=None, target="label", kind="class", metric="accuracy", **changes
):
    """A run folder by hand: of `tune` where its method is given, of `train` otherwise."""
    folder.mkdir(parents=True)
    names = changes.pop("classes", CLASSES)
    encoder = {"name": changes.pop("encoder", "tiny")}
    better = min if metric == "mse" else max
    result = {
        "fusion": changes.pop("fusion", "last_layer"),
        "decoder": "classifier",
        "metric": metric,
        "dev": better((s for s in scores if s is not None), default=None),
        "epochs": len(scores),
        "parameters": 100,
        "seconds": sum(seconds) + 1,
        "seconds_per_epoch": sum(seconds) / len(seconds),
        "peak_memory_bytes": 10**8,
        **changes,
    }
    if tuned:
        task = {"name": f"data.{target}", "target": target, "kind": kind, "names": names}
        config = {"method": tuned, "tasks": [task], "source": {"encoder": encoder}}
    else:
        of = {"name": target, "kind": kind, "names": names}
        config = {"target": of, "source": {"encoder": encoder, "store": "nowhere", "fingerprint": "f"}}
    lines = [
        {"epoch": k + 1, "loss": 1 / (k + 1), "dev": {metric: s}, "seconds": t, "lr": 0.1}
        for k, (s, t) in enumerate(zip(scores, seconds, strict=True))
    ]
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "result.json").write_text(json.dumps(result))
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (folder / "weights.safetensors").write_bytes(b"x" * 5000)
    return str(folder)


@pytest.fixture
def pair(tmp_path):
    """A head on a bank and a method of `tune`."""
    late = write(tmp_path / "runs" / "late", scores=[50.0, 77.0, 79.0], seconds=[1, 1, 1], fusion="linear")
    early = write(
        tmp_path / "runs" / "early",
        scores=[70.0, 75.9, 76.1, 80.0],
        seconds=[30, 30, 30, 30],
        tuned="bitfit",
    )
    return late, early


def test_rows_are_those_of_the_folders_best_score_first(pair):
    found = compare(pair)
    assert (found["target"], found["metric"], found["best"]) == ("label", "accuracy", 80.0)
    early, late = found["runs"]
    assert (early["method"], early["kind"], early["dev"]) == ("bitfit", "tune", 80.0)
    assert (late["method"], late["kind"], late["dev"]) == ("linear", "train", 79.0)
    # 95 % of 80 is 76: the head has it after its 2nd epoch, bitfit after its 3rd (75.9 is not enough).
    assert (late["seconds_to_95"], early["seconds_to_95"]) == (2.0, 90.0)
    assert (late["seconds_to_own_95"], early["seconds_to_own_95"]) == (2.0, 90.0)
    assert (late["seconds_per_epoch"], early["seconds_per_epoch"]) == (1.0, 30.0)
    assert late["peak_memory_bytes"] == 10**8
    assert late["bytes"] > 5000
    assert late["bank_bytes"] is None  # there is no bank at "nowhere"
    assert found["notes"] == []


def test_a_folder_of_runs_is_all_of_them_but_those_in_the_making(pair, tmp_path):
    shutil.copytree(pair[0], tmp_path / "runs" / "late.partial-12")
    assert compare([str(tmp_path / "runs")]) == compare(pair)


def test_one_run_is_a_table_of_one(pair):
    (row,) = compare(pair[:1])["runs"]
    assert row["seconds_to_95"] == row["seconds_to_own_95"] == 2.0


def lines(*scores, metric="accuracy"):
    return [{"dev": {metric: score}, "seconds": 2.0} for score in scores]


@pytest.mark.parametrize(
    ("scores", "metric", "best", "seconds"),
    [
        ([94.9, 95.0], "accuracy", 100.0, 4.0),
        ([99.0, 10.0], "accuracy", 100.0, 2.0),
        ([50.0], "accuracy", 100.0, None),
        ([None, 96.0], "accuracy", 100.0, 4.0),
        ([2.0, 1.06, 1.05], "mse", 1.0, 6.0),
        ([0.0], "accuracy", 0.0, None),
        ([], "accuracy", 50.0, None),
        ([50.0], "f1", 50.0, 2.0),
        ([50.0], "accuracy", None, None),
    ],
)
def test_seconds_to_a_share_of_the_best(scores, metric, best, seconds):
    assert seconds_to(lines(*scores, metric=metric), metric, best) == seconds


def test_an_error_is_better_the_lower_and_no_score_comes_last(tmp_path):
    paths = [
        write(tmp_path / "a", scores=[None], seconds=[1], metric="mse", kind="float", classes=[]),
        write(tmp_path / "b", scores=[3.0], seconds=[1], metric="mse", kind="float", classes=[]),
        write(tmp_path / "c", scores=[2.0], seconds=[1], metric="mse", kind="float", classes=[]),
    ]
    found = compare(paths)
    assert [row["dev"] for row in found["runs"]] == [2.0, 3.0, None]
    assert [row["seconds_to_95"] for row in found["runs"]] == [1.0, None, None]


def test_real_runs_of_a_bank(tmp_path):
    bank = tiny.shared()
    for fusion in ("linear", "average"):
        result = train_run(
            bank.path,
            target="label",
            out=str(tmp_path / fusion),
            fusion=fusion,
            rates=HeadRates(lr=1e-2),
            schedule=Schedule(epochs=3),
        )
        assert result["peak_memory_bytes"] > 10**7
    found = compare([str(tmp_path)])
    for row in found["runs"]:
        text = (tmp_path / row["method"] / "metrics.jsonl").read_text()
        epochs = [json.loads(line) for line in text.splitlines()]
        ends = np.cumsum([line["seconds"] for line in epochs])
        reached = [k for k, line in enumerate(epochs) if line["dev"]["accuracy"] >= 0.95 * row["dev"]]
        assert row["seconds_to_own_95"] == pytest.approx(ends[reached[0]])
        assert row["bank_bytes"] == bank.n_bytes
        files = list((tmp_path / row["method"]).iterdir())
        assert row["bytes"] == sum(len(file.read_bytes()) for file in files)


def test_heads_of_a_sweep_are_told_of(tmp_path):
    plan = Plan(store=tiny.shared().path, schedule=Schedule(epochs=1))
    sweep(plan, Grid(targets=["label"], fusions=["linear", "average"]), out=str(tmp_path / "s"))
    found = compare([str(tmp_path / "s" / "heads")])
    assert sorted(row["method"] for row in found["runs"]) == ["average", "linear"]
    assert [row["peak_memory_bytes"] for row in found["runs"]] == [None, None]
    assert "whole stack" in found["notes"][0]


def several(folder, tasks):
    """A run of `tune` by hand that learned several tasks together; their scores by name."""
    path = write(folder, scores=[60.0], seconds=[1], tuned="attempt", metric="mean", fusion="none")
    config, result = (json.loads((folder / f"{n}.json").read_text()) for n in ("config", "result"))
    named = [name.rpartition(".") for name in tasks]
    config["tasks"] = [
        {"name": f"{data}.{target}", "target": target, "kind": "class", "names": CLASSES,
         "metric": "accuracy"}
        for data, _, target in named
    ]  # fmt: skip
    scores = {"mean": 60.0, **{f"{name}.accuracy": score for name, score in tasks.items()}}
    line = {"epoch": 1, "loss": 1.0, "dev": scores, "seconds": 2.0, "lr": 0.1}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "result.json").write_text(json.dumps({**result, "dev_metrics": scores}))
    (folder / "metrics.jsonl").write_text(json.dumps(line) + "\n")
    return path


def test_every_task_that_was_learned_together_is_a_row_of_its_target(pair, tmp_path):
    scores = {"en.label": 81.0, "de.label": 79.5, "en.topic": 39.5}
    both = several(tmp_path / "both", scores)
    found = compare([*pair, both])
    rows = [(row["run"], row["task"], row["dev"]) for row in found["runs"]]
    late, early = pair
    assert rows == [
        (both, "en.label", 81.0), (early, None, 80.0), (both, "de.label", 79.5), (late, None, 79.0),
    ]  # fmt: skip
    assert found["runs"][0]["seconds_to_own_95"] == 2.0
    assert [curve["label"] for curve in curves([*pair, both])].count("attempt") == 1
    (row,) = compare([both], "en.topic")["runs"]
    assert (row["task"], row["dev"]) == ("en.topic", 39.5)
    assert {row["task"] for row in compare([both], "label")["runs"]} == {"en.label", "de.label"}
    with pytest.raises(PipelineError, match="have learned label, topic: name one by --target"):
        compare([both])
    other = write(tmp_path / "other", scores=[1.0], seconds=[1], target="topic")
    with pytest.raises(PipelineError, match=r"late learns 'label' .*other learns 'topic'"):
        compare([*pair, both, other])
    with pytest.raises(PipelineError, match="--target lable: no run has learned it: did you mean 'label'"):
        compare([both], "lable")


def test_a_fusion_on_a_tuned_encoder_is_part_of_the_name(tmp_path):
    for fusion, name in [("dwatt", "fine_tune+dwatt"), ("none", "fine_tune"), ("last_layer", "fine_tune")]:
        path = write(tmp_path / fusion, scores=[1.0], seconds=[1], tuned="fine_tune", fusion=fusion)
        assert compare([path])["runs"][0]["method"] == name


def test_other_encoders_are_told_of(pair, tmp_path):
    other = write(tmp_path / "other", scores=[1.0], seconds=[1], encoder="big")
    assert compare([*pair, other])["notes"] == ["the runs are of different encoders: big, tiny"]


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"target": "intent"}, "compare runs of one target, or name one by --target"),
        ({"kind": "float", "classes": []}, "compare runs of one target"),
        ({"classes": [*CLASSES[1:], "black"]}, "'black' is of one alone): compare runs on one data set"),
        ({"metric": "macro_f1"}, "train both with the same --metric"),
    ],
    ids=str,
)
def test_what_is_not_alike_is_one_line_with_both_names(pair, tmp_path, changes, said):
    other = write(tmp_path / "other", scores=[1.0], seconds=[1], **changes)
    with pytest.raises(PipelineError) as error:
        compare([pair[0], other])
    assert said in str(error.value)
    assert pair[0] in str(error.value)
    assert other in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["config.json", "metrics.jsonl", "result.json"])
def test_half_a_run_is_refused(pair, tmp_path, name):
    (tmp_path / "runs" / "early" / name).unlink()
    with pytest.raises(
        PipelineError, match=f"early is no whole run folder, it lacks {name}: train it again"
    ):
        compare(pair)


@pytest.mark.parametrize("name", ["config.json", "metrics.jsonl", "result.json"])
@pytest.mark.parametrize("content", ["{", "[]", "{}", "null", '"text"', "\udcff"])
def test_spoilt_file_is_one_line(pair, tmp_path, name, content):
    path = tmp_path / "runs" / "early" / name
    path.write_text(content, encoding="utf-8", errors="surrogateescape")
    with pytest.raises(PipelineError, match=r"early cannot be read as a run .*: train it again") as error:
        compare(pair)
    assert "\n" not in str(error.value)


def test_no_runs_say_what_to_do(tmp_path):
    (tmp_path / "empty").mkdir()
    for paths, said in [([], "no run to compare"), (["empty"], "holds no run"), (["none"], "no run at")]:
        with pytest.raises(PipelineError, match=f"{said}.*layerbank t"):
            compare([str(tmp_path / path) for path in paths])


def test_a_sweep_stands_for_its_best_heads(tmp_path):
    for name, score in (("linear", 60.0), ("attention", 70.0)):
        write(tmp_path / "sweep" / "heads" / name, scores=[score], seconds=[1], fusion=name)
    found = compare([str(tmp_path / "sweep")])
    assert [row["method"] for row in found["runs"]] == ["attention", "linear"]


def test_curves_and_their_picture(pair, tmp_path):
    again = write(tmp_path / "again", scores=[60.0], seconds=[2], fusion="linear")
    found = curves([*pair, again])
    assert [curve["label"] for curve in found] == ["linear (late)", "bitfit", "linear (again)"]
    assert found[1]["seconds"] == [30, 60, 90, 120]
    assert found[1]["loss"] == [1, 1 / 2, 1 / 3, 1 / 4]
    files = save_pictures([loss_figure(found, "label")], str(tmp_path / "new" / "pictures"))
    assert [file.rsplit("/", 1)[1] for file in files] == ["label-loss.svg", "label-loss.png"]
    drawn = (tmp_path / "new" / "pictures" / "label-loss.svg").read_text()
    for text in ("linear (late)", "bitfit", "seconds of training"):
        assert f">{text}" in drawn


def test_picture_where_none_can_be_is_one_line(pair, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(PipelineError, match="cannot be written"):
        save_pictures([loss_figure(curves(pair), "label")], str(tmp_path / "file" / "below"))
