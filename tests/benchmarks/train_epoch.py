"""Seconds an epoch of one attention head against the plain script: massive/en-US tags, the same states."""

import sys

import numpy as np
from _common import bank, layerbank, pairs, parser, run, show

from cache import Kind, open_bank
from cache.targets import ranges, spans

made = parser(__doc__)
made.add_argument("--epochs", type=int, default=3)
arguments = made.parse_args()
store = bank(arguments, "massive/en-US")
arrays = arguments.work / "massive-en-US.npz"


def export() -> None:
    """The words' states and tags as the plain script takes them."""
    split = open_bank(str(store)).split("train")
    position = ranges(split.start, split.length)
    is_word = split.kind[position] == Kind.WORD
    counts = np.diff(spans(is_word)[spans(split.length)])
    words = position[is_word]
    tags = split.target("tags").values[np.repeat(spans(split.n_words)[:-1], counts) + split.word_id[words]]
    states = np.ascontiguousarray(split.take(words).transpose(1, 0, 2))
    np.savez(arrays, states=states, lengths=counts, labels=tags.astype(np.int64))


def ours() -> float:
    out = arguments.work / "train-epoch-run"
    flags = ("--epochs", str(arguments.epochs), "--lr", "2e-3", "--threads", str(arguments.threads))
    result = layerbank("train", store, "--target", "tags", "--out", out, "--overwrite", *flags)
    return float(result["seconds_per_epoch"])


def plain() -> float:
    flags = ["--epochs", str(arguments.epochs), "--threads", str(arguments.threads)]
    script = str(arguments.plain / "plain_train.py")
    return float(run([sys.executable, script, str(arrays), *flags])["seconds_per_epoch"])


if not arrays.exists():
    export()
show(check="one attention head, an epoch of massive/en-US tags", **pairs(ours, plain, arguments.repeats))
