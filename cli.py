"""The command line: flags -> one call -> print. Nothing heavy is imported before a command runs."""

import json
import os
import sys
from typing import Annotated, Any, Literal

import typer
from typer.core import TyperGroup

from pipeline import flags

# Torch's threads (GNU OpenMP) wait by spinning, so long that a small head trains ten times slower as soon
# as another process wants a core. Read when torch is loaded; docs/log.md has the figures.
os.environ.setdefault("GOMP_SPINCOUNT", "2000")


def _read_config(ctx: typer.Context, path: str | None) -> str | None:
    """Takes the flags that a TOML file gives as the defaults of this command."""
    from pipeline.config_file import defaults_of

    if path is not None:
        ctx.default_map = {**(ctx.default_map or {}), **defaults_of(path, ctx.command.params)}
    return path


class Commands(TyperGroup):
    """The commands; a foreseen error becomes one line on standard error and exit 1."""

    def invoke(self, ctx: Any) -> Any:
        """Runs a command."""
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt as error:
            print("stopped: run the same command again", file=sys.stderr)
            raise typer.Exit(130) from error
        except Exception as error:
            # By name, not by class: a wrong flag is not to wait for the imports.
            kinds = {f"{kind.__module__}.{kind.__name__}" for kind in type(error).__mro__}
            if not kinds & {"pipeline.errors.PipelineError", "cache.errors.CacheError"}:
                raise
            print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
            raise typer.Exit(130 if "pipeline.stage.StoppedError" in kinds else 1) from error


app = typer.Typer(
    cls=Commands,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    help="Run a frozen encoder once, keep every layer's token states, train late-fusion heads on them.",
)


@app.command()
def demo(
    out: Annotated[
        str, typer.Option(help="Folder for the data, the bank and the runs.", callback=flags.on_disk)
    ] = "layerbank-demo",
    epochs: Annotated[int | None, typer.Option(help="Epochs of each head; 10 by default.", min=1)] = None,
    quick: Annotated[
        bool, typer.Option("--quick", help="A tenth of the data, and 3 epochs unless --epochs is given.")
    ] = False,
    threads: flags.Threads = None,
    as_json: flags.AsJson = False,
) -> None:
    """Extracts a bank of built-in data and trains six heads on it: the whole job, offline."""
    from pipeline import demo as module
    from pipeline import device, terminal
    from pipeline.report import page as report

    device.set_threads(threads)
    result = module.demo(out, epochs=epochs, quick=quick, note=terminal.note, bar=terminal.extraction_bar)
    result["report"] = report.report([f"{out}/runs"], f"{out}/report.html")["page"]
    _print(result, as_json, module.show)


@app.command()
def extract(
    data: flags.Data,
    encoder: flags.Encoder,
    store: Annotated[str, typer.Option(help="Folder or URL of the bank; an unfinished one is continued.")],
    keep: flags.Kept = "all",
    maskings: flags.Maskings = 1,
    dtype: flags.StoredAs = "float16",
    layers: flags.Layers = "all",
    codec: Annotated[flags.Codec, typer.Option(help="Lossless compression.")] = "none",
    max_length: flags.MaxLength = None,
    text: flags.Text = None,
    text_pair: flags.TextPair = None,
    words: flags.Words = None,
    options: flags.Options = None,
    target: Annotated[list[str] | None, typer.Option(help="Label column; all that fit by default.")] = None,
    revision: flags.Revision = None,
    encoder_revision: flags.EncoderRevision = None,
    batch_tokens: flags.BatchTokens = None,
    precision: flags.ForwardPrecision = "auto",
    force: flags.Force = False,
    repair: flags.Repair = False,
    seed: Annotated[int, typer.Option(help="Of the order of the examples.", min=0)] = 0,
    scheduler: flags.Scheduler = None,
    trust_remote_code: flags.Trust = False,
    device: flags.Device = "auto",
    threads: flags.Threads = None,
    as_json: flags.AsJson = False,
) -> None:
    """Runs the encoder once over a data set and keeps every layer's token states in a bank."""
    from pipeline import terminal
    from pipeline.corpus import load_corpus
    from pipeline.device import set_threads
    from pipeline.repeat import extract_once
    from pipeline.spread import spread_over

    set_threads(threads)
    columns = {"text": text, "text_pair": text_pair, "words": words, "options": options}
    corpus = load_corpus(data, **columns, revision=revision)
    opening = {"name": encoder, "revision": encoder_revision, "precision": precision, "device": device}
    with spread_over(scheduler, threads) as spread, terminal.extraction_bar() as bar:
        result = extract_once(
            corpus,
            {**opening, "trust_remote_code": trust_remote_code},
            store,
            repair=repair,
            keep=keep,
            dtype=dtype,
            layers=flags.numbers(layers),
            codec=codec,
            max_length=max_length,
            batch_tokens=batch_tokens,
            seed=seed,
            targets=target,
            maskings=maskings,
            force=force,
            progress=bar,
            note=terminal.note,
            spread=spread,
        )
    terminal.warn_of_clipping(result.splits)
    _print(result, as_json, terminal.show_extraction)


@app.command()
def plan(
    data: flags.Data,
    encoder: flags.Encoder,
    store: Annotated[str, typer.Option(help="Where the bank would lie.")] = ".",
    keep: flags.Kept = "all",
    maskings: flags.Maskings = 1,
    dtype: flags.StoredAs = "float16",
    layers: flags.Layers = "all",
    max_length: flags.MaxLength = None,
    sample: Annotated[str, typer.Option(help="Rows of a split to tokenize, or all.")] = "20000",
    text: flags.Text = None,
    text_pair: flags.TextPair = None,
    words: flags.Words = None,
    options: flags.Options = None,
    revision: flags.Revision = None,
    encoder_revision: flags.EncoderRevision = None,
    batch_tokens: flags.BatchTokens = None,
    precision: flags.ForwardPrecision = "auto",
    trust_remote_code: flags.Trust = False,
    device: flags.Device = "auto",
    threads: flags.Threads = None,
    as_json: flags.AsJson = False,
) -> None:
    """Tells what an extraction would cost: tokens, bytes, time. Writes nothing."""
    from pipeline import terminal
    from pipeline.device import set_threads
    from pipeline.plan import estimate

    n_rows, numbers = flags.rows(sample), flags.numbers(layers)
    set_threads(threads)
    corpus, loaded = _open(
        data,
        encoder,
        columns={"text": text, "text_pair": text_pair, "words": words, "options": options},
        data_revision=revision,
        revision=encoder_revision,
        precision=precision,
        store=store,
        device=device,
        trust_remote_code=trust_remote_code,
    )
    result = estimate(
        corpus, loaded, store=store, keep=keep, dtype=dtype, layers=numbers, max_length=max_length,
        batch_tokens=batch_tokens, sample=n_rows, maskings=maskings,
    )  # fmt: skip
    _print(result, as_json, terminal.show_plan)


@app.command()
def convert(
    source: Annotated[str, typer.Argument(metavar="SOURCE", help="Folder or URL of a bank.")],
    store: Annotated[
        str,
        typer.Argument(
            metavar="STORE", help="Folder or URL of the bank to make; an unfinished one is continued."
        ),
    ],
    dtype: Annotated[
        flags.DType | None,
        typer.Option(help="How states are stored; as in SOURCE by default."),
    ] = None,
    layers: flags.Layers = "all",
    keep: Annotated[flags.Keep | None, typer.Option(help="Tokens to keep of those SOURCE has.")] = None,
    codec: Annotated[flags.Codec | None, typer.Option(help="Lossless compression; as in SOURCE.")] = None,
    force: flags.Force = False,
    repair: flags.Repair = False,
    threads: flags.Threads = None,
    as_json: flags.AsJson = False,
) -> None:
    """Makes a smaller bank from another one, without the encoder: data type, layers, tokens."""
    from cache import open_bank
    from pipeline import convert as module
    from pipeline import terminal
    from pipeline.device import set_threads

    set_threads(threads)
    with terminal.extraction_bar() as bar:
        result = module.convert(
            open_bank(source),
            store,
            dtype=dtype,
            layers=flags.numbers(layers),
            keep=keep,
            codec=codec,
            force=force,
            repair=repair,
            progress=bar,
        )
    terminal.warn_of_clipping(result.splits)
    _print(result, as_json, terminal.show_conversion)


@app.command()
def label(
    store: flags.Store,
    data: flags.Data,
    target: Annotated[list[str], typer.Option(help="Label column; may be given more than once.")],
    text: flags.Text = None,
    text_pair: flags.TextPair = None,
    words: flags.Words = None,
    options: flags.Options = None,
    revision: flags.Revision = None,
    as_json: flags.AsJson = False,
) -> None:
    """Adds columns of labels to a bank: the same rows, another task, no encoder."""
    from cache import open_bank
    from pipeline import label as module
    from pipeline import terminal

    bank = open_bank(store)
    columns = {"text": text, "text_pair": text_pair, "words": words, "options": options}
    corpus = module.load_labelled_corpus(bank, data, **columns, revision=revision)
    result = {"store": store, "targets": [module.label(bank, corpus, column) for column in target]}
    _print(result, as_json, terminal.show_labels)


@app.command()
def train(
    store: flags.Store,
    target: Annotated[
        str, typer.Option(help="What to learn: a target of the bank; several together with commas between.")
    ],
    out: Annotated[str, typer.Option(help="Folder for the run.", callback=flags.on_disk)],
    fusion: Annotated[str, typer.Option(help="Late fusion: a name or a dotted path.")] = "attention",
    decoder: flags.Decoder = None,
    options: Annotated[
        list[str] | None, typer.Option("--set", help="Hyper-parameter of a part, name=value.")
    ] = None,
    task: Annotated[
        list[str] | None,
        typer.Option(help="STORE::TARGET to learn along, with --fusion mixture; repeatable."),
    ] = None,
    crf: Annotated[bool | None, typer.Option("--crf/--no-crf", help="Tagger: a linear-chain CRF.")] = None,
    pooling: Annotated[
        Literal["first", "mean", "max"] | None,
        typer.Option(help="Classifier: how tokens become one vector."),
    ] = None,
    dropout: Annotated[float | None, typer.Option(help="Rate before each product of the decoder.")] = None,
    epochs: flags.Epochs = 10,
    lr: Annotated[float, typer.Option(help="AdamW's highest learning rate.")] = 1e-3,
    weight_decay: Annotated[float, typer.Option(help="AdamW's decoupled decay.")] = 0.01,
    batch_size: Annotated[int, typer.Option(help="Examples a step.")] = 32,
    warmup_frac: flags.WarmupFrac = 0.1,
    patience: flags.Patience = None,
    seed: flags.Seed = 0,
    data_seed: flags.DataSeed = 0,
    metric: flags.Metric = None,
    train_split: flags.TrainSplit = "train",
    dev_split: flags.DevSplit = "dev",
    overwrite: flags.Overwrite = False,
    memory: flags.Memory = None,
    precision: flags.Precision = "auto",
    track: flags.Track = None,
    device: flags.Device = "auto",
    threads: flags.Threads = None,
    as_json: flags.AsJson = False,
) -> None:
    """Trains one late-fusion head on a bank, or one for each of several tasks; no encoder is needed."""
    from functools import partial

    from pipeline import terminal, tracking
    from pipeline.device import pick_device, pick_precision, set_threads
    from pipeline.job import HeadRates, Schedule
    from pipeline.multitask_run import BankTarget, train_tasks_run
    from pipeline.run import train_run
    from pipeline.unfinished import is_begun

    tasks = [{"store": store, "target": name} for name in flags.listed(target, "--target", str)]
    tasks += [flags.task(one, "store") for one in task or []]
    run: Any = partial(train_run, **tasks[0])
    if len(tasks) > 1:
        run = partial(train_tasks_run, [BankTarget(**one) for one in tasks])
    set_threads(threads)
    where = pick_device(device)
    with tracking.tracked(track, out, goes_on=is_begun(out), note=terminal.note) as log:
        result = run(
            out=out,
            fusion=fusion,
            decoder=decoder,
            options=flags.settings(options, crf=crf, pooling=pooling, dropout=dropout),
            rates=HeadRates(seed=seed, lr=lr, weight_decay=weight_decay),
            schedule=Schedule(
                epochs=epochs,
                batch_size=batch_size,
                warmup_frac=warmup_frac,
                patience=patience,
                data_seed=data_seed,
                precision=pick_precision(precision, where),
            ),
            metric=metric,
            splits={"train": train_split, "dev": dev_split},
            overwrite=overwrite,
            device=where,
            memory_bytes=flags.size_bytes(memory),
            note=terminal.note,
            progress=tracking.epochs(log, terminal.epoch_note),
        )
        tracking.finished(log, out, tasks=list(result.get("tasks", ())))
    _print(result, as_json, terminal.show_run if run.func is train_run else terminal.show_tasks)


@app.command()
def sweep(
    store: flags.Store,
    target: Annotated[str, typer.Option(help="Targets of the bank, with commas between.")],
    out: Annotated[
        str,
        typer.Option(
            help="Folder of the sweep; one that was cut off is continued.", callback=flags.on_disk
        ),
    ],
    config: Annotated[
        str | None,
        typer.Option(callback=_read_config, is_eager=True, help="TOML file of these flags; flags win."),
    ] = None,
    fusion: Annotated[str, typer.Option(help="Late fusions, with commas between.")] = "attention",
    decoder: Annotated[str | None, typer.Option(help="Decoders; fitting the target by default.")] = None,
    options: Annotated[
        list[str] | None, typer.Option("--set", help="Hyper-parameter of a part, name=value,value.")
    ] = None,
    crf: Annotated[
        str | None,
        typer.Option(help="Taggers without or with a linear-chain CRF: false,true. As --set crf=."),
    ] = None,
    pooling: Annotated[
        str | None,
        typer.Option(help="Classifiers' poolings of tokens: first,mean,max. As --set pooling=."),
    ] = None,
    lr: Annotated[str, typer.Option(help="Learning rates; 1e-4..1e-2 is a range to search.")] = "1e-3",
    weight_decay: Annotated[str, typer.Option(help="Weight decays.")] = "0.01",
    dropout: Annotated[str | None, typer.Option(help="Dropout rates of the decoder.")] = None,
    batch_size: Annotated[str, typer.Option(help="Examples a step.")] = "32",
    seeds: Annotated[int, typer.Option(help="Heads of each combination, with the seeds 0, 1, ...")] = 1,
    trials: Annotated[
        int | None,
        typer.Option(help="Settings that Optuna tries of each target; all by default."),
    ] = None,
    trials_at_once: Annotated[int, typer.Option("--round", help="Settings asked for at once.")] = 16,
    search_seed: Annotated[int, typer.Option(help="Of the search.")] = 0,
    rungs: Annotated[
        str | None, typer.Option(help="Epochs after which the worse half of each stack leaves: 1,2,4.")
    ] = None,
    epochs: flags.Epochs = 10,
    warmup_frac: flags.WarmupFrac = 0.1,
    patience: Annotated[
        int | None, typer.Option(help="End a head after this many epochs without a gain.")
    ] = None,
    data_seed: flags.DataSeed = 0,
    metric: Annotated[str | None, typer.Option(help="Dev score that picks epochs and heads.")] = None,
    train_split: flags.TrainSplit = "train",
    dev_split: Annotated[str, typer.Option(help="Split to choose by.")] = "dev",
    test_split: Annotated[str, typer.Option(help="Split to score at the end.")] = "test",
    memory: flags.Memory = None,
    precision: flags.Precision = "auto",
    scheduler: flags.Scheduler = None,
    track: flags.Track = None,
    device: flags.Device = "auto",
    threads: flags.Threads = None,
    as_json: flags.AsJson = False,
) -> None:
    """Trains a grid of heads as stacks: each shape of head in one pass over the bank."""
    from contextlib import nullcontext
    from dataclasses import replace

    from pipeline import cluster, plot, spread_stacks, terminal, tracking
    from pipeline import sweep as module
    from pipeline.device import pick_device, pick_precision, set_threads
    from pipeline.grid import Grid
    from pipeline.job import Schedule
    from pipeline.runner import Plan
    from pipeline.search import Trials

    set_threads(threads)
    # The workers of a cluster have devices of their own.
    where = pick_device(device if scheduler is None else "cpu")
    grid = Grid(
        targets=flags.listed(target, "--target", str),
        fusions=flags.listed(fusion, "--fusion", str),
        decoders=flags.listed(decoder, "--decoder", str) if decoder else (None,),
        options=flags.option_axes(options, crf=crf, pooling=pooling),
        lr=flags.axis(lr, "--lr"),
        weight_decay=flags.axis(weight_decay, "--weight-decay"),
        dropout=flags.axis(dropout, "--dropout") if dropout else (None,),
        batch_size=flags.listed(batch_size, "--batch-size", int),
        seeds=seeds,
    )
    schedule = Schedule(
        epochs=epochs,
        warmup_frac=warmup_frac,
        patience=patience,
        data_seed=data_seed,
        precision=pick_precision(precision, where),
        rungs=tuple(flags.listed(rungs, "--rungs", int)) if rungs else (),
    )
    plan = Plan(
        store=store,
        schedule=schedule,
        metric=metric,
        splits={"train": train_split, "dev": dev_split, "test": test_split},
        memory_bytes=flags.size_bytes(memory),
        device=str(where) if scheduler is None else device,
    )
    workers = cluster.connect(scheduler, threads=threads) if scheduler else nullcontext()
    log_of_sweep = tracking.tracked(track, out, goes_on=module.is_begun(out), note=terminal.note)
    with workers as client, log_of_sweep as log:
        spread = None
        if client is not None:
            spread = spread_stacks.on_cluster(client, threads=threads)
            there = spread_stacks.common_precision(client, precision, device)
            plan = replace(plan, schedule=replace(schedule, precision=there))
        result = module.sweep(
            plan,
            grid,
            out=out,
            trials=Trials(n=trials, round=trials_at_once, seed=search_seed) if trials is not None else None,
            spread=spread,
            note=terminal.note,
            progress=terminal.stack_note,
            finished=tracking.heads(log),
        )
    result["pictures"] = plot.save_pictures(plot.sweep_figures(result["rows"]), out)
    _print(result, as_json, terminal.show_sweep)


@app.command()
def tune(
    data: flags.Data,
    encoder: Annotated[str, typer.Option(help="Hub id or directory of an encoder, or of a T5.")],
    target: Annotated[str, typer.Option(help="What to learn: a column of the data.")],
    out: Annotated[
        str,
        typer.Option(
            help="Folder for the run; a run that was cut off is continued.", callback=flags.on_disk
        ),
    ],
    method: Annotated[str, typer.Option(help="Early fusion: a name or a dotted path.")] = "fine_tune",
    fusion: Annotated[str, typer.Option(help="Late fusion on top of an encoder.")] = "last_layer",
    decoder: flags.Decoder = None,
    options: Annotated[
        list[str] | None, typer.Option("--set", help="Hyper-parameter of method or head, name=value.")
    ] = None,
    prompts: Annotated[
        str | None, typer.Option(help="Prompts trained before: a file, a run, or a folder of them.")
    ] = None,
    task: Annotated[
        list[str] | None, typer.Option(help="DATA::TARGET to learn along, in mixed batches; repeatable.")
    ] = None,
    maskings: Annotated[
        int | None,
        typer.Option(
            help="With --target token: mask the text, so often, and learn what stood there.", min=1
        ),
    ] = None,
    verbalizer: Annotated[
        list[str] | None, typer.Option(help="CLASS=TEXT, for a model from text to text; repeatable.")
    ] = None,
    epochs: flags.Epochs = 10,
    lr: Annotated[float | None, typer.Option(help="Learning rate; the method's own by default.")] = None,
    head_lr: Annotated[float, typer.Option(help="Learning rate of fusion and decoder.")] = 1e-3,
    weight_decay: Annotated[
        float | None, typer.Option(help="AdamW's decoupled decay; the method's own by default.")
    ] = None,
    warmup_steps: Annotated[
        int | None, typer.Option(help="Steps with a rising rate; the method's own by default.")
    ] = None,
    batch_size: Annotated[int, typer.Option(help="Examples a step, of all processes together.")] = 32,
    accumulation: Annotated[int, typer.Option(help="Pieces of a step, one forward each.")] = 1,
    precision: Annotated[
        Literal["auto", "float32", "bfloat16", "float16"],
        typer.Option(
            help="Of the products, weights are float32; auto: bfloat16 where the device has units for it."
        ),
    ] = "float32",
    gradient_checkpointing: Annotated[
        bool, typer.Option("--gradient-checkpointing", help="Less memory, a second forward.")
    ] = False,
    patience: flags.Patience = None,
    seed: flags.Seed = 0,
    data_seed: flags.DataSeed = 0,
    metric: flags.Metric = None,
    train_split: flags.TrainSplit = "train",
    dev_split: flags.DevSplit = "dev",
    max_length: flags.MaxLength = None,
    text: flags.Text = None,
    text_pair: flags.TextPair = None,
    words: flags.Words = None,
    choices: flags.Options = None,
    revision: flags.Revision = None,
    encoder_revision: flags.EncoderRevision = None,
    overwrite: flags.Overwrite = False,
    trust_remote_code: flags.Trust = False,
    track: flags.Track = None,
    device: flags.Device = "auto",
    threads: flags.Threads = None,
    as_json: flags.AsJson = False,
) -> None:
    """Trains through the encoder: what late fusion is compared with."""
    from pipeline import terminal, tracking
    from pipeline.device import pick_device, set_threads
    from pipeline.precision import forward_precision
    from pipeline.tuning import run as module
    from pipeline.unfinished import is_begun

    set_threads(threads)
    where = pick_device(device)
    first = module.TaskAsked(
        data=data,
        target=target,
        columns={"text": text, "text_pair": text_pair, "words": words, "options": choices},
        revision=revision,
        metric=metric,
        verbalizer=flags.settings(verbalizer, "--verbalizer"),
        maskings=maskings,
    )
    asked = module.Asked(
        tasks=[first, *(module.TaskAsked(**flags.task(one)) for one in task or [])],
        encoder=encoder,
        encoder_revision=encoder_revision,
        method=method,
        out=out,
        fusion=fusion,
        decoder=decoder,
        options=flags.settings(options),
        prompts=prompts,
        max_length=max_length,
        splits={"train": train_split, "dev": dev_split},
        trust_remote_code=trust_remote_code,
    )
    plan = module.make_plan(
        method,
        epochs=epochs,
        lr=lr,
        head_lr=head_lr,
        weight_decay=weight_decay,
        warmup_steps=warmup_steps,
        batch_size=batch_size,
        accumulation=accumulation,
        precision=forward_precision(precision, where),
        checkpointing=gradient_checkpointing,
        patience=patience,
        seed=seed,
        data_seed=data_seed,
    )
    first_process = os.environ.get("RANK", "0") == "0"  # torchrun starts one process a device
    tool = track if first_process else None
    with tracking.tracked(tool, out, goes_on=is_begun(out), note=terminal.note) as log:
        progress = tracking.epochs(log, terminal.epoch_note)
        result = module.tune_run(asked, plan, overwrite=overwrite, device=where, progress=progress)
        if first_process:
            tracking.finished(log, out)
    if first_process:
        _print(result, as_json, terminal.show_tuned)


@app.command()
def evaluate(
    run: flags.RunFolder,
    store: Annotated[str | None, typer.Option(help="Bank; the one it was trained on by default.")] = None,
    data: Annotated[str | None, typer.Option(help="Other data for a run of tune.")] = None,
    target: flags.TaskOfRun = None,
    split: Annotated[str, typer.Option(help="Split to score.")] = "test",
    encoder: Annotated[str | None, typer.Option(help="Where the encoder of a run of tune is now.")] = None,
    trust_remote_code: flags.Trust = False,
    memory: flags.Memory = None,
    device: flags.Device = "auto",
    threads: flags.Threads = None,
    as_json: flags.AsJson = False,
) -> None:
    """Scores a trained head on a split of a bank, or a run of tune on a split of its data.

    It computes in the precision that the run was trained in.
    """
    from pipeline import evaluate as module
    from pipeline import terminal
    from pipeline.device import pick_device, set_threads
    from pipeline.results import load_run
    from pipeline.tuning.folder import is_tuned

    set_threads(threads)
    if is_tuned(run):
        from pipeline.tuning import use

        choices: dict[str, Any] = {
            "target": target,
            "encoder": encoder,
            "trust_remote_code": trust_remote_code,
        }
        result = use.evaluate(run, split, store=store, data=data, device=pick_device(device), **choices)
        return _print(result, as_json, terminal.show_scores)
    if data is not None:
        raise typer.BadParameter("--data is for runs of tune: name a bank by --store")
    if encoder is not None:
        raise typer.BadParameter("--encoder is for runs of tune: a head on a bank needs none")
    if trust_remote_code:
        raise typer.BadParameter(
            "--trust-remote-code is for runs of tune: a head on a bank needs no encoder"
        )
    flags.refuse_task(target)
    loaded = load_run(run)
    bank = module.open_bank_of(loaded, store)
    result = module.evaluate(
        loaded, bank, split, device=pick_device(device), memory_bytes=flags.size_bytes(memory)
    )
    _print(result, as_json, terminal.show_scores)


@app.command()
def predict(
    run: flags.RunFolder,
    texts: Annotated[list[str] | None, typer.Argument(metavar="TEXT...", help="Texts to label.")] = None,
    file: Annotated[
        str | None,
        typer.Option(
            help="jsonl, csv, parquet with the bank's columns, or one text a line; - reads stdin."
        ),
    ] = None,
    also: Annotated[
        list[str] | None, typer.Option("--run", help="A further run of the same encoder; repeatable.")
    ] = None,
    target: flags.TaskOfRun = None,
    encoder: flags.EncoderNow = None,
    trust_remote_code: flags.Trust = False,
    device: flags.Device = "auto",
    threads: flags.Threads = None,
    as_json: flags.AsJson = False,
) -> None:
    """Labels raw text, one JSON object a line; several runs share one forward of the encoder."""
    from pipeline import terminal
    from pipeline.device import pick_device, set_threads
    from pipeline.predict import open_predictor
    from pipeline.raw_inputs import read_inputs
    from pipeline.tuning.folder import is_tuned

    set_threads(threads)
    runs: list[str] = [run, *(also or [])]
    choices: dict[str, Any] = {"encoder": encoder, "trust_remote_code": trust_remote_code}
    predictor: Any
    if any(map(is_tuned, runs)):
        from pipeline.tuning.use import open_tuned_predictor

        predictor = open_tuned_predictor(runs, target=target, device=pick_device(device), **choices)
    else:
        flags.refuse_task(target)
        predictor = open_predictor(runs, device=device, **choices)
        if predictor.note:
            terminal.note(predictor.note)
    inputs = read_inputs(predictor.runs[0], texts or [], file)
    for row in predictor.predict_rows(inputs):
        print(json.dumps(row, ensure_ascii=False))


@app.command()
def compare(
    runs: Annotated[
        list[str],
        typer.Argument(metavar="RUN...", help="Runs of one target, folders that hold them, or sweeps."),
    ],
    target: Annotated[
        str | None,
        typer.Option(help="Which, as DATA.TARGET or TARGET; the one that all runs have by default."),
    ] = None,
    out: Annotated[
        str | None,
        typer.Option(help="Folder for the picture of loss against time.", callback=flags.on_disk),
    ] = None,
    as_json: flags.AsJson = False,
) -> None:
    """Puts runs of one target side by side: scores, parameters, seconds, memory, bytes."""
    from pipeline import compare as module
    from pipeline import plot, terminal

    result = module.compare(runs, target)
    if out is not None:
        figure = plot.loss_figure(module.curves(runs, target), result["target"])
        result["pictures"] = plot.save_pictures([figure], out)
    _print(result, as_json, terminal.show_comparison)


@app.command()
def experiment(
    name: Annotated[str, typer.Argument(help="Which, such as fusion-table; a wrong name lists them.")],
    data: Annotated[
        list[str], typer.Argument(metavar="DATA::TARGET[,TARGET]...", help="On what; DATA may be a bank.")
    ],
    out: Annotated[
        str,
        typer.Option(
            help="Folder for tables, figures and sweeps; continued if cut off.", callback=flags.on_disk
        ),
    ],
    encoder: Annotated[
        str | None, typer.Option(help="Hub id or directory of the encoder; that of DATA if it is a bank.")
    ] = None,
    banks: Annotated[
        str | None, typer.Option(help="Folder or URL of banks, made where they lack; OUT/banks by default.")
    ] = None,
    settings: Annotated[
        list[str] | None, typer.Option("--set", help="Option of the experiment, name=value.")
    ] = None,
    dtype: flags.StoredAs = "float16",
    layers: flags.Layers = "all",
    max_length: flags.MaxLength = None,
    text: flags.Text = None,
    text_pair: flags.TextPair = None,
    words: flags.Words = None,
    options: flags.Options = None,
    revision: flags.Revision = None,
    encoder_revision: flags.EncoderRevision = None,
    trust_remote_code: flags.Trust = False,
    memory: flags.Memory = None,
    precision: flags.Precision = "auto",
    device: flags.Device = "auto",
    threads: flags.Threads = None,
    as_json: flags.AsJson = False,
) -> None:
    """Runs an experiment of the papers and leaves its tables and figures."""
    from pathlib import Path

    from pipeline import terminal
    from pipeline.device import set_threads
    from pipeline.experiments import _base as module
    from pipeline.experiments._reading import Reading

    reading = Reading(
        text=text, text_pair=text_pair, words=words, options=options, revision=revision,
        max_length=max_length, dtype=dtype, layers=flags.numbers(layers),
    )  # fmt: skip
    set_threads(threads)
    on = tuple(module.Data.parse(one) for one in data)
    if encoder is None:
        known = module.encoder_of(on)
        encoder, encoder_revision = known.name, known.revision
    lab = module.Lab(
        out=Path(out),
        encoder=encoder,
        data=on,
        banks=(banks or f"{out}/banks").rstrip("/"),
        encoder_revision=encoder_revision,
        trust_remote_code=trust_remote_code,
        reading=reading,
        device=device,
        precision=precision,
        memory_bytes=flags.size_bytes(memory),
        note=terminal.note,
    )
    _print(module.perform(name, flags.settings(settings), lab), as_json, terminal.show_findings)


@app.command()
def analyze(
    runs: Annotated[
        list[str], typer.Argument(metavar="R...", help="Runs, folders of runs, sweeps; or banks.")
    ],
    out: Annotated[str, typer.Option(help="Folder for tables and figures.", callback=flags.on_disk)],
    what: Annotated[
        list[str] | None,
        typer.Option(
            help="attention, depth, probes, sentence, similarity, sources; repeatable. By default all "
            "that fits."
        ),
    ] = None,
    by: Annotated[
        Literal["class", "language", "position", "kind"] | None,
        typer.Option(help="Group tokens, or examples, by this alone; by all that fits by default."),
    ] = None,
    split: Annotated[str, typer.Option(help="Split to look at.")] = "dev",
    sentence: Annotated[
        str | None, typer.Option(metavar="N|TEXT", help="Row of the split, from 0, or a text of your own.")
    ] = None,
    tokens: Annotated[
        int, typer.Option(help="Tokens that layers are compared on, by whole blocks; 0 for all.", min=0)
    ] = 50_000,
    encoder: flags.EncoderNow = None,
    trust_remote_code: flags.Trust = False,
    memory: flags.Memory = None,
    device: flags.Device = "auto",
    threads: flags.Threads = None,
    as_json: flags.AsJson = False,
) -> None:
    """Shows which layers heads use, what each knows, how alike they are, and which sources tasks mix."""
    from pipeline import terminal
    from pipeline.analysis._base import analyze as run
    from pipeline.device import pick_device, set_threads

    set_threads(threads)
    result = run(
        runs,
        out=out,
        what=what or (),
        by=by,
        split=split,
        sentence=sentence,
        tokens=tokens,
        encoder=encoder,
        trust_remote_code=trust_remote_code,
        memory_bytes=flags.size_bytes(memory),
        device=pick_device(device),
        note=terminal.note,
    )
    _print(result, as_json, terminal.show_findings)


@app.command()
def report(
    paths: Annotated[
        list[str] | None,
        typer.Argument(metavar="R...", help="Runs, sweeps, experiments, analyses, or folders of them."),
    ] = None,
    out: Annotated[
        str, typer.Option(help="The page, one HTML file.", callback=flags.on_disk)
    ] = "report.html",
    one_table: Annotated[
        bool, typer.Option("--one-table", help="All runs in one table: they must learn one target.")
    ] = False,
    as_json: flags.AsJson = False,
) -> None:
    """Makes one self-contained page of runs, sweeps, experiments and analyses."""
    from pipeline import terminal
    from pipeline.report.page import report as make

    _print(make(paths or [], out, one_table=one_table), as_json, terminal.show_report)


@app.command()
def inspect(store: flags.Store, as_json: flags.AsJson = False) -> None:
    """Shows what a bank holds."""
    from cache import open_bank
    from pipeline import inventory, terminal

    _print(inventory.describe(open_bank(store, allow_incomplete=True)), as_json, terminal.show_bank)


@app.command()
def verify(store: flags.Store, as_json: flags.AsJson = False) -> None:
    """Checks every byte of a bank against its checksums; exit 1 if something is damaged."""
    from cache import open_bank
    from cache.verify import verify as check
    from pipeline import terminal

    report = check(open_bank(store))
    _print(
        {"ok": report.ok, "blocks": report.blocks, "bad": report.bad}, as_json, terminal.show_verification
    )
    if not report.ok:
        raise typer.Exit(1)


@app.command(name="list")
def list_(
    folder: Annotated[str, typer.Argument(metavar="DIR", help="Folder or URL to look below.")] = ".",
    as_json: flags.AsJson = False,
) -> None:
    """Lists the banks and runs below a folder."""
    from pipeline import inventory, terminal

    _print(inventory.inventory(folder), as_json, terminal.show_inventory)


@app.command()
def remove(
    store: flags.Store,
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask.")] = False,
    as_json: flags.AsJson = False,
) -> None:
    """Deletes a bank, after asking."""
    from pipeline import inventory, terminal

    facts = inventory.removable(store, ask=not yes)
    if not yes and not typer.confirm(f"remove {terminal.bank_in_short(facts)}?", err=True):
        raise typer.Exit(1)
    inventory.remove(store)
    _print({"store": store, "removed": True, "bytes": facts["bytes"]}, as_json, terminal.show_removal)


def _open(
    data: str, encoder: str, *, columns: dict[str, str | None], data_revision: str | None, **opening: Any
) -> tuple[Any, Any]:
    """The data, and the encoder opened for rows of its kind."""
    from pipeline.corpus import load_corpus
    from pipeline.encoder import open_encoder

    corpus = load_corpus(data, **columns, revision=data_revision)
    return corpus, open_encoder(encoder, words=corpus.words is not None, **opening)


def _print(result: Any, as_json: bool, show: Any) -> None:
    """Prints a result as one JSON object, or for people."""
    from dataclasses import asdict, is_dataclass

    plain = asdict(result) if is_dataclass(result) and not isinstance(result, type) else result
    if as_json:
        print(json.dumps(plain, ensure_ascii=False, allow_nan=False))
    else:
        show(plain)


if __name__ == "__main__":
    app()
