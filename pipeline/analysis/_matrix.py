"""Tasks against the sources that they attend to: the table and the figure (ATTEMPT, Figure 5)."""

from collections.abc import Mapping, Sequence
from statistics import mean, stdev

from pipeline import figures
from pipeline.attentions import OWN
from pipeline.findings import Cell, Column, Figure, Table

Means = Mapping[str, float]
"""The mean share of each source, by name, of one run: they sum to 1."""


def row_of(task: str, found: Sequence[Means], *, examples: int) -> list[dict[str, Cell]]:
    """A task's row of the matrix, a cell a source: mean and spread of its runs' means.

    Args:
        task: as it is to be called.
        found: of its runs, at least one, which differ by their seeds and have the same sources.
        examples: that each mean is over.
    """
    return [
        {
            "target": task,
            "source": source,
            "attention": mean(one[source] for one in found),
            "attention_sd": stdev(one[source] for one in found) if len(found) > 1 else 0.0,
            "runs": len(found),
            "examples": examples,
        }
        for source in found[0]
    ]


def matrix_table(cells: Sequence[Mapping[str, Cell]], name: str, title: str) -> Table:
    """The cells, one a line."""
    return Table(
        name=name,
        title=title,
        columns=(
            Column(name="target", title="target"),
            Column(name="source", title="source"),
            Column(name="attention", title="attention, mean", digits=3),
            Column(name="attention_sd", title="± sd over seeds", digits=3),
            Column(name="runs", title="runs"),
            Column(name="examples", title="examples"),
        ),
        rows=tuple(cells),
    )


def matrix_figure(cells: Sequence[Mapping[str, Cell]], name: str, title: str) -> Figure:
    """The cells as a grid, the tasks' own prompts at the right."""
    chart = figures.heat(
        sorted(cells, key=lambda cell: cell["source"] == OWN), x="source", y="target", value="attention",
        x_title="source", y_title="target", value_title="mean attention", digits=2, from_zero=True,
    )  # fmt: skip
    return Figure(
        name=name,
        title=title,
        about="A grid: mean attention of each target task (rows) over the sources (columns).",
        chart=chart,
    )


def uniform_note(cells: Sequence[Mapping[str, Cell]]) -> str:
    """What a row adds up to, and what a task has that attends to all sources alike.

    >>> uniform_note([{"target": "a"}, {"target": "a"}, {"target": "b"}, {"target": "b"}])
    'attention: a row adds up to 1; a target that attends to all alike has 0.50'
    """
    rows = [cell["target"] for cell in cells]
    alike = " or ".join(f"{1 / n:.2f}" for n in sorted({rows.count(row) for row in rows}))
    return f"attention: a row adds up to 1; a target that attends to all alike has {alike}"
