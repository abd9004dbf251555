"""Frozen queries of trained heads: taken, kept, used without their runs; refused where they do not fit."""

import json
import shutil

import numpy as np
import pytest
import safetensors.torch
import tiny
import torch

from pipeline import parts
from pipeline.errors import PipelineError
from pipeline.evaluate import evaluate
from pipeline.grid import Grid
from pipeline.head import HeadSpec, build_head
from pipeline.job import HeadRates, Schedule, plan_goal, prepare
from pipeline.results import load_run
from pipeline.run import train_run
from pipeline.runner import Plan
from pipeline.sweep import sweep
from pipeline.train import fit
from pipeline.transfer import list_runs

SEEDS = {"first": 0, "second": 1, "third": 2}
SCHEDULE = Schedule(epochs=1)


def train(out, fusion="attention", target="label", store=None, **choices):
    bank = store or tiny.shared()
    rates = HeadRates(lr=1e-2, seed=choices.pop("seed", 0))
    return train_run(
        bank.path, target=target, out=str(out), fusion=fusion, rates=rates, schedule=SCHEDULE, **choices
    )


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A folder of three trained attention heads."""
    folder = tmp_path_factory.mktemp("sources")
    for name, seed in SEEDS.items():
        train(folder / name, seed=seed)
    return folder


@pytest.fixture
def copies(runs, tmp_path):
    """A copy of it, to be damaged."""
    return shutil.copytree(runs, tmp_path / "sources")


def queries(folder, names):
    files = [folder / name / "head.safetensors" for name in names]
    return torch.stack([safetensors.torch.load_file(str(file))["fusion.query"] for file in files])


def named(folder, *names):
    return ",".join(str(folder / name) for name in names)


def mix(sources, **options):
    return prepare(tiny.shared(), "value", fusion="mixture", options={"sources": sources, **options})


def test_queries_are_those_of_the_runs_in_the_order_given_whatever_the_seed(runs):
    job = mix(named(runs, "third", "first"))
    for seed in (0, 1):
        head = build_head(job.spec, seed=seed)
        assert torch.equal(head.fusion.sources[0], queries(runs, ["third", "first"]))
    assert head.n_parameters()[1] == tiny.WIDTH + 200 * tiny.WIDTH + 2 * tiny.WIDTH


def test_a_folder_of_runs_is_all_of_them_by_name_and_each_counts_once(runs):
    given = f"{runs}, {runs / 'second'}"
    assert [run.name for run in list_runs(given, fusion="attention")] == sorted(SEEDS)
    head = build_head(mix(given).spec, seed=0)
    assert torch.equal(head.fusion.sources[0], queries(runs, sorted(SEEDS)))


@pytest.mark.parametrize("name", ["first.partial-12", "first.aside-12"])
def test_a_folder_with_a_run_that_was_cut_off_is_the_whole_ones(copies, name):
    shutil.copytree(copies / "first", copies / name)
    (copies / name / "result.json").unlink()
    assert [run.name for run in list_runs(str(copies), fusion="attention")] == sorted(SEEDS)


def test_training_leaves_the_queries_bit_for_bit_and_moves_the_rest(runs):
    job = mix(str(runs), size=4)
    start = build_head(job.spec, seed=5)
    both = fit(job, [HeadRates(lr=1e-2, seed=5), HeadRates(lr=1e-3, seed=6)], SCHEDULE)
    for trained in both:
        assert torch.equal(trained.head.fusion.sources[0], queries(runs, sorted(SEEDS)))
    for name, value in both[0].head.fusion.named_parameters():
        assert not torch.equal(value, start.fusion.get_parameter(name)), name


def test_a_run_is_used_when_its_sources_are_gone(copies, tmp_path):
    out = tmp_path / "mixture"
    train(out, "mixture", "value", options={"sources": str(copies), "size": 4})
    before = evaluate(load_run(str(out)), tiny.shared(), "test")["score"]
    shutil.rmtree(copies)
    run = load_run(str(out))
    assert run.head.fusion.sources.shape == (1, 3, tiny.WIDTH)
    assert run.head.fusion.sources.abs().min() > 0
    assert evaluate(run, tiny.shared(), "test")["score"] == before
    config = json.loads((out / "config.json").read_text())
    assert "taken" not in config["head"]
    assert config["head"]["fusion_options"]["sources"].split(",")[0] == str(copies / "first")


def test_sweep_takes_a_folder_or_one_source_after_the_other(runs, tmp_path):
    plan = Plan(store=tiny.shared().path, schedule=SCHEDULE)
    options = {"sources": [str(runs), str(runs / "first")], "size": [4]}
    grid = Grid(targets=["value"], fusions=["mixture"], options=options, lr=[1e-2], seeds=2)
    result = sweep(plan, grid, out=str(tmp_path / "s"))
    assert result["heads"] == 4
    network = 2 * 4 * tiny.WIDTH + 2 * tiny.WIDTH
    counts = sorted({row["fusion_parameters"] for row in result["rows"]})
    assert counts == [tiny.WIDTH, tiny.WIDTH + network]
    assert all(np.isfinite(row["dev"]) for row in result["rows"])


def change(run, **values):
    """Changes entries of a run's config: head__width=4 is config["head"]["width"]."""
    path = run / "config.json"
    config = json.loads(path.read_text())
    for name, value in values.items():
        *above, last = name.split("__")
        place = config
        for key in above:
            place = place[key]
        place[last] = value
    path.write_text(json.dumps(config))


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"head__fusion": "linear"}, ["is a head of linear", "takes heads of attention"]),
        ({"head__width": 16}, ["vectors of width 16", "width 8"]),
        ({"source__encoder__weights_sha256": "x" * 64}, ["another encoder", "xxxxxxxxxxxx"]),
        ({"head__layers": [0, 3]}, ["mixes layers 0, 3, here are 0, 1, 2, 3", "same --layers"]),
        ({"head": {"fusion": "attention"}}, ["cannot be read as a run", "train it again"]),
    ],
    ids=str,
)
def test_run_that_does_not_fit_is_one_line(copies, changes, said):
    change(copies / "second", **changes)
    with pytest.raises(PipelineError) as error:
        mix(str(copies))
    for text in ["second", *said]:
        assert text in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["head.safetensors", "result.json"])
def test_half_a_run_is_refused(copies, name):
    (copies / "first" / name).unlink()
    with pytest.raises(PipelineError, match=f"first is no whole run .* lacks {name}: train it again"):
        mix(str(copies))


@pytest.mark.parametrize(
    "content",
    [
        b"{",
        safetensors.torch.save({"fusion.other": torch.zeros(8)}),
        safetensors.torch.save({"fusion.query": torch.zeros(4)}),
        safetensors.torch.save({"fusion.query": torch.full((8,), torch.nan)}),
    ],
    ids=["no file", "no query", "a short query", "no numbers"],
)
def test_spoilt_weights_are_refused(copies, content):
    (copies / "first" / "head.safetensors").write_bytes(content)
    with pytest.raises(PipelineError, match=r"first cannot be read as a run .*: train it again"):
        mix(str(copies))


def test_no_sources_say_how_to_make_some(tmp_path):
    (tmp_path / "empty").mkdir()
    for given, said in [
        ("", "names no run"),
        (" , ", "names no run"),
        (str(tmp_path / "empty"), "holds no run"),
        (str(tmp_path / "nowhere"), "no run at"),
    ]:
        with pytest.raises(PipelineError, match=f"{said}.*layerbank train ... --fusion attention"):
            mix(given)
    with pytest.raises(PipelineError, match="give --set sources=RUN,RUN"):
        prepare(tiny.shared(), "value", fusion="mixture")


def test_a_path_with_a_comma_is_refused(runs, tmp_path):
    shutil.copytree(runs, tmp_path / "a,b")
    (tmp_path / "link").symlink_to(tmp_path / "a,b")
    with pytest.raises(PipelineError, match="comma in it, rename"):
        mix(str(tmp_path / "link"))


def test_what_the_bank_lacks_is_said():
    for keep, layers, said in [("words", (0, 1, 2, 3), "--keep all"), ("all", (1, 2, 3), "--layers all")]:
        bank = tiny.shared(keep=keep, layers=layers)
        with pytest.raises(PipelineError, match=said):
            prepare(bank, "label", fusion="mixture", options={"random_sources": 2})


def test_fusions_that_are_given_nothing_take_nothing():
    takers = [name for name in parts.names("fusion") if parts.load("fusion", name).takes]
    assert takers == ["attention", "mixture"]
    spec = plan_goal(tiny.shared(), "label", fusion="attention").spec
    assert spec.taken == {}
    assert HeadSpec.from_json(spec.to_json()) == spec
