"""Small runs of early fusion for the tests: data of three kinds of targets, a BERT, a way to run."""

from pathlib import Path

import tiny

from pipeline.tuning.run import Asked, TaskAsked, make_plan, prepare, tune_run

COLUMNS = ["tokens", "tags", "intent", "score"]


def data(folder, columns=COLUMNS, **sizes):
    """A data folder of rows like ``open the red door``."""
    sizes = {"train": 40, "dev": 16, "test": 12, **sizes}
    rows = {split: tiny.rows_of_text(split, n) for split, n in sizes.items()}
    return tiny.write_jsonl(folder, rows, columns)


def asked(folder, method, target="intent", *, out="run", task=None, further=(), **choices):
    """A run on the data and the encoder below a folder, made on first use."""
    folder = Path(folder)
    if not (folder / "data").is_dir():
        data(folder / "data")
    if not (folder / "encoder").is_dir():
        tiny.encoder(folder / "encoder")
    first = TaskAsked(**{"data": str(folder / "data"), "target": target, **(task or {})})
    choices = {"encoder": str(folder / "encoder"), **choices}
    return Asked(tasks=[first, *further], method=method, out=str(folder / out), **choices)


def ready(folder, method, target="intent", plan=None, **choices):
    """What `prepare` gives: the module, the run's record, the job."""
    return prepare(asked(folder, method, target, **choices), plan or make_plan(method))


def run(
    folder, method, target="intent", *, plan=None, progress=lambda *_: None, overwrite=False, **choices
):
    """A whole run of two epochs; returns its result."""
    made = make_plan(method, **{"epochs": 2, "batch_size": 8, **(plan or {})})
    return tune_run(asked(folder, method, target, **choices), made, overwrite=overwrite, progress=progress)
