"""Experiments that go through the encoder, on a tiny BERT: their figures, resumes and refusals."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import tiny
import transformers
import tuning
from encoders import tiny_encoder

from pipeline.errors import PipelineError
from pipeline.experiments import _base
from pipeline.experiments._base import Data, Lab, perform
from pipeline.experiments.cost import break_even
from pipeline.findings import load
from pipeline.job import Schedule
from pipeline.tuning import loop


@pytest.fixture(scope="module")
def lab(tmp_path_factory):
    root = tmp_path_factory.mktemp("lab")
    folder = tuning.data(root / "data", ["tokens", "intent", "score"])
    data = (Data(path=str(folder), targets=("intent",)),)
    return Lab(
        out=root / "out", encoder=str(tiny.encoder(root / "encoder")), data=data, banks=root / "banks"
    )


def table(result, name):
    return next(table["rows"] for table in result["tables"] if table["name"] == name)


def forbid(monkeypatch):
    """From now on nothing is trained and nothing is encoded."""

    def fails(*_, **__):
        raise AssertionError("it was there already")

    monkeypatch.setattr(_base, "train_run", fails)
    monkeypatch.setattr(_base, "tune_run", fails)


def test_cost_is_measured_once_and_multiplied(lab, tmp_path, monkeypatch):
    lab = replace(lab, out=tmp_path)
    options = {"methods": "bitfit,attempt", "fusions": "last_layer", "heads": "4", "epochs": "3"}
    result = perform("cost", options, lab)
    parts = {row["name"]: row for row in table(result, "parts")}
    once, head, bitfit = (parts[name]["seconds"] for name in ("extraction", "last_layer", "bitfit"))
    assert parts["last_layer"]["total"] == pytest.approx(once + 12 * head)
    assert parts["bitfit"]["total"] == pytest.approx(12 * bitfit)
    row = next(row for row in table(result, "break-even") if row["method"] == "bitfit")
    for count in (row["heads"], row["epochs"] / 3):
        assert 3 * count * bitfit >= once + 3 * count * head
    assert (row["heads"] - 1) * 3 * (bitfit - head) < once
    assert (tmp_path / "figures" / f"cost-{lab.data[0].name}-intent.png").is_file()
    forbid(monkeypatch)
    assert table(perform("cost", options, lab), "parts") == table(result, "parts")


def test_break_even_of_what_saves_nothing_is_none():
    assert break_even(5.0, -1.0) is None
    assert break_even(9.0, 3.0) == 3


def test_convergence_goes_on_after_a_kill_and_ends_the_same(lab, tmp_path, monkeypatch):
    options = {"methods": "bitfit", "fusions": "last_layer,attention", "epochs": "2", "early_epochs": "3"}
    whole = perform("convergence", options, replace(lab, out=tmp_path / "whole"))
    killed = replace(lab, out=tmp_path / "killed")
    epoch = loop._Trainer.epoch

    def dies(self, number):
        if number == 3:
            raise KeyboardInterrupt
        return epoch(self, number)

    monkeypatch.setattr(loop._Trainer, "epoch", dies)
    with pytest.raises(KeyboardInterrupt):
        perform("convergence", options, killed)
    done = []
    monkeypatch.setattr(loop._Trainer, "epoch", lambda self, n: done.append(n) or epoch(self, n))
    resumed = perform("convergence", options, killed)
    assert done == [3]
    scores = [{row["method"]: row["dev"] for row in table(r, "runs")} for r in (whole, resumed)]
    assert scores[0] == scores[1]
    assert set(scores[0]) == {"bitfit", "last_layer", "attention"}
    chart = json.loads((tmp_path / "killed" / "figures" / "loss-data-intent.json").read_text())["chart"]
    assert "through the encoder" in json.dumps(chart)
    forbid(monkeypatch)
    again = perform("convergence", options, killed)
    assert table(again, "runs") == table(resumed, "runs")


def test_runs_are_made_anew_once_rows_labels_or_encoder_have_changed(tmp_path, monkeypatch):
    folder = tuning.data(tmp_path / "data", ["tokens", "intent"])
    encoder = tmp_path / "encoder"
    data = Data(path=str(folder), targets=("intent",))

    def leave(out):
        Path(out).mkdir(parents=True)
        (Path(out) / "result.json").write_text("{}")

    monkeypatch.setattr(_base, "train_run", lambda *_, out, **__: leave(out))
    monkeypatch.setattr(_base, "tune_run", lambda asked, *_, **__: leave(asked.out))

    def runs(seed=0):
        tiny.encoder(encoder, seed=seed)
        lab = Lab(out=tmp_path, encoder=str(encoder), data=(data,), banks=tmp_path / f"banks-{seed}")
        late = lab.train("late", lab.bank(data), "intent", schedule=Schedule(epochs=1), fusion="average")
        return [late, lab.tune("early", "bitfit", [(data, "intent")], plan={"epochs": 1})]

    train = Path(folder) / "train.jsonl"
    first = runs()
    assert runs() == first
    train.write_text(train.read_text() + train.read_text().splitlines()[0] + "\n")
    grown = runs()
    rows = [json.loads(line) for line in train.read_text().splitlines()]
    rows[0]["intent"] = next(row["intent"] for row in rows if row["intent"] != rows[0]["intent"])
    train.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    relabelled, other = runs(), runs(seed=1)
    assert len({*first, *grown, *relabelled, *other}) == 8


def test_methods_that_need_sources_are_refused_early(lab):
    with pytest.raises(PipelineError, match="use attempt-table"):
        perform("convergence", {"methods": "spot"}, lab)
    with pytest.raises(PipelineError, match="a step of spot is one of prompt_tuning"):
        perform("cost", {"methods": "spot"}, lab)
    with pytest.raises(PipelineError, match="heads=0: give 1 or more"):
        perform("cost", {"heads": "0"}, lab)


@pytest.fixture(scope="module")
def several(lab, tmp_path_factory):
    """Two sources and two targets on one encoder; nothing is trained yet."""
    root = tmp_path_factory.mktemp("several")
    targets = {"colours": "intent", "doors": "intent", "one": "intent", "two": "intent"}
    data = [
        Data(path=str(tuning.data(root / name, ["tokens", "intent"], train=24, dev=8)), targets=(target,))
        for name, target in targets.items()
    ]
    return replace(lab, data=tuple(data), out=root / "out", banks=root / "banks")


WIDTH = 16
SMALL = {
    "sources": "2", "length": "3", "epochs": "1", "source_epochs": "1", "seeds": "1", "batch_size": "8",
}  # fmt: skip


def test_attempt_table_then_ablations_and_matrix_use_the_same_runs(several, monkeypatch):
    methods = "prompt_tuning,spot,spot-targeted,attempt"
    result = perform("attempt-table", {**SMALL, "methods": methods}, several)
    rows = {(row["method"], row["target"]): row for row in table(result, "scores")}
    assert set(rows) == {
        (m, t) for m in (*methods.split(","), "attempt, multi-task") for t in ("one", "two")
    }
    assert rows["prompt_tuning", "one"]["parameters"] == 3 * WIDTH
    network = 2 * 100 * WIDTH + 2 * WIDTH
    assert rows["attempt", "one"]["parameters"] == 3 * WIDTH + network
    assert rows["attempt, multi-task", "one"]["parameters"] == 3 * WIDTH + network / 2
    (wide,) = [line for line in table(result, "by-target") if line["method"] == "spot"]
    assert wide["average"] == pytest.approx((rows["spot", "one"]["dev"] + rows["spot", "two"]["dev"]) / 2)
    trained = []
    whole = _base.tune_run
    monkeypatch.setattr(
        _base, "tune_run", lambda asked, *a, **k: trained.append(asked) or whole(asked, *a, **k)
    )
    # Another folder of its own, the same runs.
    small = {**SMALL, "runs": str(several.out / "runs")}
    apart = replace(several, out=several.out / "apart")
    matrix = perform("attention-matrix", small, apart)
    assert not trained
    cells = table(matrix, "attention")
    assert [cell["source"] for cell in cells] == ["colours", "doors", "its own"] * 2
    for target in ("one", "two"):
        assert sum(cell["attention"] for cell in cells if cell["target"] == target) == pytest.approx(1)
    ablations = perform("ablations", {**small, "single": "doors"}, apart)
    assert [dict(asked.options) for asked in trained[::2]] == [
        {"target": "false"}, {"attention": "false"}, {"single": "doors"}, {"transfer": "false"},
    ]  # fmt: skip
    by_variant = {(row["variant"], row["target"]): row for row in table(ablations, "scores")}
    assert by_variant["attempt", "one"]["dev"] == rows["attempt", "one"]["dev"]
    assert by_variant["no attention", "one"]["parameters"] == 3 * WIDTH
    assert by_variant["no target", "two"]["parameters"] == network
    forbid(monkeypatch)
    assert perform("attempt-table", {**SMALL, "methods": methods}, several)["tables"] == result["tables"]
    assert perform("ablations", {**small, "single": "doors"}, apart)["tables"] == ablations["tables"]


def test_scaling_has_a_row_for_every_backbone(lab, tmp_path, monkeypatch):
    small = tiny.encoder(tmp_path / "small", seed=1)
    lab = replace(lab, out=tmp_path / "out", banks=tmp_path / "banks")
    options = {**SMALL, "sources": "0", "encoders": str(small), "methods": "bitfit", "fusions": "attention"}
    result = perform("scaling", options, lab)
    rows = table(result, "scores")
    assert {(row["encoder"], row["method"], row["kind"]) for row in rows} == {
        (name, *pair)
        for name in ("encoder", "small")
        for pair in (("bitfit", "through the encoder"), ("attention", "on the bank"))
    }
    model = transformers.AutoModel.from_pretrained(small, add_pooling_layer=False)
    assert rows[0]["size"] == pytest.approx(sum(p.numel() for p in model.parameters()) / 1e6)
    chart = json.dumps(load(str(tmp_path / "out"))[0].figures[0].chart)
    assert '"title": "encoder"' in chart  # a point tells its backbone
    forbid(monkeypatch)
    assert perform("scaling", options, lab)["tables"] == result["tables"]


@pytest.mark.parametrize(
    ("name", "options", "said"),
    [
        ("attempt-table", {}, "sources=0: 4 data given, name the source tasks first"),
        ("attention-matrix", {"sources": "4"}, "sources=4: 4 data given"),
        ("ablations", {"sources": "2", "single": "door"}, "no such source: did you mean 'doors'"),
        ("scaling", {}, "needs the option 'encoders'"),
        ("scaling", {"encoders": "other", "methods": "attempt"}, "sources=0: 4 data given"),
        ("ablations", {"seeds": "0"}, "seeds=0: give 1 or more"),
    ],
)
def test_what_is_missing_is_named(several, tmp_path, name, options, said):
    with pytest.raises(PipelineError, match=said):
        perform(name, options, replace(several, out=tmp_path))


def test_two_data_of_one_name_are_refused(several, tmp_path):
    twice = replace(several, data=(*several.data, several.data[3]), out=tmp_path)
    with pytest.raises(PipelineError, match="two data are called two"):
        perform("ablations", {"sources": "2"}, twice)


def test_a_backbone_that_cannot_is_named(several, tmp_path):
    other = replace(several, out=tmp_path, encoder=tiny_encoder("albert"))
    with pytest.raises(PipelineError, match="not 2 modules of their own"):
        perform("cost", {"methods": "prefix_tuning", "fusions": "last_layer"}, other)
