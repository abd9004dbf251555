"""Searches a sweep's axes by trial: Optuna proposes settings, they are trained as stacks, it learns.

Optuna (extra ``search``) is asked for a whole round of trials at once, because a round of heads costs
little more than the read of the bank; the sampler is told which trials are still open.
"""

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import mean
from typing import Any

from pipeline import metrics
from pipeline.errors import PipelineError
from pipeline.grid import Grid, Range, Shape, Stack
from pipeline.job import HeadRates, check_seed

Row = dict[str, Any]
Point = tuple[Shape, HeadRates]


@dataclass(frozen=True, kw_only=True)
class Trials:
    """How a search goes on."""

    n: int  # settings to try of each target, every one with all seeds
    round: int = 16  # settings asked for at once
    seed: int = 0  # of the sampler

    def __post_init__(self) -> None:
        """Checks the ranges."""
        for flag, value in (("--trials", self.n), ("--round", self.round)):
            if value < 1:
                raise PipelineError(f"{flag} {value}: give 1 or more")
        check_seed("--search-seed", self.seed)


def search(
    trials: Trials,
    grid: Grid,
    shapes: Sequence[Shape],
    metric_of: Mapping[str, str],
    rows_of: Callable[[Sequence[Stack]], list[Row]],
    note: Callable[[str], None] = lambda _: None,
) -> list[Row]:
    """Tries settings of a grid, those that promise most after a first random round.

    A trial's value is the mean dev score of its seeds. The proposals are a function of the seed and the
    scores, so a search that was killed asks the same again and finds what is finished on disk.

    Args:
        trials: how many, and how many at once.
        grid: the axes; a range is drawn from, on a logarithmic scale where it is above 0.
        shapes: of the grid's heads.
        metric_of: the metric of each target.
        rows_of: trains stacks, gives a row for each head.
        note: takes a line of text for the user.

    Raises:
        PipelineError: Optuna is not installed.
    """
    studies = {target: _Study(trials, grid, target, shapes, metric_of[target]) for target in grid.targets}
    found: dict[Point, Row] = {}
    for first in range(0, trials.n, trials.round):
        count = min(trials.round, trials.n - first)
        asked = {target: [study.ask() for _ in range(count)] for target, study in studies.items()}
        stacks = _stacks([p for points in asked.values() for each in points for p in each], found)
        note(f"trials {first + 1} to {first + count} of {trials.n}: {len(stacks)} stacks")
        rows = rows_of(stacks) if stacks else []
        points = [(stack.shape, rates) for stack in stacks for rates in stack.rates]
        found |= dict(zip(points, rows, strict=True))
        for target, study in studies.items():
            study.tell([[found[point] for point in each] for each in asked[target]])
    return list(found.values())


def _stacks(points: Sequence[Point], known: Mapping[Point, Row]) -> list[Stack]:
    """The points that are not known yet, as stacks."""
    by_shape: dict[Shape, list[HeadRates]] = {}
    for shape, rates in dict.fromkeys(points):
        if (shape, rates) not in known:
            by_shape.setdefault(shape, []).append(rates)
    return [Stack(shape=shape, rates=tuple(rates)) for shape, rates in by_shape.items()]


class _Study:
    """The search for one target."""

    def __init__(
        self, trials: Trials, grid: Grid, target: str, shapes: Sequence[Shape], metric: str
    ) -> None:
        optuna = _optuna()
        self._fail = optuna.trial.TrialState.FAIL
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
            sampler = optuna.samplers.TPESampler(
                seed=trials.seed, constant_liar=True, n_startup_trials=trials.round
            )
        self._study = optuna.create_study(direction="maximize", sampler=sampler)
        self._grid = grid
        self._shapes = {shape.name: shape for shape in shapes if shape.target == target}
        self._sign = 1.0 if metrics.higher_is_better(metric) else -1.0
        self._open: list[Any] = []

    def ask(self) -> list[Point]:
        """The heads of one more trial, one for each seed."""
        trial = self._study.ask()
        self._open.append(trial)
        shape = self._shapes[trial.suggest_categorical("shape", list(self._shapes))]
        rates = HeadRates(
            lr=_pick(trial, "lr", self._grid.lr),
            weight_decay=_pick(trial, "weight_decay", self._grid.weight_decay),
            dropout=_pick(trial, "dropout", self._grid.dropout),
        )
        return [(shape, replace(rates, seed=seed)) for seed in self._grid.seed_range]

    def tell(self, rows: Sequence[Sequence[Row]]) -> None:
        """The rows of every open trial's heads, in the order in which the trials were asked."""
        for trial, heads in zip(self._open, rows, strict=True):
            scores = [row["dev"] for row in heads if row["dev"] is not None]
            if scores:
                self._study.tell(trial, self._sign * mean(scores))
            else:
                self._study.tell(trial, state=self._fail)
        self._open = []


def _pick(trial: Any, name: str, axis: Sequence[Any] | Range) -> Any:
    if isinstance(axis, Range):
        return trial.suggest_float(name, axis.low, axis.high, log=axis.low > 0)
    return trial.suggest_categorical(name, list(axis))


def _optuna() -> Any:
    try:
        import optuna
    except ModuleNotFoundError as error:
        raise PipelineError("--trials needs Optuna: pip install 'layerbank[search]'") from error
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    return optuna


def extremes(grid: Grid, shapes: Sequence[Shape]) -> list[Stack]:
    """A stack of every shape with the ends of every axis, to be checked before the search begins."""
    axes = {"lr": grid.lr, "weight_decay": grid.weight_decay, "dropout": grid.dropout}
    ends: dict[str, list[Any]] = {
        n: [a.low, a.high] if isinstance(a, Range) else list(a) for n, a in axes.items()
    }
    longest = max(len(values) for values in ends.values())
    rates = [
        HeadRates(**{name: values[min(k, len(values) - 1)] for name, values in ends.items()})
        for k in range(longest)
    ]
    return [Stack(shape=shape, rates=tuple(rates)) for shape in shapes]
