"""Checks every byte of a bank against its checksums."""

from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import numpy as np

from cache import extras, store
from cache.bank import Bank
from cache.calibration import Calibration
from cache.errors import REPAIR, CacheError
from cache.fingerprint import bank_fingerprint, dealt_fingerprint, rows_fingerprint
from cache.layout import (
    CALIBRATION,
    GENERATIONS,
    OUTPUT_LAYER,
    SCALE,
    SHIFT,
    STATES,
    TOKEN_ARRAYS,
    example_arrays,
)
from cache.place import place
from cache.reader import Split
from cache.targets import unfinished
from cache.tensors import check_tensors


@dataclass(frozen=True, kw_only=True)
class Report:
    """What a check found."""

    blocks: int  # blocks looked at
    bad: list[str]  # one line for each thing that is damaged: split, layer, block, reason, cure

    @property
    def ok(self) -> bool:
        """Whether nothing is damaged."""
        return not self.bad


def verify(bank: Bank) -> Report:
    """Reads every chunk of every array and checks its CRC-32C."""
    blocks, bad = 0, []
    for name in bank.splits:
        split = bank.split(name)
        blocks += split.n_blocks
        bad += _small_arrays(split) + _states(split)
    bad = list(dict.fromkeys(bad)) + _output_layer(bank)
    if not bad:
        bad = _fingerprint(bank) + _calibration(bank)
    return Report(blocks=blocks, bad=bad)


def _fingerprint(bank: Bank) -> list[str]:
    """Whether splits and attributes are still those that the fingerprint was made of."""
    rows, grown, bad = {}, {}, []
    for name in bank.splits:
        split = bank.split(name)
        rows[name] = rows_fingerprint(split.text_hash[np.argsort(split.row)])
        if recorded := split.group.attrs.get(GENERATIONS):
            grown[name] = dealt_fingerprint(split.text_hash, recorded)
            bad += _generations(split)
    if bank_fingerprint(bank.recipe, rows, grown) == bank.fingerprint:
        return bad
    return [
        f"{bank.path}: splits, rows or attributes are not those the fingerprint was made of: extract into "
        "another --store"
    ]


def _generations(split: Split) -> list[str]:
    """Whether the generations of a split make up the split."""
    sums = {key: sum(part[key] for part in split.generations) for key in ("examples", "blocks")}
    if sums == {"examples": split.n_examples, "blocks": split.n_blocks}:
        return []
    return [f"split {split.name}: its generations do not sum to its examples and blocks: extract it anew"]


def _calibration(bank: Bank) -> list[str]:
    """Whether the scale and the shift of each split are those its states were stored with."""
    bad = []
    for name in bank.splits:
        split = bank.split(name)
        if split.scale is None or split.shift is None:
            continue
        if Calibration(scale=split.scale, shift=split.shift).digest != bank.attrs.get(CALIBRATION):
            bad.append(
                f"split {name}: scale and shift are not those of {bank.path}: extract into another --store"
            )
    return bad


def _output_layer(bank: Bank) -> list[str]:
    """Whether the encoder's output layer is there and whole, where a target's decoder starts with it."""
    if bank.recipe.keep != "masked":
        return []
    where = place(bank.path)
    if where.size(OUTPUT_LAYER) is None:
        return [f"{bank.path}/{OUTPUT_LAYER} is not there: run the same 'layerbank extract' again"]
    named = _first_settings(bank)
    if named is None:
        return []
    try:
        shapes = check_tensors(np.frombuffer(where.read_file(OUTPUT_LAYER), np.uint8))
        asked = (named["inner"], named["vocabulary"])
        if shapes.get("projection.weight") != asked:
            raise ValueError(f"no projection.weight of shape {asked}")
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return [f"{bank.path}/{OUTPUT_LAYER} is damaged ({store.one_line(error)}): {REPAIR}"]
    return []


def _first_settings(bank: Bank) -> Mapping[str, Any] | None:
    """The settings of a target whose decoder starts with the encoder's output layer."""
    for name in bank.splits:
        split = bank.split(name)
        for target in split.target_names():
            with suppress(CacheError):  # told already
                settings = split.target(target).settings
                if "output_layer" in settings:
                    return settings
    return None


def _states(split: Split) -> list[str]:
    bad: list[str] = []
    for block in range(split.n_blocks):
        bad += [str(error) for error in split.damaged_states(block)]
    return bad


def _small_arrays(split: Split) -> list[str]:
    bad = []
    if store.member(split.group, STATES) is None:
        bad.append(f"{split.name}/{STATES}/zarr.json is damaged: {REPAIR}")
    for name in TOKEN_ARRAYS:
        bad += [str(error) for error in split.damaged_tokens(name)]
    bad += split.damaged_counts()
    for name in (*example_arrays(split.recipe.keep), SCALE, SHIFT):
        try:
            getattr(split, name)
        except CacheError as error:
            bad.append(str(error))
    for target in unfinished(split.group):
        bad.append(
            f"{split.name}/targets/{target} was cut off while it was written: write it again with "
            "'layerbank label'"
        )
    for target in split.target_names():
        try:
            split.target(target)
            extras.check(split.group, target, split.n_examples)
        except CacheError as error:
            bad.append(str(error))
    return bad
