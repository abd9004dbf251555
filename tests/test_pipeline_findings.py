import csv
import io
import json
import shutil
from dataclasses import replace

import pytest

from pipeline import figures
from pipeline.errors import PipelineError
from pipeline.findings import Column, Figure, Findings, Table, as_csv, as_latex, load, save

ROWS = ({"fusion": "last_layer", "dev": 40.125, "n": 1200}, {"fusion": "a_b & c", "dev": None, "n": 7})
TABLE = Table(
    name="scores",
    title="Scores",
    columns=(
        Column(name="fusion", title="fusion"),
        Column(name="dev", title="dev, %", digits=1),
        Column(name="n", title="n"),
    ),
    rows=ROWS,
)


def findings() -> Findings:
    rows = [
        {"x": 1, "y": 2.0, "s": "a", "low": 1.0, "high": 3.0},
        {"x": 2, "y": 3.0, "s": "b", "low": 2.0, "high": 4.0},
    ]
    charts = {
        "lines": figures.lines(
            rows, x="x", y="y", series="s", band=("low", "high"), x_title="n", y_title="%"
        ),
        "points": figures.points(
            rows, x="x", y="y", series="s", spread=("low", "high"), x_title="n", y_title="%"
        ),
        "heat": figures.heat(rows, x="x", y="s", value="y", x_title="n", y_title="", value_title="%"),
        "bars": figures.bars(rows, x="x", y="y", series="s", x_title="n", y_title="%"),
    }
    drawn = [Figure(name=n, title=n, about=f"a chart of {n}", chart=chart) for n, chart in charts.items()]
    return Findings(
        kind="experiment", name="try", title="A try", paper="", asked={"seeds": 2}, seconds=1.5,
        notes=("a note",), tables=(TABLE,), figures=tuple(drawn),
    )  # fmt: skip


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A folder of findings and its files; drawn once, as pictures take long."""
    out = tmp_path_factory.mktemp("findings") / "out"
    return out, save(findings(), str(out))["files"]


@pytest.fixture
def damaged(saved, tmp_path):
    """A copy that may be changed."""
    return shutil.copytree(saved[0], tmp_path / "copy")


def test_what_is_saved_is_loaded_again(saved):
    out, files = saved
    back, made_by = load(str(out))
    assert back == findings()
    assert set(made_by) == {"command", "versions"}
    assert made_by["versions"]["layerbank"]
    kinds = {name.rpartition(".")[2] for name in files}
    assert kinds == {"json", "csv", "tex", "svg", "png"}


def test_pictures_are_drawn_with_what_the_chart_says():
    chart = figures.bars([{"x": "an axis entry", "y": 1.0}], x="x", y="y", x_title="", y_title="score, %")
    picture = figures.svg(chart)
    assert "an axis entry" in picture
    assert "score, %" in picture
    assert figures.png(picture)[:8] == b"\x89PNG\r\n\x1a\n"


def test_findings_cut_off_while_written_are_none(damaged):
    (damaged / "findings.json").unlink()
    with pytest.raises(PipelineError, match="holds no findings"):
        load(str(damaged))


@pytest.mark.parametrize("damage", ["", "[]", "{}", '{"tables": 3}'])
def test_a_damaged_file_is_named(damaged, damage):
    (damaged / "tables" / "scores.json").write_text(damage, encoding="utf-8")
    with pytest.raises(PipelineError, match=str(damaged)):
        load(str(damaged))


def test_csv_holds_every_digit():
    read = list(csv.reader(io.StringIO(as_csv(TABLE))))
    assert read == [["fusion", "dev", "n"], ["last_layer", "40.125", "1200"], ["a_b & c", "", "7"]]


def test_latex_is_rounded_and_its_marks_are_quoted():
    lines = as_latex(TABLE).splitlines()
    assert lines[0] == r"\begin{tabular}{lrr}"
    assert lines[2] == r"fusion & dev, \% & n \\"
    assert lines[4] == r"last\_layer & 40.1 & 1,200 \\"
    assert lines[5] == r"a\_b \& c &  & 7 \\"


def test_a_chart_is_plain_json_and_names_no_colour():
    for figure in findings().figures:
        text = json.dumps(figure.chart)
        assert "config" not in figure.chart
        assert "#" not in text


def test_a_picture_has_its_title(saved):
    assert ">lines<" in (saved[0] / "figures" / "lines.svg").read_text(encoding="utf-8")


@pytest.mark.parametrize(("low", "high"), [(3, 4), (90_000, 130_000), (0.02, 0.9), (5, 5e7), (1, 10)])
def test_a_logarithmic_axis_has_ticks_that_are_between_its_ends(low, high):
    ticks = figures.log_ticks(low, high)
    assert all(low <= tick <= high for tick in ticks)
    assert ticks == sorted(ticks)
    assert 2 <= len(ticks) <= 12 or high / low < 2


def test_files_of_older_findings_are_removed(tmp_path):
    save(findings(), str(tmp_path))
    (tmp_path / "tables" / "mine.csv").write_text("a\n", encoding="utf-8")
    other = replace(findings(), tables=(replace(TABLE, name="others"),), figures=())
    save(other, str(tmp_path))
    assert {path.name for path in (tmp_path / "tables").iterdir()} == {
        "others.json", "others.csv", "others.tex", "mine.csv",
    }  # fmt: skip
    assert not list((tmp_path / "figures").iterdir())


def test_a_logarithmic_axis_upwards_reaches_as_far_as_its_values():
    rows = [{"heads": 1, "minutes": 0.6}, {"heads": 30, "minutes": 800.0}]
    chart = figures.lines(rows, x="heads", y="minutes", x_title="", y_title="", log_x=True, log_y=True)
    up = chart["layer"][0]["encoding"]["y"]
    low, high = up["scale"]["domain"]
    assert 0.1 < low < 0.6
    assert 800 < high < 2000
    assert up["axis"]["values"] == [1, 10, 100, 1000]
    assert up["axis"]["format"] == "~g"  # not 500m for a half
