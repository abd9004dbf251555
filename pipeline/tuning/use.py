"""A run of early fusion used again: scores on a split of its data, labels for raw text."""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from numpy import ndarray

from cache.targets import spans
from pipeline.answers import context_offsets
from pipeline.corpus import Corpus, load_corpus
from pipeline.errors import PipelineError
from pipeline.labels import read_labels
from pipeline.metrics import is_entity_scheme
from pipeline.precision import products_in
from pipeline.predict import Contexts
from pipeline.raw_inputs import RawInputs
from pipeline.results import finite
from pipeline.tuning.build import open_run, target_of
from pipeline.tuning.examples import Examples
from pipeline.tuning.folder import TaskSpec, TunedRun, load, number_of_task
from pipeline.tuning.labelled import LabelledText, read_tokens
from pipeline.tuning.loop import predictions, report
from pipeline.tuning.masked import MaskedText
from pipeline.tuning.model import Tuned


def evaluate(
    path: str,
    split: str,
    *,
    store: str | None = None,
    data: str | None = None,
    encoder: str | None = None,
    target: str | None = None,
    device: torch.device | None = None,
    trust_remote_code: bool = False,
) -> dict[str, Any]:
    """Scores of a run on a split, as `pipeline.evaluate` gives them; `task` too where it has several.

    Args:
        path: the run folder.
        split: one of the data's.
        store: refused: such a run goes through the encoder.
        data: other data of the same columns and classes; those it was trained on by default.
        encoder: where the encoder is, if not where it was.
        target: which of several tasks, see `pipeline.tuning.folder.number_of_task`.
        device: where it computes, the CPU by default.
        trust_remote_code: whether code that comes with the encoder may run.

    Raises:
        PipelineError: the run cannot be loaded, or the data does not fit it.
    """
    if store is not None:
        raise PipelineError(
            f"--store {store}: {path} is a run of 'layerbank tune', it reads text and no bank: leave out "
            "--store, or name other data by --data"
        )
    run, _ = load(path)
    number = number_of_task(run, target)
    task = run.tasks[number]
    columns = {role: column for role, column in task.columns.items() if column is not None}
    corpus = load_corpus(data or task.data, revision=None if data else task.revision, **columns)
    run, tuned = open_run(path, encoder=encoder, device=device, trust_remote_code=trust_remote_code)
    with products_in(run.precision, tuned.device):
        scores = report(tuned, _examples(corpus, split, run, tuned, number))
    named = {"task": task.name} if len(run.tasks) > 1 else {}
    return dict(
        finite(
            {
                "run": path,
                **named,
                "split": split,
                "metric": task.metric,
                "score": scores[task.metric],
                "metrics": scores,
            }
        )
    )


def _examples(corpus: Corpus, split: str, run: TunedRun, tuned: Tuned, number: int) -> Examples:
    """A split with its labels in the class numbers of the run: other data may lack some of the classes."""
    backbone, max_length, task = tuned.backbone, run.source.max_length, run.tasks[number]
    if task.maskings:
        text = MaskedText.open(corpus, backbone, target=task.target, maskings=task.maskings)
        return text.examples(split, task=number, max_length=max_length)
    labels = read_labels(corpus, task.target)
    unknown = sorted(set(labels.names) - set(task.names))
    if labels.kind != task.kind or unknown:
        what = f"a class {unknown[0]!r}" if unknown else f"the kind {labels.kind}"
        raise PipelineError(
            f"target {task.target!r} of {corpus.name} has {what} that {run.path} was not trained on: give "
            "data of the same classes"
        )
    if labels.kind in ("class", "tags"):
        numbers = np.array([*map(task.names.index, labels.names), -1], dtype=np.int32)
        values = {name: numbers[codes] for name, codes in labels.values.items()}
        labels = replace(labels, names=task.names, values=values)
    rows = LabelledText(corpus=corpus, labels=labels, backbone=backbone)
    return rows.examples(split, task=number, max_length=max_length)


class TunedPredictor:
    """Labels raw text with one run; what `pipeline.predict.Predictor` is for heads on a bank.

    Args:
        path: the run folder.
        target: which of several tasks, see `pipeline.tuning.folder.number_of_task`.
        encoder: where the encoder is, if not where it was.
        device: where it computes, the CPU by default.
        trust_remote_code: whether code that comes with the encoder may run.

    Raises:
        PipelineError: the run cannot be loaded, or raw text has nothing of the task.
    """

    def __init__(
        self,
        path: str,
        *,
        target: str | None = None,
        encoder: str | None = None,
        device: torch.device | None = None,
        trust_remote_code: bool = False,
    ) -> None:
        run, self.tuned = open_run(
            path, encoder=encoder, device=device, trust_remote_code=trust_remote_code
        )
        self._number = number_of_task(run, target)
        self._task = run.tasks[self._number]
        if self._task.maskings:
            raise PipelineError(
                f"{path} predicts masked tokens, which raw text has none of: 'layerbank evaluate' scores it"
            )
        # What is read of a file are the columns of this task, which need not be those of the first.
        self.runs = [replace(run, source=replace(run.source, columns=self._task.columns))]

    def predict_rows(self, rows: RawInputs) -> Iterator[dict[str, Any]]:
        """Each input as it is shown, with the task's prediction; None where it cannot be read."""
        run, task = self.runs[0], self._task
        tokens = read_tokens(
            self.tuned.backbone, [(rows.texts, rows.pairs)], max_length=run.source.max_length
        )
        by_word = task.kind in ("tags", "choice")
        n_units = int(tokens.n_words.sum()) if by_word else len(tokens.length)
        empty: ndarray = np.full((n_units, 2) if task.kind == "span" else n_units, -1, np.int32)
        if task.kind == "float":
            empty = np.full(n_units, np.nan, np.float32)
        examples = Examples(task=self._number, tokens=tokens, target=replace(target_of(task), values=empty))
        with products_in(run.precision, self.tuned.device):
            guess: Any = predictions(self.tuned, examples)
        if task.kind == "span" and not self.tuned.backbone.text_to_text:
            guess = self._answers(rows, guess)
        bounds = spans(tokens.n_words)
        for i, shown in enumerate(rows.shown):
            here = guess[bounds[i] : bounds[i + 1]] if by_word else guess[i]
            yield {**shown, task.target: _named(task, here)}

    def _answers(self, rows: RawInputs, guess: ndarray) -> list[str]:
        """The characters of predicted spans."""
        tokenizer, length = self.tuned.backbone.tokenizer, self.runs[0].source.max_length
        contexts = rows.pairs or []
        return Contexts(contexts, context_offsets(tokenizer, rows.texts, contexts, length)).answers(guess)


def _named(task: TaskSpec, guess: Any) -> Any:
    if task.kind == "span":
        return guess
    if task.kind == "float":
        return None if np.isnan(guess) else float(guess)
    if task.kind == "choice":
        return int(guess.argmax()) if guess.any() else None
    if task.kind == "class":
        return task.names[guess] if guess >= 0 else None
    nothing = "O" if is_entity_scheme(task.names) else None
    return [task.names[tag] if tag >= 0 else nothing for tag in guess]


def open_tuned_predictor(paths: list[str], **choices: Any) -> TunedPredictor:
    """Opens a run to predict with.

    Raises:
        PipelineError: several are named: each has an encoder of its own.
    """
    if len(paths) > 1:
        raise PipelineError(
            "predict: a run of 'layerbank tune' has its own encoder and shares no forward: give it alone"
        )
    return TunedPredictor(paths[0], **choices)
