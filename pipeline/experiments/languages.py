"""One target over many languages, grouped by how much data there is of each."""

import time
from collections.abc import Sequence
from typing import Any, ClassVar

from pipeline import figures
from pipeline.errors import PipelineError, nearest
from pipeline.experiments._base import Experiment, Lab
from pipeline.experiments._languages import check_languages, open_banks, summary, sweep_on
from pipeline.experiments._tables import Row, average, groups, known, words
from pipeline.findings import Column, Figure, Findings, Table
from pipeline.grid import Grid


class Languages(Experiment):
    """Fusions × languages, and how far each fusion is above a base by group (DWAtt paper, Figures 7, 9).

    Args:
        fusions: late fusions, with commas between.
        base: the fusion that others are compared with, one of them.
        groups: languages by resource, as in ``high:en-US,de-DE;low:sw-KE``; one group of all by default.
        seeds: heads of each.
        epochs: of each head.
        lr: learning rate.
    """

    title: ClassVar[str] = "Late fusions over languages"
    paper: ClassVar[str] = "DWAtt, Figures 7 and 9"

    def __init__(
        self,
        *,
        fusions: str = "last_layer,linear,concat,attention",
        base: str = "last_layer",
        groups: str = "",
        seeds: int = 3,
        epochs: int = 10,
        lr: float = 2e-3,
    ) -> None:
        self.fusions, self.base, self.groups = words(fusions), base, groups
        self.seeds, self.epochs, self.lr = seeds, epochs, lr
        if base not in self.fusions:
            raise PipelineError(f"--set base={base}: name one of the fusions, {fusions}")

    def run(self, lab: Lab) -> Findings:
        """One sweep a language."""
        began = time.perf_counter()
        check_languages(lab.data, least=2)
        group_of = _groups(self.groups, [data.name for data in lab.data])
        ordered = sorted(lab.data, key=lambda data: list(group_of).index(data.name))
        stores = open_banks(lab)
        rows: list[dict[str, Any]] = []
        for data in ordered:
            grid = Grid(targets=data.targets, fusions=self.fusions, lr=(self.lr,), seeds=self.seeds)
            shared = {"language": data.name, "group": group_of[data.name]}
            rows += sweep_on(lab, data.name, stores[data.name], grid, self.epochs, shared)
        lines = self._with_gain(summary(rows, "target", "group", "language", "fusion"))
        gains = [_group_line(some) for some in groups(lines, "target", "group", "fusion")]
        return Findings(
            kind="experiment",
            name="languages",
            title=self.title,
            paper=self.paper,
            asked={name: getattr(self, name) for name in
                   ("fusions", "base", "groups", "seeds", "epochs", "lr")},
            seconds=time.perf_counter() - began,
            notes=tuple(_note(gain, self.base) for gain in gains if gain["fusion"] != self.base),
            tables=(
                Table(name="scores", title=self.title, columns=_SCORES, rows=tuple(lines)),
                Table(name="groups", title="By group", columns=_GAINS, rows=tuple(gains)),
            ),
            figures=tuple(_figures(lines, gains, self.base)),
        )  # fmt: skip

    def _with_gain(self, lines: Sequence[Row]) -> list[dict[str, Any]]:
        """The lines, each with how far it is above the base on the same target and language."""
        base = {(line["target"], line["language"]): line["dev"]
                for line in lines if line["fusion"] == self.base}  # fmt: skip
        found = []
        for line in lines:
            own, other = line["dev"], base[line["target"], line["language"]]
            found.append({**line, "gain": None if own is None or other is None else own - other})
        return found


def _group_line(lines: Sequence[Row]) -> dict[str, Any]:
    """One fusion in one group: means over its languages."""
    kept = {name: lines[0][name] for name in ("target", "group", "fusion", "metric")}
    means = {name: average(known(lines, name)) for name in ("dev", "gain")}
    return {**kept, "languages": len(lines), **means}


def _groups(given: str, languages: Sequence[str]) -> dict[str, str]:
    """The group of each language, the languages of a group side by side.

    Raises:
        PipelineError: a language is in no group or has no data, or the option cannot be read.
    """
    if not given:
        return dict.fromkeys(languages, "all")
    found: dict[str, str] = {}
    for part in given.split(";"):
        group, colon, members = part.partition(":")
        if not (colon and group.strip() and words(members)):
            raise PipelineError(f"--set groups={given}: give GROUP:LANGUAGE,LANGUAGE;GROUP:LANGUAGE")
        found.update(dict.fromkeys(words(members), group.strip()))
    for name in found:
        if name not in languages:
            raise PipelineError(f"--set groups: no data set is called {name!r}; {nearest(name, languages)}")
    for name in languages:
        if name not in found:
            raise PipelineError(f"--set groups={given}: {name} is in no group, name it in one")
    return found


_SCORES = (
    Column(name="target", title="target"),
    Column(name="group", title="group"),
    Column(name="language", title="language"),
    Column(name="fusion", title="fusion"),
    Column(name="metric", title="metric"),
    Column(name="dev", title="dev, mean", digits=2),
    Column(name="dev_sd", title="± sd", digits=2),
    Column(name="gain", title="above the base", digits=2),
    Column(name="test", title="test, mean", digits=2),
    Column(name="test_sd", title="± sd", digits=2),
)
_GAINS = (
    Column(name="target", title="target"),
    Column(name="group", title="group"),
    Column(name="languages", title="languages"),
    Column(name="fusion", title="fusion"),
    Column(name="metric", title="metric"),
    Column(name="dev", title="dev, mean", digits=2),
    Column(name="gain", title="above the base, mean", digits=2),
)


def _figures(lines: Sequence[Row], gains: Sequence[Row], base: str) -> list[Figure]:
    """For each target a bar a language and fusion, and the gain over the base by group."""
    found = []
    for some in groups(lines, "target"):
        target = some[0]["target"]
        chart = figures.bars(
            some, x="language", y="dev", series="fusion", x_title="", y_title="dev score, %"
        )
        about = f"Bars: dev score on {target} by language and fusion, languages of a group side by side."
        found.append(
            Figure(name=f"scores-{target}", title=f"{target} by language", about=about, chart=chart)
        )
        # The base too, so that a fusion has one colour in both figures.
        above = [g for g in gains if g["target"] == target and g["gain"] is not None]
        if any(g["fusion"] != base for g in above):
            chart = figures.bars(
                above, x="group", y="gain", series="fusion", x_title="", y_title=f"dev score above {base}"
            )
            about = f"Bars: dev score on {target} above {base}, mean over the languages of each group."
            found.append(Figure(name=f"gain-{target}", title=f"{target}: gain over {base}", about=about,
                                chart=chart))  # fmt: skip
    return found


def _note(gain: Row, base: str) -> str:
    count = f"{gain['languages']} language{'s' if gain['languages'] > 1 else ''}"
    where = f"{gain['target']}, {gain['group']} ({count})"
    if gain["gain"] is None:
        return f"{where}: no score of {gain['fusion']} or of {base}"
    way = "above" if gain["gain"] >= 0 else "below"
    return f"{where}: {gain['fusion']} is {abs(gain['gain']):.2f} {way} {base} on average"


EXPERIMENT = Languages
