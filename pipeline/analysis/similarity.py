"""How alike the layers of a bank are, and those of two banks of one text."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import combinations, combinations_with_replacement
from typing import Any, ClassVar

import numpy as np
import torch
from jaxtyping import Bool, Float, Float64, Int, Shaped
from numpy import ndarray
from torch import Tensor

from cache import Bank, Kind, Split
from cache.targets import ranges
from pipeline import figures
from pipeline.analysis._base import Answer, Question, file_name
from pipeline.analysis._material import Material, labels
from pipeline.findings import Cell, Column, Figure, Table

PRODUCTS_BYTES = 2**28
"""Room for the matrices width · width of pairs of layers."""

WRITTEN = 13
"""Layers up to which the figure has the numbers in its cells."""


class Similarity(Question):
    """Linear CKA between all pairs of layers, over the kept tokens (Kornblith et al. 2019, eq. 3).

    CKA(X, Y) = ‖Yᵀ X‖² / (‖Xᵀ X‖ ‖Yᵀ Y‖) of centred states, Frobenius norms: 1 where one layer is the other
    turned, moved or scaled, 0 where nothing of one is linear in the other.
    """

    paper: ClassVar[str] = "Kornblith et al. 2019"

    def lacks(self, material: Material) -> str:
        """A bank."""
        if material.named_banks or any(record.store is not None for record in material.records):
            return ""
        return "no bank: name one, or runs that were trained on one"

    def answer(self, material: Material) -> Answer:
        """Compares the layers of every bank, then those of every two banks of one text."""
        splits = [(_label(bank, material.banks), material.split_of(bank)) for bank in material.banks]
        tables, drawn, notes = list[Table](), list[Figure](), list[str]()
        for name, split in splits:
            blocks = _blocks(split, material.tokens)
            n_tokens = int(_real(split, blocks).sum())
            if n_tokens < 2:
                notes.append(f"{name}: {n_tokens} tokens are too few to compare layers")
                continue
            if n_tokens < split.n_tokens:
                notes.append(f"{name}: layers compared on {n_tokens:,} of {split.n_tokens:,} tokens")
            found = cka(split, blocks, material.device)
            tables.append(_table(name, name, split.layers, split.layers, found))
            drawn.append(_figure(name, name, split.layers, split.layers, found))
        for (one, first), (other, second) in combinations(splits, 2):
            same = aligned(first, second)
            if same is None:
                continue
            found = cka_between(first, second, same, _blocks(first, material.tokens), material.device)
            tables.append(_table(one, other, first.layers, second.layers, found))
            drawn.append(_figure(one, other, first.layers, second.layers, found))
        return Answer(tables=tuple(tables), figures=tuple(drawn), notes=tuple(notes))


def _label(bank: Bank, banks: Sequence[Bank]) -> str:
    return labels(one.path for one in banks)[bank.path]


def cka(
    split: Split, blocks: Sequence[int], device: torch.device | None = None
) -> Float64[ndarray, "layer layer"]:
    """Linear CKA of all pairs of layers, over the tokens of some blocks; fill does not count.

    Args:
        split: of a bank, of any data type.
        blocks: which of its blocks.
        device: where it computes, the CPU by default.
    """
    states = _States(_lazy(split, blocks), _real(split, blocks), device or torch.device("cpu"))
    pairs = list(combinations_with_replacement(range(len(split.layers)), 2))
    found = np.zeros((len(split.layers),) * 2)
    for (a, b), value in zip(pairs, _squares(states, states, pairs), strict=True):
        found[a, b] = found[b, a] = value
    return _scaled(found, np.diagonal(found), np.diagonal(found))


def cka_between(
    one: Split,
    other: Split,
    same: Int[ndarray, " token"],
    blocks: Sequence[int],
    device: torch.device | None = None,
) -> Float64[ndarray, "layer other_layer"]:
    """Linear CKA of the layers of one bank and those of another, over the tokens that both have.

    Args:
        one: of a bank.
        other: of another, of any width.
        same: for each token of `one`, fill included, that of `other` that is the same; -1 for none.
        blocks: which blocks of `one`.
        device: where it computes, the CPU by default.
    """
    pieces, where = [same[_span(one, block)] for block in blocks], device or torch.device("cpu")
    both = np.concatenate(pieces) >= 0
    first = _States(_lazy(one, blocks), both, where)
    second = _States(_lazy_tokens(other, pieces), both, where)
    shape = (len(one.layers), len(other.layers))
    found = np.reshape(_squares(first, second, list(np.ndindex(shape))), shape)
    inner = [
        _squares(x, x, [(k, k) for k in range(n)]) for x, n in zip((first, second), shape, strict=True)
    ]
    return _scaled(found, np.array(inner[0]), np.array(inner[1]))


def aligned(one: Split, other: Split) -> Int[ndarray, " token"] | None:
    """The same tokens of two banks of one text: for each token of `one` that of `other`, or -1.

    None where they have no row in common, or keep other tokens of it.
    """
    if one.recipe.tokenizer_sha256 != other.recipe.tokenizer_sha256 or one.keep != other.keep:
        return None
    place = {row: k for k, row in enumerate(other.text_hash.tolist())}
    pairs = [(k, place[row]) for k, row in enumerate(one.text_hash.tolist()) if row in place]
    pairs = [(a, b) for a, b in pairs if one.length[a] == other.length[b]]
    if not pairs:
        return None
    first, second = np.array(pairs).T
    same = np.full(one.n_blocks * one.block_tokens, -1, dtype=np.int64)
    length = one.length[first].astype(np.int64)
    same[ranges(one.start[first], length)] = ranges(other.start[second], length)
    return same


@dataclass(frozen=True)
class _States:
    """Layers of a bank as a lazy array, of which one block is in memory at a time."""

    lazy: Any  # dask.array, layer token width; a chunk is a layer of a block
    real: Bool[ndarray, " token"]  # which tokens count
    device: torch.device

    @cached_property
    def mean(self) -> Float[Tensor, "layer 1 width"]:
        """Of every layer and channel, from a first pass."""
        total = torch.zeros((), dtype=torch.float64, device=self.device)
        for block in self._blocks():
            total = total + block.sum(1, keepdim=True, dtype=torch.float64)
        return (total / max(1, int(self.real.sum()))).float()

    def centred(self) -> Iterator[Float[Tensor, "layer token width"]]:
        """The blocks, one after the other."""
        for block in self._blocks():
            yield block - self.mean

    def _blocks(self) -> Iterator[Float[Tensor, "layer token width"]]:
        ends = np.cumsum(self.lazy.chunks[1])
        for k, end in enumerate(ends):
            real = self.real[end - self.lazy.chunks[1][k] : end]
            states = self.lazy.blocks[:, k].compute(scheduler="synchronous")
            yield torch.from_numpy(states[:, real].astype(np.float32)).to(self.device)


def _squares(one: _States, other: _States, pairs: Sequence[tuple[int, int]]) -> list[float]:
    """‖one_aᵀ other_b‖² of pairs of layers.

    As many pairs at a time as their matrices have room; block after block in one order, so that the result
    is the same on every machine.
    """
    found: list[float] = []
    shape = (one.lazy.shape[2], other.lazy.shape[2])
    at_once = max(1, PRODUCTS_BYTES // (4 * shape[0] * shape[1]))
    for first in range(0, len(pairs), at_once):
        some = pairs[first : first + at_once]
        sums = torch.zeros(len(some), *shape, device=one.device)
        blocks = (
            ((x, x) for x in one.centred())
            if one is other
            else zip(one.centred(), other.centred(), strict=True)
        )
        for x, y in blocks:
            for total, (a, b) in zip(sums, some, strict=True):
                total.addmm_(x[a].T, y[b])
        found += sums.double().square().sum((1, 2)).tolist()
    return found


def _scaled(
    found: Float64[ndarray, "row column"],
    rows: Float64[ndarray, " row"],
    columns: Float64[ndarray, " column"],
) -> Float64[ndarray, "row column"]:
    """CKA from squared norms: of products, and of each layer with itself; 0 where a layer is constant."""
    scale = np.sqrt(np.outer(rows, columns))
    return np.divide(found, scale, out=np.zeros_like(found), where=scale > 0)


def _blocks(split: Split, n_tokens: int) -> list[int]:
    """Blocks of at least so many tokens: a random sample of the rows, as every block is."""
    order = split.sequence.tolist()
    if not n_tokens:
        return sorted(order)
    held = np.cumsum([int(_real(split, [block]).sum()) for block in order])
    return sorted(order[: int(np.searchsorted(held, n_tokens)) + 1])


def _span(split: Split, block: int) -> Int[ndarray, " token"]:
    return np.arange(block * split.block_tokens, (block + 1) * split.block_tokens)


def _real(split: Split, blocks: Sequence[int]) -> Bool[ndarray, " token"]:
    """Which tokens of some blocks are no fill."""
    places = [_span(split, block) for block in blocks] or [np.empty(0, dtype=np.int64)]
    real: Bool[ndarray, " token"] = split.kind[np.concatenate(places)] != Kind.FILL
    return real


def _lazy(split: Split, blocks: Sequence[int]) -> Any:
    """Some blocks of a split, nothing read yet."""
    import dask.array

    whole, room = split.dask(), split.block_tokens
    return dask.array.concatenate([whole[:, block * room : (block + 1) * room] for block in blocks], axis=1)


def _lazy_tokens(split: Split, pieces: Sequence[Int[ndarray, " token"]]) -> Any:
    """Chosen tokens of a split piece by piece, nothing read yet; -1 gives any token's states."""
    import dask
    import dask.array

    take = dask.delayed(_taken, pure=True)
    shape = (1, len(pieces[0]), split.width)
    parts = [
        [dask.array.from_delayed(take(split, piece, layer), shape, dtype=np.float32) for piece in pieces]
        for layer in split.layers
    ]
    return dask.array.concatenate([dask.array.concatenate(row, axis=1) for row in parts], axis=0)


def _taken(split: Split, tokens: Int[ndarray, " token"], layer: int) -> Float[ndarray, "1 token width"]:
    tokens = np.maximum(tokens, 0)
    states: Shaped[ndarray, "1 token width"] = split.take(tokens, [layer])
    return split.to_float(states, tokens, [layer]).astype(np.float32)


def _cells(
    rows: Sequence[int], columns: Sequence[int], found: Float64[ndarray, "row column"]
) -> Iterator[dict[str, Cell]]:
    for layer, values in zip(rows, found.tolist(), strict=True):
        for other, value in zip(columns, values, strict=True):
            yield {"layer": layer, "other": other, "cka": value}


def _names(one: str, other: str) -> Mapping[str, str]:
    if one == other:
        return {"title": f"Linear CKA of the layers of {one}", "rows": "layer", "columns": "layer"}
    title = f"Linear CKA of the layers of {one} and {other}"
    return {"title": title, "rows": f"layer of {one}", "columns": f"layer of {other}"}


def _table(
    one: str, other: str, rows: Sequence[int], columns: Sequence[int], found: Float64[ndarray, "row column"]
) -> Table:
    names = _names(one, other)
    lines = [
        {"layer": layer, **{f"layer_{n}": v for n, v in zip(columns, values, strict=True)}}
        for layer, values in zip(rows, found.tolist(), strict=True)
    ]
    return Table(
        name=file_name("similarity", one, "" if one == other else other),
        title=names["title"],
        columns=(
            Column(name="layer", title=names["rows"]),
            *(Column(name=f"layer_{n}", title=str(n), digits=3) for n in columns),
        ),
        rows=tuple(lines),
    )


def _figure(
    one: str, other: str, rows: Sequence[int], columns: Sequence[int], found: Float64[ndarray, "row column"]
) -> Figure:
    names = _names(one, other)
    chart = figures.heat(
        list(_cells(rows, columns, found)), x="other", y="layer", value="cka", x_title=names["columns"],
        y_title=names["rows"], value_title="CKA", digits=2 if len(columns) <= WRITTEN else None,
    )  # fmt: skip
    return Figure(
        name=file_name("similarity", one, "" if one == other else other),
        title=names["title"],
        about="Grid: linear CKA of each pair of layers, 0 to 1.",
        chart=chart,
    )


QUESTION = Similarity
