"""Extraction by an encoder of BERT-large's shape on a GPU, against its bare forwards and the disk.

Random weights, bfloat16, sentences of massive's lengths (the packaged encoder's tokens, or `--lengths`, a
file with one number a line). (a) forward-only: the same batches, states dropped; (b) the rate at which the
disk takes the same bytes in files of a chunk's size. The figure is the extraction's rate over the slower's.
`--shape tiny --device cpu` tries the script where there is no GPU.
"""

import os
import shutil
import time
from pathlib import Path

import numpy as np
import torch
from _common import layerbank, parser, show
from _random_encoder import SHAPES, make_data, make_encoder, massive_lengths

from cache import open_bank
from pipeline.corpus import load_corpus
from pipeline.encoder import Encoder, _pad
from pipeline.extract import _tokenize
from pipeline.grouping import group

made = parser(__doc__)
made.add_argument("--shape", choices=SHAPES, default="large")
made.add_argument("--device", default="cuda")
made.add_argument("--precision", default="bfloat16")
made.add_argument("--lengths", type=Path)
made.add_argument("--rows", type=int, default=11_514)
made.add_argument("--keep", default="all")
arguments = made.parse_args()


def forward_s(folder: Path, model: Path, store: Path) -> float:
    """Seconds of the forwards of every batch of the bank, states dropped."""
    torch.set_num_threads(arguments.threads)
    loaded = Encoder(str(model), device=arguments.device, words=True, precision=arguments.precision)
    bank = open_bank(str(store))
    tokens = _tokenize(load_corpus(str(folder)), "train", loaded, bank.recipe.max_length)
    split, batches = bank.split("train"), []
    for block in range(split.n_blocks):
        rows = split.row[split.start // split.block_tokens == block]
        for chosen in group(tokens.length[rows], bank.recipe.batch_tokens):
            size = tokens.length[rows[chosen]]
            padded, types, _ = _pad(tokens, rows[chosen], size, loaded._pad_id)
            batches.append((padded, types, size))
    for batch in batches[:20]:
        loaded._forward(*batch, bank.recipe.layers)
    synchronize()
    began = time.perf_counter()
    for batch in batches:
        loaded._forward(*batch, bank.recipe.layers)
    synchronize()
    return time.perf_counter() - began


def synchronize() -> None:
    if arguments.device != "cpu":
        torch.cuda.synchronize()


def disk_s(store: Path) -> float:
    """Seconds to write the bank's bytes anew, in files of the same sizes, one thread."""
    sizes = [path.stat().st_size for path in store.rglob("*") if path.is_file()]
    folder = arguments.work / "disk"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    block = os.urandom(max(sizes))
    began = time.perf_counter()
    for number, n_bytes in enumerate(sizes):
        with (folder / str(number)).open("wb", buffering=0) as file:
            file.write(memoryview(block)[:n_bytes])
    seconds = time.perf_counter() - began
    shutil.rmtree(folder)
    return seconds


lengths = np.loadtxt(arguments.lengths, dtype=np.int64) if arguments.lengths else None
folder = make_data(
    arguments.work / "gpu-data",
    {"train": arguments.rows},
    massive_lengths(arguments.data) if lengths is None else lengths,
)
model = make_encoder(arguments.work / f"encoder-{arguments.shape}", arguments.shape)
store = arguments.work / "gpu-bank"
runs = []
for _ in range(arguments.repeats):
    shutil.rmtree(store, ignore_errors=True)
    result = layerbank(
        "extract", folder, "--encoder", model, "--store", store, "--keep", arguments.keep, "--device",
        arguments.device, "--precision", arguments.precision, "--threads", str(arguments.threads),
    )  # fmt: skip
    limits = {"forward_s": forward_s(folder, model, store), "disk_s": disk_s(store)}
    runs.append({"seconds": result["seconds"], **limits})
ratio = float(np.median([max(run["forward_s"], run["disk_s"]) / run["seconds"] for run in runs]))
name = "cpu" if arguments.device == "cpu" else torch.cuda.get_device_name()
show(
    check="extraction on a GPU", device=name, shape=arguments.shape, precision=arguments.precision,
    tokens=result["tokens"], bytes=result["bytes"], batch_tokens=result["batch_tokens"], runs=runs,
    tokens_per_s=result["tokens"] / float(np.median([run["seconds"] for run in runs])),
    share_of_the_slower_limit=ratio,
)  # fmt: skip
