"""Training on a bank that does not fit --memory, and streaming with nothing computed.

The bank is massive/en-US, repeated until it is as large as asked. Peak memory is that of a process of its
own.
"""

import json
import os
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
from _common import bank, parser, show

from cache import Bank, Rows, Split, Writer, open_bank
from cache.targets import ranges, spans

made = parser(__doc__)
made.add_argument("--gb", type=float, default=8.0)
made.add_argument("--memory", default="1GiB")
made.add_argument("--heads", type=int, default=1)
made.add_argument("--cold", action="store_true", help="drop the files from the page cache before each read")
arguments = made.parse_args()


def repeated(source: Bank, store: Path, n_bytes: float) -> Path:
    """A bank of a source's rows, its train split repeated; made once."""
    times = {"train": int(np.ceil(n_bytes / source.n_bytes)), "dev": 1}
    rows = {name: _rows(source.split(name), n) for name, n in times.items()}
    with Writer(str(store), source.recipe, rows) as writer:
        for name, n in times.items():
            split = source.split(name)
            for block in writer.missing(name):
                _write_block(writer, split, block)
            intent, tags = split.target("intent"), split.target("tags")
            place, bounds = np.argsort(split.row), spans(split.n_words)
            by_row = np.concatenate([tags.values[bounds[i] : bounds[i + 1]] for i in place])
            writer.write_target(name, replace(intent, values=np.tile(intent.values[place], n)))
            writer.write_target(name, replace(tags, values=np.tile(by_row, n)))
        writer.finish()
    return store


def _rows(split: Split, times: int) -> Rows:
    place = np.argsort(split.row)  # example of each row
    length, n_words = (np.tile(column[place], times) for column in (split.length, split.n_words))
    return Rows(lengths=length[None], n_words=n_words, text_hash=np.arange(len(length), dtype=np.uint64))


def _write_block(writer: Writer, split: Split, block: int) -> None:
    plan = writer.plans[split.name]
    chosen = np.argsort(split.row)[plan.row[plan.examples(block)] % split.n_examples]
    found, _ = split.gather(chosen)
    states = np.zeros((len(found), plan.block_tokens, split.width), found.dtype)
    states[:, : found.shape[1]] = found
    at = ranges(split.start[chosen], split.length[chosen])
    tokens = {}
    for name, fill in (("input_ids", 0), ("word_id", -1), ("kind", 0)):
        tokens[name] = np.full(plan.block_tokens, fill, dtype=np.int64)
        tokens[name][: len(at)] = getattr(split, name)[at]
    writer.write_block(split.name, block, states, tokens)


def files(store: Path) -> list[Path]:
    return sorted((store / "train" / "states").rglob("c/*/*/0"))


def forget(store: Path) -> None:
    """Drops the chunk files from the page cache."""
    if arguments.cold:
        for path in files(store):
            descriptor = os.open(path, os.O_RDONLY)
            os.fsync(descriptor)
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(descriptor)


def plain_read(store: Path) -> float:
    """Seconds of reading every chunk file into one buffer, one after the other."""
    forget(store)
    buffer = bytearray(max(path.stat().st_size for path in files(store)))
    began = time.perf_counter()
    for path in files(store):
        with path.open("rb", buffering=0) as file:
            while file.readinto(buffer):
                pass
    return time.perf_counter() - began


def streamed(store: Path, layers: list[int] | None = None) -> float:
    """Seconds of streaming the train split, every chunk checked, with nothing computed on it."""
    forget(store)
    split = open_bank(str(store)).split("train")
    began = time.perf_counter()
    for _ in split.blocks(layers):
        pass
    return time.perf_counter() - began


def trained(store: Path, memory: str) -> tuple[float, float]:
    """Seconds an epoch, and peak memory in GiB, of a training run."""
    out = arguments.work / "streaming-run"
    flags = ["--target", "tags", "--out", str(out), "--overwrite", "--epochs", "1", "--memory", memory]
    # Not getrusage: a child starts with the peak of the process that it was forked from.
    code = (
        "import sys, cli; sys.argv = ['layerbank', *sys.argv[1:]]\n"
        "try: cli.app()\n"
        "finally: print(open('/proc/self/status').read().split('VmHWM:')[1].split()[0], file=sys.stderr)"
    )
    command = [sys.executable, "-c", code, "train", str(store), *flags, "--threads", str(arguments.threads)]
    done = subprocess.run([*command, "--json"], check=True, capture_output=True, text=True)
    return json.loads(done.stdout)["seconds_per_epoch"], int(done.stderr.split()[-1]) / 2**20


source = open_bank(str(bank(arguments, "massive/en-US")))
store = repeated(source, arguments.work / f"repeated-{arguments.gb:g}", arguments.gb * 1e9)
reads, streams = [], []
for _ in range(arguments.repeats):
    reads.append(plain_read(store))
    streams.append(streamed(store))
one_layer = np.median([streamed(store, [3]) for _ in range(arguments.repeats)])
small_s, small_gib = trained(store, arguments.memory)
large_s, large_gib = trained(store, "64GiB")
n_bytes = sum(path.stat().st_size for path in files(store))
show(
    check="streaming",
    gigabytes=n_bytes / 1e9,
    plain_read_s=float(np.median(reads)),
    stream_s=float(np.median(streams)),
    share_of_plain_read=float(np.median(reads) / np.median(streams)),
    one_layer_share=float(one_layer / np.median(streams)),
    resident_epoch_s=large_s,
    streamed_epoch_s=small_s,
    share_of_resident=large_s / small_s,
    peak_gib=small_gib,
    peak_resident_gib=large_gib,
)
