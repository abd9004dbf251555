"""The axes of a sweep, and the stacks that they make: heads of one shape, trained as one."""

import hashlib
import itertools
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from cache import Bank
from pipeline import parts
from pipeline.errors import PipelineError
from pipeline.head import DECODER_FOR
from pipeline.job import HeadRates, open_target


@dataclass(frozen=True, kw_only=True)
class Shape:
    """What all heads of a stack share."""

    target: str
    fusion: str
    decoder: str | None
    options: tuple[tuple[str, Any], ...]  # hyper-parameters of the parts
    batch_size: int

    @property
    def name(self) -> str:
        """A name for tables and folders."""
        chosen = [f"{name}={value}" for name, value in self.options]
        given = [self.target, self.fusion, *([self.decoder] if self.decoder else []), *chosen]
        return "-".join([*given, f"batch={self.batch_size}"]).replace("/", "_")


@dataclass(frozen=True, kw_only=True)
class Stack:
    """Heads of one shape, trained as one."""

    shape: Shape
    rates: tuple[HeadRates, ...]

    @property
    def digest(self) -> str:
        """Names the stack's files: a function of all that it is."""
        return hashlib.sha256(json.dumps(asdict(self), sort_keys=True).encode()).hexdigest()[:16]

    def split(self, size: int) -> "list[Stack]":
        """Stacks of at most that many heads."""
        return [replace(self, rates=self.rates[k : k + size]) for k in range(0, len(self.rates), size)]


@dataclass(frozen=True)
class Range:
    """All numbers between two, for a search to draw from."""

    low: float
    high: float

    def __post_init__(self) -> None:
        """Checks the order of the ends."""
        if not self.low < self.high:
            raise PipelineError(f"{self}: give the lower end first")

    def __str__(self) -> str:
        """The range as it is given on the command line."""
        return f"{self.low:g}..{self.high:g}"


@dataclass(frozen=True, kw_only=True)
class Grid:
    """The axes of a sweep; every combination is a head."""

    targets: Sequence[str]
    fusions: Sequence[str]
    decoders: Sequence[str | None] = (None,)
    options: Mapping[str, Sequence[Any]] = field(default_factory=dict)  # of the parts, where they have them
    lr: Sequence[float] | Range = (1e-3,)
    lr_of: Mapping[str, float] = field(default_factory=dict)  # of single fusions, in place of lr
    weight_decay: Sequence[float] | Range = (0.01,)
    dropout: Sequence[float | None] | Range = (None,)
    batch_size: Sequence[int] = (32,)
    seeds: int = 1  # heads of each combination, with the seeds first_seed, first_seed + 1, ...
    first_seed: int = 0

    def __post_init__(self) -> None:
        """Checks that no axis is empty."""
        for name in ("targets", "fusions", "decoders", "lr", "weight_decay", "dropout", "batch_size"):
            if not getattr(self, name):
                raise PipelineError(
                    f"--{name.rstrip('s').replace('_', '-')} has no value: give one or more"
                )
        for name, values in self.options.items():
            if not values:
                raise PipelineError(f"--set {name} has no value: give one or more")
        if self.seeds < 1:
            raise PipelineError(f"--seeds {self.seeds}: give 1 or more")

    @property
    def seed_range(self) -> range:
        """The seeds of the heads of each combination."""
        return range(self.first_seed, self.first_seed + self.seeds)

    def rates(self, fusion: str = "") -> tuple[HeadRates, ...]:
        """Seed, learning rate, weight decay and dropout of every head of a shape.

        Args:
            fusion: of the shape; one may have a learning rate of its own.

        Raises:
            PipelineError: an axis is a range.
        """
        values: list[Sequence[Any]] = []
        for name in ("lr", "weight_decay", "dropout"):
            axis = getattr(self, name)
            if isinstance(axis, Range):
                flag = f"--{name.replace('_', '-')} {axis}"
                raise PipelineError(f"{flag} is a range: give values, or search it with --trials N")
            values.append(axis)
        if fusion in self.lr_of:
            values[0] = (self.lr_of[fusion],)
        axes = itertools.product(*values, self.seed_range)
        return tuple(HeadRates(seed=s, lr=lr, weight_decay=wd, dropout=d) for lr, wd, d, s in axes)

    def stacks(self, shapes: Sequence[Shape]) -> list[Stack]:
        """Every head of the grid: a stack for each of its shapes."""
        return [Stack(shape=shape, rates=self.rates(shape.fusion)) for shape in shapes]

    def shapes(self, bank: Bank, split: str) -> list[Shape]:
        """Every shape of head in the grid. `single_layer` without a layer is a head for every layer.

        Args:
            bank: has the targets and the layers.
            split: the one in the role of train.

        Raises:
            PipelineError: a target is missing, or an option belongs to no part of the grid.
        """
        found: list[Shape] = []
        used: set[str] = set()
        for target, fusion, decoder in itertools.product(self.targets, self.fusions, self.decoders):
            kind = open_target(bank, target, split)[1].kind
            axes = self._axes(bank, fusion, decoder or DECODER_FOR[kind])
            used |= set(axes)
            for values in itertools.product(*axes.values()):
                options = tuple(zip(axes, values, strict=True))
                shape = Shape(
                    target=target,
                    fusion=fusion,
                    decoder=decoder,
                    options=options,
                    batch_size=self.batch_size[0],
                )
                found += [replace(shape, batch_size=size) for size in self.batch_size]
        for name in self.options:
            if name not in used:
                raise PipelineError(f"--set {name}: no fusion and no decoder of the sweep has that option")
        return found

    def _axes(self, bank: Bank, fusion: str, decoder: str) -> dict[str, Sequence[Any]]:
        """The options that these two parts have, each with its values."""
        known = {
            *parts.hyper_parameters(parts.load("fusion", fusion)),
            *parts.hyper_parameters(parts.load("decoder", decoder)),
        }
        axes = {name: values for name, values in self.options.items() if name in known}
        if fusion == "single_layer" and "layer" not in axes:
            axes["layer"] = list(bank.recipe.layers)
        return axes
