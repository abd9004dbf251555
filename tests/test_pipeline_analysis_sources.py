"""Which sources tasks attend to: against numpy on what the runs have noted; and what cannot be shown."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import safetensors
import safetensors.numpy
import tiny
import tuning

from cache import open_bank
from pipeline.analysis._base import analyze
from pipeline.attentions import read_shares
from pipeline.errors import PipelineError
from pipeline.findings import load, save_figure
from pipeline.grid import Grid
from pipeline.job import HeadRates, Schedule
from pipeline.multitask_run import BankTarget, train_tasks_run
from pipeline.run import train_run
from pipeline.runner import Plan
from pipeline.sweep import sweep
from pipeline.tuning.run import TaskAsked

PLAN = {"epochs": 1, "batch_size": 16}
SMALL = {"size": 4, "temperature": -3.0}

pytestmark = pytest.mark.usefixtures("undrawn")


@pytest.fixture
def undrawn(monkeypatch):
    """Leaves the pictures out, for speed; the charts are written all the same."""
    monkeypatch.setattr("pipeline.findings.save_figure", lambda *_: [])


@pytest.fixture(scope="module")
def early(tmp_path_factory):
    """Prompts a, of a run, and b; two seeds of ATTEMPT from them on one task, and a run of two tasks."""
    folder = tmp_path_factory.mktemp("early")
    tuning.run(folder, "prompt_tuning", out="prompts/a", plan=PLAN, options={"length": 3})
    prompts = folder / "prompts"
    rewritten(prompts / "a" / "prompt.safetensors", prompts / "b.safetensors", np.negative)
    choices = {"prompts": str(folder / "prompts"), "options": SMALL}
    for seed in (0, 1):
        tuning.run(folder, "attempt", out=f"intent-{seed}", plan={**PLAN, "seed": seed}, **choices)
    tags = [TaskAsked(data=str(folder / "data"), target="tags")]
    tuning.run(folder, "attempt", out="both", plan=PLAN, further=tags, **choices)
    return folder


def rewritten(file, to, change=lambda values: values, **metadata):
    """A copy of a safetensors file with other values, or other metadata."""
    with safetensors.safe_open(str(file), "numpy") as opened:
        tensors = {name: change(opened.get_tensor(name)) for name in opened.keys()}  # noqa: SIM118
        known = opened.metadata()
    safetensors.numpy.save_file(tensors, str(to), {**known, **metadata})


@pytest.fixture(scope="module")
def late(tmp_path_factory):
    """Heads of `attention`, and two seeds of a mixture of them on a target with classes."""
    folder = tmp_path_factory.mktemp("late")
    bank = tiny.bank(folder / "bank")
    for name, target in (("one", "label"), ("two", "tags")):
        train(bank, folder / "heads" / name, target)
    sources = f"{folder / 'heads' / 'one'},{folder / 'heads' / 'two'}"
    for seed in (0, 1):
        options = {"sources": sources, **SMALL}
        train(bank, folder / f"mixture-{seed}", "label", seed, fusion="mixture", options=options)
    return folder


def train(bank, out, target, seed=0, **choices):
    rates = HeadRates(lr=1e-2, seed=seed)
    train_run(bank.path, target=target, out=str(out), rates=rates, schedule=Schedule(epochs=1), **choices)


def noted(run, task):
    """What a run has noted, as an outside reader sees it."""
    return safetensors.numpy.load_file(str(run / "attentions.safetensors"))[task].astype(np.float64)


def computed(run, bank, split="dev"):
    """The shares of a head on a bank by ATTEMPT's equations in numpy, by row."""
    weights = safetensors.numpy.load_file(str(run / "head.safetensors"))
    names = ("mixer.down.weight", "mixer.up.weight", "mixer.norm.weight", "mixer.norm.bias", "sources")
    down, up, gain, shift, sources = (weights[f"fusion.{name}"].astype(float) for name in names)
    temperature = json.loads((run / "config.json").read_text())["head"]["fusion_options"]["temperature"]
    part = bank.split(split)
    found = np.full((part.n_examples, len(sources)), np.nan)
    for start, length, row in zip(part.start, part.length, part.row, strict=True):
        pooled = part.take(np.arange(start, start + length))[0].astype(float).max(0)
        hidden = pooled @ down
        hidden = hidden / (1 + np.exp(-hidden)) @ up
        hidden = (hidden - hidden.mean()) / np.sqrt(hidden.var() + 1e-5) * gain.ravel() + shift.ravel()
        scores = np.exp(sources @ hidden / (tiny.WIDTH * np.exp(temperature)))
        found[row] = scores / scores.sum()
    return found


def rows_of(result, table):
    return next(t["rows"] for t in result["tables"] if t["name"] == table)


def matrix(result):
    return {(row["target"], row["source"]): row for row in rows_of(result, "sources")}


def intents(folder):
    lines = (folder / "data" / "dev.jsonl").read_text().splitlines()
    return np.array([json.loads(line)["intent"] for line in lines])


def test_attempt_over_seeds_is_the_mean_of_their_means(early, tmp_path):
    runs = [early / "intent-0", early / "intent-1"]
    result = analyze([*map(str, runs)], out=str(tmp_path), what=["sources"])
    means = np.array([noted(run, "data.intent").mean(0) for run in runs])
    assert np.abs(means[0] - means[1]).max() > 1e-3
    cells = matrix(result)
    assert [source for _, source in cells] == ["a", "b", "its own"]
    assert {target for target, _ in cells} == {"data.intent"}
    found = list(cells.values())
    np.testing.assert_allclose([cell["attention"] for cell in found], means.mean(0), atol=1e-6)
    np.testing.assert_allclose([cell["attention_sd"] for cell in found], means.std(0, ddof=1), atol=1e-6)
    assert {(cell["runs"], cell["examples"]) for cell in found} == {(2, 16)}
    assert sum(cell["attention"] for cell in found) == pytest.approx(1, abs=1e-6)
    assert "has 0.33" in result["notes"][0]
    drawn = {figure.name: figure.chart for figure in load(str(tmp_path))[0].figures}
    assert set(drawn) == {"sources", "sources-by-class-data.intent"}
    assert "its own" in json.dumps(drawn["sources"])


def test_classes_are_those_of_the_data(early, tmp_path):
    result = analyze([str(early / "intent-0")], out=str(tmp_path), by="class")
    assert result["what"] == ["sources"]
    weights, gold = noted(early / "intent-0", "data.intent"), intents(early)
    rows = rows_of(result, "sources-by-class")
    counts = [row["examples"] for row in rows]
    assert counts == sorted(counts, reverse=True)
    assert {row["class"] for row in rows} == set(gold)
    for row in rows:
        here = weights[gold == row["class"]]
        assert row["examples"] == len(here)
        np.testing.assert_allclose([row[f"source_{k}"] for k in range(3)], here.mean(0), atol=1e-6)


def test_every_task_of_a_run_has_a_row_and_company_is_told(early, tmp_path):
    result = analyze([str(early / "both"), str(early / "intent-0")], out=str(tmp_path), what=["sources"])
    cells = matrix(result)
    names = {"data.intent (one of 2 tasks)": "data.intent", "data.tags": "data.tags"}
    for shown, task in names.items():
        means = noted(early / "both", task).mean(0)
        found = [cell["attention"] for (target, _), cell in cells.items() if target == shown]
        np.testing.assert_allclose(found, means, atol=1e-6)
    alone = [cell for (target, _), cell in cells.items() if target == "data.intent (alone)"]
    np.testing.assert_allclose(
        [cell["attention"] for cell in alone], noted(early / "intent-0", "data.intent").mean(0), atol=1e-6
    )
    assert {row["target"] for row in rows_of(result, "sources-by-class")} == {
        "data.intent (one of 2 tasks)", "data.intent (alone)",
    }  # fmt: skip


def test_heads_of_a_mixture_and_prompts_are_one_matrix(late, early, tmp_path):
    runs = [late / "mixture-0", late / "mixture-1"]
    asked = [str(early / "intent-0"), *map(str, runs)]
    result = analyze(asked, out=str(tmp_path), what=["sources"], by="class")
    cells = matrix(result)
    assert [key for key in cells if key[0] == "bank.label"] == [
        ("bank.label", "one"),
        ("bank.label", "two"),
    ]
    weights = [computed(run, open_bank(str(late / "bank"))) for run in runs]
    means = np.array([one.mean(0) for one in weights])
    for k, source in enumerate(("one", "two")):
        assert cells["bank.label", source]["attention"] == pytest.approx(means[:, k].mean(), abs=1e-5)
        assert cells["bank.label", source]["attention_sd"] == pytest.approx(
            means[:, k].std(ddof=1), abs=1e-5
        )
    drawn = load(str(tmp_path))[0].figures[0]
    assert '"sort": ["a", "b", "one", "two", "its own"]' in json.dumps(drawn.chart)
    assert '"labelAngle": -40' in json.dumps(drawn.chart)  # level, the names would run into one another
    picture = Path(save_figure(drawn, str(tmp_path))[0]).read_text()
    assert all(f">{text}<" in picture for text in ("bank.label", "data.intent", "its own"))
    rows = [row for row in rows_of(result, "sources-by-class") if row["target"] == "bank.label"]
    gold = np.array([row.label for row in tiny.examples("dev")])
    gold[4] = -1  # has no label
    assert sum(row["examples"] for row in rows) == 49
    for row in rows:
        here = [one[gold == tiny.CLASSES.index(row["class"])].mean(0) for one in weights]
        shown = [row["source_3"], row["source_4"]]
        np.testing.assert_allclose(shown, np.mean(here, 0), atol=1e-5)
        assert row["source_0"] is None


def test_tasks_that_trained_together_on_banks(late, tmp_path):
    asked = [BankTarget(store=str(late / "bank"), target=target) for target in ("label", "tags")]
    options = {"random_sources": 3, **SMALL}
    out = tmp_path / "together"
    train_tasks_run(asked, out=str(out), options=options, schedule=Schedule(epochs=1))
    result = analyze([str(out)], out=str(tmp_path / "found"), what=["sources"])
    bank = open_bank(str(late / "bank"))
    means = {name: computed(out / f"bank.{name}", bank).mean(0) for name in ("label", "tags")}
    for (target, source), cell in matrix(result).items():
        place = int(source.removeprefix("random-"))
        assert cell["attention"] == pytest.approx(means[target.removeprefix("bank.")][place], abs=1e-5)
    assert len(matrix(result)) == 6


def test_a_mixture_is_asked_about_its_layers_too(late, tmp_path):
    result = analyze([str(late / "mixture-0")], out=str(tmp_path), by="class")
    assert result["what"] == ["attention", "sentence", "similarity", "sources"]


def test_a_bank_that_was_moved_is_named_beside_the_run(late, tmp_path):
    whole = analyze([str(late / "mixture-0")], out=str(tmp_path / "whole"), what=["sources"])
    config = json.loads((late / "mixture-0" / "config.json").read_text())
    config["source"]["store"] = str(tmp_path / "gone")
    shutil.copytree(late / "mixture-0", tmp_path / "lost")
    (tmp_path / "lost" / "config.json").write_text(json.dumps(config))
    with pytest.raises(PipelineError, match="name where it is now beside the run"):
        analyze([str(tmp_path / "lost")], out=str(tmp_path / "alone"), what=["sources"])
    paths = [str(tmp_path / "lost"), str(late / "bank")]
    beside = analyze(paths, out=str(tmp_path / "beside"), what=["sources"])
    found, wanted = (rows_of(one, "sources-by-class") for one in (beside, whole))
    assert [row["source_0"] for row in found] == [row["source_0"] for row in wanted]


def test_any_split_and_another_bank_than_that_of_the_training(late, tmp_path):
    other = tiny.bank(tmp_path / "other", only=("tags",))
    paths = [str(late / "mixture-0"), str(late / "bank"), other.path]
    result = analyze(paths, out=str(tmp_path / "out"), what=["sources"], split="test")
    for name in ("bank.label", "other.label"):
        found = [cell["attention"] for (target, _), cell in matrix(result).items() if target == name]
        means = computed(late / "mixture-0", other, "test").mean(0)
        np.testing.assert_allclose(found, means, atol=1e-5)
    assert {row["target"] for row in rows_of(result, "sources-by-class")} == {"bank.label"}
    assert any("other.label is not shown by class: split test has no" in note for note in result["notes"])


def test_a_sweep_is_analyzed_as_its_heads_are(late, tmp_path):
    """No head of a sweep has noted anything; heads of other settings are tasks of their own."""
    grid = Grid(
        targets=("label", "tags"), fusions=("attention", "mixture"), seeds=2,
        options={"random_sources": (2, 3), "size": (4,), "temperature": (-3.0,)},
    )  # fmt: skip
    plan = Plan(store=str(late / "bank"), schedule=Schedule(epochs=1))
    sweep(plan, grid, out=str(tmp_path / "sweep"))
    result = analyze([str(tmp_path / "sweep")], out=str(tmp_path / "of-sweep"))
    assert set(result["what"]) == {"attention", "sentence", "similarity", "sources"}
    bank, means = open_bank(str(late / "bank")), matrix(result)
    for head in sorted((tmp_path / "sweep" / "heads").glob("*-mixture-*")):
        options = json.loads((head / "config.json").read_text())["head"]["fusion_options"]
        name = f"bank.{head.name.split('-')[0]} (random_sources={options['random_sources']})"
        found = [cell["attention"] for (target, _), cell in means.items() if target == name]
        np.testing.assert_allclose(found, computed(head, bank).mean(0), atol=1e-5)
    assert len(means) == 2 * (2 + 3)
    tasks = {row["task"]: row["heads"] for row in rows_of(result, "attention")}
    assert tasks == {
        f"{target}, {fusion}": 1
        for target in ("label", "tags")
        for fusion in ("attention", "mixture, random_sources=2", "mixture, random_sources=3")
    }
    heads = [str(path) for path in sorted((tmp_path / "sweep" / "heads").iterdir())]
    of_heads = analyze(heads, out=str(tmp_path / "of-heads"))
    assert of_heads["tables"] == result["tables"]


def test_data_that_has_changed_is_told(early, tmp_path):
    data = shutil.copytree(early / "data", tmp_path / "data")
    shutil.copytree(early / "intent-0", tmp_path / "run")
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    config["tasks"][0]["data"] = str(data)
    (tmp_path / "run" / "config.json").write_text(json.dumps(config))
    text = (data / "dev.jsonl").read_text()
    (data / "dev.jsonl").write_text(text + text.splitlines()[0] + "\n")
    result = analyze([str(tmp_path / "run")], out=str(tmp_path / "out"), by="class")
    assert any("has other rows than when" in note for note in result["notes"])
    assert any("by class: the targets' classes are not known" in note for note in result["notes"])


def test_runs_that_mix_nothing_are_told_of(early, tmp_path):
    runs = [str(early / "intent-0"), str(early / "prompts" / "a")]
    result = analyze(runs, out=str(tmp_path), split="test")
    assert result["what"] == ["sources"]
    assert any("/a mixes no source prompts" in note for note in result["notes"])
    assert any("is that of split dev" in note for note in result["notes"])


def test_tuned_runs_beside_heads_are_told_of_where_they_have_no_part(early, late, tmp_path):
    runs = [str(early / "prompts" / "a"), str(late / "heads" / "one")]
    result = analyze(runs, out=str(tmp_path), what=["attention"])
    assert any("/a was trained through the encoder" in note for note in result["notes"])


@pytest.mark.parametrize(
    ("runs", "choices", "said"),
    [
        (["prompts/a"], {}, "/a was trained through the encoder by 'layerbank tune'.*; no run that mixes"),
        (["intent-0"], {"what": ["attention"]}, "--what attention: .* was trained through the encoder"),
        (["intent-0"], {"what": ["similarity"]}, "--what similarity: .* was trained through the encoder"),
        (["both", "prompts/a"], {"what": ["probes"]}, "both and 1 more were trained through the encoder"),
        (["prompts/a"], {"what": ["sources"]}, "name runs of 'layerbank tune --method attempt'"),
        (["intent-0"], {"by": "kind"}, "--by kind: sources are mixed for whole examples, give --by class"),
    ],
)
def test_what_cannot_be_answered_is_one_line(early, tmp_path, runs, choices, said):
    with pytest.raises(PipelineError, match=said) as error:
        analyze([str(early / run) for run in runs], out=str(tmp_path / "out"), **choices)
    assert "\n" not in str(error.value)
    assert str(error.value).count("trained through") <= 1


def test_runs_of_one_task_with_other_sources_are_refused(early, tmp_path):
    other = shutil.copytree(early / "intent-1", tmp_path / "other")
    names = {"data.intent": json.dumps(["a", "c", "data.intent"])}
    rewritten(other / "attentions.safetensors", other / "attentions.safetensors", **names)
    with pytest.raises(PipelineError, match="mix other sources for one task: analyze each alone"):
        analyze([str(early / "intent-0"), str(other)], out=str(tmp_path / "out"), what=["sources"])


def test_spoilt_attentions_are_one_line(early, tmp_path):
    shutil.copytree(early / "intent-0", tmp_path / "run")
    file = tmp_path / "run" / "attentions.safetensors"
    file.write_bytes(file.read_bytes()[:-30])
    with pytest.raises(PipelineError, match=r"has no attentions\.safetensors that can be read") as error:
        analyze([str(tmp_path / "run")], out=str(tmp_path / "out"))
    assert "\n" not in str(error.value)


def test_shares_of_rows_that_were_not_read_do_not_count(tmp_path):
    weights = np.array([[0.25, 0.75], [np.nan, np.nan], [0.75, 0.25]], np.float32)
    names = {"label": json.dumps(["x", "x"])}
    safetensors.numpy.save_file({"label": weights}, str(tmp_path / "attentions.safetensors"), names)
    (shares,) = read_shares(Path(tmp_path))
    assert shares.means == {"x (1)": 0.5, "x (2)": 0.5}
