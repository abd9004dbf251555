"""The command line: flags -> one call -> print. Nothing heavy is imported before a command runs."""

import json
import os
import sys
from typing import Annotated, Any, Literal

import typer
from typer.core import TyperGroup

# Torch's threads (GNU OpenMP) wait by spinning, so long that a small head trains ten times slower as soon
# as another process wants a core. Read when torch is loaded; docs/log.md has the figures.
os.environ.setdefault("GOMP_SPINCOUNT", "2000")


def _read_config(ctx: typer.Context, path: str | None) -> str | None:
    """Takes the flags that a TOML file gives as the defaults of this command."""
    from pipeline.flags import defaults_of

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

Data = Annotated[str, typer.Argument(help="A folder of train|dev|test files, a named task, or a Hub id.")]
Store = Annotated[str, typer.Argument(help="Folder or URL of a bank.")]
RunFolder = Annotated[str, typer.Argument(help="Folder of a run.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object on standard output.")]
Threads = Annotated[
    int | None, typer.Option(help="CPU threads; OMP_NUM_THREADS, or one a core, by default.", min=1)
]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1, mps.")]
Text = Annotated[str | None, typer.Option("--text", help="Column of texts.")]
TextPair = Annotated[str | None, typer.Option("--text-pair", help="Column of second texts.")]
Words = Annotated[str | None, typer.Option("--words", help="Column of lists of words.")]
Options = Annotated[
    str | None, typer.Option("--options", help="Column of lists of texts to choose from: multiple choice.")
]
Revision = Annotated[str | None, typer.Option(help="Hub revision of the data.")]
Memory = Annotated[
    str, typer.Option(help="For states and heads, half each, such as 512MiB or 8GiB; more is streamed.")
]
Precision = Annotated[
    Literal["auto", "float32", "bfloat16"], typer.Option(help="Of the products; weights are float32.")
]
ForwardPrecision = Annotated[
    Literal["auto", "float32", "bfloat16", "float16"],
    typer.Option(help="Of the encoder's products; auto: bfloat16 where the device has units for it."),
]
Scheduler = Annotated[
    str | None,
    typer.Option(help="Dask scheduler whose workers do it, or local:N for N processes of this machine."),
]
Track = Annotated[
    Literal["tensorboard", "mlflow"] | None,
    typer.Option(help="Show curves, settings and scores there too; in a folder beside the run."),
]
Trust = Annotated[bool, typer.Option("--trust-remote-code", help="Run code that comes with the encoder.")]


@app.command()
def demo(
    out: Annotated[
        str, typer.Option(help="Folder for the data, the bank and the runs.")
    ] = "layerbank-demo",
    epochs: Annotated[int, typer.Option(help="Epochs of each head.", min=1)] = 10,
    quick: Annotated[bool, typer.Option("--quick", help="A tenth of the data.")] = False,
    threads: Threads = None,
    as_json: AsJson = False,
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
    data: Data,
    encoder: Annotated[str, typer.Option(help="Hub id or directory of the encoder.")],
    store: Annotated[str, typer.Option(help="Folder or URL of the bank; an unfinished one is continued.")],
    keep: Annotated[
        Literal["all", "words", "first", "masked"], typer.Option(help="Tokens to keep.")
    ] = "all",
    maskings: Annotated[
        int, typer.Option(help="With --keep masked: how often each text is masked.", min=1)
    ] = 1,
    dtype: Annotated[
        Literal["float16", "bfloat16", "float32", "int8"], typer.Option(help="How states are stored.")
    ] = "float16",
    layers: Annotated[str, typer.Option(help="all, or numbers such as 0,6,12.")] = "all",
    codec: Annotated[Literal["none", "lz4", "zstd"], typer.Option(help="Lossless compression.")] = "none",
    max_length: Annotated[int | None, typer.Option(help="Longest example in tokens.")] = None,
    text: Text = None,
    text_pair: TextPair = None,
    words: Words = None,
    options: Options = None,
    target: Annotated[list[str] | None, typer.Option(help="Label column; all that fit by default.")] = None,
    revision: Revision = None,
    encoder_revision: Annotated[str | None, typer.Option(help="Hub revision of the encoder.")] = None,
    batch_tokens: Annotated[int | None, typer.Option(help="Padded tokens in one forward.", min=1)] = None,
    precision: ForwardPrecision = "auto",
    force: Annotated[bool, typer.Option("--force", help="Start even if the disk seems too small.")] = False,
    seed: Annotated[int, typer.Option(help="Of the order of the examples.", min=0)] = 0,
    scheduler: Scheduler = None,
    trust_remote_code: Trust = False,
    device: Device = "auto",
    threads: Threads = None,
    as_json: AsJson = False,
) -> None:
    """Runs the encoder once over a data set and keeps every layer's token states in a bank."""
    from pipeline import terminal
    from pipeline.corpus import load_corpus
    from pipeline.device import set_threads
    from pipeline.encoder import open_encoder
    from pipeline.extract import extract as run
    from pipeline.spread import spread_over

    set_threads(threads)
    columns = {"text": text, "text_pair": text_pair, "words": words, "options": options}
    corpus = load_corpus(data, **columns, revision=revision)
    loaded = open_encoder(
        encoder,
        revision=encoder_revision,
        precision=precision,
        store=store,
        device=device,
        words=corpus.words is not None,
        trust_remote_code=trust_remote_code,
    )
    with spread_over(scheduler, threads) as spread, terminal.extraction_bar() as bar:
        result = run(
            corpus,
            loaded,
            store,
            keep=keep,
            dtype=dtype,
            layers=_numbers(layers),
            codec=codec,
            max_length=max_length,
            batch_tokens=batch_tokens,
            seed=seed,
            targets=target,
            maskings=maskings,
            force=force,
            progress=bar,
            spread=spread,
        )
    terminal.warn_of_clipping(result.splits)
    _print(result, as_json, terminal.show_extraction)


@app.command()
def plan(
    data: Data,
    encoder: Annotated[str, typer.Option(help="Hub id or directory of the encoder.")],
    store: Annotated[str, typer.Option(help="Where the bank would lie.")] = ".",
    keep: Annotated[Literal["all", "words", "first"], typer.Option(help="Tokens to keep.")] = "all",
    dtype: Annotated[
        Literal["float16", "bfloat16", "float32", "int8"], typer.Option(help="How states are stored.")
    ] = "float16",
    layers: Annotated[str, typer.Option(help="all, or numbers such as 0,6,12.")] = "all",
    max_length: Annotated[int | None, typer.Option(help="Longest example in tokens.")] = None,
    sample: Annotated[str, typer.Option(help="Rows of a split to tokenize, or all.")] = "20000",
    text: Text = None,
    text_pair: TextPair = None,
    words: Words = None,
    options: Options = None,
    revision: Revision = None,
    encoder_revision: Annotated[str | None, typer.Option(help="Hub revision of the encoder.")] = None,
    batch_tokens: Annotated[int | None, typer.Option(help="Padded tokens in one forward.", min=1)] = None,
    precision: ForwardPrecision = "auto",
    trust_remote_code: Trust = False,
    device: Device = "auto",
    threads: Threads = None,
    as_json: AsJson = False,
) -> None:
    """Tells what an extraction would cost: tokens, bytes, time. Writes nothing."""
    from pipeline import terminal
    from pipeline.corpus import load_corpus
    from pipeline.device import set_threads
    from pipeline.encoder import open_encoder
    from pipeline.plan import estimate

    n_rows, numbers = _rows(sample), _numbers(layers)
    set_threads(threads)
    columns = {"text": text, "text_pair": text_pair, "words": words, "options": options}
    corpus = load_corpus(data, **columns, revision=revision)
    loaded = open_encoder(
        encoder,
        revision=encoder_revision,
        precision=precision,
        store=store,
        device=device,
        words=corpus.words is not None,
        trust_remote_code=trust_remote_code,
    )
    result = estimate(
        corpus, loaded, store=store, keep=keep, dtype=dtype, layers=numbers, max_length=max_length,
        batch_tokens=batch_tokens, sample=n_rows,
    )  # fmt: skip
    _print(result, as_json, terminal.show_plan)


@app.command()
def convert(
    source: Annotated[str, typer.Argument(metavar="SOURCE", help="Folder of a bank.")],
    store: Annotated[
        str,
        typer.Argument(metavar="STORE", help="Folder of the bank to make; an unfinished one is continued."),
    ],
    dtype: Annotated[
        Literal["float16", "bfloat16", "float32", "int8"] | None,
        typer.Option(help="How states are stored; as in SOURCE by default."),
    ] = None,
    layers: Annotated[str, typer.Option(help="all, or numbers such as 0,6,12.")] = "all",
    keep: Annotated[
        Literal["all", "words", "first"] | None, typer.Option(help="Tokens to keep of those SOURCE has.")
    ] = None,
    codec: Annotated[
        Literal["none", "lz4", "zstd"] | None, typer.Option(help="Lossless compression; as in SOURCE.")
    ] = None,
    threads: Threads = None,
    as_json: AsJson = False,
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
            layers=_numbers(layers),
            keep=keep,
            codec=codec,
            progress=bar,
        )
    terminal.warn_of_clipping(result.splits)
    _print(result, as_json, terminal.show_conversion)


@app.command()
def label(
    store: Store,
    data: Data,
    target: Annotated[list[str], typer.Option(help="Label column; may be given more than once.")],
    text: Text = None,
    text_pair: TextPair = None,
    words: Words = None,
    options: Options = None,
    revision: Revision = None,
    as_json: AsJson = False,
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
    store: Store,
    target: Annotated[str, typer.Option(help="What to learn: a target of the bank.")],
    out: Annotated[str, typer.Option(help="Folder for the run.")],
    fusion: Annotated[str, typer.Option(help="Late fusion: a name or a dotted path.")] = "attention",
    decoder: Annotated[str | None, typer.Option(help="Decoder; fitting the target by default.")] = None,
    options: Annotated[
        list[str] | None, typer.Option("--set", help="Hyper-parameter of a part, name=value.")
    ] = None,
    crf: Annotated[bool | None, typer.Option("--crf/--no-crf", help="Tagger: a linear-chain CRF.")] = None,
    pooling: Annotated[
        Literal["first", "mean", "max"] | None,
        typer.Option(help="Classifier: how tokens become one vector."),
    ] = None,
    dropout: Annotated[float | None, typer.Option(help="Rate before each product of the decoder.")] = None,
    epochs: Annotated[int, typer.Option(help="Passes over the training split.")] = 10,
    lr: Annotated[float, typer.Option(help="AdamW's highest learning rate.")] = 1e-3,
    weight_decay: Annotated[float, typer.Option(help="AdamW's decoupled decay.")] = 0.01,
    batch_size: Annotated[int, typer.Option(help="Examples a step.")] = 32,
    warmup_frac: Annotated[float, typer.Option(help="Share of steps with a rising learning rate.")] = 0.1,
    patience: Annotated[
        int | None, typer.Option(help="Stop after this many epochs without a gain.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Of the weights and of dropout.")] = 0,
    data_seed: Annotated[int, typer.Option(help="Of the order of the examples.")] = 0,
    metric: Annotated[str | None, typer.Option(help="Dev score that picks the epoch.")] = None,
    train_split: Annotated[str, typer.Option(help="Split to learn from.")] = "train",
    dev_split: Annotated[str, typer.Option(help="Split to choose the epoch by.")] = "dev",
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a run that is there.")] = False,
    memory: Memory = "4GiB",
    precision: Precision = "auto",
    track: Track = None,
    device: Device = "auto",
    threads: Threads = None,
    as_json: AsJson = False,
) -> None:
    """Trains one late-fusion head on a bank; the encoder is not needed."""
    from pipeline import terminal, tracking
    from pipeline.device import pick_device, pick_precision, set_threads
    from pipeline.job import HeadRates, Schedule
    from pipeline.run import train_run

    set_threads(threads)
    where = pick_device(device)
    with tracking.tracked(track, out) as log:
        result = train_run(
            store,
            target=target,
            out=out,
            fusion=fusion,
            decoder=decoder,
            options=_settings(options, crf=crf, pooling=pooling, dropout=dropout),
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
            memory_bytes=_bytes(memory),
            note=terminal.note,
            progress=tracking.epochs(log, terminal.epoch_note),
        )
        tracking.finished(log, out)
    _print(result, as_json, terminal.show_run)


@app.command()
def sweep(
    store: Store,
    target: Annotated[str, typer.Option(help="Targets of the bank, with commas between.")],
    out: Annotated[str, typer.Option(help="Folder of the sweep; one that was cut off is continued.")],
    config: Annotated[
        str | None,
        typer.Option(callback=_read_config, is_eager=True, help="TOML file of these flags; flags win."),
    ] = None,
    fusion: Annotated[str, typer.Option(help="Late fusions, with commas between.")] = "attention",
    decoder: Annotated[str | None, typer.Option(help="Decoders; fitting the target by default.")] = None,
    options: Annotated[
        list[str] | None, typer.Option("--set", help="Hyper-parameter of a part, name=value,value.")
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
    epochs: Annotated[int, typer.Option(help="Passes over the training split.")] = 10,
    warmup_frac: Annotated[float, typer.Option(help="Share of steps with a rising learning rate.")] = 0.1,
    patience: Annotated[
        int | None, typer.Option(help="End a head after this many epochs without a gain.")
    ] = None,
    data_seed: Annotated[int, typer.Option(help="Of the order of the examples.")] = 0,
    metric: Annotated[str | None, typer.Option(help="Dev score that picks epochs and heads.")] = None,
    train_split: Annotated[str, typer.Option(help="Split to learn from.")] = "train",
    dev_split: Annotated[str, typer.Option(help="Split to choose by.")] = "dev",
    test_split: Annotated[str, typer.Option(help="Split to score at the end.")] = "test",
    memory: Memory = "4GiB",
    precision: Precision = "auto",
    scheduler: Scheduler = None,
    track: Track = None,
    device: Device = "auto",
    threads: Threads = None,
    as_json: AsJson = False,
) -> None:
    """Trains a grid of heads as stacks: each shape of head in one pass over the bank."""
    from contextlib import nullcontext

    from pipeline import cluster, plot, terminal, tracking
    from pipeline import sweep as module
    from pipeline.device import pick_device, pick_precision, set_threads
    from pipeline.grid import Grid
    from pipeline.job import Schedule
    from pipeline.runner import Plan
    from pipeline.search import Trials

    set_threads(threads)
    where = pick_device(device)
    grid = Grid(
        targets=_list(target, "--target", str),
        fusions=_list(fusion, "--fusion", str),
        decoders=_list(decoder, "--decoder", str) if decoder else (None,),
        options={name: _list(value, f"--set {name}", str) for name, value in _settings(options).items()},
        lr=_axis(lr, "--lr"),
        weight_decay=_axis(weight_decay, "--weight-decay"),
        dropout=_axis(dropout, "--dropout") if dropout else (None,),
        batch_size=_list(batch_size, "--batch-size", int),
        seeds=seeds,
    )
    schedule = Schedule(
        epochs=epochs,
        warmup_frac=warmup_frac,
        patience=patience,
        data_seed=data_seed,
        precision=pick_precision(precision, where),
        rungs=tuple(_list(rungs, "--rungs", int)) if rungs else (),
    )
    plan = Plan(
        store=store,
        schedule=schedule,
        metric=metric,
        splits={"train": train_split, "dev": dev_split, "test": test_split},
        memory_bytes=_bytes(memory),
        device=str(where),
    )
    workers = cluster.connect(scheduler, threads=threads) if scheduler else nullcontext()
    log_of_sweep = tracking.tracked(track, out, goes_on=module.is_begun(out))
    with workers as client, log_of_sweep as log:
        result = module.sweep(
            plan,
            grid,
            out=out,
            trials=Trials(n=trials, round=trials_at_once, seed=search_seed) if trials else None,
            client=client,
            note=terminal.note,
            progress=terminal.stack_note,
            finished=tracking.heads(log),
        )
    result["pictures"] = plot.save_pictures(plot.sweep_figures(result["rows"]), out)
    _print(result, as_json, terminal.show_sweep)


@app.command()
def tune(
    data: Data,
    encoder: Annotated[str, typer.Option(help="Hub id or directory of an encoder, or of a T5.")],
    target: Annotated[str, typer.Option(help="What to learn: a column of the data.")],
    out: Annotated[str, typer.Option(help="Folder for the run; a run that was cut off is continued.")],
    method: Annotated[str, typer.Option(help="Early fusion: a name or a dotted path.")] = "fine_tune",
    fusion: Annotated[str, typer.Option(help="Late fusion on top of an encoder.")] = "last_layer",
    decoder: Annotated[str | None, typer.Option(help="Decoder; fitting the target by default.")] = None,
    options: Annotated[
        list[str] | None, typer.Option("--set", help="Hyper-parameter of method or head, name=value.")
    ] = None,
    prompts: Annotated[
        str | None, typer.Option(help="Prompts trained before: a file, a run, or a folder of them.")
    ] = None,
    task: Annotated[
        list[str] | None, typer.Option(help="DATA::TARGET to learn along, in mixed batches; repeatable.")
    ] = None,
    verbalizer: Annotated[
        list[str] | None, typer.Option(help="CLASS=TEXT, for a model from text to text; repeatable.")
    ] = None,
    epochs: Annotated[int, typer.Option(help="Passes over the training split.")] = 10,
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
    precision: Annotated[Literal["no", "bf16", "fp16"], typer.Option(help="Mixed precision.")] = "no",
    gradient_checkpointing: Annotated[
        bool, typer.Option("--gradient-checkpointing", help="Less memory, a second forward.")
    ] = False,
    patience: Annotated[
        int | None, typer.Option(help="Stop after this many epochs without a gain.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Of the weights and of dropout.")] = 0,
    data_seed: Annotated[int, typer.Option(help="Of the order of the examples.")] = 0,
    metric: Annotated[str | None, typer.Option(help="Dev score that picks the epoch.")] = None,
    train_split: Annotated[str, typer.Option(help="Split to learn from.")] = "train",
    dev_split: Annotated[str, typer.Option(help="Split to choose the epoch by.")] = "dev",
    max_length: Annotated[int | None, typer.Option(help="Longest example in tokens.")] = None,
    text: Text = None,
    text_pair: TextPair = None,
    words: Words = None,
    revision: Revision = None,
    encoder_revision: Annotated[str | None, typer.Option(help="Hub revision of the encoder.")] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a run that is there.")] = False,
    trust_remote_code: Trust = False,
    track: Track = None,
    device: Device = "auto",
    threads: Threads = None,
    as_json: AsJson = False,
) -> None:
    """Trains through the encoder: what late fusion is compared with."""
    from pipeline import terminal, tracking
    from pipeline.device import pick_device, set_threads
    from pipeline.tuning import run as module
    from pipeline.tuning.saved import is_begun

    set_threads(threads)
    first = module.TaskAsked(
        data=data,
        target=target,
        columns={"text": text, "text_pair": text_pair, "words": words},
        revision=revision,
        metric=metric,
        verbalizer=_settings(verbalizer, "--verbalizer"),
    )
    asked = module.Asked(
        tasks=[first, *(module.TaskAsked(**_task(one)) for one in task or [])],
        encoder=encoder,
        encoder_revision=encoder_revision,
        method=method,
        out=out,
        fusion=fusion,
        decoder=decoder,
        options=_settings(options),
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
        precision=precision,
        checkpointing=gradient_checkpointing,
        patience=patience,
        seed=seed,
        data_seed=data_seed,
    )
    first_process = os.environ.get("RANK", "0") == "0"  # torchrun starts one process a device
    tool = track if first_process else None
    with tracking.tracked(tool, out, goes_on=is_begun(out)) as log:
        progress = tracking.epochs(log, terminal.epoch_note)
        result = module.tune_run(
            asked, plan, overwrite=overwrite, device=pick_device(device), progress=progress
        )
        if first_process:
            tracking.finished(log, out)
    if first_process:
        _print(result, as_json, terminal.show_tuned)


@app.command()
def evaluate(
    run: RunFolder,
    store: Annotated[str | None, typer.Option(help="Bank; the one it was trained on by default.")] = None,
    data: Annotated[str | None, typer.Option(help="Other data for a run of tune.")] = None,
    split: Annotated[str, typer.Option(help="Split to score.")] = "test",
    memory: Memory = "4GiB",
    device: Device = "auto",
    threads: Threads = None,
    as_json: AsJson = False,
) -> None:
    """Scores a trained head on a split of a bank, or a run of tune on a split of its data."""
    from pipeline import evaluate as module
    from pipeline import terminal
    from pipeline.device import pick_device, set_threads
    from pipeline.results import load_run
    from pipeline.tuning.folder import is_tuned

    set_threads(threads)
    if is_tuned(run):
        from pipeline.tuning import use

        result = use.evaluate(run, split, store=store, data=data, device=pick_device(device))
        return _print(result, as_json, terminal.show_scores)
    if data is not None:
        raise typer.BadParameter("--data is for runs of tune: name a bank by --store")
    loaded = load_run(run)
    bank = module.open_bank_of(loaded, store)
    result = module.evaluate(loaded, bank, split, device=pick_device(device), memory_bytes=_bytes(memory))
    _print(result, as_json, terminal.show_scores)


@app.command()
def predict(
    run: RunFolder,
    texts: Annotated[list[str] | None, typer.Argument(metavar="TEXT...", help="Texts to label.")] = None,
    file: Annotated[
        str | None,
        typer.Option(help="jsonl with the bank's columns, or one text a line; - reads stdin."),
    ] = None,
    also: Annotated[
        list[str] | None, typer.Option("--run", help="A further run of the same encoder; repeatable.")
    ] = None,
    encoder: Annotated[str | None, typer.Option(help="Where the encoder is now.")] = None,
    trust_remote_code: Trust = False,
    device: Device = "auto",
    threads: Threads = None,
    as_json: AsJson = False,
) -> None:
    """Labels raw text, one JSON object a line; several runs share one forward of the encoder."""
    from pipeline import terminal
    from pipeline.device import pick_device, set_threads
    from pipeline.predict import open_predictor, read_inputs
    from pipeline.tuning.folder import is_tuned

    set_threads(threads)
    runs: list[str] = [run, *(also or [])]
    choices: dict[str, Any] = {"encoder": encoder, "trust_remote_code": trust_remote_code}
    predictor: Any
    if any(map(is_tuned, runs)):
        from pipeline.tuning.use import open_tuned_predictor

        predictor = open_tuned_predictor(runs, device=pick_device(device), **choices)
    else:
        predictor = open_predictor(runs, device=device, **choices)
        if predictor.note:
            terminal.note(predictor.note)
    inputs = read_inputs(predictor.runs[0], texts or [], file)
    for row in predictor.predict_rows(inputs):
        print(json.dumps(row, ensure_ascii=False))


@app.command()
def compare(
    runs: Annotated[
        list[str], typer.Argument(metavar="RUN...", help="Runs of one target, or folders that hold them.")
    ],
    out: Annotated[str | None, typer.Option(help="Folder for the picture of loss against time.")] = None,
    as_json: AsJson = False,
) -> None:
    """Puts runs of one target side by side: scores, parameters, seconds, memory, bytes."""
    from pipeline import compare as module
    from pipeline import plot, terminal

    result = module.compare(runs)
    if out is not None:
        figure = plot.loss_figure(module.curves(runs), result["target"])
        result["pictures"] = plot.save_pictures([figure], out)
    _print(result, as_json, terminal.show_comparison)


@app.command()
def experiment(
    name: Annotated[str, typer.Argument(help="Which, such as fusion-table; a wrong name lists them.")],
    data: Annotated[list[str], typer.Argument(metavar="DATA::TARGET[,TARGET]...", help="On what.")],
    encoder: Annotated[str, typer.Option(help="Hub id or directory of the encoder.")],
    out: Annotated[str, typer.Option(help="Folder for tables, figures and sweeps; continued if cut off.")],
    banks: Annotated[
        str | None, typer.Option(help="Folder of banks, made where they lack; OUT/banks by default.")
    ] = None,
    options: Annotated[
        list[str] | None, typer.Option("--set", help="Option of the experiment, name=value.")
    ] = None,
    encoder_revision: Annotated[str | None, typer.Option(help="Hub revision of the encoder.")] = None,
    memory: Memory = "4GiB",
    precision: Precision = "auto",
    device: Device = "auto",
    threads: Threads = None,
    as_json: AsJson = False,
) -> None:
    """Runs an experiment of the papers and leaves its tables and figures."""
    from pathlib import Path

    from pipeline import terminal
    from pipeline.device import set_threads
    from pipeline.experiments._base import Data as OnData
    from pipeline.experiments._base import Lab, perform

    set_threads(threads)
    lab = Lab(
        out=Path(out),
        encoder=encoder,
        data=tuple(OnData.parse(one) for one in data),
        banks=Path(banks or f"{out}/banks"),
        encoder_revision=encoder_revision,
        device=device,
        precision=precision,
        memory_bytes=_bytes(memory),
        note=terminal.note,
    )
    _print(perform(name, _settings(options), lab), as_json, terminal.show_findings)


@app.command()
def analyze(
    runs: Annotated[
        list[str], typer.Argument(metavar="R...", help="Runs, folders of runs, sweeps; or banks.")
    ],
    out: Annotated[str, typer.Option(help="Folder for tables and figures.")],
    what: Annotated[
        list[str] | None,
        typer.Option(
            help="attention, depth, probes, sentence, similarity; repeatable. All that fits by default."
        ),
    ] = None,
    by: Annotated[
        Literal["class", "language", "position", "kind"] | None,
        typer.Option(help="Group tokens by this alone; by all that fits by default."),
    ] = None,
    split: Annotated[str, typer.Option(help="Split to look at.")] = "dev",
    sentence: Annotated[
        str | None, typer.Option(metavar="N|TEXT", help="Row of the split, from 0, or a text of your own.")
    ] = None,
    tokens: Annotated[
        int, typer.Option(help="Tokens that layers are compared on, by whole blocks; 0 for all.", min=0)
    ] = 50_000,
    encoder: Annotated[str | None, typer.Option(help="Where the encoder is now.")] = None,
    trust_remote_code: Trust = False,
    memory: Memory = "4GiB",
    device: Device = "auto",
    threads: Threads = None,
    as_json: AsJson = False,
) -> None:
    """Shows which layers heads use, what each layer knows, and how alike layers are."""
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
        memory_bytes=_bytes(memory),
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
    out: Annotated[str, typer.Option(help="The page, one HTML file.")] = "report.html",
    one_table: Annotated[
        bool, typer.Option("--one-table", help="All runs in one table: they must learn one target.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Makes one self-contained page of runs, sweeps, experiments and analyses."""
    from pipeline import terminal
    from pipeline.report.page import report as make

    _print(make(paths or [], out, one_table=one_table), as_json, terminal.show_report)


@app.command()
def inspect(store: Store, as_json: AsJson = False) -> None:
    """Shows what a bank holds."""
    from cache import open_bank
    from pipeline import inventory, terminal

    _print(inventory.describe(open_bank(store, allow_incomplete=True)), as_json, terminal.show_bank)


@app.command()
def verify(store: Store, as_json: AsJson = False) -> None:
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
    as_json: AsJson = False,
) -> None:
    """Lists the banks and runs below a folder."""
    from pipeline import inventory, terminal

    _print(inventory.inventory(folder), as_json, terminal.show_inventory)


@app.command()
def remove(
    store: Store,
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask.")] = False,
    as_json: AsJson = False,
) -> None:
    """Deletes a bank, after asking."""
    from pipeline import inventory, terminal

    facts = inventory.removable(store, ask=not yes)
    if not yes and not typer.confirm(f"remove {terminal.bank_in_short(facts)}?", err=True):
        raise typer.Exit(1)
    inventory.remove(store)
    _print({"store": store, "removed": True, "bytes": facts["bytes"]}, as_json, terminal.show_removal)


def _print(result: Any, as_json: bool, show: Any) -> None:
    """Prints a result as one JSON object, or for people."""
    from dataclasses import asdict, is_dataclass

    plain = asdict(result) if is_dataclass(result) and not isinstance(result, type) else result
    if as_json:
        print(json.dumps(plain, ensure_ascii=False, allow_nan=False))
    else:
        show(plain)


def _numbers(text: str) -> list[int] | None:
    """Layer numbers: ``all`` is None."""
    if text == "all":
        return None
    try:
        return [int(part) for part in text.split(",")]
    except ValueError as error:
        raise typer.BadParameter(f"--layers {text}: give all, or numbers such as 0,6,12") from error


def _rows(text: str) -> int | None:
    """A number of rows: ``all`` is None."""
    if text == "all":
        return None
    if not text.isdecimal() or int(text) < 1:
        raise typer.BadParameter(f"--sample {text}: give all, or a number of rows")
    return int(text)


def _list(text: str, flag: str, kind: Any) -> list[Any]:
    """The values of a flag, with commas between."""
    parts = [part.strip() for part in text.split(",") if part.strip()]
    if not parts:
        raise typer.BadParameter(f"{flag}: no value, give one or more with commas between")
    try:
        return [kind(part) for part in parts]
    except ValueError as error:
        wanted = {int: "an integer", float: "a number"}[kind]
        raise typer.BadParameter(f"{flag} {text}: {error}, {wanted} was expected") from error


def _axis(text: str, flag: str) -> Any:
    """The values of a flag, or a range such as 1e-4..1e-2."""
    from pipeline.grid import Range

    low, dots, high = text.partition("..")
    if not dots:
        return _list(text, flag, float)
    return Range(_list(low, flag, float)[0], _list(high, flag, float)[0])


def _bytes(text: str) -> int:
    """A size such as 512MiB or 4GiB."""
    units = {"GiB": 2**30, "MiB": 2**20, "GB": 10**9, "MB": 10**6}
    for unit, factor in units.items():
        number = text.removesuffix(unit)
        if number != text and number.replace(".", "", 1).isdigit():
            return int(float(number) * factor)
    raise typer.BadParameter(f"--memory {text}: give a size such as 512MiB or 4GiB")


def _task(text: str) -> dict[str, Any]:
    """A further task: DATA::TARGET."""
    data, colons, target = text.rpartition("::")
    if not (data and colons and target):
        raise typer.BadParameter(f"--task {text}: give DATA::TARGET")
    return {"data": data, "target": target}


def _settings(options: list[str] | None, flag: str = "--set", **flags: Any) -> dict[str, Any]:
    """Hyper-parameters by name: ``--set name=value`` and the flags that are short for it."""
    settings = {name: value for name, value in flags.items() if value is not None}
    for option in options or []:
        name, equals, value = option.partition("=")
        if not equals or not name:
            raise typer.BadParameter(f"{flag} {option}: give name=value")
        settings[name] = value
    return settings


if __name__ == "__main__":
    app()
