"""What the experiments on transferred prompts share: sources, their prompts, and runs from them."""

import shutil
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from pipeline.errors import PipelineError
from pipeline.experiments._base import Data, Experiment, Lab, digest
from pipeline.findings import Findings
from pipeline.results import RESULT, read_json
from pipeline.tuning.prompts import FILE

Task = tuple[Data, str]
"""A data set and one of its targets."""

ABLATIONS: Mapping[str, Mapping[str, str]] = {
    "attempt": {},
    "no target": {"target": "false"},
    "no attention": {"attention": "false"},
    "single prompt": {"single": ""},
    "no prior transfer": {"transfer": "false"},
}
"""The rows of ATTEMPT's Table 4, and the options that make them; the single prompt has yet to be named."""


@dataclass(kw_only=True)
class FromSources(Experiment):
    """An experiment whose first data are source tasks and whose other data are targets.

    Each source gets a prompt.

    Args:
        sources: how many of the data are sources.
        length: soft tokens of a prompt.
        epochs: on a target.
        source_epochs: on a source.
        seeds: runs of each method on each target.
        batch_size: examples of a step.
        runs: folder of runs, shared with other experiments that are given it; OUT/runs if not given.
    """

    sources: int = 0
    length: int = 20
    epochs: int = 10
    source_epochs: int = 10
    seeds: int = 3
    batch_size: int = 32
    runs: str | None = None

    def __post_init__(self) -> None:
        for name in ("length", "epochs", "source_epochs", "seeds"):
            if getattr(self, name) < 1:
                raise PipelineError(f"--set {name}={getattr(self, name)}: give 1 or more")

    @abstractmethod
    def run(self, lab: Lab) -> Findings:
        """Does all the work."""

    def bench(self, lab: Lab, *, needed: bool = True) -> "Bench":
        """The runs of this experiment in a lab.

        Args:
            lab: what it works with.
            needed: whether there have to be sources.

        Raises:
            PipelineError: there are no sources or no targets among the data, or two of one name.
        """
        if not (1 if needed else 0) <= self.sources < len(lab.data):
            raise PipelineError(
                f"--set sources={self.sources}: {len(lab.data)} data given, name the source tasks first, "
                "then the targets, and say how many are sources by --set sources=N"
            )
        lab.check_text(*lab.data)
        return Bench(
            lab=replace(lab, runs=Path(self.runs)) if self.runs else lab,
            sources=_named(lab.data[: self.sources]),
            targets=_named(lab.data[self.sources :]),
            length=self.length,
            source_plan={"epochs": self.source_epochs, "batch_size": self.batch_size},
            plan={"epochs": self.epochs, "batch_size": self.batch_size},
        )


@dataclass(frozen=True)
class Bench:
    """Source tasks, targets, and runs on them."""

    lab: Lab
    sources: Mapping[str, Task]
    targets: Mapping[str, Task]
    length: int  # of a prompt, in tokens
    source_plan: Mapping[str, Any]
    plan: Mapping[str, Any]

    @cached_property
    def prompts(self) -> dict[str, Path]:
        """A run of prompt tuning for each source."""
        return {
            name: self._prompt_tuning(f"source-{name}", [task], self.source_plan)
            for name, task in self.sources.items()
        }

    @cached_property
    def mixed_prompt(self) -> Path:
        """The run of one prompt on all sources together, which a generic SPoT starts from."""
        return self._prompt_tuning("source-mixture", list(self.sources.values()), self.source_plan)

    def _prompt_tuning(self, name: str, tasks: Sequence[Task], plan: Mapping[str, Any]) -> Path:
        options = {"length": self.length}
        return self.lab.tune(name, "prompt_tuning", tasks, plan=plan, options=options)

    def run(self, method: str, target: str, seed: int) -> Path:
        """A run of any method on one target.

        `spot` starts from the prompt of all sources, `spot-targeted` from those of the sources that are
        most like the target's own.
        """
        plan, task = {**self.plan, "seed": seed}, self.targets[target]
        name = f"{target}-{method}-{seed}"
        if method == "prompt_tuning":
            return self._prompt_tuning(name, [task], plan)
        if method == "attempt":
            return self.attempt([target], seed)
        choices: dict[str, Any] = {}
        if method == "spot":
            choices = {"prompts": self._folder({"mixture": self.mixed_prompt})}
        elif method == "spot-targeted":
            own = {"the target": self.run("prompt_tuning", target, seed)}
            choices = {"prompts": self._folder({**self.prompts, **own})}
            choices["options"] = {"mode": "targeted", "like": "the target"}
        return self.lab.tune(name, method.partition("-")[0], [task], plan=plan, **choices)

    def attempt(self, targets: Sequence[str], seed: int, **options: str) -> Path:
        """ATTEMPT on one target, or on several in mixed batches."""
        name = f"{'+'.join(targets)}-attempt-{seed}"
        return self.lab.tune(
            name,
            "attempt",
            [self.targets[target] for target in targets],
            plan={**self.plan, "seed": seed},
            prompts=self._folder(self.prompts),
            options=options,
        )

    def _folder(self, runs: Mapping[str, Path]) -> str:
        """A folder with the prompts of some runs, named by what is in it."""
        folder = (
            (self.lab.runs or self.lab.out)
            / "prompts"
            / digest({name: run.name for name, run in runs.items()})
        )
        folder.mkdir(parents=True, exist_ok=True)
        for name, run in runs.items():
            shutil.copyfile(run / FILE, folder / f"{name}.safetensors")
        return str(folder)


def score_of(run: Path, task: Task | None = None) -> float:
    """The dev score of a run; of one of its tasks if it learned several."""
    result = read_json(run / RESULT)
    if task is None:
        return float(result["dev"])
    name = _recorded(task)
    return float(result["dev_metrics"][f"{name}.{result['tasks'][name]}"])


def facts_of(run: Path, task: Task | None = None) -> dict[str, Any]:
    """Metric and number of parameters, without those of the head and by task; of one of several tasks."""
    result = read_json(run / RESULT)
    tasks = result["tasks"]
    return {
        "metric": next(iter(tasks.values())) if task is None else tasks[_recorded(task)],
        "parameters": round(result["method_parameters"] / len(tasks)),
    }


def _recorded(task: Task) -> str:
    """The name of a task in a run folder."""
    return f"{Path(task[0].path.rstrip('/')).name}.{task[1]}"


def mean_sd(scores: Sequence[float]) -> dict[str, float]:
    """Mean and spread of the seeds' dev scores."""
    return {"dev": mean(scores), "dev_sd": stdev(scores) if len(scores) > 1 else 0.0}


def _named(data: Sequence[Data]) -> dict[str, Task]:
    """A name for every target of some data; the data's alone where it has one target."""
    found: dict[str, Task] = {}
    for one in data:
        for target in one.targets:
            name = one.name if len(one.targets) == 1 else f"{one.name}.{target}"
            if name in found:
                raise PipelineError(f"two data are called {name}: give their folders other names")
            found[name] = (one, target)
    return found
