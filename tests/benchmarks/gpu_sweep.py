"""64 attention heads on a GPU, on a bank of a BERT-large shape, against 64 runs and against fine-tuning.

Random weights, sentences of massive's lengths (the packaged encoder's tokens, or `--lengths`, a file with
one number a line). Two figures: the runs' seconds over the sweep's, of which a few runs are timed and the
mean counts for all; and the extraction with the whole sweep over one epoch of fine-tuning the encoder in
bfloat16. `--shape tiny --device cpu` tries the script where there is no GPU.
"""

import shutil
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from _common import layerbank, parser, show
from _random_encoder import SHAPES, make_data, make_encoder, massive_lengths

from pipeline.device import pick_precision
from pipeline.grid import Grid
from pipeline.job import HeadRates, Schedule
from pipeline.run import train_run
from pipeline.runner import Plan
from pipeline.sweep import sweep

made = parser(__doc__)
made.add_argument("--shape", choices=SHAPES, default="large")
made.add_argument("--device", default="cuda")
made.add_argument("--precision", default="bfloat16", help="of the encoder and of the heads' products")
made.add_argument("--lengths", type=Path)
made.add_argument("--rows", type=int, default=11_514)
made.add_argument("--epochs", type=int, default=10)
made.add_argument("--heads", type=int, default=64, help="a multiple of 8")
made.add_argument("--runs", type=int, default=4, help="single runs that are timed")
arguments = made.parse_args()
work: Path = arguments.work / "gpu-sweep"
device = torch.device(arguments.device)


def schedule(epochs: int) -> Schedule:
    """The schedule of every head."""
    return Schedule(epochs=epochs, precision=pick_precision(arguments.precision, device))


def sweep_s(store: str, memory_bytes: int) -> float:
    """Seconds of the sweep."""
    out = work / "heads"
    shutil.rmtree(out, ignore_errors=True)
    rates = [1e-3 * 1.2**k for k in range(arguments.heads // 8)]
    grid = Grid(targets=["tags"], fusions=["attention"], lr=rates, seeds=8)
    plan = Plan(
        store=store, schedule=schedule(arguments.epochs), device=str(device), memory_bytes=memory_bytes
    )
    began = time.perf_counter()
    sweep(plan, grid, out=str(out))
    return time.perf_counter() - began


def run_s(store: str, seed: int, memory_bytes: int) -> float:
    """Seconds of one run."""
    began = time.perf_counter()
    train_run(
        store, target="tags", out=str(work / "run"), fusion="attention", rates=HeadRates(seed=seed),
        schedule=schedule(arguments.epochs), overwrite=True, device=device, memory_bytes=memory_bytes,
    )  # fmt: skip
    return time.perf_counter() - began


def fine_tuning_s(data: Path, model: Path) -> float:
    """Seconds of one epoch of fine-tuning, after one that warms up."""
    out = work / "tuned"
    shutil.rmtree(out, ignore_errors=True)
    result = layerbank(
        "tune", data, "--encoder", model, "--method", "fine_tune", "--target", "tags", "--out", out,
        "--epochs", "2", "--precision", arguments.precision, "--device", arguments.device,
        "--threads", str(arguments.threads),
    )  # fmt: skip
    return float(result["seconds_per_epoch"])


def main() -> None:
    """Makes encoder, data and bank, then times all of it."""
    known = np.loadtxt(arguments.lengths, dtype=np.int64) if arguments.lengths else None
    lengths = massive_lengths(arguments.data) if known is None else known
    data = make_data(work / "data", {"train": arguments.rows, "dev": arguments.rows // 6}, lengths)
    model = make_encoder(arguments.work / f"encoder-{arguments.shape}", arguments.shape)
    store = str(work / "bank")
    shutil.rmtree(store, ignore_errors=True)
    extracted: dict[str, Any] = layerbank(
        "extract", data, "--encoder", model, "--store", store, "--keep", "words", "--device",
        arguments.device, "--precision", arguments.precision, "--threads", str(arguments.threads),
    )  # fmt: skip
    memory_bytes = 4 * extracted["bytes"] + 2**32
    run_s(store, 0, memory_bytes)  # kernels are loaded
    runs = [run_s(store, seed, memory_bytes) for seed in range(arguments.runs)]
    swept = sweep_s(store, memory_bytes)
    tuned = fine_tuning_s(data, model)
    show(
        check="heads of a sweep on a GPU",
        device="cpu" if device.type == "cpu" else torch.cuda.get_device_name(device),
        shape=arguments.shape, precision=arguments.precision, heads=arguments.heads,
        epochs=arguments.epochs, bytes=extracted["bytes"], extraction_s=extracted["seconds"],
        sweep_s=swept, runs_s=runs, times_faster=arguments.heads * float(np.mean(runs)) / swept,
        fine_tuning_epoch_s=tuned, sweep_and_extraction_over_it=(swept + extracted["seconds"]) / tuned,
    )  # fmt: skip


if __name__ == "__main__":
    main()
