"""Seconds of an extraction against the plain script: snips train, float32 forward, all tokens and layers.

Model load and process start are outside on both sides, tokenizing and writing inside.
"""

import shutil

from _common import encoder, layerbank, pairs, parser, run, show

arguments = parser(__doc__).parse_args()
folder = arguments.work / "snips-train"
folder.mkdir(parents=True, exist_ok=True)
shutil.copy(arguments.data / "snips/train.jsonl", folder / "train.jsonl")


def ours() -> float:
    store = arguments.work / "extraction-bank"
    shutil.rmtree(store, ignore_errors=True)
    flags = ("--keep", "all", "--max-length", "256", "--threads", str(arguments.threads))
    return float(layerbank("extract", folder, "--encoder", encoder(), "--store", store, *flags)["seconds"])


def plain() -> float:
    import sys

    out = arguments.work / "naive.npy"
    script = str(arguments.plain / "naive_extract.py")
    rows = str(folder / "train.jsonl")
    command = [sys.executable, script, encoder(), rows, str(out), "--threads", str(arguments.threads)]
    return float(run(command)["seconds"])


show(check="extraction of snips train", **pairs(ours, plain, arguments.repeats))
