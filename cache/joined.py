"""Banks joined, not extracted again: a split made of pieces of splits of several banks of one encoder.

No state is copied to disk: a joined split holds its own small arrays and reads states from where they lie.
"""

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
from jaxtyping import Int, Shaped
from numpy import ndarray

from cache import codecs
from cache.bank import Bank, open_bank
from cache.chunks import cached_chunks
from cache.errors import CacheError
from cache.layout import Kind, Recipe
from cache.reader import Split
from cache.targets import Target, ranges, spans

_DECODED_BLOCKS = 64
"""Blocks of a joined split that are kept once they are put together, one layer each."""

ClassNames = Callable[[str], tuple[str, ...]]


@dataclass(frozen=True, kw_only=True)
class Piece:
    """Some examples of one split of a bank: all of them, or a seeded draw without replacement.

    A draw is by the rows of the source, so it is the same in every bank of them; a smaller draw of the same
    seed lies within a larger one.
    """

    store: str
    split: str = "train"
    share: float | None = None  # of its examples, above 0 and up to 1
    n_examples: int | None = None  # or how many of them
    seed: int = 0  # of the draw

    def __post_init__(self) -> None:
        """Checks the ranges."""
        if self.share is not None and self.n_examples is not None:
            raise CacheError(f"a piece of {self.store}: give a share or a number of examples, not both")
        if self.share is not None and not 0 < self.share <= 1:
            raise CacheError(
                f"a piece of {self.store}: a share of {self.share}, give one above 0 and up to 1"
            )
        if self.n_examples is not None and self.n_examples < 1:
            raise CacheError(f"a piece of {self.store}: {self.n_examples} examples, give 1 or more")
        if self.seed < 0:
            raise CacheError(f"a piece of {self.store}: a seed of {self.seed}, give 0 or more")

    def examples(self, split: Split) -> Int[ndarray, " chosen"]:
        """The examples of the piece, in an order in which they are a random sample.

        Raises:
            CacheError: more are asked for than there are.
        """
        n_all, n = split.n_examples, self.n_examples
        if n is None:
            n = n_all if self.share is None else max(1, round(self.share * n_all))
        if n > n_all:
            raise CacheError(f"{self.store}: {n} examples asked for, split {self.split} has {n_all}")
        drawn = np.random.default_rng(self.seed).permutation(n_all)[:n]
        chosen = np.sort(np.argsort(split.row, kind="stable")[drawn])
        block = np.minimum(split.start[chosen] // split.block_tokens, max(0, split.n_blocks - 1))
        return chosen[np.argsort(np.argsort(split.sequence)[block], kind="stable")]


class JoinedSplit(Split):
    """Pieces of splits as one split, its examples spread so that each block is a random sample of them all.

    Args:
        name: of the split.
        recipe: of the bank it is a split of.
        parts: the splits, each with its examples in a random order.
        class_names: the names of a target's classes, those of all parts.
    """

    def __init__(
        self,
        name: str,
        recipe: Recipe,
        parts: Sequence[tuple[Split, ndarray]],
        class_names: ClassNames,
    ) -> None:
        dtypes = {split.recipe.dtype for split, _ in parts}
        # Each int8 bank has its own scale, and other types differ in range: float32 holds them all.
        dtype = dtypes.pop() if len(dtypes) == 1 and "int8" not in dtypes else "float32"
        self.name, self.recipe = name, replace(recipe, dtype=dtype)
        self.layers, self.keep, self.width = recipe.layers, recipe.keep, recipe.encoder.width
        self.dtype = codecs.numpy_dtype(dtype)
        self.block_tokens = max(split.block_tokens for split, _ in parts)
        self.group, self._place = parts[0][0].group, parts[0][0]._place
        self._parts, self._class_names = list(parts), class_names
        self._maps = False
        self.scale = self.shift = None

        self._part, self._example = _spread([chosen for _, chosen in parts])
        self.n_examples = len(self._part)
        for array in ("length", "n_words", "row", "text_hash"):
            setattr(self, array, self._gathered([getattr(split, array) for split, _ in parts]))
        self.start, self.n_blocks = _deal(self.length, self.block_tokens)
        self.n_tokens = int(self.length.sum())
        self.generations = [{"examples": self.n_examples, "blocks": self.n_blocks}]
        self._find_tokens()
        self._chunks = cached_chunks(self._open_chunk, _DECODED_BLOCKS)

    def __reduce__(self) -> tuple[Any, ...]:
        """A copy in another process is put together there."""
        return JoinedSplit, (self.name, self.recipe, self._parts, self._class_names)

    def _gathered(self, arrays: Sequence[ndarray]) -> ndarray:
        """One value of each example, in the order of the joined split."""
        out = np.empty(self.n_examples, arrays[0].dtype)
        for part, values in enumerate(arrays):
            mine = self._part == part
            out[mine] = values[self._example[mine]]
        return out

    def _find_tokens(self) -> None:
        """Where each token lies in its own split, and what it is; fill belongs to no part."""
        room = self.n_blocks * self.block_tokens
        self._token_part = np.full(room, -1, np.int16)
        self._token = np.zeros(room, np.int64)
        fills = {"input_ids": (0, np.int32), "word_id": (-1, np.int32), "kind": (int(Kind.FILL), np.uint8)}
        arrays = {name: np.full(room, value, dtype) for name, (value, dtype) in fills.items()}
        for part, (split, _) in enumerate(self._parts):
            mine = self._part == part
            here = ranges(self.start[mine], self.length[mine])
            there = ranges(split.start[self._example[mine]], self.length[mine])
            self._token_part[here], self._token[here] = part, there
            for name, array in arrays.items():
                array[here] = getattr(split, name)[there]
        for name, array in arrays.items():
            setattr(self, name, array)

    def read_block(
        self, block: int, layers: Sequence[int] | None = None
    ) -> list[Shaped[ndarray, "token width"]]:
        """One block's layers, put together from the parts; zeros in fill.

        Raises:
            CorruptChunk: a chunk is damaged.
            CacheError: a layer is not kept, or a store does not answer.
        """
        return self._block(block, self.layer_indices(layers))

    def _block(self, block: int, indices: Sequence[int]) -> list[Shaped[ndarray, "token width"]]:
        layers = [self.layers[index] for index in indices]
        here = slice(block * self.block_tokens, (block + 1) * self.block_tokens)
        out = np.zeros((len(layers), self.block_tokens, self.width), self.dtype)
        for part, (split, _) in enumerate(self._parts):
            mine = np.flatnonzero(self._token_part[here] == part)
            if len(mine):
                tokens = self._token[here][mine]
                out[:, mine] = split.to_float(split.take(tokens, layers), tokens, layers)
        return list(out)

    def _open_chunk(self, index: int, block: int) -> Shaped[ndarray, "token width"]:
        return self._block(block, [index])[0]

    def target_names(self) -> dict[str, dict[str, Any]]:
        """The targets of any part; `target` says where one is lacking."""
        known = {name: one for split, _ in self._parts for name, one in split.target_names().items()}
        return {name: {**one, "classes": len(self._class_names(name))} for name, one in known.items()}

    def target(self, name: str) -> Target:
        """The labels of all parts, their classes numbered alike by name.

        Raises:
            CacheError: a part has no such target, or one of another kind.
        """
        first, *others = found = [_target_of(split, name) for split, _ in self._parts]
        for (split, _), other in zip(self._parts[1:], others, strict=True):
            if other.kind != first.kind:
                raise CacheError(
                    f"target {name!r} is {first.kind} in {_path(self._parts[0][0])} and {other.kind} in "
                    f"{_path(split)}: join banks that have it of one kind"
                )
        names = self._class_names(name) if first.names else ()
        values = [renumbered(target, names).values for target in found]
        counts = [_units(split, first.kind) for split, _ in self._parts]
        return replace(first, names=names, values=self._by_example(values, counts))

    def target_extra(self, name: str) -> dict[str, ndarray]:
        """What a target keeps beside its labels, of all parts.

        Raises:
            CacheError: it is damaged.
        """
        extras = [split.target_extra(name) for split, _ in self._parts]
        dealt: dict[str, ndarray] = {}
        for key in (key for key in extras[0] if f"n_{key}" in extras[0]):
            counts = [extra[f"n_{key}"] for extra in extras]
            dealt[key] = self._by_example([extra[key] for extra in extras], counts)
            dealt[f"n_{key}"] = self._gathered(counts)
        return dealt

    def _by_example(self, values: Sequence[ndarray], counts: Sequence[ndarray]) -> ndarray:
        """Runs of values, one run an example, in the order of the joined split."""
        ends = spans(self._gathered(counts))
        out = np.empty((ends[-1], *values[0].shape[1:]), np.result_type(*values))
        for part, (value, count) in enumerate(zip(values, counts, strict=True)):
            mine = np.flatnonzero(self._part == part)
            wanted = count[self._example[mine]]
            out[ranges(ends[mine], wanted)] = value[ranges(spans(count)[self._example[mine]], wanted)]
        return out


class _NamedSplit(Split):
    """A split whose classes are numbered as those of a joined one."""

    class_names: ClassNames

    def target_names(self) -> dict[str, dict[str, Any]]:
        """The targets, each with the number of classes of all that is joined."""
        known = super().target_names()
        return {name: {**one, "classes": len(self.class_names(name))} for name, one in known.items()}

    def target(self, name: str) -> Target:
        """A target, its classes numbered as in the joined split."""
        found = super().target(name)
        return renumbered(found, self.class_names(name)) if found.names else found


class _ClassNames:
    """The names of a target's classes: of a bank's own splits, then those that only pieces have.

    Apart from the joined bank: its split asks for them, and were the bank held by the split that it holds,
    the memory of both would stay taken until the garbage collector comes round.
    """

    def __init__(self, bank: Bank, others: Sequence[str], sources: Sequence[Split]) -> None:
        self._bank, self._others, self._sources = bank, others, sources
        self._names: dict[str, tuple[str, ...]] = {}

    def __call__(self, target: str) -> tuple[str, ...]:
        """The names, read on the first call."""
        if target not in self._names:
            splits = [*(self._bank.split(name) for name in self._others), *self._sources]
            having = [split for split in splits if target in split.target_names()]
            found = dict.fromkeys(name for split in having for name in split.target(target).names)
            self._names[target] = tuple(found)
        return self._names[target]


class JoinedBank(Bank):
    """A bank with one split replaced by pieces of splits, of the same bank and of others.

    Args:
        bank: has every other split. Its classes are numbered together with those of the pieces.
        split: name of the split that is replaced.
        pieces: what it is made of.

    Raises:
        CacheError: a bank is not there, or has states that do not go with the others.
    """

    def __init__(self, bank: Bank, split: str, pieces: Sequence[Piece]) -> None:
        super().__init__(bank.path, bank._root)
        self.pieces = tuple(pieces)
        opened = {piece.store: open_bank(piece.store) for piece in pieces}
        for other in opened.values():
            _check_alike(bank, other)
        self._bank, self._replaced = bank, split
        sources = [opened[piece.store].split(piece.split) for piece in pieces]
        others = [name for name in super().splits if name != split]
        self.class_names: ClassNames = _ClassNames(bank, others, sources)
        self.made_of = [
            {**{name: value for name, value in asdict(piece).items() if name != "store"},
             "bank": opened[piece.store].fingerprint}
            for piece in pieces
        ]  # fmt: skip
        described = json.dumps([bank.fingerprint, split, self.made_of], sort_keys=True)
        self.fingerprint = hashlib.sha256(described.encode()).hexdigest()
        parts = [(s, piece.examples(s)) for piece, s in zip(pieces, sources, strict=True)]
        self._joined = JoinedSplit(split, bank.recipe, parts, self.class_names)

    @property
    def splits(self) -> list[str]:
        """Names of the splits, the joined one among them."""
        known = super().splits
        return known if self._replaced in known else [self._replaced, *known]

    def split(self, name: str) -> Split:
        """Opens a split.

        Raises:
            CacheError: there is no such split.
        """
        if name == self._replaced:
            return self._joined
        plain = super().split(name)
        named = _NamedSplit(name, plain.group, plain.recipe, self.path)
        named.class_names = self.class_names
        return named

    def __reduce__(self) -> tuple[Any, ...]:
        """A copy in another process joins the pieces itself."""
        return JoinedBank, (self._bank, self._replaced, self.pieces)


def renumbered(target: Target, names: tuple[str, ...]) -> Target:
    """A target with its classes numbered as in `names`, which has all of them."""
    if target.names == names:
        return target
    place = {name: number for number, name in enumerate(names)}
    # The last entry is for -1, no label.
    numbers = np.array([*(place[name] for name in target.names), -1], dtype=target.values.dtype)
    return replace(target, names=names, values=numbers[target.values])


def _check_alike(bank: Bank, other: Bank) -> None:
    """Refuses a bank whose states are not those another one would have of the same text."""
    ours, theirs = bank.recipe, other.recipe
    if ours.encoder.weights_sha256 != theirs.encoder.weights_sha256:
        found = [f"{e.name} (sha256 {e.weights_sha256[:12]})" for e in (theirs.encoder, ours.encoder)]
        raise CacheError(
            f"{other.path} is of encoder {found[0]}, {bank.path} of {found[1]}: join banks of one encoder"
        )
    for what in ("tokenizer_sha256", "layers", "keep"):
        if getattr(ours, what) != getattr(theirs, what):
            found = [_said(getattr(recipe, what)) for recipe in (theirs, ours)]
            raise CacheError(
                f"{other.path} has {what} {found[0]}, {bank.path} has {found[1]}: extract both the same way"
            )


def _said(value: Any) -> str:
    return ",".join(map(str, value)) if isinstance(value, tuple) else str(value)[:12]


def _path(split: Split) -> str:
    return split._place.name


def _target_of(split: Split, name: str) -> Target:
    if name not in split.target_names():
        path = _path(split)
        raise CacheError(
            f"{path} has no target {name!r} on split {split.name}, which is to be joined: add it with "
            f"'layerbank label {path} DATA --target {name}'"
        )
    return split.target(name)


def _units(split: Split, kind: str) -> Int[ndarray, " example"]:
    """How many labels each example has."""
    if kind in ("tags", "choice"):
        return split.n_words
    return split.length if kind == "token" else np.ones(split.n_examples, np.int64)


def _spread(
    parts: Sequence[ndarray],
) -> tuple[Int[ndarray, " example"], Int[ndarray, " example"]]:
    """The part and the place there of each example, the examples of every part spread evenly."""
    part = np.repeat(np.arange(len(parts)), [len(chosen) for chosen in parts])
    place = [(np.arange(len(chosen)) + 0.5) / max(1, len(chosen)) for chosen in parts]
    order = np.argsort(np.concatenate(place), kind="stable")
    return part[order], np.concatenate(parts)[order].astype(np.int64)


def _deal(length: Int[ndarray, " example"], room: int) -> tuple[Int[ndarray, " example"], int]:
    """The first token of each example where each lies whole in a block, and the number of blocks."""
    start, at = np.zeros(len(length), np.int64), 0
    for example, count in enumerate(length.tolist()):
        if at % room + count > room:
            at += room - at % room
        start[example] = at
        at += count
    return start, -(-at // room)
