"""Seconds of an extraction: snips train, float32 forward, all tokens and layers, a float16 bank.

Against the plain script (model load and process start outside on both sides, tokenizing and writing
inside). With `--against forward` against nothing but the forwards of the very same batches in this process,
one after the other on all threads; with `--against side-by-side` against those forwards as an extraction
runs them, each on one thread.
"""

import shutil

from _common import encoder, layerbank, pairs, parser, run, show

made = parser(__doc__)
made.add_argument("--against", choices=("plain", "forward", "side-by-side"), default="plain")
made.add_argument("--precision", default="float32")
made.add_argument("--rows", type=int, default=0, help="only so many rows, to try the script")
arguments = made.parse_args()
folder = arguments.work / "snips-train"
folder.mkdir(parents=True, exist_ok=True)
lines = (arguments.data / "snips/train.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
(folder / "train.jsonl").write_text("".join(lines[: arguments.rows or None]), encoding="utf-8")
store = arguments.work / "extraction-bank"
flags = ("--keep", "all", "--max-length", "256", "--threads", str(arguments.threads))


def ours() -> float:
    shutil.rmtree(store, ignore_errors=True)
    options = ("--encoder", encoder(), "--store", store, "--precision", arguments.precision)
    return float(layerbank("extract", folder, *options, *flags)["seconds"])


def plain() -> float:
    import sys

    out = arguments.work / "naive.npy"
    script = str(arguments.plain / "naive_extract.py")
    rows = str(folder / "train.jsonl")
    command = [sys.executable, script, encoder(), rows, str(out), "--threads", str(arguments.threads)]
    return float(run(command)["seconds"])


def forwards() -> float:
    """Seconds of the forwards of every batch of the bank, states dropped; batches are padded beforehand."""
    import time
    from concurrent.futures import ThreadPoolExecutor

    import torch

    from cache import open_bank
    from pipeline.corpus import load_corpus
    from pipeline.device import one_thread_each
    from pipeline.encoder import Encoder, _pad
    from pipeline.extract import _tokenize
    from pipeline.grouping import group

    torch.set_num_threads(arguments.threads)
    loaded = Encoder(encoder(), device="cpu", words=True, precision=arguments.precision)
    tokens = _tokenize(load_corpus(str(folder)), "train", loaded, 256)
    bank = open_bank(str(store))
    split, layers, batches = bank.split("train"), bank.recipe.layers, []
    for block in range(split.n_blocks):
        rows = split.row[split.start // split.block_tokens == block]
        for chosen in group(tokens.length[rows], bank.recipe.batch_tokens):
            size = tokens.length[rows[chosen]]
            padded, types, _ = _pad(tokens, rows[chosen], size, loaded._pad_id)
            batches.append((padded, types, size))
    loaded._forward(*batches[0], layers)
    began = time.perf_counter()
    if arguments.against == "forward":
        for batch in batches:
            loaded._forward(*batch, layers)
        return time.perf_counter() - began
    encoders = loaded.side_by_side(arguments.threads)
    with one_thread_each(loaded.device), ThreadPoolExecutor(len(encoders)) as pool:
        waiting = iter(batches)  # shared: each encoder takes the next one
        list(pool.map(lambda one: [one._forward(*batch, layers) and None for batch in waiting], encoders))
    return time.perf_counter() - began


other = plain if arguments.against == "plain" else forwards
show(
    check=f"extraction of snips train against {arguments.against}", precision=arguments.precision,
    **pairs(ours, other, arguments.repeats),
)  # fmt: skip
