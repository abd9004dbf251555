"""Flags that several commands share, and the values that texts of flags stand for.

Imports typer alone, so that ``--help`` waits for nothing.
"""

from typing import Annotated, Any, Literal

import typer

DType = Literal["float16", "bfloat16", "float32", "int8"]
Keep = Literal["all", "words", "first"]
Codec = Literal["none", "lz4", "zstd"]

# What is worked on.

Data = Annotated[str, typer.Argument(help="A folder of train|dev|test files, a named task, or a Hub id.")]
Store = Annotated[str, typer.Argument(help="Folder or URL of a bank.")]
RunFolder = Annotated[str, typer.Argument(help="Folder of a run.")]
TaskOfRun = Annotated[
    str | None,
    typer.Option("--target", help="Of a run of tune that learned several tasks: TARGET or DATA.TARGET."),
]
Text = Annotated[str | None, typer.Option("--text", help="Column of texts.")]
TextPair = Annotated[str | None, typer.Option("--text-pair", help="Column of second texts.")]
Words = Annotated[str | None, typer.Option("--words", help="Column of lists of words.")]
Options = Annotated[
    str | None, typer.Option("--options", help="Column of lists of texts to choose from: multiple choice.")
]
Revision = Annotated[str | None, typer.Option(help="Hub revision of the data.")]
MaxLength = Annotated[int | None, typer.Option(help="Longest example in tokens.")]

# The encoder and what is kept of it.

Encoder = Annotated[str, typer.Option(help="Hub id or directory of the encoder.")]
EncoderRevision = Annotated[str | None, typer.Option(help="Hub revision of the encoder.")]
EncoderNow = Annotated[str | None, typer.Option("--encoder", help="Where the encoder is now.")]
Trust = Annotated[bool, typer.Option("--trust-remote-code", help="Run code that comes with the encoder.")]
ForwardPrecision = Annotated[
    Literal["auto", "float32", "bfloat16", "float16"],
    typer.Option(help="Of the encoder's products; auto: bfloat16 where the device has units for it."),
]
BatchTokens = Annotated[int | None, typer.Option(help="Padded tokens in one forward.", min=1)]
Kept = Annotated[Literal["all", "words", "first", "masked"], typer.Option("--keep", help="Tokens to keep.")]
Maskings = Annotated[int, typer.Option(help="With --keep masked: how often each text is masked.", min=1)]
Layers = Annotated[str, typer.Option(help="all, or numbers such as 0,6,12.")]
StoredAs = Annotated[DType, typer.Option("--dtype", help="How states are stored.")]

Force = Annotated[bool, typer.Option("--force", help="Start even if the disk seems too small.")]
Repair = Annotated[
    bool,
    typer.Option("--repair", help="Read every byte of a bank that is there; make damaged blocks anew."),
]

# Training.

Decoder = Annotated[str | None, typer.Option(help="Decoder; fitting the target by default.")]
Epochs = Annotated[int, typer.Option(help="Passes over the training split.")]
WarmupFrac = Annotated[float, typer.Option(help="Share of steps with a rising learning rate.")]
Patience = Annotated[int | None, typer.Option(help="Stop after this many epochs without a gain.")]
Seed = Annotated[int, typer.Option(help="Of the weights and of dropout.")]
DataSeed = Annotated[int, typer.Option(help="Of the order of the examples.")]
Metric = Annotated[str | None, typer.Option(help="Dev score that picks the epoch.")]
TrainSplit = Annotated[str, typer.Option(help="Split to learn from.")]
DevSplit = Annotated[str, typer.Option(help="Split to choose the epoch by.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace a run that is there.")]
Precision = Annotated[
    Literal["auto", "float32", "bfloat16"], typer.Option(help="Of the products; weights are float32.")
]
Track = Annotated[
    Literal["tensorboard", "mlflow"] | None,
    typer.Option(help="Show curves, settings and scores there too; in a folder beside the run."),
]

# Where and how.

Memory = Annotated[
    str | None,
    typer.Option(
        help="For states and heads, half each, such as 512MiB; more is streamed. 4GiB by default, "
        "on a GPU most of what it has."
    ),
]
Scheduler = Annotated[
    str | None,
    typer.Option(help="Dask scheduler whose workers do it, or local:N for N processes of this machine."),
]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1, mps.")]
Threads = Annotated[
    int | None, typer.Option(help="CPU threads; OMP_NUM_THREADS, or one a core, by default.", min=1)
]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object on standard output.")]


def on_disk(out: str | None) -> str | None:
    """Refuses a URL where runs, tables or figures are to be written, which stay on the local disk."""
    if out is not None and "://" in out:
        raise typer.BadParameter(f"{out}: a URL is for banks alone, give a folder of a local disk")
    return out


def numbers(text: str) -> list[int] | None:
    """Layer numbers: ``all`` is None."""
    if text == "all":
        return None
    try:
        return [int(part) for part in text.split(",")]
    except ValueError as error:
        raise typer.BadParameter(f"--layers {text}: give all, or numbers such as 0,6,12") from error


def rows(text: str) -> int | None:
    """A number of rows: ``all`` is None."""
    if text == "all":
        return None
    if not text.isdecimal() or int(text) < 1:
        raise typer.BadParameter(f"--sample {text}: give all, or a number of rows")
    return int(text)


def listed(text: str, flag: str, kind: Any) -> list[Any]:
    """The values of a flag, with commas between."""
    parts = [part.strip() for part in text.split(",") if part.strip()]
    if not parts:
        raise typer.BadParameter(f"{flag}: no value, give one or more with commas between")
    try:
        return [kind(part) for part in parts]
    except ValueError as error:
        wanted = {int: "an integer", float: "a number"}[kind]
        raise typer.BadParameter(f"{flag} {text}: {error}, {wanted} was expected") from error


def axis(text: str, flag: str) -> Any:
    """The values of a flag, or a range such as 1e-4..1e-2."""
    from pipeline.grid import Range

    low, dots, high = text.partition("..")
    if not dots:
        return listed(text, flag, float)
    return Range(listed(low, flag, float)[0], listed(high, flag, float)[0])


def size_bytes(text: str | None) -> int | None:
    """A size such as 512MiB or 4GiB; None where none was given."""
    if text is None:
        return None
    units = {"GiB": 2**30, "MiB": 2**20, "GB": 10**9, "MB": 10**6}
    for unit, factor in units.items():
        number = text.removesuffix(unit)
        if number != text and number.replace(".", "", 1).isdigit():
            return int(float(number) * factor)
    raise typer.BadParameter(f"--memory {text}: give a size such as 512MiB or 4GiB")


def task(text: str, place: str = "data") -> dict[str, Any]:
    """A further task: DATA::TARGET, or STORE::TARGET."""
    where, colons, target = text.rpartition("::")
    if not (where and colons and target):
        raise typer.BadParameter(f"--task {text}: give {place.upper()}::TARGET")
    return {place: where, "target": target}


def option_axes(options: list[str] | None, **short: Any) -> dict[str, list[str]]:
    """The values of each hyper-parameter: ``--set name=a,b`` and the flags that are short for it."""
    flag_of = {name: f"--{name}" for name, text in short.items() if text is not None}
    return {
        name: listed(text, flag_of.get(name, f"--set {name}"), str)
        for name, text in settings(options, **short).items()
    }


def refuse_task(target: str | None) -> None:
    """A head on a bank has one target, which is not to be named."""
    if target is not None:
        raise typer.BadParameter("--target is for runs of tune: a head of 'layerbank train' has one target")


def settings(options: list[str] | None, flag: str = "--set", **flags: Any) -> dict[str, Any]:
    """Hyper-parameters by name: ``--set name=value`` and the flags that are short for it."""
    given = {name: value for name, value in flags.items() if value is not None}
    for option in options or []:
        name, equals, value = option.partition("=")
        if not equals or not name:
            raise typer.BadParameter(f"{flag} {option}: give name=value")
        given[name] = value
    return given
