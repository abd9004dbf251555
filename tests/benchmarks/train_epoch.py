"""Seconds an epoch of one attention head against the plain script: massive/en-US tags, the same states."""

import sys

from _common import bank, layerbank, massive_arrays, pairs, parser, run, show

made = parser(__doc__)
made.add_argument("--epochs", type=int, default=3)
arguments = made.parse_args()
store = bank(arguments, "massive/en-US")
arrays = massive_arrays(arguments, store)


def ours() -> float:
    out = arguments.work / "train-epoch-run"
    flags = ("--epochs", str(arguments.epochs), "--lr", "2e-3", "--threads", str(arguments.threads))
    result = layerbank("train", store, "--target", "tags", "--out", out, "--overwrite", *flags)
    return float(result["seconds_per_epoch"])


def plain() -> float:
    flags = ["--epochs", str(arguments.epochs), "--threads", str(arguments.threads)]
    script = str(arguments.plain / "plain_train.py")
    return float(run([sys.executable, script, str(arrays), *flags])["seconds_per_epoch"])


show(check="one attention head, an epoch of massive/en-US tags", **pairs(ours, plain, arguments.repeats))
