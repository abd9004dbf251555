"""Runs of several tasks: a folder for each, whole without the others; what is refused."""

import json
import shutil
from dataclasses import replace

import numpy as np
import pytest
import safetensors.torch
import tiny
import torch
from killed import KilledError, content_of, killed_after

from cache.targets import write_target
from pipeline import multitask_run, unfinished
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
    """Three banks of one encoder, one of them small, and one of another, by name."""
    folder = tmp_path_factory.mktemp("banks")
    tiny.bank(folder / "en")
    tiny.bank(folder / "de", sizes={"train": 60, "dev": 20, "test": 10})
    tiny.bank(folder / "few", sizes={"train": 9, "dev": 9})
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
        (["en.label", "en.value"], {"metric": "f1"}, "en.label: .*f1"),
        (["en.label", "en.value"], {"decoder": "classifier"}, "learns class, target 'value' is float"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_one_line(banks, tmp_path, names, choices, said):
    with pytest.raises(PipelineError, match=said) as caught:
        train(banks, tmp_path / "run", *names, **choices)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "run").exists()


def test_a_bank_named_in_two_ways_is_one(banks, tmp_path):
    asked = [BankTarget(store=f"{banks}/en{end}", target="label") for end in ("", "/")]
    with pytest.raises(PipelineError, match=r"en\.label is there twice"):
        train_tasks_run(asked, out=str(tmp_path / "run"))


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


LONGER = {"options": {**OPTIONS, "dropout": 0.1}, "schedule": Schedule(epochs=3, batch_size=12)}
TASKS = ("de.label", "de.tags", "few.value")  # many a batch has nothing of the last


@pytest.fixture(scope="module")
def undisturbed(banks, tmp_path_factory):
    out = tmp_path_factory.mktemp("undisturbed") / "runs"
    train(banks, out, *TASKS, **LONGER)
    return content_of(out)


@pytest.mark.parametrize("kills", [(1,), (1, 2), (3,)])
def test_runs_that_were_killed_end_as_undisturbed_ones(banks, tmp_path, monkeypatch, undisturbed, kills):
    monkeypatch.setattr(unfinished, "CHECKPOINT_S", 0)
    out, notes, epochs = tmp_path / "runs", [], []
    for kill in kills:
        with pytest.raises(KilledError):
            train(banks, out, *TASKS, **LONGER, progress=killed_after(kill))
        assert not out.exists()
    train(banks, out, *TASKS, **LONGER, note=notes.append, progress=lambda done, _: epochs.append(done))
    assert content_of(out) == undisturbed
    assert epochs == list(range(kills[-1] + 1, 4))
    assert notes == [f"{out}: goes on after epoch {kills[-1]}"]
    assert [path.name for path in tmp_path.iterdir()] == ["runs"]


def test_a_kill_between_the_folders_needs_no_overwrite(banks, tmp_path, monkeypatch, undisturbed):
    out, real = tmp_path / "runs", multitask_run.save_run

    def dying(path, *args, **choices):
        if path.endswith(TASKS[-1]):
            raise KilledError
        return real(path, *args, **choices)

    with monkeypatch.context() as patch:
        patch.setattr(multitask_run, "save_run", dying)
        with pytest.raises(KilledError):
            train(banks, out, *TASKS, **LONGER)
    assert (out / TASKS[0] / "result.json").is_file()
    train(banks, out, *TASKS, **LONGER)
    assert content_of(out) == undisturbed
    with pytest.raises(PipelineError, match="not empty"):
        train(banks, out, *TASKS, **LONGER)


@pytest.mark.parametrize(
    ("tasks", "choices", "said"),
    [
        ((*TASKS, "en.label"), {}, "differs in tasks"),
        (TASKS, {"rates": HeadRates(lr=1e-2, seed=1)}, "differs in seed"),
        (TASKS, {"options": OPTIONS}, "differs in options"),
        (TASKS, {"splits": {"train": "train", "dev": "train"}}, "differs in splits"),
    ],
)
def test_unfinished_runs_of_other_choices_are_refused(banks, tmp_path, monkeypatch, tasks, choices, said):
    monkeypatch.setattr(unfinished, "CHECKPOINT_S", 0)
    with pytest.raises(KilledError):
        train(banks, tmp_path / "runs", *TASKS, **LONGER, progress=killed_after(1))
    with pytest.raises(PipelineError, match=f"unfinished run that {said}: ask for the same") as caught:
        train(banks, tmp_path / "runs", *tasks, **{**LONGER, **choices})
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("what", ["labels", "states of the bank", "runs that this one starts from"])
def test_unfinished_runs_of_banks_that_have_changed_are_refused(tmp_path, monkeypatch, what):
    monkeypatch.setattr(unfinished, "CHECKPOINT_S", 0)
    sizes = {"train": 40, "dev": 20}
    bank = tiny.bank(tmp_path / "en", sizes=sizes)
    for name in "ab":
        train_run(bank.path, target="label", out=str(tmp_path / name), schedule=Schedule(epochs=1))
    options = {"sources": f"{tmp_path / 'a'},{tmp_path / 'b'}", "size": 4}
    with pytest.raises(KilledError):
        train(tmp_path, tmp_path / "runs", "en.label", "en.tags", options=options, progress=killed_after(1))
    if what == "labels":
        target = bank.split("dev").target("label")
        write_target(bank.writable_split("dev"), replace(target, values=np.roll(target.values, 1)))
    elif what == "states of the bank":
        shutil.rmtree(bank.path)
        tiny.bank(tmp_path / "en", sizes=sizes, dtype="float16")
    else:
        train_run(
            bank.path, target="value", out=str(tmp_path / "a"), schedule=Schedule(epochs=1), overwrite=True
        )
    with pytest.raises(PipelineError, match=f"the {what} changed since the unfinished run in .* began"):
        train(tmp_path, tmp_path / "runs", "en.label", "en.tags", options=options)


def test_what_has_no_epoch_stands_in_no_ones_way(banks, tmp_path):
    for lr in (1e-2, 1e30):
        with pytest.raises(KilledError):
            train(banks, tmp_path / "runs", *TASKS, rates=HeadRates(lr=lr), progress=killed_after(1))
    assert train(banks, tmp_path / "runs", *TASKS)["epochs"] == SCHEDULE.epochs


def test_runs_that_failed_stand_in_no_ones_way(banks, tmp_path, monkeypatch):
    monkeypatch.setattr(unfinished, "CHECKPOINT_S", 0)
    with pytest.raises(PipelineError, match=r"NaN or infinite at step .*lower --lr"):
        train(banks, tmp_path / "runs", *TASKS, rates=HeadRates(lr=1e30))
    assert not list(tmp_path.iterdir())
