"""Writes a bank: first its plan, then its blocks in any order, completion last.

A block is whole or absent: each chunk is written under a temporary name and renamed, and a run that
was killed leaves nothing that counts. Opening the writer again on the same rows goes on where it ended.
"""

from collections.abc import Collection, Mapping
from contextlib import ExitStack
from dataclasses import replace
from types import TracebackType
from typing import Any

import numpy as np
import zarr
from jaxtyping import Int, Shaped
from numpy import ndarray

from cache import calibration, codecs, growth, receipt, skeleton, store, targets
from cache.calibration import Calibration
from cache.errors import BankIncomplete, CacheError
from cache.layout import CLIPPED, GROWING, STATES, TOKEN_ARRAYS, Recipe
from cache.place import Place, place
from cache.plan import Plan, deal
from cache.skeleton import Rows


class Writer:
    """One bank being written. Use it as a context manager: it holds the bank's lock meanwhile.

    A bank that is there grows by the rows that it lacks, see `cache.growth`.

    Args:
        path: folder or URL of the bank; made when it is not there.
        recipe: what the bank is made with.
        rows: the rows of each split.
        repair: read every byte of what is there, also where the bank was complete.
        versions: versions of the packages that take part, for the record.

    Raises:
        CacheError: the place holds something else, a bank of another recipe, or one with rows that are not
            among these.
        BankLocked: another process is writing into it.
    """

    def __init__(
        self,
        path: str,
        recipe: Recipe,
        rows: Mapping[str, Rows],
        versions: Mapping[str, str] | None = None,
        *,
        repair: bool = False,
    ) -> None:
        self.place: Place = place(path)
        self.path: str = self.place.name
        self._repair = repair
        self._was_complete = False
        self._left: dict[str, int] = {}  # blocks of a bank that was complete, its files as they were left
        self.recipe = recipe
        self.rows = dict(rows)
        self.plans: dict[str, Plan] = {
            name: deal(split.lengths, block_tokens=recipe.block_tokens, seed=recipe.seed, kept=split.kept)
            for name, split in rows.items()
        }
        self._dtype = codecs.numpy_dtype(recipe.dtype)
        self._versions = dict(versions or {})
        self.new_rows: dict[str, int] = {}
        """Rows of each split that a bank which was there did not have."""
        self._fingerprint: str | None = None
        self._calibration: Calibration | None = None
        self._exit = ExitStack()

    @classmethod
    def attached(cls, path: str, recipe: Recipe, plans: Mapping[str, Plan]) -> "Writer":
        """A writer of blocks alone, for another process than the one that holds the lock."""
        writer = cls(path, recipe, {})
        writer.plans = dict(plans)
        writer._root = store.open_root(path, "r+")
        return writer

    def __enter__(self) -> "Writer":
        """Takes the lock, then makes the bank or checks that the one there is of the same making."""
        self._exit.enter_context(self.place.writing())
        try:
            self._root = self._open()
        except BaseException:
            self._exit.close()
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Gives the lock back."""
        self._exit.close()

    @property
    def complete(self) -> bool:
        """Whether the bank was complete when it was opened, and no block has been found bad since."""
        return bool(self._root.attrs["complete"])

    @property
    def calibration(self) -> Calibration | None:
        """Scale and shift of an int8 bank; None where they are still to be given to `calibrate`."""
        if self._calibration is None:
            try:
                self._calibration = calibration.settle(self._root, self.plans)
            except OSError as error:
                raise store.disk_error(self.path, error) from error
        return self._calibration

    def calibrate(self, made: Calibration) -> None:
        """Fixes scale and shift of an int8 bank, before its first block is written.

        Raises:
            CacheError: the bank was calibrated before, to other values; or the disk refused.
        """
        try:
            calibration.record(self._root, self.plans, made)
        except OSError as error:
            raise store.disk_error(self.path, error) from error
        self._calibration = made

    def missing(self, split: str) -> list[int]:
        """Blocks that are absent, cut short or damaged.

        Nothing is read of a complete bank whose files are as they were left; of any other complete bank,
        and to repair one, every byte is. Of an unfinished one on a disk too: a process that was killed, or
        a machine that lost power, leaves files whose size says nothing; on an object store it says all.
        """
        n_blocks = self.plans[split].n_blocks
        by_size = n_blocks if self.place.trusted and not self._was_complete else self._left.get(split, 0)
        if self._repair:
            by_size = 0
        sizes = self.place.sizes(split) if by_size else {}
        bad = [
            block
            for block in range(n_blocks)
            if not self._block_is_whole(split, block, sizes if block < by_size else None)
        ]
        if bad and self.complete:
            self._update(self._root, {"complete": False})
        return bad

    def write_block(
        self,
        split: str,
        block: int,
        states: Shaped[ndarray, "layer token width"],
        tokens: Mapping[str, Shaped[ndarray, " token"]],
        clipped: Int[ndarray, " layer"] | None = None,
    ) -> int:
        """Writes one block. Writing it again, from any process, makes the same files.

        Args:
            split: its split.
            block: its number.
            states: the states of the bank's layers, as long as the block has room; fill is zero.
            tokens: `input_ids`, `word_id` and `kind` of the same tokens.
            clipped: of an int8 bank, how many states of each layer were out of range.

        Returns:
            Bytes written.

        Raises:
            CacheError: a state is NaN, infinite or too large for the dtype, or the disk refused.
        """
        plan = self.plans[split]
        shape = (len(self.recipe.layers), plan.block_tokens, self.recipe.encoder.width)
        assert (states.shape, states.dtype) == (shape, self._dtype), (states.shape, states.dtype)
        assert 0 <= block < plan.n_blocks, block
        self._check_finite(split, block, states)
        if self.recipe.dtype == "int8":
            assert clipped is not None, "an int8 block without its clipped states"
            assert self.calibration is not None, "an int8 block before scale and shift"
            self._write_clipped(split, block, np.asarray(clipped, np.int64)[None])
        chunks: list[tuple[str, tuple[int, ...], ndarray]] = [
            (STATES, (index, block, 0), states[index : index + 1]) for index in range(len(states))
        ]
        for name, dtype in TOKEN_ARRAYS.items():
            chunks.append((name, (block,), np.asarray(tokens[name], dtype)))
        return sum(self.place.each(lambda chunk: self._write(split, *chunk), chunks))

    def write_target(self, split: str, target: targets.Target) -> None:
        """Writes labels given in row order: one a row, or for tags one a word."""
        receipt.withdraw(self._root)
        plan, values = self.plans[split], target.values
        rows = self.rows[split]
        counts = {"tags": rows.n_words, "choice": rows.n_words, "token": rows.length}.get(target.kind)
        dealt = values[plan.row] if counts is None else targets.reorder_tags(values, counts, plan.row)
        extra = targets.reorder_extra(target.extra, plan.row)
        targets.write_target(self._root[split], replace(target, values=dealt, extra=extra))

    def lengthen_targets(self, written: Collection[str]) -> list[str]:
        """Gives targets that the data does not have room for the rows that came: those have no label.

        Args:
            written: names of the targets that were written for all rows.

        Returns:
            Names of the targets that have rows without a label now.
        """
        lengthened = set()
        for name, plan in self.plans.items():
            group, n_words = self._root[name], self.rows[name].n_words[plan.row]
            for target in targets.target_names(group):
                if target in written:
                    continue
                try:
                    found = targets.read_target(group, target)
                except CacheError:  # its readers say what to do
                    continue
                units = int(n_words.sum()) if found.kind in ("tags", "choice") else len(plan.row)
                if len(found.values) < units:
                    receipt.withdraw(self._root)
                    longer = targets.lengthen(found, units - len(found.values))
                    targets.write_target(group, longer, keep_extra=True)
                    lengthened.add(target)
        return sorted(lengthened)

    def finish(
        self,
        reports: Mapping[str, Mapping[str, Any]] | None = None,
        *,
        skipped: Mapping[str, str] | None = None,
        asked: str | None = None,
        written: Collection[str] = (),
    ) -> None:
        """Marks every split and then the bank complete.

        Args:
            reports: further attributes of each split, such as counts.
            skipped: columns that are no targets, and why.
            asked: what tells the command and its data, so that the same is known again.
            written: the columns of labels that the command writes.

        Raises:
            BankIncomplete: a block is not there.
        """
        for name, plan in self.plans.items():
            stored = self.place.sizes(name)
            for block in range(plan.n_blocks):
                if not all(key in stored for key in self._chunks(name, block)):
                    raise BankIncomplete(
                        f"split {name}, block {block} of {self.path} is not there: run the same "
                        "'layerbank extract' again"
                    )
        self.place.tidy()  # of what a killed worker left
        for name in self.plans:
            report = dict((reports or {}).get(name, {}))
            self._update(self._root[name], {**report, "complete": True})
        last: dict[str, Any] = {"skipped": dict(skipped or {}), "complete": True}
        if asked is not None or not receipt.fits(self._root.attrs, self.place):
            last |= receipt.note(self.place, asked, written)
        if self._fingerprint is None:
            self._update(self._root, last)
        else:
            self._end_growth({**last, "fingerprint": self._fingerprint})

    def _end_growth(self, last: Mapping[str, Any]) -> None:
        """Switches to the grown bank by one write of the root's attributes."""
        kept = {name: value for name, value in self._root.attrs.items() if name != GROWING}
        try:
            self._root.attrs.put({**kept, **last})
            growth.forget(self._root)
        except OSError as error:
            raise store.disk_error(self.path, error) from error

    def _update(self, group: zarr.Group, attrs: Mapping[str, Any]) -> None:
        try:
            # Not `attrs.update`, which writes the file once for every key.
            group.update_attributes(dict(attrs))
        except OSError as error:
            raise store.disk_error(self.path, error) from error

    def _open(self) -> zarr.Group:
        try:
            if not skeleton.is_planned(self.place):
                skeleton.make(self.path, self.recipe, self.plans, self.rows, self._versions)
            self.place.tidy()
            root = store.open_root(self.path, "r+")
            skeleton.check_same(self.path, root, self.recipe)
            self._was_complete = bool(root.attrs["complete"])
            if self._was_complete and receipt.fits(root.attrs, self.place):
                splits = store.members(root).items()
                self._left = {name: int(split.attrs.get("n_blocks", 0)) for name, split in splits}
            grown = growth.settle(self.path, root, self.recipe, self.rows, self.plans)
            self.plans, self.new_rows, self._fingerprint = grown.plans, grown.new_rows, grown.fingerprint
            for name in self.plans:
                targets.recover(root[name])
            skeleton.restore(root, self.recipe, self.plans, self.rows)
        except OSError as error:
            raise store.disk_error(self.path, error) from error
        return root

    def _block_is_whole(self, split: str, block: int, sizes: Mapping[str, int] | None) -> bool:
        chunks, plain = self._chunks(split, block), self.recipe.codec == "none"
        if sizes is not None:
            return all(
                sizes.get(key) == n_bytes + store.CRC_BYTES if plain else sizes.get(key, 0) > 0
                for key, n_bytes in chunks.items()
            )
        if not plain:
            return self._reads_back(split, block)
        return all(self.place.each(lambda chunk: self.place.is_whole(*chunk), chunks.items()))

    def _reads_back(self, split: str, block: int) -> bool:
        group, room = self._root[split], self.plans[split].block_tokens
        tokens = slice(block * room, (block + 1) * room)

        def read(array: str, selection: Any) -> bool:
            try:
                return group[array][selection] is not None
            except store.UNREADABLE:
                return False

        arrays: list[tuple[str, Any]] = [(STATES, (k, tokens)) for k in range(len(self.recipe.layers))]
        arrays += [(name, tokens) for name in TOKEN_ARRAYS]
        if self.recipe.dtype == "int8":
            arrays.append((CLIPPED, block))
        there = self.place.each(lambda key: self.place.size(key) is not None, self._chunks(split, block))
        return all(there) and all(self.place.each(lambda chunk: read(*chunk), arrays))

    def _chunks(self, split: str, block: int) -> dict[str, int]:
        """The keys of a block's chunks, and the bytes of each without compression and checksum."""
        room, n_layers = self.plans[split].block_tokens, len(self.recipe.layers)
        state_bytes = room * self.recipe.encoder.width * self._dtype.itemsize
        found = {store.chunk_key(split, STATES, k, block, 0): state_bytes for k in range(n_layers)}
        for name, dtype in TOKEN_ARRAYS.items():
            found[store.chunk_key(split, name, block)] = room * np.dtype(dtype).itemsize
        if self.recipe.dtype == "int8":
            found[store.chunk_key(split, CLIPPED, block, 0)] = 8 * n_layers
        return found

    def _write(self, split: str, array: str, index: tuple[int, ...], values: ndarray) -> int:
        key = store.chunk_key(split, array, *index)
        if self.recipe.codec == "none":
            self.place.put(key, values)
            return int(values.nbytes)
        block = index[1] if array == STATES else index[0]
        room = self.plans[split].block_tokens
        tokens = slice(block * room, (block + 1) * room)
        # A chunk that happens to hold zeros alone must exist too: existing is being written.
        target = self._root[split][array].with_config({"write_empty_chunks": True})
        try:
            target[(index[0], tokens) if array == STATES else tokens] = (
                values[0] if array == STATES else values
            )
        except OSError as error:
            raise store.disk_error(self.path, error) from error
        return self.place.size(key) or 0

    def _write_clipped(self, split: str, block: int, counts: Int[ndarray, "1 layer"]) -> None:
        self.place.put(store.chunk_key(split, CLIPPED, block, 0), counts)

    def _check_finite(self, split: str, block: int, states: ndarray) -> None:
        for index, layer in enumerate(self.recipe.layers):
            token = codecs.first_nonfinite(states[index])
            if token is not None:
                raise self.bad_state(split, block, layer, token)

    def bad_state(self, split: str, block: int, layer: int, token: int) -> CacheError:
        """What to say of a state that cannot be stored.

        Args:
            split: its split.
            block: its block.
            layer: number of its layer.
            token: its place in the block.
        """
        cure = "--dtype bfloat16 or float32" if self.recipe.dtype == "float16" else "another encoder"
        return CacheError(
            f"layer {layer} has a state that is NaN, infinite or too large for {self.recipe.dtype} "
            f"(split {split}, block {block}, token {token}, source row "
            f"{self._row_of(split, block, token)}): use {cure}"
        )

    def _row_of(self, split: str, block: int, token: int) -> int:
        plan = self.plans[split]
        at = np.searchsorted(plan.start, block * plan.block_tokens + token, side="right") - 1
        return plan.source_row(int(at))
