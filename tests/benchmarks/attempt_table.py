"""ATTEMPT on a tiny T5 with random weights and on MiniLM: sources massive, snips, boolq; small targets.

Makes the data, then runs the experiments attempt-table, ablations and attention-matrix on wsc and on
intents of massive that no source has seen. Prints Markdown tables.
"""

import json
import random
from pathlib import Path
from typing import Any

from _common import encoder, layerbank, parser, show
from early_fusion_table import rows_of

HELD_OUT = ("music", "iot", "weather", "transport")
"""Scenarios of massive whose intents are the target; the source has the others."""

EXPERIMENTS = {"attempt-table": "scores", "ablations": "scores", "attention-matrix": "attention"}
"""Each with the table that is printed."""


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
    data: Path, work: Path, n_source: int, n_target: int, n_dev: int
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Folder and target column of every source and every target; their rows are drawn by chance."""
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
        sizes = {"train": n, "dev": n_dev}
        cut = {s: random.Random(0).sample(rows[s], min(sizes[s], len(rows[s]))) for s in splits}
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


def main() -> None:
    """Runs the experiments and prints a Markdown table for each model."""
    made = parser(__doc__ or "")
    made.add_argument("--epochs", type=int, default=10)
    made.add_argument("--source-rows", type=int, default=2_000)
    made.add_argument("--target-rows", type=int, default=500)
    made.add_argument("--dev-rows", type=int, default=400)
    made.add_argument("--seeds", type=int, default=3)
    made.add_argument("--ablation-seeds", type=int, help="as --seeds if not given")
    made.add_argument("--length", type=int, default=20, help="of a prompt")
    made.add_argument("--max-length", type=int, default=128, help="of an example, in tokens")
    made.add_argument("--models", default="minilm,t5")
    arguments = made.parse_args()
    work = arguments.work / "attempt"
    sizes = (arguments.source_rows, arguments.target_rows, arguments.dev_rows)
    sources, targets = data_sets(arguments.data, work, *sizes)
    data = [f"{folder}::{column}" for folder, column in (*sources.values(), *targets.values())]
    settings = {
        "sources": len(sources), "length": arguments.length,
        "seeds": arguments.seeds, "epochs": arguments.epochs, "source_epochs": arguments.epochs,
    }  # fmt: skip
    models = {"minilm": encoder, "t5": lambda: tiny_t5(work / "t5")}
    for name in arguments.models.split(","):
        given = {**settings, "runs": work / name / "runs"}
        model = models[name]()
        for title, table in EXPERIMENTS.items():
            found = experiment(arguments, title, data, model, work / name / title, given)
            print(f"\n{title} on {name}\n")
            print(
                markdown(next(one for one in found["tables"] if one["name"] == table)["rows"]), flush=True
            )
    show(seeds=arguments.seeds, epochs=arguments.epochs)


def markdown(rows: list[dict[str, Any]]) -> str:
    """A table of all that the rows hold."""
    shown = [[f"{v:.3f}" if isinstance(v, float) else str(v) for v in row.values()] for row in rows]
    return "\n".join(
        f"| {' | '.join(cells)} |" for cells in [list(rows[0]), ["---"] * len(rows[0]), *shown]
    )


def experiment(
    arguments: Any, name: str, data: list[str], model: str, out: Path, settings: dict[str, Any]
) -> dict[str, Any]:
    """The findings of an experiment; what is there from an earlier call is used again."""
    if name == "attempt-table":
        settings = {**settings, "methods": "prompt_tuning,attempt"}
    if name == "ablations" and arguments.ablation_seeds:
        settings = {**settings, "seeds": arguments.ablation_seeds}
    sets = [part for key, value in settings.items() for part in ("--set", f"{key}={value}")]
    return layerbank(
        "experiment", name, *data, "--encoder", model, "--out", out, "--device", "cpu",
        "--threads", str(arguments.threads), "--max-length", str(arguments.max_length), *sets,
    )  # fmt: skip


if __name__ == "__main__":
    main()
