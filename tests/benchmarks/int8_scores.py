"""int8 against float16, and `words` against `all`: bytes, scores and the time of an epoch, on MiniLM.

Scores are dev scores, means over the seeds: entity F1 on wnut17 tags, accuracy on massive/en-US intent. The
epochs are those of the same trainings, which run in turn, so that a busy moment strikes both.
"""

import argparse
import json
from pathlib import Path
from statistics import mean, median
from typing import Any

from _common import bank, layerbank, parser, show

TASKS = {"wnut17": "tags", "massive/en-US": "intent"}


def main() -> None:
    """Prints one line for each comparison."""
    made = parser(__doc__)
    made.add_argument("--parts", default="types,tokens", help="of these, what to compare")
    made.add_argument("--sets", default=",".join(TASKS), help="data sets whose types are compared")
    made.add_argument("--fusions", default="attention,linear,concat")
    made.add_argument("--seeds", type=int, default=3)
    made.add_argument("--epochs", type=int, default=5)
    made.add_argument("--rows", type=int, help="only so many rows of each split")
    arguments = made.parse_args()
    if arguments.rows:
        arguments.data = shortened(arguments)
    parts = arguments.parts.split(",")
    for data in arguments.sets.split(",") if "types" in parts else ():
        compare_types(arguments, data, TASKS[data])
    if "tokens" in parts:
        compare_tokens(arguments)


def shortened(arguments: argparse.Namespace) -> Path:
    """A folder with the first rows of the data sets."""
    folder: Path = arguments.work / f"first-{arguments.rows}"
    for data in TASKS:
        (folder / data).mkdir(parents=True, exist_ok=True)
        classes: set[str | None] = set()
        for file in sorted((arguments.data / data).glob("*.jsonl"), key=lambda f: f.stem != "train"):
            lines = file.read_text("utf-8").splitlines()[: arguments.rows]
            if file.stem == "train":
                classes = {json.loads(line).get("intent") for line in lines}
            else:  # a class that the shortened train lacks cannot be scored
                lines = [line for line in lines if json.loads(line).get("intent") in classes]
            (folder / data / file.name).write_text("\n".join(lines) + "\n", "utf-8")
    arguments.work = folder / "work"
    return folder


def compare_types(arguments: argparse.Namespace, data: str, target: str) -> None:
    """float16 and int8 extractions of one data set."""
    stores = {dtype: bank(arguments, data, dtype=dtype) for dtype in ("float16", "int8")}
    states = {dtype: state_bytes(store) for dtype, store in stores.items()}
    files = {dtype: layerbank("inspect", store)["bytes"] for dtype, store in stores.items()}
    inspected = layerbank("inspect", stores["int8"])["splits"]
    show(
        check="bytes of int8 to float16", data=data,
        states=states["int8"] / states["float16"], bank=files["int8"] / files["float16"],
        clipped_frac={split: facts["clipped_frac"] for split, facts in inspected.items()},
    )  # fmt: skip
    for fusion in arguments.fusions.split(","):
        runs = [
            {dtype: train(arguments, store, target, fusion, seed) for dtype, store in stores.items()}
            for seed in range(arguments.seeds)
        ]
        scores = {dtype: mean(run[dtype]["dev"] for run in runs) for dtype in stores}
        seconds = [run["int8"]["seconds_per_epoch"] / run["float16"]["seconds_per_epoch"] for run in runs]
        show(
            check="int8 to float16", data=data, target=target, fusion=fusion, **scores,
            difference=scores["int8"] - scores["float16"], epoch_ratio=median(seconds),
            each=[{dtype: run[dtype]["dev"] for dtype in stores} for run in runs],
        )  # fmt: skip


def compare_tokens(arguments: argparse.Namespace) -> None:
    """A bank of words against one of all tokens: a tagging head that reads words must score the same."""
    whole, words = (bank(arguments, "wnut17", keep=keep) for keep in ("all", "words"))
    kept = {store: tokens(store) for store in (whole, words)}
    for fusion in arguments.fusions.split(","):
        pairs = [
            [train(arguments, store, "tags", fusion, seed)["dev"] for store in (whole, words)]
            for seed in range(arguments.seeds)
        ]
        show(
            check="words to all, wnut17 tags", fusion=fusion, scores=pairs,
            same=all(one == other for one, other in pairs),
            tokens=kept[words] / kept[whole], bytes=state_bytes(words) / state_bytes(whole),
        )  # fmt: skip


def train(
    arguments: argparse.Namespace, store: Path, target: str, fusion: str, seed: int
) -> dict[str, Any]:
    """One head's result."""
    out = arguments.work / f"run-{store.name}-{target}-{fusion}-{seed}"
    flags = ("--epochs", str(arguments.epochs), "--lr", "2e-3", "--batch-size", "32", "--overwrite")
    seeds = ("--seed", str(seed), "--data-seed", str(seed), "--threads", str(arguments.threads))
    return layerbank("train", store, "--target", target, "--fusion", fusion, "--out", out, *flags, *seeds)


def state_bytes(store: Path) -> int:
    """Bytes of the states and of all that a data type needs beside them."""
    arrays = ("states", "scale", "shift", "clipped")
    files = (f for array in arrays for f in store.glob(f"*/{array}/c/**/*") if f.is_file())
    return sum(file.stat().st_size for file in files)


def tokens(store: Path) -> int:
    """Tokens a bank keeps."""
    return sum(split["tokens"] for split in layerbank("inspect", store)["splits"].values())


if __name__ == "__main__":
    main()
