"""Gathering random sentences of a bank, against a memory map of one plain array of the same states.

Uses the bank that `streaming.py` leaves.
"""

import time

import numpy as np
from _common import bank, parser, show

from cache import open_bank

made = parser(__doc__)
made.add_argument("--sentences", type=int, default=20_000)
arguments = made.parse_args()
split = open_bank(str(bank(arguments, "massive/en-US"))).split("train")
plain_file = arguments.work / "plain-states.npy"
if not plain_file.exists():
    np.save(plain_file, np.ascontiguousarray(split.numpy().transpose(1, 0, 2)))
plain = np.load(plain_file, mmap_mode="r")  # token layer width: a sentence is one run of bytes
random = np.random.default_rng(0)
list(split.blocks())  # checked and mapped, as after a first pass


def ours(chosen: np.ndarray) -> float:
    began = time.perf_counter()
    for example in chosen:
        split.gather([example])
    return time.perf_counter() - began


def batched(chosen: np.ndarray) -> float:
    began = time.perf_counter()
    for first in range(0, len(chosen), 32):
        split.gather(chosen[first : first + 32])
    return time.perf_counter() - began


def mapped(chosen: np.ndarray) -> float:
    began = time.perf_counter()
    for example in chosen:
        start = split.start[example]
        np.array(plain[start : start + split.length[example]])
    return time.perf_counter() - began


times = []
for _ in range(arguments.repeats):
    chosen = random.integers(0, split.n_examples, arguments.sentences)
    times.append((ours(chosen), batched(chosen), mapped(chosen)))
one, many, plain_s = np.median(times, axis=0)
show(
    check="gathering random sentences", sentences_per_s=arguments.sentences / one,
    in_batches_of_32=arguments.sentences / many, memory_map=arguments.sentences / plain_s,
    ratio=plain_s / one, ratio_in_batches=plain_s / many,
)  # fmt: skip
