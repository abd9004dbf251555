"""Runs of several tasks: a folder for each, whole without the others; what is refused."""

import json
from dataclasses import replace

import pytest
import safetensors.torch
import tiny
import torch

from pipeline.compare import compare
from pipeline.errors import PipelineError
from pipeline.evaluate import evaluate
from pipeline.job import HeadRates, Schedule
from pipeline.multitask_run import BankTarget, train_tasks_run
from pipeline.results import load_run
from pipeline.run import train_run

RATES, SCHEDULE = HeadRates(lr=1e-2), Schedule(epochs=2, batch_size=16)
OPTIONS = {"random_sources": 3, "size": 4}
NETWORK = 2 * 4 * tiny.WIDTH + 2 * tiny.WIDTH


@pytest.fixture(scope="module")
def banks(tmp_path_factory):
    """Two banks of one encoder and one of another, by name."""
    folder = tmp_path_factory.mktemp("banks")
    tiny.bank(folder / "en")
    tiny.bank(folder / "de", sizes={"train": 60, "dev": 20, "test": 10})
    other = replace(tiny.ENCODER, weights_sha256="v" * 64)
    tiny.bank(folder / "fr", sizes={"train": 20, "dev": 10}, encoder=other)
    return folder


def train(banks, out, *names, **choices):
    """Trains tasks that are named as their folders are."""
    pairs = [name.split(".") for name in names]
    asked = [BankTarget(store=str(banks / store), target=target) for store, target in pairs]
    choices = {"options": OPTIONS, "rates": RATES, "schedule": SCHEDULE, **choices}
    return train_tasks_run(asked, out=str(out), **choices)


@pytest.fixture(scope="module")
def trained(banks, tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "together"
    return out, train(banks, out, "en.label", "en.tags", "de.label", options={**OPTIONS, "crf": True})


def test_every_task_has_a_run_that_is_whole_without_the_others(trained, banks, tmp_path):
    out, result = trained
    assert {path.name for path in out.iterdir()} == {"en.label", "en.tags", "de.label", "joint.json"}
    for name, row in result["tasks"].items():
        alone = (out / name).rename(tmp_path / name)
        run = load_run(str(alone))
        found = evaluate(run, run_bank(banks, name), "dev")
        assert found["score"] == pytest.approx(row["dev"])
        assert row["run"] == str(out / name)
        alone.rename(out / name)
    networks = [safetensors.torch.load_file(out / name / "head.safetensors") for name in result["tasks"]]
    names = [name for name in networks[0] if name.startswith("fusion.mixer.")]
    assert names
    assert all(torch.equal(networks[0][name], other[name]) for other in networks for name in names)


def run_bank(banks, name):
    from cache import open_bank

    return open_bank(str(banks / name.split(".")[0]))


def test_what_the_runs_have_in_common_is_written_down(trained):
    out, result = trained
    joint = json.loads((out / "joint.json").read_text())
    assert joint["tasks"] == list(result["tasks"]) == ["en.label", "en.tags", "de.label"]
    assert joint["shared"] == "mixer"
    assert joint["shared_parameters"] == result["shared_parameters"] == NETWORK
    assert result["parameters"] == NETWORK + sum(
        row["parameters"] - NETWORK for row in result["tasks"].values()
    )
    assert [line["epoch"] for line in joint["lines"]] == [1, 2]
    assert joint["dev"] == max(line["dev"]["mean"] for line in joint["lines"])
    for name, row in result["tasks"].items():
        assert row["best_epoch"] == result["best_epoch"]
        assert row["fusion_parameters"] == tiny.WIDTH + NETWORK
        assert row["fusion_parameters_per_task"] == tiny.WIDTH + NETWORK / 3
        config = json.loads((out / name / "config.json").read_text())
        assert config["joint"] == {"tasks": joint["tasks"], "shared": "mixer", "parameters": NETWORK}


def test_an_option_goes_to_the_heads_that_have_it(trained):
    out, _ = trained
    heads = {name: load_run(str(out / name)).head for name in ("en.label", "en.tags")}
    options = {name: load_run(str(out / name)).spec.decoder_options for name in heads}
    assert options == {"en.label": {}, "en.tags": {"crf": True}}


def test_runs_stand_in_a_comparison_beside_one_of_a_task_alone(trained, tmp_path):
    out, _ = trained
    choices = {"fusion": "mixture", "options": OPTIONS, "rates": RATES, "schedule": SCHEDULE}
    train_run(str(tiny.shared().path), target="label", out=str(tmp_path / "alone"), **choices)
    found = compare([str(tmp_path / "alone"), str(out / "en.label")])
    assert {row["method"] for row in found["runs"]} == {"mixture"}


@pytest.mark.parametrize(
    ("names", "choices", "said"),
    [
        (["en.label", "en.tags"], {"fusion": "attention"}, "nothing .* share.*fusion mixture"),
        (["en.label", "fr.label"], {}, "fr has states of another encoder .* than .*en .*one encoder"),
        (["en.label", "en.label"], {}, "en.label is there twice"),
        (["en.label", "en.nothing"], {}, "no target 'nothing'"),
        (["en.label", "en.tags"], {"options": {"longest": 3}}, "no task's head has an option 'longest'"),
        (["en.label", "en.value"], {"options": {}}, "mixture mixes the queries of trained heads"),
        (["en.label", "en.value"], {"metric": "f1"}, "f1"),
        (["en.label", "en.value"], {"decoder": "classifier"}, "learns class, target 'value' is float"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_one_line(banks, tmp_path, names, choices, said):
    with pytest.raises(PipelineError, match=said) as caught:
        train(banks, tmp_path / "run", *names, **choices)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "run").exists()


def test_banks_of_one_name_are_told(banks, tmp_path):
    asked = [BankTarget(store=f"{folder}/en", target="label") for folder in ("a", "b")]
    with pytest.raises(
        PipelineError, match=r"two tasks would be called en\.label, of a/en and b/en: rename"
    ):
        train_tasks_run(asked, out=str(tmp_path / "run"))


def test_runs_are_replaced_only_by_runs_of_the_same_tasks(banks, tmp_path):
    out = tmp_path / "run"
    first = train(banks, out, "en.label", "de.label")
    with pytest.raises(PipelineError, match="not empty"):
        train(banks, out, "en.label", "de.label")
    with pytest.raises(PipelineError, match="not empty, name another one"):
        train(banks, out, "en.label", "en.value", overwrite=True)
    (out / "joint.json").unlink()  # as a kill between the runs leaves it
    again = train(banks, out, "en.label", "de.label", overwrite=True)
    assert again["dev"] == first["dev"]
    assert (out / "joint.json").is_file()
