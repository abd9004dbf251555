"""Early fusions beside late fusions on massive/en-US `intent`: score, parameters, time and memory of each.

Every run learns the same rows for the same number of epochs. Early fusions go through the encoder at each
step; late fusions read one bank, whose extraction is counted once, spread over ten epochs.
"""

import json
import random
import shutil
from collections import Counter
from pathlib import Path
from statistics import mean
from typing import Any

from _common import encoder, layerbank, parser, show

EARLY = (
    "fine_tune",
    "adapter",
    "bitfit",
    "diff_prune",
    "prompt_tuning",
    "prefix_tuning",
    "spot",
    "attempt",
)
LATE = ("last_layer", "linear", "attention", "concat", "affine", "dwatt", "mixture")
OPTIONS = {"prompt_tuning": ["length=20"], "prefix_tuning": ["length=20"], "spot": [], "attempt": []}
SOURCES = {"snips": ("snips", "intent"), "massive-scenario": ("massive/en-US", "scenario")}


SHARED_EPOCHS = 10
"""Epochs that an extraction is spread over in the column that counts it."""


def rows_of(file: Path) -> list[dict[str, Any]]:
    """The rows of a jsonl file."""
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


def classes(label: str | list[str]) -> set[str]:
    """The classes in a row's label: its one class, or those of its words."""
    return {*label} if isinstance(label, list) else {label}


def subset(source: Path, folder: Path, n_train: int, n_dev: int, target: str) -> Path:
    """Some rows of a data set by chance, dev rows of classes that train lacks left out."""
    folder.mkdir(parents=True, exist_ok=True)
    train, dev = (rows_of(source / f"{split}.jsonl") for split in ("train", "dev"))
    random.Random(0).shuffle(train)  # the rows of massive stand by scenario
    train = train[:n_train]
    known = set[str]().union(*(classes(row[target]) for row in train))
    kept = {"train": train, "dev": [row for row in dev if classes(row[target]) <= known][:n_dev]}
    for split, rows in kept.items():
        lines = [json.dumps({"tokens": row["tokens"], target: row[target]}) for row in rows]
        (folder / f"{split}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return folder


def tune(arguments: Any, data: Path, target: str, method: str, out: Path, *flags: Any) -> dict[str, Any]:
    """One run of early fusion; `out` is made anew."""
    for folder in (out, out.with_name(f"{out.name}.partial")):
        shutil.rmtree(folder, ignore_errors=True)
    sets = [part for option in OPTIONS.get(method, []) for part in ("--set", option)]
    return layerbank(
        "tune", data, "--encoder", encoder(), "--method", method, "--target", target, "--out", out,
        "--epochs", arguments.epochs, "--device", "cpu", "--threads", arguments.threads, *sets, *flags,
    )  # fmt: skip


def early_rows(arguments: Any, data: Path, sources: Path, methods: list[str]) -> dict[str, list[Any]]:
    """Runs of every early fusion, one a seed."""
    found: dict[str, list[Any]] = {}
    for method in methods:
        prompts = {"spot": sources / "snips", "attempt": sources}.get(method)
        for seed in range(arguments.seeds):
            flags = ["--seed", seed, *(["--prompts", prompts] if prompts else [])]
            out = arguments.work / "early" / f"{method}-{seed}"
            found.setdefault(method, []).append(tune(arguments, data, "intent", method, out, *flags))
    return found


def extract(arguments: Any, data: Path, store: Path) -> dict[str, Any]:
    """A bank, made anew: `mixture` pools the embeddings of all tokens."""
    shutil.rmtree(store, ignore_errors=True)
    return layerbank(
        "extract", data, "--encoder", encoder(), "--store", store, "--keep", "all",
        "--device", "cpu", "--threads", arguments.threads,
    )  # fmt: skip


def train(arguments: Any, store: Path, target: str, fusion: str, out: Path, *flags: Any) -> dict[str, Any]:
    """One head on a bank; `out` is made anew."""
    shutil.rmtree(out, ignore_errors=True)
    return layerbank(
        "train", store, "--target", target, "--fusion", fusion, "--out", out,
        "--epochs", arguments.epochs, "--lr", "3e-4" if fusion == "dwatt" else "2e-3",
        "--device", "cpu", "--threads", arguments.threads, *flags,
    )  # fmt: skip


def late_rows(arguments: Any, data: Path, fusions: list[str]) -> dict[str, list[Any]]:
    """Heads of every late fusion, one a seed, on one bank; their seconds an epoch hold a share of it."""
    work = arguments.work / "early"
    made = extract(arguments, data, work / "bank")
    found: dict[str, list[Any]] = {}
    for fusion in fusions:
        flags = ["--set", f"sources={late_sources(arguments)}"] if fusion == "mixture" else []
        for seed in range(arguments.seeds):
            out = work / f"{fusion}-{seed}"
            result = train(arguments, work / "bank", "intent", fusion, out, "--seed", seed, *flags)
            result["with_extraction"] = result["seconds_per_epoch"] + made["seconds"] / SHARED_EPOCHS
            found.setdefault(fusion, []).append(result)
    return found


def late_sources(arguments: Any) -> str:
    """Trained `attention` heads of the source data sets, for `mixture`."""
    work = arguments.work / "early"
    for name, (_, target) in SOURCES.items():
        extract(arguments, work / name, work / f"bank-{name}")
        train(arguments, work / f"bank-{name}", target, "attention", work / "queries" / name)
    return ",".join(str(work / "queries" / name) for name in SOURCES)


def write_sources(arguments: Any) -> None:
    """The source data sets."""
    for name, (folder, target) in SOURCES.items():
        subset(arguments.data / folder, arguments.work / "early" / name, arguments.train, 300, target)


def line(name: str, runs: list[dict[str, Any]]) -> str:
    """One line of the table."""
    scores = [run["dev"] for run in runs]
    seconds = mean(run["seconds_per_epoch"] for run in runs)
    whole = mean(run.get("with_extraction", run["seconds_per_epoch"]) for run in runs)
    memory = runs[0].get("peak_memory_bytes")
    shown = f"{memory / 1e6:,.0f} MB" if memory else "–"
    cells = [f"`{name}`", f"{mean(scores):.2f}", " ".join(f"{s:.2f}" for s in scores)]
    cells += [f"{runs[0]['parameters']:,}", f"{seconds:.2f}", f"{whole:.2f}", shown]
    return f"| {' | '.join(cells)} |"


def main() -> None:
    """Runs everything and prints a Markdown table."""
    made = parser(__doc__ or "")
    made.add_argument("--train", type=int, default=3_000, help="training rows")
    made.add_argument("--dev", type=int, default=2_033, help="dev rows")
    made.add_argument("--epochs", type=int, default=10)
    made.add_argument("--seeds", type=int, default=2)
    made.add_argument("--methods", default=",".join(EARLY))
    made.add_argument("--fusions", default=",".join(LATE))
    arguments = made.parse_args()
    work = arguments.work / "early"
    data = subset(arguments.data / "massive/en-US", work / "data", arguments.train, arguments.dev, "intent")
    methods = [name for name in arguments.methods.split(",") if name]
    write_sources(arguments)
    if {"spot", "attempt"} & {*methods}:
        for name, (_, target) in SOURCES.items():
            tune(arguments, work / name, target, "prompt_tuning", work / "sources" / name)
    found = early_rows(arguments, data, work / "sources", methods)
    found |= late_rows(arguments, data, [name for name in arguments.fusions.split(",") if name])
    dev = Counter(row["intent"] for row in rows_of(data / "dev.jsonl"))
    majority = 100 * dev.most_common(1)[0][1] / dev.total()
    print("| method | dev accuracy | seeds | parameters | s an epoch | with extraction | peak memory |")
    print("|---|---|---|---|---|---|---|")
    print(f"| majority class | {majority:.2f} | | | | | |")
    for name, runs in found.items():
        print(line(name, runs))
    slowest = max(mean(r["with_extraction"] for r in found[f]) for f in found if f in LATE)
    ratios = {
        m: mean(r["seconds_per_epoch"] for r in found[m]) / slowest
        for m in ("bitfit", "fine_tune")
        if m in found
    }
    show(majority=majority, early_over_slowest_late_with_extraction=ratios)


if __name__ == "__main__":
    main()
