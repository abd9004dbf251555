"""Runs as TensorBoard and MLflow show them: curves, settings, scores; a sweep's heads as child runs.

Behind the progress callbacks of `train` and `tune`, and what a sweep tells of a stack that is done. Neither
package is imported before it is asked for. Writes beside the run, ``tensorboard/NAME`` and ``mlflow.db`` in
the folder that the run is in, so that runs side by side are seen together. MLflow takes another place from
MLFLOW_TRACKING_URI.

A run begins with its first value: a command that is refused leaves the curves of an older run of that name
as they are.
"""

import logging
import math
import os
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from cache.store import one_line
from pipeline.errors import PipelineError
from pipeline.records import read_records
from pipeline.runner import Outcome

Tool = Literal["tensorboard", "mlflow"]
EXPERIMENT = "layerbank"
"""MLflow's name for what all runs belong to."""


class Log(ABC):
    """One run as a tracker has it."""

    @abstractmethod
    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Takes the values of an epoch."""

    @abstractmethod
    def settings(self, values: Mapping[str, Any], scores: Mapping[str, float]) -> None:
        """Takes what was asked, and what came out in the end."""

    @abstractmethod
    def child(self, name: str) -> "Log":
        """A run below this one."""

    @abstractmethod
    def close(self) -> None:
        """Marks the run as finished."""


class _Nothing(Log):
    """Where nothing is tracked."""

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        pass

    def settings(self, values: Mapping[str, Any], scores: Mapping[str, float]) -> None:
        pass

    def child(self, name: str) -> Log:
        return self

    def close(self) -> None:
        pass


class _Guarded(Log):
    """A tracker that may fail: what it follows goes on without it, and the user is told once.

    Args:
        log: of the tracker.
        note: takes a line of text for the user.
        top: the run above, which is lost with this one.
    """

    def __init__(self, log: Log, note: Callable[[str], None], top: "_Guarded | None" = None) -> None:
        self._log, self._note, self._top = log, note, top or self
        self._lost = False

    def _tell(self, act: Callable[[Log], Any]) -> Any:
        if self._top._lost:
            return None
        try:
            return act(self._log)
        except Exception as error:  # whatever a tracker, its data base or the network raises
            self._top._lost = True
            self._note(f"--track: {one_line(error)}: this goes on without the tracker")
            return None

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        self._tell(lambda log: log.scalars(step, values))

    def settings(self, values: Mapping[str, Any], scores: Mapping[str, float]) -> None:
        self._tell(lambda log: log.settings(values, scores))

    def child(self, name: str) -> Log:
        child = self._tell(lambda log: log.child(name))
        return _Nothing() if child is None else _Guarded(child, self._note, self._top)

    def close(self) -> None:
        self._tell(lambda log: log.close())


class _TensorBoard(Log):
    """A folder of event files; a child is a folder in it."""

    def __init__(self, folder: Path, *, goes_on: bool = False) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._folder, self._goes_on, self._open = folder, goes_on, SummaryWriter

    @cached_property
    def _writer(self) -> Any:
        if not self._goes_on:
            _remove_events(self._folder)
        return self._open(str(self._folder))

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)
        self._writer.flush()  # seen at once, and there if the run is killed

    def settings(self, values: Mapping[str, Any], scores: Mapping[str, float]) -> None:
        plain = {n: v if isinstance(v, bool | int | float | str) else str(v) for n, v in values.items()}
        self._writer.add_hparams(plain, {f"best/{n}": v for n, v in scores.items()}, run_name=".")

    def child(self, name: str) -> Log:
        _ = self._writer  # before the child's files, which belong to a run that begins here
        return _TensorBoard(self._folder / name)

    def close(self) -> None:
        if "_writer" in vars(self):
            self._writer.close()


def _remove_events(folder: Path) -> None:
    """Removes the curves of an older run of this name and of its children, and no other file."""
    for file in folder.rglob("events.out.tfevents.*"):
        file.unlink()


class _MLflow(Log):
    """A run of MLflow; a child is a nested run."""

    def __init__(self, client: Any, name: str, tags: Mapping[str, str], *, goes_on: bool = False) -> None:
        self._client, self._name, self._tags, self._goes_on = client, name, dict(tags), goes_on

    @cached_property
    def _id(self) -> str:
        known = self._client.get_experiment_by_name(EXPERIMENT)
        experiment = known.experiment_id if known else self._client.create_experiment(EXPERIMENT)
        run = self._unfinished(experiment) if self._goes_on else None
        run = run or self._client.create_run(experiment, run_name=self._name, tags=self._tags)
        return str(run.info.run_id)

    def _unfinished(self, experiment: str) -> Any:
        """The newest run of the same folder that did not finish; None if there is none."""
        asked = [f"tags.`{tag}` = '{_quoted(value)}'" for tag, value in self._tags.items()]
        asked += [f"attributes.run_name = '{_quoted(self._name)}'", "attributes.status != 'FINISHED'"]
        found = self._client.search_runs(
            [experiment],
            filter_string=" and ".join(asked),
            max_results=1,
            order_by=["attributes.start_time DESC"],
        )
        return found[0] if found else None

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            self._client.log_metric(self._id, name, value, step=step)

    def settings(self, values: Mapping[str, Any], scores: Mapping[str, float]) -> None:
        for name, value in values.items():
            self._client.log_param(self._id, name, value)
        for name, value in scores.items():
            self._client.log_metric(self._id, f"best/{name}", value)

    def child(self, name: str) -> Log:
        return _MLflow(self._client, name, {"mlflow.parentRunId": self._id})

    def close(self) -> None:
        if "_id" in vars(self):
            self._client.set_terminated(self._id)


def _quoted(text: str) -> str:
    return text.replace("'", "_")


@contextmanager
def tracked(
    tool: Tool | None, out: str, *, goes_on: bool = False, note: Callable[[str], None] = lambda _: None
) -> Iterator[Log]:
    """A log for a run; it counts as finished where no error leaves the context.

    Args:
        tool: the tracker; None tracks nothing.
        out: folder of the run, which need not be there yet.
        goes_on: whether a run of that folder that was cut off is resumed: its curves go on. All others
            begin anew; TensorBoard then forgets what was tracked under that name, MLflow has a further run.
        note: takes a line of text for the user, where the tracker fails later on.

    Raises:
        PipelineError: the tracker's package is not installed, or its server does not answer.
    """
    if tool is None:
        yield _Nothing()
        return
    with warnings.catch_warnings():
        for kind in (DeprecationWarning, FutureWarning):  # among the trackers' own dependencies
            warnings.simplefilter("ignore", kind)
        log = _Guarded(_open(tool, Path(out).absolute(), goes_on=goes_on), note)
        yield log
        log.close()


def _open(tool: Tool, out: Path, *, goes_on: bool) -> Log:
    try:
        if tool == "tensorboard":
            return _TensorBoard(out.parent / "tensorboard" / out.name, goes_on=goes_on)
        os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")  # no request that was not asked for
        # Seven tries, four minutes, is what MLflow waits for a server by itself, each time it is called.
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "3")
        for name in ("mlflow", "alembic"):  # each table that is made would be told of
            logging.getLogger(name).setLevel(logging.WARNING)
        from mlflow.tracking import MlflowClient

        out.parent.mkdir(parents=True, exist_ok=True)
        uri = os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{out.parent / 'mlflow.db'}"
        client = MlflowClient(tracking_uri=uri)
        client.get_experiment_by_name(EXPERIMENT)  # a server that does not answer is told of now
        return _MLflow(client, out.name, {"layerbank.out": str(out)}, goes_on=goes_on)
    except ImportError as error:
        raise PipelineError(f"--track {tool} needs the extra: pip install 'layerbank[{tool}]'") from error
    except Exception as error:  # as above
        raise PipelineError(f"--track {tool}: {one_line(error)}: check MLFLOW_TRACKING_URI") from error


def epochs(log: Log, shown: Callable[[int, Sequence[Any]], None]) -> Callable[[int, Sequence[Any]], None]:
    """What a run calls after every epoch: tracks its line, then shows it.

    Args:
        log: of a run of one head.
        shown: what else is to be called.
    """

    def progress(epoch: int, lines: Sequence[Any]) -> None:
        for line in lines:
            log.scalars(epoch, _values(line))
        shown(epoch, lines)

    return progress


def finished(log: Log, out: str, *, tasks: Sequence[str] = ()) -> None:
    """Tracks the settings and the scores of a run folder of `train` or `tune`.

    Args:
        log: of the run.
        out: its folder.
        tasks: names of the runs in that folder, where several were trained together; each is a child run.

    Raises:
        PipelineError: the folder is not whole.
    """
    if isinstance(log, _Nothing):
        return
    if tasks:
        for name in tasks:
            child = log.child(name)
            finished(child, str(Path(out) / name))
            child.close()
        return
    record, *others = read_records(Path(out))
    config, scores = record.config, _scores(record.result)
    target = ", ".join(one.part or one.target for one in (record, *others))
    if others:  # tasks that a run of `tune` learned together
        scores.pop("dev", None)
        scores |= _finite({f"dev/{one.part}": one.result["dev"] for one in (record, *others)})
    asked = {**config.get("rates", {}), **config.get("schedule", {}), **config.get("plan", {})}
    named = {"method": record.method, "decoder": record.result["decoder"], "target": target}
    log.settings({**named, **asked, "command": config.get("command", "")}, scores)


def heads(log: Log) -> Callable[[Outcome], None]:
    """What a sweep calls with a stack that is done: every head becomes a child run.

    Args:
        log: of the sweep.
    """

    def keep(outcome: Outcome) -> None:
        shape = outcome.stack.shape
        for rates, trained, test in zip(outcome.stack.rates, outcome.trained, outcome.test, strict=True):
            marks = [f"{name}={value}" for name, value in asdict(rates).items() if value is not None]
            child = log.child("-".join([shape.name, *marks]))
            for line in trained.epochs:
                child.scalars(line.epoch, _values(line))
            asked: dict[str, Any] = {"target": shape.target, "fusion": shape.fusion}
            asked |= {"decoder": outcome.goal.spec.decoder, "batch_size": shape.batch_size}
            asked |= {**dict(shape.options), **asdict(rates)}
            parameters, _ = trained.head.n_parameters()
            scores = {"dev": trained.dev, "parameters": parameters, "seconds": trained.seconds}
            scores |= {f"test/{name}": value for name, value in test.items()}
            child.settings({**asked, "status": trained.status}, _finite(scores))
            child.close()

    return keep


def _values(line: Any) -> dict[str, float]:
    """The scalars of an epoch's line."""
    scores = {f"dev/{name}": value for name, value in line.dev.items()}
    return _finite({"loss": line.loss, "lr": line.lr, "seconds": line.seconds, **scores})


def _scores(result: Mapping[str, Any]) -> dict[str, float]:
    return _finite({name: result[name] for name in ("dev", "parameters", "seconds")})


def _finite(values: Mapping[str, Any]) -> dict[str, float]:
    return {n: float(v) for n, v in values.items() if v is not None and math.isfinite(v)}
