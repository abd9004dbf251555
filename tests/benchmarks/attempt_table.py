"""ATTEMPT on a tiny T5 with random weights and on MiniLM: sources massive, snips, boolq; small targets.

Trains a prompt on each source, then `prompt_tuning`, `attempt` (single and multi-task) and its ablations on
wsc and on intents of massive that no source has seen. Prints a Markdown table of dev accuracies.
"""

import json
import shutil
from pathlib import Path
from statistics import mean
from typing import Any

from _common import encoder, layerbank, parser, show
from early_fusion_table import rows_of

HELD_OUT = ("music", "iot", "weather", "transport")
"""Scenarios of massive whose intents are the target; the source has the others."""

ABLATIONS = {
    "attempt": [],
    "no target": ["target=false"],
    "no attention": ["attention=false"],
    "single prompt": ["single=snips"],
    "no prior transfer": ["transfer=false"],
}


def write(folder: Path, splits: dict[str, list[dict[str, Any]]], columns: tuple[str, ...]) -> Path:
    """A data folder of those columns; dev rows of unknown classes are left out."""
    folder.mkdir(parents=True, exist_ok=True)
    known = {row[columns[-1]] for row in splits["train"]}
    for split, rows in splits.items():
        kept = [{name: row[name] for name in columns} for row in rows if row[columns[-1]] in known]
        text = "".join(f"{json.dumps(row)}\n" for row in kept)
        (folder / f"{split}.jsonl").write_text(text, encoding="utf-8")
    return folder


def data_sets(
    data: Path, work: Path, n_source: int, n_target: int
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Folder and target column of every source and every target."""
    splits = ("train", "dev")
    massive = {s: rows_of(data / "massive/en-US" / f"{s}.jsonl") for s in splits}
    seen = {s: [r for r in rows if r["scenario"] not in HELD_OUT] for s, rows in massive.items()}
    held = {s: [r for r in rows if r["scenario"] in HELD_OUT] for s, rows in massive.items()}
    snips = {s: rows_of(data / "snips" / f"{s}.jsonl") for s in splits}
    boolq = rows_of(
        data / "boolq" / "dev.jsonl"
    )  # split here: the first 2,500 rows train, the rest are dev
    boolq = {"train": boolq[:2_500], "dev": boolq[2_500:]}
    wsc = {s: rows_of(data / "wsc" / f"{s}.jsonl") for s in splits}

    def made(name: str, rows: dict[str, Any], n: int, *columns: str) -> tuple[Path, str]:
        cut = {"train": rows["train"][:n], "dev": rows["dev"][:400]}
        return write(work / "data" / name, cut, columns), columns[-1]

    pair = ("text", "text_pair", "label")
    sources = {
        "boolq": made("boolq", boolq, n_source, *pair),
        "massive": made("massive", seen, n_source, "tokens", "intent"),
        "snips": made("snips", snips, n_source, "tokens", "intent"),
    }
    targets = {
        "wsc": made("wsc", wsc, n_target, *pair),
        "held-out intents": made("held", held, n_target, "tokens", "intent"),
    }
    return sources, targets


def tiny_t5(folder: Path) -> str:
    """A T5 of two layers with random weights, and a tokenizer of letters."""
    import torch
    import transformers

    letters = [*"abcdefghijklmnopqrstuvwxyz0123456789_'.,?!-"]
    vocab = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -3.0), *((c, -4.0) for c in letters)]
    tokenizer = transformers.T5Tokenizer(vocab=vocab, extra_ids=0)
    config = transformers.T5Config(
        vocab_size=len(tokenizer), d_model=64, d_kv=16, d_ff=128, num_layers=2, num_heads=4,
        decoder_start_token_id=0,
    )  # fmt: skip
    torch.manual_seed(0)
    transformers.T5ForConditionalGeneration(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def tune(arguments: Any, model: str, where: tuple[Path, str], out: Path, *flags: Any) -> dict[str, Any]:
    """One run, made anew."""
    for folder in (out, out.with_name(f"{out.name}.partial")):
        shutil.rmtree(folder, ignore_errors=True)
    return layerbank(
        "tune", where[0], "--target", where[1], "--encoder", model, "--out", out, "--max-length", 128,
        "--epochs", arguments.epochs, "--device", "cpu", "--threads", arguments.threads, *flags,
    )  # fmt: skip


def main() -> None:
    """Runs everything and prints a Markdown table for each model."""
    made = parser(__doc__ or "")
    made.add_argument("--epochs", type=int, default=10)
    made.add_argument("--source-rows", type=int, default=2_000)
    made.add_argument("--target-rows", type=int, default=500)
    made.add_argument("--seeds", type=int, default=3)
    made.add_argument("--length", type=int, default=20)
    made.add_argument("--models", default="minilm,t5")
    arguments = made.parse_args()
    work = arguments.work / "attempt"
    sources, targets = data_sets(arguments.data, work, arguments.source_rows, arguments.target_rows)
    models = {"minilm": encoder, "t5": lambda: tiny_t5(work / "t5")}
    for name in arguments.models.split(","):
        table(arguments, name, models[name](), sources, targets, work / name)
    show(seeds=arguments.seeds, epochs=arguments.epochs)


def table(
    arguments: Any, name: str, model: str, sources: dict[str, Any], targets: dict[str, Any], work: Path
) -> None:
    """One model's table."""
    length = ["--set", f"length={arguments.length}"]
    prompts = ["--prompts", work / "sources"]
    shutil.rmtree(work / "sources", ignore_errors=True)
    for source, where in sources.items():
        tune(arguments, model, where, work / "sources" / source, "--method", "prompt_tuning", *length)
    scores: dict[str, dict[str, list[float]]] = {}
    for target, where in targets.items():
        for seed in range(arguments.seeds):
            flags = ["--seed", seed, "--method"]
            out = work / f"{target}-{seed}"
            found = {"prompt_tuning": tune(arguments, model, where, out, *flags, "prompt_tuning", *length)}
            for ablation, options in ABLATIONS.items():
                sets = [part for option in options for part in ("--set", option)]
                found[ablation] = tune(arguments, model, where, out, *flags, "attempt", *prompts, *sets)
            for method, result in found.items():
                scores.setdefault(method, {}).setdefault(target, []).append(result["dev"])
    first, *others = targets.values()
    further = [part for folder, column in others for part in ("--task", f"{folder}::{column}")]
    for seed in range(arguments.seeds):
        result = tune(
            arguments, model, first, work / f"multi-{seed}", "--method", "attempt", "--seed", seed,
            *prompts, *further,
        )  # fmt: skip
        for target, (folder, column) in targets.items():
            score = result["dev_metrics"][f"{folder.name}.{column}.accuracy"]
            scores.setdefault("attempt, multi-task", {}).setdefault(target, []).append(score)
    print(f"\n{name}, dev accuracy, mean of {arguments.seeds} seeds\n")
    print(f"| method | {' | '.join(targets)} |\n|---|{'---|' * len(targets)}")
    for method, by_target in scores.items():
        print(f"| {method} | {' | '.join(f'{mean(by_target[t]):.2f}' for t in targets)} |")


if __name__ == "__main__":
    main()
