"""The page: one HTML file with its styles, scripts and data in it. It asks nothing of any server."""

import base64
import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from importlib.resources import files
from pathlib import Path
from typing import Any

from pipeline import figures
from pipeline.findings import Cell, Table, as_csv, as_latex, is_numeric, shown
from pipeline.report.sections import COMMAND, MAX_ROWS, VERSIONS, Section, sections
from pipeline.report.sources import find
from pipeline.results import finite, write_whole
from pipeline.versions import command_line, versions


def report(paths: Sequence[str], out: str, *, one_table: bool = False) -> dict[str, Any]:
    """Writes the report of runs, sweeps, experiments and analyses.

    Args:
        paths: their folders, or folders that hold them.
        out: the file.
        one_table: put all runs into one table.

    Returns:
        `page`, `bytes`, and how many it tells of: `findings`, `sweeps`, `runs`, `tables`, `figures`.

    Raises:
        PipelineError: there is nothing to tell of, something is not whole, runs that are to share a table
            learn different targets, or the disk refuses.
    """
    found = find(paths)
    made = sections(found, one_table=one_table)
    html = render(made)
    write_whole(Path(out), html)
    return {
        "page": out,
        "bytes": len(html.encode()),
        "findings": len(found.findings),
        "sweeps": len(found.sweeps),
        "runs": len({record.path for record in found.runs}),
        "tables": sum(len(section.tables) for section in made),
        "figures": sum(len(section.figures) for section in made),
    }


def render(made: Sequence[Section]) -> str:
    """The page of some sections. Every text is escaped: run names and words are others' text."""
    import jinja2
    import vl_convert

    folder = files("pipeline.report")
    css, own, html = (folder.joinpath(f"page.{kind}").read_text("utf-8") for kind in ("css", "js", "html"))
    bundle: Any = vl_convert.javascript_bundle  # its stub asks for a snippet, which it does without
    scripts = [_inert(bundle()), _inert(own)]
    template = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    ).from_string(html)
    return template.render(
        sections=[_shown(section) for section in made],
        policy=_policy(scripts, css),
        css=css,
        scripts=scripts,
        settings=_json({"page": figures.theme("currentColor"), "paper": figures.PAPER}),
        now=datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        command=command_line(),
        version=versions()["layerbank"],
    )


def _policy(scripts: Sequence[str], css: str) -> str:
    """What the page may do: run its own scripts and styles, by their hashes, and show its own pictures."""
    hashes = " ".join(map(_hash, scripts))
    return f"default-src 'none'; script-src {hashes}; style-src {_hash(css)}; img-src data: blob:"


def _hash(text: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"


def _inert(script: str) -> str:
    """A script whose strings cannot end the element that it stands in."""
    return script.replace("</script", "<\\/script").replace("<!--", "<\\!--")


def _json(value: Any) -> str:
    """JSON that no HTML can begin or end in."""
    return json.dumps(finite(value), ensure_ascii=False, allow_nan=False).replace("<", "\\u003c")


@dataclass(frozen=True, kw_only=True)
class _Cell:
    """A cell as the template takes it."""

    text: str
    value: Cell  # that it sorts by
    numeric: bool


def _shown(section: Section) -> dict[str, Any]:
    """A section as the template takes it."""
    charts = [
        {
            "name": figure.name,
            "title": figure.title,
            "about": figure.about,
            "wide": figure.chart.get("width", 0) > figures.WIDTH,
            "chart": _json({**figure.chart, "description": f"{figure.title}. {figure.about}"}),
        }
        for figure in section.figures
    ]
    return {"section": section, "tables": [_table(table) for table in section.tables], "charts": charts}


def _table(table: Table) -> dict[str, Any]:
    """A table as the template takes it; what makes a row again becomes one cell at its end."""
    columns = [column for column in table.columns if column.name not in (COMMAND, VERSIONS)]
    plain = replace(table, columns=tuple(columns))
    numeric = [is_numeric(table, column) for column in columns]
    rows = [
        {
            "cells": [
                _Cell(text=shown(row.get(c.name), c.digits), value=row.get(c.name), numeric=n)
                for c, n in zip(columns, numeric, strict=True)
            ],
            "command": row.get(COMMAND),
            "versions": row.get(VERSIONS),
        }
        for row in table.rows[:MAX_ROWS]
    ]
    return {
        "name": table.name,
        "title": table.title,
        "columns": [{"title": c.title, "numeric": n} for c, n in zip(columns, numeric, strict=True)],
        "rows": rows,
        "left_out": len(table.rows) - len(rows),
        "how": len(columns) < len(table.columns),
        "csv": _link("text/csv", as_csv(table)),
        "latex": _link("application/x-tex", as_latex(plain)),
    }


def _link(kind: str, text: str) -> str:
    return f"data:{kind};charset=utf-8;base64,{base64.b64encode(text.encode()).decode()}"
