"""What every question is: runs, sweeps and banks in; tables and figures out."""

import re
import time
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from pipeline import parts
from pipeline.analysis._material import Material, gather, through_encoder, weightless
from pipeline.errors import PipelineError
from pipeline.findings import Figure, Findings, Table, save


@dataclass(frozen=True, kw_only=True)
class Answer:
    """What came out of one question."""

    tables: tuple[Table, ...] = ()
    figures: tuple[Figure, ...] = ()
    notes: tuple[str, ...] = ()


class Question(ABC):
    """One question about layers (``--what``)."""

    paper: ClassVar[str] = ""
    """What it reproduces; empty where it is of no paper."""

    reads_tuned: ClassVar[bool] = False
    """Whether it can be answered of runs of `layerbank tune`."""

    @abstractmethod
    def lacks(self, material: Material) -> str:
        """What is missing to answer it, and what to name instead; empty if nothing is."""

    @abstractmethod
    def answer(self, material: Material) -> Answer:
        """Does the work.

        Raises:
            PipelineError: the material does not belong together.
            CacheError: a bank is damaged.
        """


def analyze(paths: Sequence[str], *, out: str, what: Sequence[str] = (), **choices: Any) -> dict[str, Any]:
    """Answers questions and writes the findings.

    Args:
        paths: runs, sweeps and banks.
        out: folder for the findings.
        what: the questions; all that can be answered by default.
        choices: how to look, see `Material`.

    Returns:
        `out`, `name`, `title`, `what`, `seconds`, `notes`, `tables`, `files`.

    Raises:
        PipelineError: a question cannot be answered, or none.
        CacheError: a bank is not complete, or damaged.
    """
    began = time.perf_counter()
    for name in what:
        parts.load("question", name)
    material = gather(paths, **choices)
    names = what or parts.names("question")
    asked: dict[str, Question] = {name: parts.load("question", name)() for name in names}
    lacking = {name: lack for name, one in asked.items() if (lack := _lack(one, material))}
    if what and lacking:
        name, lack = next(iter(lacking.items()))
        raise PipelineError(f"--what {name}: {lack}")
    asked = {name: one for name, one in asked.items() if name not in lacking}
    if not asked:
        raise PipelineError(f"nothing to analyze: {'; '.join(dict.fromkeys(lacking.values()))}")
    answers = []
    for name, one in asked.items():
        material.note(name)
        answers.append(one.answer(material))
    notes = [note for answer in answers for note in answer.notes]
    if not what and (lack := weightless([r for r in material.records if r.method != "single_layer"])):
        notes.append(lack)
    if not any(one.reads_tuned for one in asked.values()):
        notes += [lack] if (lack := through_encoder(material.tuned)) else []
    findings = Findings(
        kind="analysis",
        name="analysis",
        title=f"Analysis: {', '.join(asked)}",
        paper="; ".join(dict.fromkeys(one.paper for one in asked.values() if one.paper)),
        asked={"of": list(paths), "what": list(asked), "split": material.split},
        seconds=time.perf_counter() - began,
        notes=tuple(dict.fromkeys(notes)),
        tables=tuple(table for answer in answers for table in answer.tables),
        figures=tuple(figure for answer in answers for figure in answer.figures),
    )
    return {**save(findings, out), "what": list(asked)}


def _lack(question: Question, material: Material) -> str:
    """What is missing to answer a question; empty if nothing is."""
    only_tuned = not (material.records or material.sweeps or material.named_banks)
    if material.tuned and only_tuned and not question.reads_tuned:
        return through_encoder(material.tuned)
    return question.lacks(material)


def file_name(*names: str) -> str:
    """A name for files, of names that may hold anything.

    >>> file_name("by class", "a/b")
    'by-class-a-b'
    """
    return re.sub(r"[^\w.=-]+", "-", "-".join(name for name in names if name)).strip("-")
