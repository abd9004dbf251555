"""The report: what is found, what its tables say, how each row is made again, and what is refused."""

import csv
import html.parser
import io
import json
import shutil
from base64 import b64decode
from pathlib import Path

import pytest
import tiny
from typer.testing import CliRunner

import cli
from pipeline import figures
from pipeline.errors import PipelineError
from pipeline.findings import Column, Figure, Findings, Table, save
from pipeline.grid import Grid
from pipeline.job import HeadRates, Schedule
from pipeline.report import commands
from pipeline.report.page import report
from pipeline.report.sections import sections
from pipeline.report.sources import find
from pipeline.run import train_run
from pipeline.runner import Plan
from pipeline.sweep import sweep

EVIL = "</script><script>alert('<b>&\"')</script><!--"


def findings():
    rows = [{"word": word, "layer": k, "weight": k / 7} for word in ("wake", EVIL) for k in range(3)]
    chart = figures.heat(
        rows, x="word", y="layer", value="weight", x_title="", y_title="layer", value_title="weight"
    )
    columns = (Column(name="word", title="word"), Column(name="weight", title="weight", digits=2))
    return Findings(
        kind="analysis", name="attention", title=f"Weights {EVIL}", paper="", seconds=1.0,
        asked={"a": 2, "left": None, "of": ["x", "y"]},
        notes=(EVIL,), tables=(Table(name="weights", title="Weights", columns=columns, rows=tuple(rows)),),
        figures=(Figure(name="heat", title="Layers of a sentence", about="Rows: layers.", chart=chart),),
    )  # fmt: skip


def tuned(folder):
    """A run of tune, by hand."""
    folder.mkdir(parents=True)
    names = list(tiny.CLASSES)
    task = {"name": "data.label", "data": "data", "target": "label", "kind": "class", "names": names}
    first = {"data": "my data", "target": "label", "columns": {"text": "text"}, "revision": None,
             "metric": None, "verbalizer": {}}  # fmt: skip
    asked = {"tasks": [first], "encoder": "enc", "encoder_revision": None, "method": "bitfit", "out": "x",
             "fusion": "last_layer", "decoder": None, "options": {"a": "b c"}, "prompts": None,
             "max_length": None, "splits": {"train": "train", "dev": "dev"},
             "trust_remote_code": False}  # fmt: skip
    plan = {"epochs": 2, "lr": 0.001, "patience": None, "checkpointing": True}
    config = {"method": "bitfit", "tasks": [{**task, "metric": "accuracy"}], "asked": asked, "plan": plan,
              "source": {"encoder": {"name": "enc"}}}  # fmt: skip
    result = {"fusion": "last_layer", "decoder": "classifier", "metric": "accuracy", "dev": 71.0,
              "epochs": 1, "parameters": 100, "seconds": 9.0, "seconds_per_epoch": 8.0}  # fmt: skip
    line = {"epoch": 1, "loss": 0.5, "dev": {"accuracy": 71.0}, "seconds": 8.0}
    for name, text in (("config.json", config), ("result.json", result), ("metrics.jsonl", line)):
        (folder / name).write_text(json.dumps(text) + "\n")
    return folder


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    """A sweep, three runs of two targets and findings, in one folder."""
    folder = tmp_path_factory.mktemp("report")
    store = tiny.shared().path
    grid = Grid(targets=["label"], fusions=["linear", "single_layer"], lr=[1e-2, 1e-3], seeds=2)
    sweep(Plan(store=store, schedule=Schedule(epochs=2)), grid, out=str(folder / "sweep"))
    for target, fusion in (("label", "linear"), ("tags", "attention")):
        train_run(
            store, target=target, out=str(folder / "runs" / f"{target}-{fusion}"), fusion=fusion,
            rates=HeadRates(lr=0.01), schedule=Schedule(epochs=2),
        )  # fmt: skip
    tuned(folder / "runs" / "tuned")
    save(findings(), str(folder / "findings"))
    return folder


@pytest.fixture(scope="module")
def page(work, tmp_path_factory):
    """The page of all of it, and what was said of it."""
    out = tmp_path_factory.mktemp("page") / "report.html"
    return out, report([str(work)], str(out))


class _Reader(html.parser.HTMLParser):
    """The elements of a page with their attributes and texts, as an outside parser sees them."""

    def __init__(self, text):
        super().__init__()
        self.elements, self.texts, self._open = [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        self._open.append(tag)

    def handle_endtag(self, tag):
        while self._open and self._open.pop() != tag:
            pass

    def handle_data(self, data):
        self.texts.append((self._open[-1] if self._open else "", data))


def test_everything_below_a_folder_is_found_once(work, page):
    found = find([str(work), str(work / "sweep")])
    assert (len(found.findings), len(found.sweeps), len(found.runs)) == (1, 1, 3)
    assert {k: page[1][k] for k in ("findings", "sweeps", "runs")} == {
        "findings": 1,
        "sweeps": 1,
        "runs": 3,
    }
    assert page[1]["bytes"] == page[0].stat().st_size < 5 * 10**6


def test_what_was_asked_leaves_out_what_was_not(work):
    [section] = sections(find([str(work / "findings")]))
    assert section.facts["asked"] == "a 2, of x,y"


def test_runs_of_different_targets_have_tables_of_their_own(work):
    made = {section.title: section for section in sections(find([str(work / "runs")]))}
    assert len(made["Runs on label"].tables[0].rows) == 2
    assert len(made["Runs on tags"].tables[0].rows) == 1
    with pytest.raises(PipelineError, match="compare runs of one target"):
        sections(find([str(work / "runs")]), one_table=True)


def test_a_sweep_has_the_mean_of_each_setting(work):
    found = find([str(work / "sweep")])
    rows = [row for row in found.sweeps[0].rows if row["target"] == "label" and row["fusion"] == "linear"]
    tables = {table.name: table for table in sections(found)[0].tables}
    for setting in (row for row in tables["label-settings"].rows if row["fusion"] == "linear"):
        scores = [row["dev"] for row in rows if row["lr"] == setting["lr"]]
        assert setting["heads"] == len(scores) == 2
        assert setting["dev"] == pytest.approx(sum(scores) / 2)
    heads = [row["dev"] for row in tables["label-heads"].rows]
    assert heads == sorted(heads, reverse=True)


def test_the_command_of_a_head_makes_it_again(work, tmp_path):
    tables = {table.name: table for table in sections(find([str(work / "sweep")]))[0].tables}
    row = next(row for row in tables["label-heads"].rows if row["fusion"] == "single_layer")
    words = row["command"].split()
    assert words[:2] == ["layerbank", "train"]
    done = CliRunner().invoke(cli.app, [*words[1:-1], str(tmp_path / "again"), "--json"])
    again = json.loads(done.stdout)
    assert (again["fusion"], again["epochs"], again["parameters"]) == ("single_layer", 2, row["parameters"])
    assert again["dev"] == pytest.approx(row["dev"], abs=2)  # of a stack: the order of sums differs


def test_the_command_of_a_run_is_the_recorded_one_or_made_of_its_settings(work, tmp_path):
    shutil.copytree(work / "runs", tmp_path / "runs")
    config = tmp_path / "runs" / "tags-attention" / "config.json"
    recorded = "layerbank train 'a bank' --target tags --out x"
    config.write_text(json.dumps({**json.loads(config.read_text()), "command": recorded}))
    made = sections(find([str(tmp_path / "runs")]))
    rows = {row["method"]: row for section in made for table in section.tables for row in table.rows}
    assert rows["attention"]["command"] == recorded
    assert "torch " in rows["attention"]["versions"]
    linear = rows["linear"]["command"]
    for part in ("layerbank train ", "--target label", "--lr 0.01", "--epochs 2", "--seed 0"):
        assert part in linear
    early = rows["bitfit"]["command"]
    for part in (
        "layerbank tune 'my data'",
        "--method bitfit",
        "--set 'a=b c'",
        "--gradient-checkpointing",
    ):
        assert part in early
    assert rows["bitfit"]["versions"] == "not recorded"


def test_text_of_others_stays_text(page):
    text = page[0].read_text(encoding="utf-8")
    seen = _Reader(text)
    tags = [tag for tag, _ in seen.elements]
    scripts = [attrs for tag, attrs in seen.elements if tag == "script"]
    assert sum("type" not in attrs for attrs in scripts) == 2  # Vega, and the page's own
    assert "b" not in tags
    assert any(EVIL in data for _, data in seen.texts)
    charts = [json.loads(data) for tag, data in seen.texts if tag == "script" and data.startswith('{"')]
    assert any(EVIL in json.dumps(chart, ensure_ascii=False).replace('\\"', '"') for chart in charts)


def test_the_page_asks_for_nothing_and_runs_no_text(page):
    seen = _Reader(page[0].read_text(encoding="utf-8"))
    [policy] = [attrs["content"] for _, attrs in seen.elements if attrs.get("http-equiv")]
    assert policy.startswith("default-src 'none'")
    assert "unsafe" not in policy
    for _, attrs in seen.elements:
        assert not [name for name in attrs if name.startswith("on") or name in ("src", "style")]
        assert attrs.get("href", "#").startswith(("#", "data:"))


def test_tables_come_as_files_with_every_digit(work, page):
    seen = _Reader(page[0].read_text(encoding="utf-8"))
    links = {attrs["download"]: attrs["href"] for tag, attrs in seen.elements if "download" in attrs}
    read = list(csv.DictReader(io.StringIO(b64decode(links["label-heads.csv"].partition(",")[2]).decode())))
    expected = sorted(r["dev"] for r in find([str(work)]).sweeps[0].rows if r["target"] == "label")
    assert sorted(float(row["dev"]) for row in read) == expected
    latex = b64decode(links["label-heads.tex"].partition(",")[2]).decode()
    assert latex.startswith("\\begin{tabular}")
    assert "layerbank" not in latex


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (None, "nothing to report"),
        ("nowhere", "is no folder"),
        ("empty", "holds nothing known"),
        ("run", "lacks config.json"),
        ("sweep", "cut off: run the same sweep again"),
        ("findings", "run the same command to its end"),
        ("table", "cannot be read as a sweep"),
    ],
)
def test_what_is_not_whole_is_one_line(work, tmp_path, damage, said):
    folder = tmp_path / "x"
    if damage == "run":
        (shutil.copytree(work / "runs" / "tuned", folder) / "config.json").unlink()
    elif damage == "sweep":
        (shutil.copytree(work / "sweep", folder) / "results.parquet").unlink()
    elif damage == "table":
        (shutil.copytree(work / "sweep", folder) / "results.parquet").write_bytes(b"PAR1")
    elif damage == "findings":
        (shutil.copytree(work / "findings", folder) / "findings.json").unlink()
    elif damage == "empty":
        folder.mkdir()
    asked = [] if damage is None else [str(folder)]
    done = CliRunner().invoke(cli.app, ["report", *asked, "--out", str(tmp_path / "r.html")])
    assert done.exit_code == 1
    assert said in done.stderr
    assert done.stderr.count("\n") == 1
    assert not (tmp_path / "r.html").exists()


def test_an_encoder_or_a_bank_on_the_way_is_no_run(work, tmp_path):
    (tmp_path / "encoder").mkdir()
    (tmp_path / "encoder" / "config.json").write_text("{}")
    shutil.copytree(work / "runs" / "tuned", tmp_path / "tuned")
    assert [Path(run.path).name for run in find([str(tmp_path)]).runs] == ["tuned"]


@pytest.mark.parametrize(
    "special",
    [
        {"train_on": [{"store": "b", "share": 0.05}]},
        {"depth": 2},
        {"schedule": {"epochs": 100, "decay": False, "warmup_steps": 20, "dev_epochs": [25]}},
        {"schedule": {"epochs": 8, "rungs": [1, 2]}},
    ],
)
def test_a_head_that_train_cannot_make_gets_the_command_of_all(special):
    row = {
        "target": "tags", "fusion": "attention", "decoder": "tagger", "options": "{}", "batch_size": 32,
        "metric": "f1", "seed": 0, "lr": 1e-3, "weight_decay": 0.01, "dropout": None,
    }  # fmt: skip
    usual = {"schedule": {"epochs": 8}, "splits": {"train": "train", "dev": "dev"}}
    recorded = "layerbank experiment few-shot data::tags --out few"
    assert commands.of_head(row, {**usual, **special, "command": recorded}, "bank", "r") == recorded
    assert commands.of_head(row, usual, "bank", "r").startswith("layerbank train bank --target tags")
