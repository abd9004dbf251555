"""What a person sees: tables, progress, sizes. All on standard error or as finished text."""

import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from statistics import mean, stdev
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.progress import BarColumn, Progress, ProgressColumn, Task, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from pipeline import metrics
from pipeline.units import size

CLIPPED_FRAC = 0.001
"""Share of states out of int8's range above which the user is warned."""

_SHORT = 8
"""Digits of a fingerprint that tell the banks of a table apart."""

_PLAIN: dict[str, Any] = {"markup": False, "emoji": False, "highlight": False}
"""Words, paths and names are shown as they are: ``[b]`` and ``:x:`` are no commands."""
_ERR = Console(stderr=True, **_PLAIN)
_OUT = Console(**_PLAIN)
_UNFOLDED = 10_000
"""Columns of what is no terminal: wider than any table."""


def note(text: str) -> None:
    """One line on standard error."""
    _ERR.print(text, soft_wrap=True)


def say(text: str) -> None:
    """One line on standard output."""
    _OUT.print(text, soft_wrap=True)


def table(title: str, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
    """A table on standard output; numbers to the right. Cells are folded in a terminal only."""
    made = Table(
        title=title or None,
        title_justify="left",
        box=SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
        pad_edge=False,
        show_edge=False,
    )
    for k, name in enumerate(columns):
        numeric = bool(rows) and all(isinstance(row[k], int | float) for row in rows)
        made.add_column(name, justify="right" if numeric else "left", overflow="fold", no_wrap=numeric)
    for row in rows:
        made.add_row(*(_cell(value) for value in row))
    (_OUT if _OUT.is_terminal else Console(width=_UNFOLDED, **_PLAIN)).print(made)
    say("")


def facts(values: Mapping[str, Any]) -> None:
    """Names and values, one a line, on standard output."""
    width = max(map(len, values), default=0)
    for name, value in values.items():
        say(f"{name:<{width}}  {_cell(value)}")


def _short(name: str) -> str:
    """An encoder's name: a Hub id, or the last two folders of a directory."""
    return "/".join(name.rstrip("/").split("/")[-2:])


def _cell(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:.2f}"
    return f"{value:,}" if isinstance(value, int) else str(value)


class _Rate(ProgressColumn):
    """Tokens a second since it was made, and bytes written so far."""

    def __init__(self) -> None:
        super().__init__()
        self._began = time.perf_counter()

    def render(self, task: Task) -> Text:
        """The column's text."""
        rate = task.completed / (time.perf_counter() - self._began)
        return Text(f"{rate:,.0f} tokens/s  {size(task.fields['written_bytes'])}")


@contextmanager
def extraction_bar() -> Iterator[Callable[[Any], None]]:
    """A bar on standard error; gives the function that moves it (see `pipeline.stage.Progress`)."""
    bar = Progress(
        TextColumn("{task.fields[split]}", markup=False),
        BarColumn(),
        TextColumn("{task.fields[examples]:,}/{task.fields[n_examples]:,} examples"),
        _Rate(),
        TimeRemainingColumn(),
        console=_ERR,
    )
    started: list[Any] = []
    try:

        def move(state: Any) -> None:
            fields = {
                "split": state.split,
                "examples": state.examples,
                "n_examples": state.n_examples,
                "written_bytes": state.written_bytes,
            }
            if not started:  # not before: an error that comes first has a line of its own
                bar.start()
                started.append(bar.add_task("", total=state.n_tokens, start=True, **fields))
            bar.update(started[0], completed=state.tokens, **fields)

        yield move
    finally:
        if started:
            bar.stop()


def show_extraction(result: Mapping[str, Any]) -> None:
    """What an extraction did."""
    for line in result["notes"]:
        note(line)
    names = ("examples", "tokens", "blocks", "words_cut", "words_empty")
    rows = [(split, *(facts[name] for name in names)) for split, facts in result["splits"].items()]
    table("", ("split", "examples", "kept tokens", "blocks", "words cut off", "words without token"), rows)
    grown = ", ".join(f"{n:,} of {split}" for split, n in result["new_rows"].items())
    if grown:
        say(f"{result['store']} lacked rows of the data: {grown}")
    if result["blocks_encoded"] == 0:
        say(f"{result['store']} was complete: nothing to encode")
    else:
        say(
            f"{result['store']}: {size(result['bytes'])}, {result['blocks_encoded']} of {result['blocks']} "
            f"blocks encoded in {result['seconds']:.1f} s"
        )
    say(f"targets: {', '.join(result['targets']) or 'none'}")
    for name in result["unlabelled"]:
        note(f"target {name!r} has no labels on the new rows: add them with 'layerbank label'")
    for column, reason in result["skipped"].items():
        note(f"column {column!r} is no target: {reason}")
    for split in ("train", "dev"):
        if split not in result["splits"]:
            note(f"no file {split!r} in the data: 'layerbank train' needs it, or --{split}-split")
    if any(facts["words_cut"] for facts in result["splits"].values()):
        note("words that --max-length cut off have no state; a tag on them counts as wrong")
    for split, facts in result["splits"].items():
        _note_cut(split, facts.get("answers_cut", 0))


def _note_cut(split: str, answers: int) -> None:
    if answers:
        note(f"{answers} answers of {split} stand in no token, most cut off by --max-length")


def show_plan(result: Mapping[str, Any]) -> None:
    """What an extraction would cost."""
    spread = f" ± {result['tokens_error']:,}" if result["tokens_error"] else ""
    free = result["free_bytes"]
    facts(
        {
            "examples": result["examples"],
            "tokens": f"{result['tokens']:,}{spread}",
            "layers": ", ".join(map(str, result["layers"])),
            "operations": f"{result['flops'] / 1e12:,.2f} TFLOP",
            "time": f"{result['seconds']:,.0f} s, {result['tokens_per_s']:,.0f} tokens/s in "
            f"{result['precision']}, {result['batch_tokens']:,} tokens a forward",
            "pays": f"where the store reads {size(result['break_even_bytes_per_s'])}/s or more: below "
            "that, encoding anew is faster than reading",
            "free": "not known" if free is None else size(free),
        }
    )
    dtypes = list(next(iter(result["bytes"].values())))
    rows = [
        (keep, result["kept_tokens"][keep], *(size(n_bytes) for n_bytes in kinds.values()))
        for keep, kinds in result["bytes"].items()
    ]
    table("", ("keep", "tokens", *dtypes), rows)
    best = result["recommended"]
    if best is None:
        say("nothing fits: keep fewer --layers, or name another disk by --store")
    else:
        say(f"recommended: --keep {best['keep']} --dtype {best['dtype']} ({best['why']})")


def show_conversion(result: Mapping[str, Any]) -> None:
    """What a conversion made."""
    if result["note"]:
        note(f"note: {result['note']}")
    if result["blocks_written"] == 0:
        say(f"{result['store']} was complete: nothing to convert")
        return
    say(
        f"{result['store']}: {result['dtype']}, {result['keep']}, {len(result['layers'])} layers, "
        f"{size(result['bytes'])} (of {size(result['source_bytes'])}), {result['blocks_written']} of "
        f"{result['blocks']} blocks written in {result['seconds']:.1f} s"
    )
    say(f"targets: {', '.join(result['targets']) or 'none'}")


def warn_of_clipping(splits: Mapping[str, Mapping[str, Any]]) -> None:
    """Says on standard error which splits of an int8 bank hold many states cut to its range."""
    for split, facts in splits.items():
        share = facts.get("clipped_frac") or 0.0
        if share > CLIPPED_FRAC:
            note(
                f"warning: split {split}: {100 * share:.2f} % of the states lie outside the range int8 was "
                "calibrated to and were cut to its ends: use --dtype float16 if scores suffer"
            )


def show_labels(result: Mapping[str, Any]) -> None:
    """What was added to a bank."""
    for target in result["targets"]:
        say(
            f"{result['store']}: target {target['target']!r} on {', '.join(target['splits'])} "
            f"({target['kind']}, {target['classes']} classes)"
        )


def epoch_note(epoch: int, lines: Sequence[Any]) -> None:
    """One line an epoch, on standard error."""
    for line in lines:
        scores = ", ".join(f"{name} {value:.2f}" for name, value in line.dev.items())
        note(f"epoch {epoch}: loss {line.loss:.4f}, dev {scores}, {line.seconds:.2f} s")


def show_run(result: Mapping[str, Any]) -> None:
    """A trained head."""
    say(
        f"{result['run']}: {result['fusion']} + {result['decoder']} on {result['target']}, dev "
        f"{result['metric']} {_cell(result['dev'])} (epoch {result['best_epoch']} of {result['epochs']}), "
        f"{result['parameters']:,} parameters, {result['fusion_parameters']:,} of them the fusion's, "
        f"{result['seconds']:.1f} s"
    )


def show_tasks(result: Mapping[str, Any]) -> None:
    """Heads of several tasks that were trained together."""
    for task in result["tasks"].values():
        show_run(task)
    say(
        f"{result['run']}: {len(result['tasks'])} tasks, dev mean {_cell(result['dev'])}, "
        f"{result['parameters']:,} parameters, {result['shared_parameters']:,} of them shared"
    )


def show_tuned(result: Mapping[str, Any]) -> None:
    """A run through the encoder."""
    say(
        f"{result['run']}: {result['method']} on {_learned(result)}, dev {result['metric']} "
        f"{_cell(result['dev'])} (epoch {result['best_epoch']} of {result['epochs']}), "
        f"{result['parameters']:,} parameters ({100 * result['trainable_frac']:.3g} % of all), "
        f"{result['seconds_per_step']:.3f} s a step, peak memory {size(result['peak_memory_bytes'])}, "
        f"{result['seconds']:.1f} s"
    )
    for cut in result.get("answers_cut", {}).values():
        for split, answers in cut.items():
            _note_cut(split, answers)


def _learned(result: Mapping[str, Any]) -> str:
    """The target of a run; of one of several tasks each with its data."""
    tasks = result.get("tasks", ())
    return ", ".join(tasks) if len(tasks) > 1 else str(result["target"])


def show_scores(result: Mapping[str, Any]) -> None:
    """The scores of a head on a split."""
    scores = ", ".join(f"{name} {_cell(value)}" for name, value in result["metrics"].items())
    task = f", {result['task']}," if "task" in result else ""
    say(f"{result['run']}{task} on {result['split']}: {scores}")


def show_bank(result: Mapping[str, Any]) -> None:
    """What a bank holds."""
    encoder = result["encoder"]
    facts(
        {
            "bank": result["store"],
            "complete": result["complete"],
            "fingerprint": result["fingerprint"],
            "encoder": encoder["name"],
            "layers": f"{', '.join(map(str, result['layers']))} of 0 to {encoder['n_layers'] - 1}",
            "width": encoder["width"],
            "dtype": result["dtype"],
            "precision": result["precision"],
            "keep": result["keep"],
            "max_length": result["max_length"],
            "size": size(result["bytes"]),
        }
    )
    names = ("examples", "tokens", "blocks", "words_cut")
    rows = [(split, *(values[name] for name in names)) for split, values in result["splits"].items()]
    table("", ("split", "examples", "kept tokens", "blocks", "words cut off"), rows)
    clipped = [
        f"{split} {100 * values['clipped_frac']:.3f} %"
        for split, values in result["splits"].items()
        if "clipped_frac" in values
    ]
    if clipped:
        say(f"states cut to the range of int8: {', '.join(clipped)}")
    targets = [
        (name, values["kind"], values["classes"], ", ".join(values["splits"]))
        for name, values in result["targets"].items()
    ]
    table("", ("target", "kind", "classes", "splits"), targets)


def show_verification(result: Mapping[str, Any]) -> None:
    """The outcome of a check."""
    for line in result["bad"]:
        say(line)
    found = "all whole" if result["ok"] else f"{len(result['bad'])} damaged"
    say(f"{result['blocks']} blocks: {found}")


def bank_in_short(bank: Mapping[str, Any]) -> str:
    """A bank in a few words."""
    if "encoder" not in bank:
        return f"the unfinished bank {bank['store']} ({size(bank['bytes'])})"
    splits = ", ".join(f"{split['examples']:,} {name}" for name, split in bank["splits"].items())
    return f"{bank['store']} ({_short(bank['encoder']['name'])}, {splits}, {size(bank['bytes'])})"


def show_removal(result: Mapping[str, Any]) -> None:
    """What was removed."""
    say(f"{result['store']}: removed, {size(result['bytes'])}")


def show_inventory(result: Mapping[str, Any]) -> None:
    """Banks and runs."""
    banks = [
        (
            bank["store"],
            _short(bank["encoder"]["name"]) if "encoder" in bank else bank["error"],
            bank.get("keep", ""),
            bank.get("dtype", ""),
            ", ".join(f"{split['examples']:,} {name}" for name, split in bank.get("splits", {}).items()),
            size(bank.get("bytes", 0)),
            ", ".join(bank.get("targets", {})),
            bank.get("fingerprint", "")[:_SHORT],
            bank["complete"],
        )
        for bank in result["banks"]
    ]
    if banks:
        columns = ("bank", "encoder", "keep", "dtype", "rows", "size", "targets", "fingerprint", "complete")
        table("", columns, banks)
    names = ("run", "target", "fusion", "decoder", "metric", "dev", "store")
    runs = [
        (run["run"], run["error"], *[""] * 5)
        if "error" in run
        else tuple({**run, "target": _learned(run)}[name] for name in names)
        for run in result["runs"]
    ]
    if runs:
        table("", names, runs)
    if not banks and not runs:
        say("no bank and no run here")


def stack_note(epoch: int, lines: Sequence[Any]) -> None:
    """One line an epoch of the stacks that train together, on standard error."""
    running = [line for line in lines if line.epoch == epoch]
    seen: dict[str, list[float]] = {}
    for line in (line for line in running if line.dev):
        metric, score = next(iter(line.dev.items()))
        seen.setdefault(metric, []).append(score)
    ranges = [f"dev {name} {min(values):.2f} to {max(values):.2f}" for name, values in seen.items()]
    seconds = sum(line.seconds for line in running)
    note(f"epoch {epoch}: {len(running)} heads, {', '.join(ranges)}, {seconds:.2f} s")


def show_sweep(result: Mapping[str, Any]) -> None:
    """The settings of a sweep, best first, with mean and spread over seeds."""
    names = ("target", "fusion", "decoder", "options", "batch_size", "lr", "weight_decay", "dropout")
    settings: dict[tuple[Any, ...], list[Mapping[str, Any]]] = {}
    for row in result["rows"]:
        settings.setdefault(tuple(row[name] for name in names), []).append(row)
    lines = sorted(map(_setting, settings.values()), key=_rank)
    columns = ("target", "fusion", "setting", "heads", "metric", "dev", "± sd", "test", "parameters")
    table("", columns, lines)
    failed = [row for row in result["rows"] if row["status"] != "ok"]
    for row in failed:
        note(f"{row['target']}, {row['fusion']}, lr {row['lr']}, seed {row['seed']}: {row['status']}")
    say(f"{result['heads']} heads in {result['seconds']:.1f} s: {result['results']}")


def _setting(rows: Sequence[Mapping[str, Any]]) -> tuple[Any, ...]:
    """One setting's line: its heads differ by their seeds."""
    first, scores = rows[0], [row["dev"] for row in rows if row["dev"] is not None]
    tests = [row["test"] for row in rows if row["test"] is not None]
    options = json.loads(first["options"])
    for name, usual in (("lr", None), ("weight_decay", 0.01), ("dropout", None), ("batch_size", 32)):
        if first[name] != usual:
            options[name] = first[name]
    return (
        first["target"],
        first["fusion"],
        " ".join(f"{name}={value}" for name, value in options.items()),
        len(rows),
        first["metric"],
        mean(scores) if scores else "failed",
        stdev(scores) if len(scores) > 1 else 0.0,
        mean(tests) if tests else "",
        first["parameters"],
    )


def _rank(line: tuple[Any, ...]) -> tuple[Any, ...]:
    """Targets apart, then from the best dev score to the worst, then what failed."""
    target, metric, dev = line[0], line[4], line[5]
    if not isinstance(dev, float):
        return target, True, 0.0
    return target, False, -dev if metrics.higher_is_better(metric) else dev


def show_comparison(result: Mapping[str, Any]) -> None:
    """Runs side by side, best first."""
    rows = [
        (
            f"{run['run']}, {run['task']}" if run["task"] else run["run"],
            run["method"],
            "" if run["dev"] is None else run["dev"],
            run["parameters"],
            run["seconds_per_epoch"],
            "never" if run["seconds_to_95"] is None else f"{run['seconds_to_95']:.2f}",
            "" if run["peak_memory_bytes"] is None else size(run["peak_memory_bytes"]),
            size(run["bytes"]),
            "" if run["bank_bytes"] is None else size(run["bank_bytes"]),
        )
        for run in result["runs"]
    ]
    score = f"dev {result['metric']}"
    columns = ("run", "method", score, "parameters", "s/epoch", "s to 95 %", "peak memory", "run", "bank")
    table(f"target {result['target']}", columns, rows)
    for line in result["notes"]:
        note(line)
    for path in result.get("pictures", []):
        say(path)


def show_findings(result: Mapping[str, Any]) -> None:
    """The tables of an experiment or an analysis, and what was noticed."""
    for found in result["tables"]:
        columns = found["columns"]
        rows = [[_rounded(row.get(c["name"]), c["digits"]) for c in columns] for row in found["rows"]]
        table(found["title"], [column["title"] for column in columns], rows[:_SHOWN_ROWS])
        if len(rows) > _SHOWN_ROWS:
            say(f"{len(rows) - _SHOWN_ROWS} more rows: {result['out']}/tables/{found['name']}.csv\n")
    for text in result["notes"]:
        say(text)
    say(f"{result['seconds']:.1f} s: tables and figures are in {result['out']}")


def show_report(result: Mapping[str, Any]) -> None:
    """Where a report is, and what it tells of."""
    names = ("findings", "sweeps", "runs", "tables", "figures")
    counts = ", ".join(f"{result[name]} {name}" for name in names if result[name])
    say(f"{result['page']}: {counts}, {size(result['bytes'])}")


_SHOWN_ROWS = 40
"""Of a table; its file has all."""


def _rounded(value: Any, digits: int | None) -> Any:
    if value is None:
        return ""
    return f"{value:,.{digits}f}" if isinstance(value, float) and digits is not None else value
