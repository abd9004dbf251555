"""Small banks for the tests of `cache`: their states are a pure function of split, row and layer.

Run as a program it writes such a bank, for the tests that kill a writer:
``python banks.py FOLDER [hold]``.
"""

import atexit
import shutil
import sys
import time
import zlib
from dataclasses import replace
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np

from cache import Bank, Calibration, EncoderRecord, Kind, Recipe, Rows, Writer, open_bank
from cache.codecs import numpy_dtype
from cache.fingerprint import hash_texts

RECIPE = Recipe(
    encoder=EncoderRecord(name="tiny", revision=None, weights_sha256="w" * 64, n_layers=4, width=8),
    tokenizer_sha256="t" * 64,
    columns={"text": "sentence", "text_pair": None},
    max_length=16,
    keep="all",
    layers=(0, 1, 2, 3),
    dtype="float16",
    seed=3,
    block_tokens=16,
    codec="none",
    batch_tokens=64,
)

TRAIN = [5, 0, 3, 16, 7, 1, 9, 2, 4, 6]
DEV = [4, 6, 0, 2]


def recipe(**changes):
    """The recipe of the tests, some of it changed."""
    return replace(RECIPE, **changes)


def rows(lengths, text="row"):
    """Rows of some lengths, with two thirds as many words as tokens."""
    length = np.array(lengths, dtype=np.int32)
    return Rows(
        lengths=length[None],
        n_words=(length * 2 // 3).astype(np.int32),
        text_hash=hash_texts(f"{text} {i}" for i in range(len(length))),
    )


def splits():
    """The rows of both splits."""
    return {"train": rows(TRAIN), "dev": rows(DEV, "dev row")}


def calibration_of(what: Recipe):
    """Some scale and shift for the layers of a recipe; about one state in twenty is out of range."""
    layer = np.arange(what.encoder.n_layers)[:, None] + np.zeros(what.encoder.width)
    scale, shift = 2 / 127 * (1 + layer / 100), (layer - 1) / 16
    scale, shift = np.stack([scale, 0.9 * scale]), np.stack([shift, shift + 0.1])
    layers = list(what.layers)
    return Calibration(scale=scale.astype(np.float32)[:, layers], shift=shift.astype(np.float32)[:, layers])


def channels_of(calibration, first):
    """Scale and shift of each token, as layer token width."""
    group = np.asarray(first, dtype=int)
    return calibration.scale[group].swapaxes(0, 1), calibration.shift[group].swapaxes(0, 1)


def numbers_of(codes, calibration, first):
    """Stored states as numbers."""
    scale, shift = channels_of(calibration, first)
    return codes.astype(np.float32) * scale + shift


def codes_of(states, calibration, first):
    """States as int8, and how many of each layer are out of range."""
    scale, shift = channels_of(calibration, first)
    steps = (states.astype(np.float32) - shift) * (1 / scale)
    whole = np.rint(steps)
    return np.clip(whole, -127, 127).astype(np.int8), (np.abs(whole) > 127).sum((1, 2))


def states_of(what: Recipe, split, row, length):
    """The states of a row as they are stored: kept layers, its tokens, width."""
    if what.dtype == "int8":
        return codes_of(floats_of(what, split, row, length), calibration_of(what), np.arange(length) == 0)[
            0
        ]
    return floats_of(what, split, row, length).astype(numpy_dtype(what.dtype))


def floats_of(what: Recipe, split, row, length):
    """The states of a row before they are rounded."""
    random = np.random.default_rng([zlib.crc32(split.encode()), int(row)])
    shape = (what.encoder.n_layers, int(length), what.encoder.width)
    return random.standard_normal(shape)[list(what.layers)]


def zeros(writer: Writer, split):
    """Zeros of a block's shape and type."""
    what, room = writer.recipe, writer.plans[split].block_tokens
    return np.zeros((len(what.layers), room, what.encoder.width), numpy_dtype(what.dtype))


def block_of(writer: Writer, split, block):
    """States and token arrays of a block."""
    plan, states = writer.plans[split], zeros(writer, split)
    room = plan.block_tokens
    tokens = {
        "input_ids": np.zeros(room, np.int32),
        "word_id": np.full(room, -1, np.int32),
        "kind": np.full(room, Kind.FILL, np.uint8),
    }
    here = plan.examples(block)
    for row, start, length in zip(plan.row[here], plan.start[here], plan.length[here], strict=True):
        inside = slice(start - block * room, start - block * room + length)
        states[:, inside] = states_of(writer.recipe, split, row, length)
        tokens["input_ids"][inside] = 1000 * row + np.arange(length)
        tokens["word_id"][inside] = np.arange(length)
        tokens["kind"][inside] = Kind.WORD
    return states, tokens


def write(writer: Writer, split, block):
    """Writes one block."""
    if writer.recipe.dtype != "int8":
        return writer.write_block(split, block, *block_of(writer, split, block))
    if writer.calibration is None:
        writer.calibrate(calibration_of(writer.recipe))
    return writer.write_block(
        split, block, *block_of(writer, split, block), clipped_of(writer, split, block)
    )


def clipped_of(writer: Writer, split, block):
    """How many states of each layer of a block are out of range."""
    plan, what = writer.plans[split], writer.recipe
    here = plan.examples(block)
    counts = np.zeros(len(what.layers), np.int64)
    for row, length in zip(plan.row[here], plan.length[here], strict=True):
        floats, first = floats_of(what, split, row, length), np.arange(length) == 0
        counts += codes_of(floats, calibration_of(what), first)[1]
    return counts


def complete(writer: Writer):
    """Writes what is missing and ends the bank."""
    for split in writer.plans:
        for block in writer.missing(split):
            write(writer, split, block)
    writer.finish()


def make(path, lengths=None, **changes) -> Bank:
    """A complete bank."""
    with Writer(str(path), recipe(**changes), lengths or splits()) as writer:
        complete(writer)
    return open_bank(str(path))


def copy_to(path, codec="none") -> Bank:
    """A copy of a complete bank that is made once: for tests that only read or damage it."""
    shutil.copytree(_template(codec), path)
    return open_bank(str(path))


@cache
def _template(codec):
    folder = TemporaryDirectory(prefix="layerbank-tests-")
    atexit.register(folder.cleanup)
    make(Path(folder.name) / "bank", codec=codec)
    return Path(folder.name) / "bank"


def files_of(path):
    """Every file below a folder, and its bytes."""
    path = Path(path)
    return {str(p.relative_to(path)): p.read_bytes() for p in path.rglob("*") if p.is_file()}


def damage(path):
    """Flips one bit in the middle of a file."""
    content = bytearray(Path(path).read_bytes())
    content[len(content) // 2] ^= 1
    Path(path).write_bytes(content)


LARGE = {"train": rows([500, 300, 200, 400] * 8)}
"""Enough to be killed in the middle of."""


def large_recipe():
    """The recipe of `LARGE`."""
    encoder = replace(RECIPE.encoder, width=128)
    return recipe(encoder=encoder, dtype="float32", max_length=512, block_tokens=512)


def main(path, *mode):
    """Writes the large bank, saying so block by block; or only holds its lock."""
    with Writer(path, large_recipe(), LARGE) as writer:
        print("open", flush=True)
        if mode == ("hold",):
            time.sleep(60)
        for block in writer.missing("train"):
            write(writer, "train", block)
            print("block", block, flush=True)
        writer.finish()


if __name__ == "__main__":
    main(*sys.argv[1:])
