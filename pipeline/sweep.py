"""Sweeps: a grid or a search of heads, trained as stacks, with their rows and best heads in one folder.

A finished stack is kept on disk and one in training has checkpoints, so a sweep that was killed goes on
where it was.
"""

import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet

from cache import Bank, JoinedBank
from pipeline import metrics, search
from pipeline.errors import PipelineError, said_by
from pipeline.folders import HEADS
from pipeline.grid import Grid, Stack
from pipeline.results import RESULT, Source, check_free_sweep, finite, save_run, write_whole
from pipeline.runner import STACKS, Note, Outcome, Plan, Runner, Train
from pipeline.train import Progress

RESULTS = "results.parquet"


def sweep(
    plan: Plan,
    grid: Grid,
    *,
    out: str,
    trials: search.Trials | None = None,
    spread: Callable[[Runner], Train] | None = None,
    keep_heads: bool = True,
    note: Note = lambda _: None,
    progress: Progress = lambda *_: None,
    finished: Callable[[Outcome], None] = lambda _: None,
) -> dict[str, Any]:
    """Trains every head of a grid, or those that a search picks from it.

    Args:
        plan: the bank, and what all stacks share; its schedule's batch size is the grid's.
        grid: the axes.
        out: folder of the sweep; one that was cut off is continued, if all that was asked is the same.
        trials: how to search the grid; None trains all of it.
        spread: how the stacks are trained elsewhere, see `pipeline.spread_stacks`; in this process by
            default.
        keep_heads: whether the best head of each shape is left as a run folder.
        note: takes a line of text for the user.
        progress: called after every epoch of the stacks that train together.
        finished: called with every stack that is done, but for those that were before.

    Returns:
        `run`, `heads`, `results`, `seconds`, `best` (the row of the best head of each target), `rows`.

    Raises:
        PipelineError: a choice does not fit, or the folder holds another sweep.
        CacheError: the bank is not there or damaged.
    """
    began = time.perf_counter()
    folder = Path(out)
    runner = Runner(plan, checkpoints=folder / STACKS, note=note, progress=progress)
    shapes = grid.shapes(runner.bank, plan.splits["train"])
    stacks = search.extremes(grid, shapes) if trials else grid.stacks(shapes)
    metric_of = {stack.shape.target: runner.check(stack).metric for stack in stacks}
    source = Source.of(runner.bank, plan.splits)
    check_free_sweep(out, _asked(plan, grid, trials, runner.bank), store=source.store)
    train = runner.train if spread is None else spread(runner)
    keeper = _Keeper(runner, folder, train, keep_heads, finished)
    if trials:
        rows = search.search(trials, grid, shapes, metric_of, keeper.rows, note)
    else:
        note(f"{sum(len(stack.rates) for stack in stacks)} heads in {len(stacks)} stacks")
        rows = keeper.rows(stacks)
    _write_table(rows, folder / RESULTS)
    return {
        "run": out,
        "heads": len(rows),
        "results": str(folder / RESULTS),
        "seconds": time.perf_counter() - began,
        "best": best_rows(rows),
        "rows": rows,
    }


def is_begun(out: str) -> bool:
    """Whether a sweep of that folder has a stack that is done."""
    return any((Path(out) / STACKS).glob("*.json"))


def _asked(plan: Plan, grid: Grid, trials: search.Trials | None, bank: Bank) -> dict[str, Any]:
    """All that decides the results, as JSON gives it back."""
    asked: dict[str, Any] = {
        "grid": asdict(grid),
        "schedule": asdict(plan.schedule),
        "bank": bank.fingerprint,
        "metric": plan.metric,
        "splits": dict(plan.splits),
        "search": None if trials is None else asdict(trials),
    }
    if isinstance(bank, JoinedBank):
        asked["train_on"] = bank.made_of
    if plan.depth is not None:
        asked["depth"] = plan.depth
    return dict(json.loads(json.dumps(asked)))


@dataclass(frozen=True)
class _Keeper:
    """Leaves the rows and the best head of every stack in the sweep's folder."""

    runner: Runner
    folder: Path
    train: Train
    keep_heads: bool
    finished: Callable[[Outcome], None]

    def rows(self, stacks: Sequence[Stack]) -> list[dict[str, Any]]:
        """The rows of the stacks' heads, from disk where they are finished."""
        lots = [self.runner.fitting(stack) for stack in stacks]
        todo = [piece for lot in lots for piece in self._todo(lot)]
        for outcome in self.train(todo) if todo else ():
            if not self._file(outcome.stack).exists():
                self._keep(outcome)
            lot = next(lot for lot in lots if outcome.stack in lot)
            if all(self._file(piece).exists() for piece in lot):
                for piece in lot:
                    self.runner.forget(piece)
        return [row for lot in lots for piece in lot for row in self._read(piece)]

    def _todo(self, lot: Sequence[Stack]) -> Sequence[Stack]:
        """The pieces of a stack that are not finished; with rungs all, as they are ranked together."""
        missing = [piece for piece in lot if not self._file(piece).exists()]
        return lot if missing and self.runner.plan.schedule.rungs else missing

    def _file(self, stack: Stack) -> Path:
        return self.folder / STACKS / f"{stack.digest}.json"

    def _read(self, stack: Stack) -> list[dict[str, Any]]:
        path = self._file(stack)
        try:
            return list(json.loads(path.read_text(encoding="utf-8")))
        except (OSError, ValueError) as error:
            raise PipelineError(f"{path} is damaged: remove it and run the same sweep again") from error

    def _keep(self, outcome: Outcome) -> None:
        shared = _shared(self.runner.plan)
        rows = [_row(outcome, k) | shared for k in range(len(outcome.trained))]
        if self.keep_heads:
            self._keep_best(outcome)
        self.finished(outcome)
        write_whole(self._file(outcome.stack), json.dumps([finite(row) for row in rows]))

    def _keep_best(self, outcome: Outcome) -> None:
        """Leaves the best head of a shape as a run folder, if no stack of that shape had a better one."""
        sign = 1.0 if metrics.higher_is_better(outcome.goal.metric) else -1.0
        whole = [k for k, one in enumerate(outcome.trained) if one.status == "ok"]
        if not whole:
            return
        best = max(whole, key=lambda k: sign * outcome.trained[k].dev)
        folder = self.folder / HEADS / outcome.stack.shape.name
        known = _dev_of(folder)
        if known is not None and sign * known >= sign * outcome.trained[best].dev:
            return
        plan = self.runner.plan
        save_run(
            str(folder),
            outcome.trained[best],
            job=outcome.goal,
            bank=self.runner.bank,
            rates=outcome.stack.rates[best],
            schedule=replace(plan.schedule, batch_size=outcome.stack.shape.batch_size),
            splits={role: plan.splits[role] for role in ("train", "dev")},
            seconds=outcome.trained[best].seconds,
        )


def _dev_of(folder: Path) -> float | None:
    """The dev score of a run folder that is there and whole."""
    try:
        found = json.loads((folder / RESULT).read_text(encoding="utf-8"))["dev"]
        return None if found is None else float(found)
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _write_table(rows: Sequence[Mapping[str, Any]], path: Path) -> None:
    columns = dict.fromkeys(name for row in rows for name in row)  # targets of other kinds have others
    table = pa.Table.from_pylist([{name: row.get(name) for name in columns} for row in rows])
    partial = path.with_name(f"{path.name}.partial")
    try:
        pyarrow.parquet.write_table(table, partial)
        partial.replace(path)
    except OSError as error:
        raise PipelineError(f"{path} cannot be written: {said_by(error)}") from error


def best_rows(rows: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """The row of the best head of each target, by its dev score."""
    best: dict[str, dict[str, Any]] = {}
    for row in rows:
        sign = 1.0 if metrics.higher_is_better(row["metric"]) else -1.0
        found = best.get(row["target"])
        better = row["status"] == "ok" and (found is None or sign * row["dev"] > sign * found["dev"])
        if better:
            best[row["target"]] = dict(row)
    return best


def _shared(plan: Plan) -> dict[str, Any]:
    """What decides every head of a sweep alike; `epochs` of a row are those that the head took."""
    asked = asdict(plan.schedule)
    del asked["batch_size"]  # an axis of the grid
    listed = {name: ",".join(map(str, asked.pop(name))) or None for name in ("rungs", "dev_epochs")}
    splits = {f"{role}_split": name for role, name in plan.splits.items()}
    return {"epochs_asked": asked.pop("epochs"), **asked, **listed, **splits, "depth": plan.depth}


def _row(outcome: Outcome, k: int) -> dict[str, Any]:
    """Its own flags, scores and costs of one head."""
    stack, goal, trained = outcome.stack, outcome.goal, outcome.trained[k]
    shape, test = stack.shape, outcome.test[k]
    parameters, fusion_parameters = trained.head.n_parameters()
    best = trained.epochs[trained.best_epoch - 1].dev if trained.best_epoch else {}
    history = [{"epoch": e.epoch, "loss": e.loss, "dev": e.dev.get(goal.metric)} for e in trained.epochs]
    return {
        "target": shape.target,
        "fusion": shape.fusion,
        "decoder": goal.spec.decoder,
        "options": json.dumps(dict(shape.options), sort_keys=True),
        "batch_size": shape.batch_size,
        **asdict(stack.rates[k]),
        "metric": goal.metric,
        "dev": trained.dev,
        "test": test.get(goal.metric),
        **{f"dev_{name}": value for name, value in best.items()},
        **{f"test_{name}": value for name, value in test.items()},
        "best_epoch": trained.best_epoch,
        "epochs": len(trained.epochs),
        "history": json.dumps(finite(history)),
        "parameters": parameters,
        "fusion_parameters": fusion_parameters,
        "seconds": trained.seconds,
        "status": trained.status,
    }
