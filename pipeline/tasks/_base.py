"""What a named data set is: a record of where its rows are, of their columns and of how they are scored."""

import importlib
import pkgutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import pipeline.tasks
from pipeline.errors import PipelineError, nearest

PARQUET_BRANCH = "refs/convert/parquet"
"""The Hub's branch with a parquet copy of a data set that is a script. A config is a folder there."""


@dataclass(frozen=True, kw_only=True)
class Target:
    """One column of labels."""

    kind: Literal["class", "tags", "float", "span", "choice"]

    metric: str
    """Name of the score the papers report."""

    names: tuple[str, ...] = ()
    """Names of the classes in the order of their numbers, for files that hold numbers only."""

    names_from: Literal["train", "all"] = "train"
    """The splits whose rows name the classes: ``all`` where the published test set has more than train."""

    grouped_by: tuple[str, ...] = ()
    """Columns that rows of one question have in common, where a score is that of whole questions."""

    option_texts: str | None = None
    """Column of a list of texts, one an option, by which a choice is scored beside its number."""

    missing: float | None = None
    """The number that says in a float column that a row has no label."""


@dataclass(frozen=True, kw_only=True)
class Task:
    """A data set by name. The same record reads the Hub's rows and local files of the same columns."""

    hub: str
    """Id on the Hub."""

    config: str | None = None
    """Config on the Hub; ``{config}`` stands for what the user writes after the colon."""

    example: str = ""
    """A config to show to a user who gave none."""

    revision: str = "main"

    select: str | None = None
    """A column whose value the user may ask for after the colon, to get these rows alone."""

    splits: Mapping[str, str] = field(default_factory=dict)
    """Splits of the source that go by another name here, beside validation, which is always dev."""

    renames: Mapping[str, str] = field(default_factory=dict)
    """Columns of the source that go by another name here; a column that is not there is left alone."""

    parse: Callable[[Mapping[str, Any]], Mapping[str, Any]] | None = None
    """Makes columns of a row out of `parse_from`; runs after `renames`, only if the words are missing."""

    parse_from: tuple[str, ...] = ()

    text: str | None = None
    text_pair: str | None = None
    words: str | None = None

    options: str | None = None
    """The column of the answers to choose from, a list of strings; each makes a pair with the text."""

    targets: Mapping[str, Target]
    """By column; none where the text itself is what is learned."""

    citation: str

    def __post_init__(self) -> None:
        if (self.text is None) == (self.words is None):
            raise ValueError("a task has either a text column or a words column")
        if (self.parse is None) != (not self.parse_from):
            raise ValueError("`parse` and `parse_from` come together")
        if (self.takes_config or self.select is not None) == (not self.example):
            raise ValueError("a config that the user chooses, and only that, needs an example")
        if self.options is not None and (self.text is None or self.text_pair is not None):
            raise ValueError("the options of a task are the second half of its text")

    @property
    def takes_config(self) -> bool:
        """Whether a name is followed by a config: ``massive:en-US``."""
        return self.config is not None and "{config}" in self.config

    def hub_config(self, name: str, asked: str | None) -> str | None:
        """The config on the Hub.

        Args:
            name: the task's name, for messages.
            asked: what the user wrote after the colon.

        Raises:
            PipelineError: a config is missing, or there where the task has none.
        """
        if self.config is None or not self.takes_config:
            if asked is not None and self.select is None:
                raise PipelineError(
                    f"task {name!r} has no configs, {asked!r} was asked: use {name!r} alone"
                )
            return self.config
        if not asked:
            raise PipelineError(
                f"task {name!r} needs a config, none was given: use for example {name}:{self.example}"
            )
        return self.config.format(config=asked)


def task_names() -> list[str]:
    """Names of the tasks in this folder, sorted."""
    found = (module.name for module in pkgutil.iter_modules(pipeline.tasks.__path__))
    return sorted(name for name in found if not name.startswith("_"))


def load_task(name: str) -> Task:
    """The record of a task in this folder, or of a module elsewhere by its dotted path.

    Raises:
        PipelineError: there is no such task.
    """
    if "." not in name and name not in task_names():
        raise PipelineError(f"unknown task {name!r}: {nearest(name, task_names())}")
    try:
        module = importlib.import_module(name if "." in name else f"pipeline.tasks.{name}")
    except ImportError as error:
        raise PipelineError(f"task {name!r} cannot be imported ({error}); check the dotted path") from error
    task = getattr(module, "TASK", None)
    if not isinstance(task, Task):
        raise PipelineError(f"module {name!r} has no task: end it with TASK = Task(...)")
    return task
