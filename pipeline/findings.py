"""What an experiment or an analysis found, as one folder: tables, figures, and how it was made.

``tables/NAME.json, .csv, .tex``   a table, for programs, for spreadsheets, for papers
``figures/NAME.json, .svg, .png``  a figure: its Vega-Lite chart, and two pictures of it
``findings.json``                  the rest; written last, so a folder that has it is whole
"""

import csv
import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from pipeline import figures
from pipeline.errors import PipelineError, said_by
from pipeline.results import finite, read_json, write_whole
from pipeline.versions import made_by

FINDINGS = "findings.json"
Cell = str | int | float | bool | None


@dataclass(frozen=True, kw_only=True)
class Column:
    """A column of a table."""

    name: str  # its key in the rows
    title: str  # with the unit, where it has one
    digits: int | None = None  # of fractions shown; the files for programs hold all


@dataclass(frozen=True, kw_only=True)
class Table:
    """Rows of values by column; a value that is not there is None."""

    name: str  # of its files
    title: str
    columns: tuple[Column, ...]
    rows: tuple[Mapping[str, Cell], ...]


@dataclass(frozen=True, kw_only=True)
class Figure:
    """A picture, as `pipeline.figures` draws it."""

    name: str  # of its files
    title: str
    about: str  # what it shows, for those who do not see it
    chart: Mapping[str, Any]  # Vega-Lite, with its data in it


@dataclass(frozen=True, kw_only=True)
class Findings:
    """What was asked, and what came out of it."""

    kind: Literal["experiment", "analysis"]
    name: str
    title: str
    paper: str  # what it reproduces; empty where it is new here
    asked: Mapping[str, Any]
    seconds: float
    notes: tuple[str, ...] = ()
    tables: tuple[Table, ...] = ()
    figures: tuple[Figure, ...] = ()


def save(findings: Findings, out: str) -> dict[str, Any]:
    """Writes findings into a folder, which may hold other files; older findings there are replaced.

    Args:
        findings: what to write.
        out: the folder; made where it is not there.

    Returns:
        `out`, `name`, `title`, `seconds`, `notes`, `tables` (each with title, columns and rows), `files`.

    Raises:
        PipelineError: the disk refuses.
    """
    folder = Path(out)
    _remove_older(folder)
    files: dict[Path, str] = {}
    for table in findings.tables:
        stem = folder / "tables" / table.name
        files[stem.with_name(f"{stem.name}.json")] = _text(asdict(table))
        files[stem.with_name(f"{stem.name}.csv")] = as_csv(table)
        files[stem.with_name(f"{stem.name}.tex")] = as_latex(table)
    for figure in findings.figures:
        files[folder / "figures" / f"{figure.name}.json"] = _text(asdict(figure))
    for path, content in files.items():
        write_whole(path, content)
    pictures = [
        path for figure in findings.figures for path in save_figure(figure, str(folder / "figures"))
    ]
    rest = {key: value for key, value in asdict(findings).items() if key not in ("tables", "figures")}
    rest |= {"tables": [t.name for t in findings.tables], "figures": [f.name for f in findings.figures]}
    rest |= made_by()
    write_whole(folder / FINDINGS, _text(rest))
    return {
        "out": out,
        "name": findings.name,
        "title": findings.title,
        "seconds": findings.seconds,
        "notes": list(findings.notes),
        "tables": [finite(asdict(table)) for table in findings.tables],
        "files": [*map(str, files), *pictures, str(folder / FINDINGS)],
    }


def _remove_older(folder: Path) -> None:
    """Removes findings that are there, with the files that they name."""
    if not (folder / FINDINGS).is_file():
        return
    older = read_json(folder / FINDINGS)
    (folder / FINDINGS).unlink()
    for kind, suffixes in (("tables", ("json", "csv", "tex")), ("figures", ("json", "svg", "png"))):
        for name in older.get(kind, ()):
            for suffix in suffixes:
                (folder / kind / f"{name}.{suffix}").unlink(missing_ok=True)


def save_figure(figure: Figure, folder: str) -> list[str]:
    """Draws a figure, with its title, into ``NAME.svg`` and ``NAME.png``.

    Returns:
        The files written.

    Raises:
        PipelineError: the disk refuses.
    """
    stem = Path(folder, figure.name)
    drawn = figures.svg(figure.chart, figure.title)
    vector, pixels = (stem.with_name(f"{stem.name}.{kind}") for kind in ("svg", "png"))
    write_whole(vector, drawn)
    try:
        pixels.write_bytes(figures.png(drawn))
    except OSError as error:
        raise PipelineError(f"{pixels} cannot be written: {said_by(error)}") from error
    return [str(vector), str(pixels)]


def load(path: str) -> tuple[Findings, dict[str, Any]]:
    """Reads findings back, with the command and the versions that made them.

    Raises:
        PipelineError: there are none, or a file of them is damaged.
    """
    folder = Path(path)
    if not (folder / FINDINGS).is_file():
        raise PipelineError(f"{path} holds no findings: run 'layerbank experiment' or 'analyze' to its end")
    rest = read_json(folder / FINDINGS)
    try:
        made_by = {name: rest.pop(name) for name in ("command", "versions")}
        tables = [_table(read_json(folder / "tables" / f"{name}.json")) for name in rest.pop("tables")]
        charts = [Figure(**read_json(folder / "figures" / f"{name}.json")) for name in rest.pop("figures")]
        rest["notes"] = tuple(rest["notes"])
        return Findings(**rest, tables=tuple(tables), figures=tuple(charts)), made_by
    except (KeyError, TypeError) as error:
        said = " ".join(str(error).split())
        raise PipelineError(f"{path} cannot be read as findings ({said}): make them again") from error


def as_csv(table: Table) -> str:
    """The table with every digit."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow([column.name for column in table.columns])
    writer.writerows([row.get(column.name) for column in table.columns] for row in table.rows)
    return out.getvalue()


def as_latex(table: Table) -> str:
    """The table as a LaTeX tabular with the rules of the package booktabs."""
    sides = ["r" if is_numeric(table, column) else "l" for column in table.columns]
    lines = [f"\\begin{{tabular}}{{{''.join(sides)}}}", "\\toprule"]
    lines += [" & ".join(_latex(column.title) for column in table.columns) + " \\\\", "\\midrule"]
    for row in table.rows:
        lines.append(" & ".join(_latex(shown(row.get(c.name), c.digits)) for c in table.columns) + " \\\\")
    return "\n".join([*lines, "\\bottomrule", "\\end{tabular}", ""])


def shown(value: Cell, digits: int | None) -> str:
    """A cell as people read it.

    >>> shown(0.12345, 2), shown(12345, None), shown(None, None)
    ('0.12', '12,345', '')
    """
    if value is None:
        return ""
    if isinstance(value, bool | str):
        return str(value)
    if isinstance(value, float):
        return f"{value:,.{3 if digits is None else digits}f}"
    return f"{value:,}"


def is_numeric(table: Table, column: Column) -> bool:
    """Whether all values of a column that are there are numbers."""
    values = [row.get(column.name) for row in table.rows]
    return all(isinstance(value, int | float) for value in values if value is not None)


_LATEX = {"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}"}
_LATEX |= {mark: f"\\{mark}" for mark in "&%$#_{}"}


def _latex(text: str) -> str:
    return "".join(_LATEX.get(mark, mark) for mark in text)


def _text(value: Mapping[str, Any]) -> str:
    return json.dumps(finite(value), indent=1, ensure_ascii=False, allow_nan=False) + "\n"


def _table(values: Mapping[str, Any]) -> Table:
    columns: Sequence[Mapping[str, Any]] = values["columns"]
    made = {**values, "columns": tuple(Column(**column) for column in columns)}
    return Table(**{**made, "rows": tuple(values["rows"])})
