"""Successive halving against the full sweep: 64 attention heads on massive/en-US tags."""

import shutil

from _common import bank, layerbank, parser, show

made = parser(__doc__)
made.add_argument("--epochs", type=int, default=8)
made.add_argument("--rungs", default="1,3,4")
made.add_argument("--target", default="tags")
arguments = made.parse_args()
store = bank(arguments, "massive/en-US")
flags = [
    "--target", arguments.target, "--fusion", "attention", "--seeds", "8", "--epochs",
    str(arguments.epochs), "--lr", "1e-4,3e-4,5e-4,1e-3,2e-3,3e-3,5e-3,1e-2",
    "--threads", str(arguments.threads),
]  # fmt: skip


def run(name: str, *more: str) -> tuple[float, float]:
    """Seconds, and the dev score of the winner."""
    out = arguments.work / name
    shutil.rmtree(out, ignore_errors=True)
    found = layerbank("sweep", store, *flags, *more, "--out", out)
    return found["seconds"], found["best"][arguments.target]["dev"]


halved_s, halved = run("halved", "--rungs", arguments.rungs)
full_s, full = run("full")
show(
    check="successive halving, 64 heads", full_s=full_s, halved_s=halved_s, time_frac=halved_s / full_s,
    full_dev=full, halved_dev=halved, difference=halved - full,
)  # fmt: skip
