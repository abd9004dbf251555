"""Weights over layers of every token that a head decodes, averaged as they stream by."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
import torch
from jaxtyping import Float64, Int
from numpy import ndarray

from cache import Bank
from cache.targets import spans
from pipeline import batches
from pipeline.analysis import _words
from pipeline.analysis._material import Material
from pipeline.errors import PipelineError
from pipeline.evaluate import check_encoder
from pipeline.head import Inputs
from pipeline.metrics import is_entity_scheme
from pipeline.results import Run
from pipeline.selection import Selection, select

GROUPINGS = ("class", "language", "position", "kind")
"""What tokens may be grouped by; a language is a bank."""

POSITIONS = 32
"""Places that are told apart; those from here on are one."""

_BATCH = 256


@dataclass(frozen=True)
class Groups:
    """Which group each decoded token of a split is in."""

    names: tuple[str, ...]
    code: Int[ndarray, " token"]  # place among the names; -1 for none


@dataclass
class Tally:
    """Sums of weights by group."""

    groups: Groups
    n_layers: int
    sums: Float64[ndarray, "group layer"] = field(init=False)
    counts: Int[ndarray, " group"] = field(init=False)

    def __post_init__(self) -> None:
        """Starts from nothing."""
        self.sums = np.zeros((len(self.groups.names), self.n_layers))
        self.counts = np.zeros(len(self.groups.names), dtype=np.int64)

    def add(self, places: Int[ndarray, " token"], weights: Float64[ndarray, "token layer"]) -> None:
        """Takes the weights of some decoded tokens."""
        code = self.groups.code[places]
        some = code >= 0
        np.add.at(self.sums, code[some], weights[some])
        self.counts += np.bincount(code[some], minlength=len(self.counts))

    def means(self) -> dict[str, "Mean"]:
        """The mean of each group that has a token."""
        return {
            name: Mean(tokens=int(count), weights=total / count)
            for name, total, count in zip(self.groups.names, self.sums, self.counts, strict=True)
            if count
        }


@dataclass(frozen=True)
class Mean:
    """Weights over layers, averaged over tokens: they sum to 1."""

    tokens: int
    weights: Float64[ndarray, " layer"]


@dataclass(frozen=True, kw_only=True)
class Reading:
    """One head on one bank."""

    run: Run
    bank: str
    means: Mapping[str, Mapping[str, Mean]]  # by grouping ("all" is one), then by group

    @property
    def layers(self) -> tuple[int, ...]:
        """Numbers of the layers that the weights are of."""
        return self.run.spec.layers


def read(material: Material, runs: Sequence[Run]) -> list[Reading]:
    """Averages the weights of heads on their banks; heads that read the same tokens share the reading.

    Raises:
        PipelineError: a bank has not the split or the tokens, or is of another encoder.
        CacheError: a bank is gone or damaged.
    """
    found: list[Reading] = []
    for bank in material.banks:
        here = [run for run in runs if bank in material.banks_of(run)]
        for run in here:
            recipe = bank.recipe
            check_encoder(
                run, recipe.encoder.weights_sha256, recipe.tokenizer_sha256, what=f"bank {bank.path}"
            )
        if here:
            found += _Reader(material, bank).read(here)
    return found


class _Reader:
    """Reads one bank."""

    def __init__(self, material: Material, bank: Bank) -> None:
        self._material, self._bank = material, bank
        self._split = material.split_of(bank)
        self._feeds = batches.Feeds(memory_bytes=material.memory_bytes, device=material.device)

    def read(self, runs: Sequence[Run]) -> Iterable[Reading]:
        by_key: dict[batches.Key, list[Run]] = {}
        for run in runs:
            by_key.setdefault(batches.feed_key(self._split, run.head), []).append(run)
        for alike in by_key.values():
            tallies = self._tally(alike)
            for run, own in zip(alike, tallies, strict=True):
                means = {name: tally.means() for name, tally in own.items()}
                if not means["all"]:
                    raise PipelineError(
                        f"split {self._split.name} of {self._bank.path} has no token that {run.path} "
                        "decodes: name another split"
                    )
                yield Reading(run=run, bank=self._bank.path, means=means)

    @torch.inference_mode()
    def _tally(self, runs: Sequence[Run]) -> list[dict[str, Tally]]:
        """One pass over what these heads read together."""
        selection = select(self._split, runs[0].head)
        shared = self._groups(selection)
        tallies = [
            {
                name: Tally(groups, len(run.spec.layers))
                for name, groups in {**shared, **self._classes(run, selection)}.items()
            }
            for run in runs
        ]
        layers = sorted({layer for run in runs for layer in run.spec.layers})
        feed = self._feeds.open(self._split, runs[0].head, layers)
        for run in runs:
            run.head.to(self._material.device)
        for batch in feed.batches(np.arange(feed.n_examples), batch_size=_BATCH):
            for run, own in zip(runs, tallies, strict=True):
                weights = weights_of(run, batch.inputs(batches.places(feed.layers, run.spec.layers)))
                for tally in own.values():
                    tally.add(batch.decoded_places, weights)
        return tallies

    def _groups(self, selection: Selection) -> dict[str, Groups]:
        """The groups that do not depend on a target."""
        by, split, decoded = self._material.by, self._split, selection.decoded
        groups = {"all": Groups(("all",), np.zeros(len(decoded.position), dtype=np.int64))}
        if by in (None, "position"):
            place = decoded.position - np.repeat(split.start, decoded.count)
            names = (*map(str, range(POSITIONS)), f"{POSITIONS} on")
            groups["position"] = Groups(names, np.minimum(place, POSITIONS))
        if by in (None, "kind"):
            kind, ids = split.kind[decoded.position], split.input_ids[decoded.position]
            groups["kind"] = Groups(_words.KIND_NAMES, _words.kinds(kind, ids, self._tokenizer))
        return groups

    @cached_property
    def _tokenizer(self) -> object | None:
        material = self._material
        try:
            return _words.open_tokenizer(
                self._bank.recipe, material.encoder, trust_remote_code=material.trust_remote_code
            )
        except PipelineError as error:
            material.note(f"numbers and punctuation count as words: {error}")
            return None

    def _classes(self, run: Run, selection: Selection) -> dict[str, Groups]:
        """The gold classes of a head's target, where it has classes and the bank has the target."""
        name, split = run.target.name, self._split
        known = split.target_names().get(name)
        if (
            self._material.by not in (None, "class")
            or known is None
            or known["kind"] not in ("class", "tags")
        ):
            return {}
        target, count = split.target(name), selection.decoded.count
        if target.kind == "class":
            return {"class": Groups(target.names, np.repeat(target.values, count).astype(np.int64))}
        first = np.repeat(spans(split.n_words)[:-1], count)
        tags = target.values[first + split.word_id[selection.decoded.position]]
        types, code = _types(target.names)
        return {"class": Groups(types, np.where(tags < 0, -1, code[tags]))}


def _types(tags: Sequence[str]) -> tuple[tuple[str, ...], Int[ndarray, " tag"]]:
    """The types of entities that tags are of, and the place of each tag's type; other tags are their own.

    >>> types, code = _types(("O", "B-time", "I-time"))
    >>> types, code.tolist()
    (('O', 'time'), [0, 1, 1])
    """
    is_entity = is_entity_scheme(tags)
    type_of = [tag.partition("-")[2] or tag if is_entity else tag for tag in tags]
    types = tuple(dict.fromkeys(type_of))
    return types, np.array([types.index(one) for one in type_of])


def weights_of(run: Run, inputs: Inputs) -> Float64[ndarray, "token layer"]:
    """The weights over layers of the tokens that a head decodes, each summing to 1."""
    weights = run.head.fusion.weights(inputs.states, inputs.lengths)
    assert weights is not None, f"{run.path}: its fusion promised weights"
    found = weights[0] if inputs.decoded is None else weights[0].index_select(0, inputs.decoded)
    return found.double().cpu().numpy()
