"""A smaller bank from a larger one, without the encoder: another data type, fewer layers, fewer tokens.

Blocks are written as an extraction writes them, so a conversion that was cut off goes on when it is started
again, and what it writes does not depend on how often that happened.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from jaxtyping import UInt8
from numpy import ndarray
from torch import Tensor

from cache import Bank, Recipe, Writer, open_bank
from cache.calibration import LEVELS
from cache.layout import OUTPUT_LAYER, TOKEN_ARRAYS, Codec, Keep
from cache.place import Place, place
from cache.store import local_path
from pipeline.arrays import TORCH_DTYPES, to_numpy
from pipeline.errors import PipelineError
from pipeline.excerpt import Excerpt
from pipeline.quantise import Quantiser
from pipeline.room import NARROWER, check_room
from pipeline.stage import Progress
from pipeline.versions import versions

_BITS = {"float32": 24, "float16": 11, "bfloat16": 8, "int8": 7}
"""Bits of each data type that tell numbers of one size apart."""


@dataclass(frozen=True, kw_only=True)
class Conversion:
    """What a conversion did."""

    source: str
    store: str
    dtype: str
    keep: str
    layers: list[int]
    splits: dict[
        str, dict[str, Any]
    ]  # of each split: examples, tokens, blocks, words cut off, share clipped
    examples: int
    tokens: int  # kept tokens
    source_bytes: int
    bytes: int  # of the bank that was made
    seconds: float
    blocks: int
    blocks_written: int  # the others were whole already
    targets: list[str]
    note: str | None  # what the choice of data type does not do


def convert(
    source: Bank,
    store: str,
    *,
    dtype: str | None = None,
    layers: Sequence[int] | None = None,
    keep: Keep | None = None,
    codec: Codec | None = None,
    force: bool = False,
    repair: bool = False,
    progress: Callable[[Progress], None] = lambda _: None,
) -> Conversion:
    """Makes a bank from another one, or goes on making it; what is not asked for stays as it is.

    Args:
        source: a complete bank.
        store: folder of the bank to make.
        dtype: how states are stored.
        layers: which layers are kept.
        keep: which tokens are kept: no more than the source has.
        codec: lossless compression.
        force: start even where the disk has no room for the bank.
        repair: read every byte of what is there, as `pipeline.extract.extract` does.
        progress: called after every block.

    Raises:
        PipelineError: the source has not what is asked for, or it is what would be written.
        CacheError: the source is damaged; the bank cannot be written, or is of another making.
    """
    began = time.perf_counter()
    _check_paths(source, store)
    recipe = replace(
        source.recipe,
        dtype=dtype or source.recipe.dtype,
        keep=_keep(source, keep),
        layers=_layers(source, layers),
        codec=codec or source.recipe.codec,
        rounded=_rounded(source.recipe, dtype or source.recipe.dtype),
    )
    parts = {name: Excerpt(source.split(name), recipe) for name in source.splits}
    rows = {name: part.rows() for name, part in parts.items()}
    if not force:
        check_room(store, recipe, parts, place(source.path).size(OUTPUT_LAYER) or 0)
    with Writer(store, recipe, rows, versions=versions(), repair=repair) as writer:
        written = _Conversion(writer, parts, progress).run()
        targets = set()
        for name, part in parts.items():
            for target in part.targets():
                writer.write_target(name, target)
                targets.add(target.name)
        reports = {name: _report(writer, part) for name, part in parts.items()}
        _copy_output_layer(place(source.path), writer.place)
        writer.finish(reports, skipped=source.attrs.get("skipped"))
    bank = open_bank(store)
    if recipe.dtype == "int8":
        reports = {
            name: {**r, "clipped_frac": bank.split(name).clipped_frac} for name, r in reports.items()
        }
    return Conversion(
        source=source.path,
        store=store,
        dtype=recipe.dtype,
        keep=recipe.keep,
        layers=list(recipe.layers),
        splits=reports,
        examples=sum(r["examples"] for r in reports.values()),
        tokens=sum(r["tokens"] for r in reports.values()),
        source_bytes=source.n_bytes,
        bytes=bank.n_bytes,
        seconds=time.perf_counter() - began,
        blocks=sum(plan.n_blocks for plan in writer.plans.values()),
        blocks_written=written,
        targets=sorted(targets),
        note=_note(source.recipe.dtype, recipe.dtype),
    )


def _copy_output_layer(source: Place, target: Place) -> None:
    """Takes along the encoder's output layer, which a bank of masked text has."""
    if source.size(OUTPUT_LAYER) is not None:
        target.put_file(OUTPUT_LAYER, source.read_file(OUTPUT_LAYER))


def _check_paths(source: Bank, store: str) -> None:
    here, there = local_path(source.path), local_path(store)
    if source.path == store or (here and there and here.resolve() == there.resolve()):
        raise PipelineError(
            f"convert {source.path}: the bank cannot become itself, name another folder for STORE"
        )
    if here and there and here.resolve() in there.resolve().parents:
        raise PipelineError(
            f"convert {source.path}: STORE {store} lies in the bank, name a folder elsewhere"
        )


def _keep(source: Bank, asked: Keep | None) -> Keep:
    has = source.recipe.keep
    if asked is not None and asked not in NARROWER[has]:
        raise PipelineError(
            f"--keep {asked}: {source.path} keeps {has}, of which {' or '.join(NARROWER[has])} can be "
            "made: extract again for more"
        )
    return asked or has


def _layers(source: Bank, asked: Sequence[int] | None) -> tuple[int, ...]:
    has = source.recipe.layers
    wanted = has if asked is None else tuple(sorted(set(asked)))
    lacking = [layer for layer in wanted if layer not in has]
    if lacking or not wanted:
        raise PipelineError(
            f"--layers {lacking[0] if lacking else ''}: {source.path} keeps {', '.join(map(str, has))}: "
            "choose among these, or extract again"
        )
    return wanted


def _rounded(before: Recipe, after: str) -> str | None:
    """The coarsest data type that the states have had before, unless that is what they keep or float32."""
    had = [name for name in (before.rounded, before.dtype) if name not in (None, "float32", after)]
    if before.dtype == after:
        return before.rounded
    return min(had, key=_BITS.__getitem__, default=None)


def _note(before: str, after: str) -> str | None:
    if _BITS[after] <= _BITS[before]:
        return None
    return (
        f"{after} regains nothing that {before} had rounded away: the bank is larger, its states no better"
    )


class _Conversion:
    """Makes the missing blocks one after the other."""

    def __init__(
        self, writer: Writer, parts: Mapping[str, Excerpt], progress: Callable[[Progress], None]
    ) -> None:
        self._writer, self._parts, self._progress = writer, parts, progress
        self._int8: Quantiser | None = None

    def run(self) -> int:
        """Writes what is missing; returns how many blocks that was."""
        writer = self._writer
        todo = [(split, block) for split in self._parts for block in writer.missing(split)]
        if writer.recipe.dtype == "int8" and not self._carry_calibration():
            self._int8 = Quantiser(writer, torch.device("cpu"), self._floats, self._kind)
        sizes = np.array([self._size(*each) for each in todo]).reshape(-1, 2)
        done, written = np.zeros(2, dtype=np.int64), 0
        for (split, block), size in zip(todo, sizes, strict=True):
            written += self._write(split, block)
            done += size
            self._progress(
                Progress(
                    split=split,
                    examples=int(done[0]),
                    tokens=int(done[1]),
                    written_bytes=written,
                    n_examples=int(sizes[:, 0].sum()),
                    n_tokens=int(sizes[:, 1].sum()),
                )
            )
        return len(todo)

    def _carry_calibration(self) -> bool:
        """int8 from int8: the numbers stay, and what they mean."""
        for part in self._parts.values():
            found = part.calibration()
            if found is None:
                return False
            if self._writer.calibration is None:
                self._writer.calibrate(found)
        return True

    def _size(self, split: str, block: int) -> tuple[int, int]:
        plan = self._writer.plans[split]
        examples = plan.examples(block)
        return examples.stop - examples.start, int(plan.length[examples].sum())

    def _floats(self, split: str, block: int, out: Tensor) -> None:
        """The states of a block to make, as far as the source knows them."""
        part = self._parts[split]
        position = part.positions(self._writer.plans[split], block)
        out[:, : len(position)] = part.floats(position, torch.float32)

    def _kind(self, split: str, block: int) -> UInt8[ndarray, " token"]:
        part = self._parts[split]
        return part.split.kind[part.positions(self._writer.plans[split], block)]

    def _write(self, split: str, block: int) -> int:
        writer, part = self._writer, self._parts[split]
        plan, dtype = writer.plans[split], TORCH_DTYPES[writer.recipe.dtype]
        position = part.positions(plan, block)
        shape = (len(part.layers), plan.block_tokens, part.split.width)
        states, clipped = torch.zeros(shape, dtype=dtype), None
        if self._int8 is not None:
            clipped = self._int8.fill(split, block, states).check(writer, split, block)
        elif dtype == torch.int8:
            states[:, : len(position)] = stored = part.stored(position)
            # Which of them were beyond the range is not known any more: at most those at its ends.
            clipped = (stored.abs() == LEVELS).sum((1, 2)).numpy()
        else:
            states[:, : len(position)] = part.floats(position, dtype)
        small = {}
        for name in TOKEN_ARRAYS:
            small[name] = np.full(plan.block_tokens, -1 if name == "word_id" else 0, dtype=np.int64)
            small[name][: len(position)] = getattr(part.split, name)[position]
        return writer.write_block(split, block, to_numpy(states), small, clipped)


def _report(writer: Writer, part: Excerpt) -> dict[str, Any]:
    plan, attrs = writer.plans[part.split.name], part.split.group.attrs
    return {
        "examples": len(plan.row),
        "tokens": int(plan.length.sum()),
        "blocks": plan.n_blocks,
        "words_cut": attrs.get("words_cut", 0),
        "words_empty": attrs.get("words_empty", 0),
    }
