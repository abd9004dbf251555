"""Which sources a task attends to: prompts of `attempt`, heads of `mixture`; by task and by class."""

from collections.abc import Iterator, Mapping, Sequence
from typing import ClassVar

from cache import CacheError
from pipeline import figures
from pipeline.analysis._base import Answer, Question, file_name
from pipeline.analysis._material import Material
from pipeline.analysis._matrix import matrix_figure, matrix_table, row_of, uniform_note
from pipeline.analysis._mixing import Group, Task, mixing, noting, tasks_of
from pipeline.analysis._shares import DRAWN
from pipeline.errors import PipelineError
from pipeline.findings import Cell, Column, Figure, Table

TITLE = "Attention over sources"


class Sources(Question):
    """The task x source matrix of instance attentions a_j (ATTEMPT, Figure 5), and a_j by gold class.

    Runs of `attempt` have noted a_j of their dev examples; a_j of heads of `mixture` are computed from the
    states of their bank. A mean is the mean over runs of their means over examples; runs of one task differ
    by their seeds.
    """

    paper: ClassVar[str] = "ATTEMPT, Figure 5"
    reads_tuned: ClassVar[bool] = True

    def lacks(self, material: Material) -> str:
        """Runs that mix sources."""
        if not (noting(material) or mixing(material)):
            return (
                "no run that mixes sources: name runs of 'layerbank tune --method attempt', or heads of "
                "--fusion mixture"
            )
        if material.by not in (None, "class"):
            return f"--by {material.by}: sources are mixed for whole examples, give --by class"
        return ""

    def answer(self, material: Material) -> Answer:
        """Averages the shares of every example."""
        tasks = list(tasks_of(material))
        cells = [
            cell
            for task in tasks
            for cell in row_of(task.name, [one.means for one in task.shares], examples=task.examples)
        ]
        tables, drawn = [matrix_table(cells, "sources", TITLE)], [matrix_figure(cells, "sources", TITLE)]
        notes = [uniform_note(cells), *_notes(material, tasks)]
        grouped = dict[Task, list[Group]]()
        for task in tasks:
            try:
                grouped[task] = task.by_class()
            except (PipelineError, CacheError) as error:
                notes.append(f"{task.name} is not shown by class: {error}")
        grouped = {task: groups for task, groups in grouped.items() if groups}
        if grouped:
            tables.append(_class_table(grouped))
            drawn += [_class_figure(task, groups) for task, groups in grouped.items()]
        elif material.by == "class":
            notes.append("no attention over sources by class: the targets' classes are not known")
        return Answer(tables=tuple(tables), figures=tuple(drawn), notes=tuple(notes))


def _notes(material: Material, tasks: Sequence[Task]) -> Iterator[str]:
    """What is shown otherwise than one may think, and what is not."""
    splits = sorted({task.key.split for task in tasks})
    if material.split not in ("dev", *splits):
        yield f"attention over source prompts is that of split {', '.join(splits)}: tuning notes no other"
    silent = list(dict.fromkeys(r.path for r in material.tuned if r not in noting(material)))
    if silent:
        more = f" and {len(silent) - 1} more mix" if len(silent) > 1 else " mixes"
        yield f"{silent[0]}{more} no source prompts: of runs of 'layerbank tune' only attempt is shown"


def _class_table(grouped: Mapping[Task, Sequence[Group]]) -> Table:
    """A row a class, a column a source."""
    sources = list(dict.fromkeys(source for task in grouped for source in task.sources))
    rows: list[dict[str, Cell]] = []
    for task, groups in grouped.items():
        for group in groups:
            shares = {f"source_{k}": group.shares.get(source) for k, source in enumerate(sources)}
            rows.append({"target": task.name, "class": group.name, "examples": group.examples, **shares})
    return Table(
        name="sources-by-class",
        title=f"{TITLE}, by class",
        columns=(
            Column(name="target", title="target"),
            Column(name="class", title="class"),
            Column(name="examples", title="examples"),
            *(Column(name=f"source_{k}", title=source, digits=3) for k, source in enumerate(sources)),
        ),
        rows=tuple(rows),
    )


def _class_figure(task: Task, groups: Sequence[Group]) -> Figure:
    rows = [
        {"class": group.name, "source": source, "attention": share}
        for group in groups[:DRAWN]
        for source, share in group.shares.items()
    ]
    chart = figures.heat(
        rows, x="source", y="class", value="attention", x_title="source", y_title="class",
        value_title="mean attention", digits=2, from_zero=True,
    )  # fmt: skip
    most = f" The {DRAWN} classes of the most examples; the table has all." if len(groups) > DRAWN else ""
    return Figure(
        name=file_name("sources-by-class", task.name),
        title=f"{TITLE}: {task.name}, by class",
        about=f"A grid: mean attention of each class's examples (rows) over the sources (columns).{most}",
        chart=chart,
    )


QUESTION = Sources
