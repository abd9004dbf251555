"""Sweeps against single runs: 16 attention heads, 64 heads, head-epochs against the plain script.

Everything of ours runs in this process, so that no start of a process is timed.
"""

import shutil
import sys
import time
from pathlib import Path

from _common import bank, massive_arrays, parser, run, show

from pipeline.device import pick_precision, set_threads
from pipeline.grid import Grid
from pipeline.job import HeadRates, Schedule
from pipeline.run import train_run
from pipeline.runner import Plan
from pipeline.sweep import sweep

made = parser(__doc__)
made.add_argument("--epochs", type=int, default=2)
made.add_argument("--crf", action="store_true")
made.add_argument("--precision", default="auto")
made.add_argument("--many", type=int, default=64, help="heads of the large sweep; 0 leaves it out")
made.add_argument("--device", default="cpu")
arguments = made.parse_args()
set_threads(arguments.threads)
store = str(bank(arguments, "massive/en-US"))
work: Path = arguments.work
OPTIONS = {"crf": "true"} if arguments.crf else {}


def schedule() -> Schedule:
    import torch

    precision = pick_precision(arguments.precision, torch.device(arguments.device))
    return Schedule(epochs=arguments.epochs, precision=precision)


def swept(n_rates: int, n_seeds: int) -> float:
    """Seconds of a sweep of learning rates and seeds."""
    out = work / "sweep-heads"
    shutil.rmtree(out, ignore_errors=True)
    rates = [1e-3 * 1.2**k for k in range(n_rates)]
    options = {name: [value] for name, value in OPTIONS.items()}
    grid = Grid(targets=["tags"], fusions=["attention"], options=options, lr=rates, seeds=n_seeds)
    began = time.perf_counter()
    sweep(Plan(store=store, schedule=schedule(), device=arguments.device), grid, out=str(out))
    return time.perf_counter() - began


def alone(n: int) -> float:
    """Seconds of that many runs, one after the other."""
    began = time.perf_counter()
    for k in range(n):
        train_run(
            store,
            target="tags",
            out=str(work / "sweep-alone"),
            fusion="attention",
            options=OPTIONS,
            rates=HeadRates(lr=1e-3, seed=k),
            schedule=schedule(),
            overwrite=True,
        )
    return time.perf_counter() - began


def plain() -> float:
    """Seconds of an epoch of the plain script."""
    arrays = massive_arrays(arguments, Path(store))
    flags = ["--epochs", "2", "--threads", str(arguments.threads)]
    script = str(arguments.plain / "plain_train.py")
    return float(run([sys.executable, script, str(arrays), *flags])["seconds_per_epoch"])


sixteen, single = swept(4, 4), alone(16)
plain_s = plain()
head_epochs_per_s = 16 * arguments.epochs / sixteen
figures = {
    "check": "16 attention heads, massive/en-US tags" + (", CRF" if arguments.crf else ""),
    "sweep_s": sixteen,
    "single_runs_s": single,
    "times_faster": single / sixteen,
    "head_epochs_per_s": head_epochs_per_s,
    "plain_epoch_s": plain_s,
    "times_plain": head_epochs_per_s * plain_s,
}
if arguments.many:
    figures["many"] = arguments.many
    figures["s_per_head_of_many"] = swept(arguments.many // 8, 8) / arguments.many
    figures["s_per_head_of_16"] = sixteen / 16
show(**figures)
