"""Experiments that go through the encoder, on a tiny BERT: their figures, resumes and refusals."""

import json
from dataclasses import replace

import pytest
import tiny
import tuning

from pipeline.errors import PipelineError
from pipeline.experiments import _base
from pipeline.experiments._base import Data, Lab, perform
from pipeline.experiments.cost import break_even
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


def test_methods_that_need_sources_are_refused_early(lab):
    with pytest.raises(PipelineError, match="use attempt-table"):
        perform("convergence", {"methods": "spot"}, lab)
    with pytest.raises(PipelineError, match="a step of spot is one of prompt_tuning"):
        perform("cost", {"methods": "spot"}, lab)
    with pytest.raises(PipelineError, match="heads=0: give 1 or more"):
        perform("cost", {"heads": "0"}, lab)
