"""One run of early fusion, whole: read data and backbone, train, leave a run folder."""

import hashlib
import json
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from cache import Target
from pipeline import memory, metrics
from pipeline.attentions import ATTENTIONS
from pipeline.corpus import Corpus, load_corpus
from pipeline.errors import PipelineError
from pipeline.labels import Labels, read_labels
from pipeline.results import finite
from pipeline.tuning import folder
from pipeline.tuning.backbone import Backbone, load_backbone
from pipeline.tuning.batches import in_order, make_batch
from pipeline.tuning.build import assemble, load_method, plan_task_head, split_options
from pipeline.tuning.examples import Examples
from pipeline.tuning.folder import Source, TaskSpec, TunedRun
from pipeline.tuning.labelled import LabelledText
from pipeline.tuning.loop import Epoch, Job, Plan, Progress, fit, learned, make_accelerator
from pipeline.tuning.masked import MaskedText, start_from
from pipeline.tuning.model import Tuned, moved
from pipeline.tuning.prompts import FILE, prompt_file, read_prompts
from pipeline.tuning.saved import open_partial
from pipeline.tuning.verbalizer import verbalize
from pipeline.tuning.wording import SAYABLE_KINDS, step_of

Text = LabelledText | MaskedText
"""What a task learns from."""


@dataclass(frozen=True, kw_only=True)
class TaskAsked:
    """A data set and the column to learn."""

    data: str
    target: str
    columns: Mapping[str, str | None] = field(default_factory=dict)  # text, text_pair, words, options
    revision: str | None = None
    metric: str | None = None
    verbalizer: Mapping[str, str] = field(default_factory=dict)
    maskings: int | None = None  # masks the text so often; what is learned are the masked tokens


@dataclass(frozen=True, kw_only=True)
class Asked:
    """A run as it was asked for."""

    tasks: Sequence[TaskAsked]  # the first is the target, others are learned along with it
    encoder: str
    method: str
    out: str
    encoder_revision: str | None = None
    fusion: str = "last_layer"
    decoder: str | None = None
    options: Mapping[str, Any] = field(default_factory=dict)
    prompts: str | None = None  # prompts trained before
    max_length: int | None = None
    splits: Mapping[str, str] = field(default_factory=lambda: {"train": "train", "dev": "dev"})
    trust_remote_code: bool = False


def make_plan(method: str, **given: Any) -> Plan:
    """The plan of a run: what is given (not None), else the method's own rates, else the usual.

    Raises:
        PipelineError: there is no such method, or a value is out of its range.
    """
    part = load_method(method)
    usual = {"weight_decay": part.weight_decay, "warmup_steps": part.warmup_steps}
    return Plan(**{**usual, **{name: value for name, value in given.items() if value is not None}})


def tune_run(
    asked: Asked,
    plan: Plan,
    *,
    overwrite: bool = False,
    device: torch.device | None = None,
    progress: Callable[[int, Sequence[Epoch]], None] = lambda *_: None,
) -> dict[str, Any]:
    """Trains through the backbone and writes a run folder.

    A run that was killed goes on with the first epoch that was not whole, when it is asked for again.

    Returns:
        The content of ``result.json``.

    Raises:
        PipelineError: a choice does not fit, or the loss is not finite.
    """
    began = time.perf_counter()
    folder.check_free_run(asked.out, overwrite=overwrite)
    accelerator = make_accelerator(device or torch.device("cpu"), plan.precision)
    tuned, run, job = prepare(asked, plan)
    if plan.lr is None:
        plan = replace(plan, lr=tuned.method.usual_lr())
    if plan.checkpointing:
        recompute(tuned, asked.method)
    with accelerator.main_process_first():
        partial = open_partial(asked.out, {**_plain(asked), **asdict(plan)}, _content(asked, run, job))
    memory.start(accelerator.device)
    record = fit(tuned, job, plan, accelerator, partial, progress)
    result = {**_result(asked, run, job, tuned, record), **_cut(job)}
    result["peak_memory_bytes"] = memory.peak_bytes(accelerator.device)
    result["seconds"] = time.perf_counter() - began
    if accelerator.is_main_process:
        _save(asked, replace(run, result=result), tuned, job, plan, record)
        shutil.rmtree(partial, ignore_errors=True)
    accelerator.wait_for_everyone()
    return dict(finite(result))


def prepare(asked: Asked, plan: Plan) -> tuple[Tuned, TunedRun, Job]:
    """Reads data, backbone and source prompts, and builds what is trained; nothing is computed yet.

    Raises:
        PipelineError: a choice does not fit.
    """
    corpora = [load_corpus(t.data, revision=t.revision, **t.columns) for t in asked.tasks]
    labels = [
        None if task.maskings else read_labels(corpus, task.target)
        for corpus, task in zip(corpora, asked.tasks, strict=True)
    ]
    backbone = load_backbone(
        asked.encoder,
        revision=asked.encoder_revision,
        words=any(c.words is not None for c in corpora),
        trust_remote_code=asked.trust_remote_code,
    )
    texts = [
        _text(one, corpus, label, backbone)
        for one, corpus, label in zip(asked.tasks, corpora, labels, strict=True)
    ]
    options = split_options(
        asked.options,
        method=asked.method,
        fusion=asked.fusion,
        decoder=asked.decoder,
        text_to_text=backbone.text_to_text,
    )
    tasks = [
        _task(one, text, backbone, asked, options.head)
        for one, text in zip(asked.tasks, texts, strict=True)
    ]
    names = [task.name for task in tasks]
    twice = [name for name in names if names.count(name) > 1]
    if twice:
        raise PipelineError(f"--task: {twice[0]} is there twice: name every data set and target once")
    sources = {}
    if asked.prompts is not None:
        width = backbone.model.get_input_embeddings().embedding_dim
        sources = read_prompts(asked.prompts, fingerprint=backbone.record.weights_sha256, width=width)
    tuned = assemble(
        backbone, tasks, method=asked.method, options=options.method, sources=sources, seed=plan.seed
    )
    tuned.method.begin()
    heads: Any = list(tuned.heads)
    for head, text in zip(heads, texts, strict=False):  # from text to text there are no heads
        if isinstance(text, MaskedText):
            start_from(head, text.output_layer)
    max_length = backbone.max_length(asked.max_length, tuned.method.n_slots)
    run = TunedRun(
        path=asked.out,
        method=asked.method,
        options=options.method,
        source=Source(
            encoder=backbone.record,
            tokenizer_sha256=backbone.tokenizer_sha256,
            max_length=max_length,
            columns=tasks[0].columns,
        ),
        tasks=tuple(tasks),
        sources={name: list(prompt.shape) for name, prompt in sources.items()},
        result={},
    )
    return tuned, run, _job(texts, tasks, tuned, asked.splits, max_length)


def _text(asked: TaskAsked, corpus: Corpus, labels: Labels | None, backbone: Backbone) -> Text:
    """What a task learns from: labelled rows, or masked text where there are no labels to read."""
    if labels is not None:
        return LabelledText(corpus=corpus, labels=labels, backbone=backbone)
    return MaskedText.open(corpus, backbone, target=asked.target, maskings=asked.maskings or 1)


def _task(
    asked: TaskAsked,
    text: Text,
    backbone: Backbone,
    whole: Asked,
    head_options: Mapping[str, Any],
) -> TaskSpec:
    """Checks one task against the backbone."""
    corpus, labels = text.corpus, text.labels
    target = Target(
        name=labels.name,
        kind=labels.kind,
        names=labels.names,
        values=np.empty(0, np.int32),
        settings=labels.settings,
    )
    head, texts, step = None, [], None
    if not backbone.text_to_text:
        if asked.verbalizer:
            raise PipelineError("--verbalizer is for models from text to text; an encoder has a decoder")
        head = plan_task_head(
            target,
            backbone,
            fusion=whole.fusion,
            decoder=whole.decoder,
            options=head_options,
            alone=len(whole.tasks) == 1,
        )
    else:
        texts = _texts(asked, labels, whole)
        if labels.kind == "float":
            step = step_of(labels.values.get(whole.splits["train"], np.empty(0, np.float32)))
    name = Path(asked.data.rstrip("/")).name
    return TaskSpec(
        name=f"{name}.{labels.name}",
        data=str(Path(asked.data).resolve()) if Path(asked.data).is_dir() else asked.data,
        columns={
            "text": corpus.text,
            "text_pair": corpus.text_pair,
            "words": corpus.words,
            **({"options": corpus.options} if corpus.options else {}),
        },
        revision=asked.revision,
        splits=dict(whole.splits),
        target=labels.name,
        kind=labels.kind,
        names=labels.names,
        metric=metrics.resolve(asked.metric or labels.metric, labels.kind, labels.names),
        head=head,
        texts=tuple(texts),
        maskings=asked.maskings,
        step=step,
    )


def _texts(asked: TaskAsked, labels: Labels, whole: Asked) -> list[str]:
    """The texts of the classes, for a model from text to text; none for other kinds."""
    if labels.kind not in SAYABLE_KINDS:
        raise PipelineError(
            f"target {labels.name!r} is {labels.kind}: a model from text to text learns classes, numbers, "
            "answers and choices here, use an encoder such as BERT for it"
        )
    if whole.decoder is not None or whole.fusion != "last_layer":
        raise PipelineError(
            "--fusion and --decoder need an encoder; a model from text to text answers in words"
        )
    if labels.kind == "class":
        return verbalize(labels.name, labels.names, asked.verbalizer)
    if asked.verbalizer:
        raise PipelineError(
            f"--verbalizer is for classes, target {labels.name!r} is {labels.kind}: leave it out"
        )
    return []


def _job(
    texts: Sequence[Text],
    tasks: Sequence[TaskSpec],
    tuned: Tuned,
    splits: Mapping[str, str],
    max_length: int,
) -> Job:
    read: dict[str, list[Examples]] = {"train": [], "dev": []}
    for number, (text, task) in enumerate(zip(texts, tasks, strict=True)):
        for role, found in read.items():
            examples = text.examples(splits[role], task=number, max_length=max_length)
            if task.head is None:
                answers = tuned.wordings[number].answers(examples, tuned.backbone.tokenizer)
                examples = replace(examples, answers=answers)
            found.append(examples)
    return Job(
        train=read["train"],
        dev=read["dev"],
        metrics=[task.metric for task in tasks],
        tasks=[task.name for task in tasks],
    )


def recompute(tuned: Tuned, method: str) -> None:
    """Has the backbone compute its states anew in the backward pass instead of keeping them.

    Raises:
        PipelineError: method or backbone cannot.
    """
    if not tuned.method.recomputes:
        raise PipelineError(f"--gradient-checkpointing does not go with {method}: leave it out")
    try:
        # Its name in newer versions; either way the first argument is `torch.utils.checkpoint`'s options.
        enable = getattr(tuned.model, "activation_checkpointing_enable", None)
        (enable or tuned.model.gradient_checkpointing_enable)({"use_reentrant": False})
    except ValueError as error:
        raise PipelineError(f"--gradient-checkpointing: {error}: leave it out") from error


def _result(asked: Asked, run: TunedRun, job: Job, tuned: Tuned, record: Progress) -> dict[str, Any]:
    lines, first = record.lines, run.tasks[0]
    best = lines[record.best_epoch - 1].dev
    heads: Any = list(tuned.heads)
    counts = [head.n_parameters() for head in heads]
    of_method = tuned.method.n_parameters()
    parameters = of_method + sum(count for count, _ in counts)
    frozen = sum(p.numel() for p in tuned.model.parameters() if not p.requires_grad)
    seconds = sum(line.seconds for line in lines)
    return {
        "run": asked.out,
        "method": asked.method,
        "encoder": run.source.encoder.name,
        "fusion": asked.fusion if first.head else "none",
        "decoder": first.head.decoder if first.head else "text",
        "target": first.target,
        "metric": job.metric,
        "dev": best[job.metric],
        "best_epoch": record.best_epoch,
        "epochs": len(lines),
        "seconds_per_epoch": seconds / len(lines),
        "seconds_per_step": seconds / max(1, record.steps),
        "steps": record.steps,
        "parameters": parameters,
        "method_parameters": of_method,
        "fusion_parameters": sum(count for _, count in counts),
        "trainable_frac": parameters / (parameters + frozen),
        "tasks": {task.name: task.metric for task in run.tasks},
        "dev_metrics": best,
        **record.facts,
        **tuned.method.facts(),
    }


def _cut(job: Job) -> dict[str, Any]:
    """Of the tasks of answers, how many answers of train and dev stand in no token."""
    found = {
        name: {"train": train.cut, "dev": dev.cut}
        for name, train, dev in zip(job.tasks, job.train, job.dev, strict=True)
        if train.target.kind == "span"
    }
    return {"answers_cut": found} if found else {}


def _save(asked: Asked, run: TunedRun, tuned: Tuned, job: Job, plan: Plan, record: Progress) -> None:
    heads = {name: value for name, value in learned(tuned).items() if name.startswith("heads.")}
    further = {}
    if tuned.method.leaves_prompt:
        prompt = tuned.method.state_dict()["prompt"]
        further[FILE] = prompt_file(
            prompt, fingerprint=run.source.encoder.weights_sha256, method=run.method, task=run.tasks[0].name
        )
    if tuned.method.attended:
        further[ATTENTIONS] = _attentions(tuned, job)
    folder.save(
        asked.out,
        {**folder.config_of(run), "asked": _plain(asked), "plan": asdict(plan)},
        weights={**tuned.method.state(), **heads},
        lines=[asdict(line) for line in record.lines],
        result=run.result,
        further=further,
    )


@torch.no_grad()
def _attentions(tuned: Tuned, job: Job) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """The weights of the prompts for every dev example, a tensor a task in the order of the rows.

    Those of an example of several options are the mean over the options.
    """
    tensors, columns = {}, {}
    tuned.eval()
    heads: Any = list(tuned.heads)
    for name, examples, attended in zip(job.tasks, job.dev, tuned.method.attended, strict=True):
        weights = torch.full((len(examples), len(attended)), torch.nan)
        for picked in in_order(examples):
            batch = moved(make_batch(picked, tuned.backbone, heads, n_slots=0), tuned.device)
            embedded = tuned.model.get_input_embeddings()(batch.ids)
            found = tuned.method.attentions(embedded, batch.mask, batch.tasks)
            assert found is not None
            rows = picked[0][1]
            of_row = torch.split(found.float().cpu(), examples.tokens.sequences(rows)[1].tolist())
            weights[torch.from_numpy(rows)] = torch.stack([one.mean(0) for one in of_row])
        tensors[name], columns[name] = weights, json.dumps(attended)
    return tensors, columns


def _content(asked: Asked, run: TunedRun, job: Job) -> dict[str, Any]:
    """Fingerprints of what was read for the choices."""
    return {
        "rows of the data": [examples.sha256 for examples in (*job.train, *job.dev)],
        "weights of the encoder": run.source.encoder.weights_sha256,
        "words of the tokenizer": run.source.tokenizer_sha256,
        "runs that this one starts from": [_file_sha256(file) for file in _taken_from(asked)],
    }


def _taken_from(asked: Asked) -> list[Path]:
    """The files of earlier runs that prompts and options name."""
    sources = str(asked.options.get("sources", "")).split(",")
    named = [Path(text.strip()).expanduser() for text in (asked.prompts or "", *sources) if text.strip()]
    below = [file for place in named if place.is_dir() for file in sorted(place.rglob("*.safetensors"))]
    return [*(place for place in named if place.is_file()), *below]


def _file_sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _plain(asked: Asked) -> dict[str, Any]:
    """What was asked, as JSON has it."""
    values = {**asdict(asked), "tasks": [plain_task(task) for task in asked.tasks]}
    return {**values, "options": {name: str(value) for name, value in asked.options.items()}}


def plain_task(task: TaskAsked) -> dict[str, Any]:
    """A task as JSON has it; `maskings` where there are some, so that other tasks are told as ever."""
    return {name: v for name, v in asdict(task).items() if name != "maskings" or v is not None}
