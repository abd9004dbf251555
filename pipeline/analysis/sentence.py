"""The words of one sentence, coloured by how much of each layer goes into them."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Float64, Int
from numpy import ndarray
from torch import Tensor

from cache import Bank, Split
from pipeline import figures
from pipeline.analysis import _words
from pipeline.analysis._base import Answer, Question, file_name
from pipeline.analysis._material import Material, has_weights, name_of, weightless
from pipeline.arrays import to_torch
from pipeline.errors import PipelineError
from pipeline.evaluate import check_encoder
from pipeline.findings import Cell, Column, Figure, Table
from pipeline.predict import encode, encoder_of, layers_of
from pipeline.raw_inputs import read_inputs
from pipeline.results import Run
from pipeline.selection import select
from pipeline.tokens import tokenize


@dataclass(frozen=True)
class Coloured:
    """A sentence as heads of one target and fusion see it."""

    task: str
    where: str  # the sentence comes from
    words: tuple[str, ...]
    layers: tuple[int, ...]
    weights: Float64[ndarray, "word layer"]  # mean over heads
    heads: int


class Sentence(Question):
    """Weights over layers of every word of one sentence, a row of a split or a text, averaged over heads.

    A word's weights are those of its first sub-word. Every word is shown, also where a decoder looks at the
    first token alone: a fusion's weights depend on the token, not on what is done with it.
    """

    def lacks(self, material: Material) -> str:
        """Heads whose fusion has weights over layers."""
        if any(has_weights(record.method) for record in material.records):
            return ""
        return weightless(material.records) or "no run: name runs of attention, linear, mixture or dwatt"

    def answer(self, material: Material) -> Answer:
        """Colours the sentence once for each target, fusion and bank."""
        notes, asked = list[str](), material.sentence
        if asked is None or asked.isdecimal():
            found = list[Coloured]()
            for bank in material.banks:
                try:
                    found += _of_row(material, bank, int(asked or 0))
                except PipelineError as error:
                    if asked is not None:
                        raise
                    notes.append(f"no sentence is shown: {error}")
        else:
            found = list(_of_text(material, asked))
        return Answer(
            tables=tuple(map(_table, found)), figures=tuple(map(_figure, found)), notes=tuple(notes)
        )


def _of_row(material: Material, bank: Bank, row: int) -> Iterator[Coloured]:
    """A row of the split as every head of a bank sees it."""
    runs = [run for run in material.runs if bank in material.banks_of(run)]
    split, recipe = material.split_of(bank), bank.recipe
    example = _example(split, row)
    tokenizer = _words.open_tokenizer(
        recipe, material.encoder, trust_remote_code=material.trust_remote_code
    )
    tokens = slice(int(split.start[example]), int(split.start[example] + split.length[example]))
    first, words = _words.words(split.kind[tokens], split.input_ids[tokens], tokenizer)
    weights: dict[str, Float64[ndarray, "word layer"]] = {}
    for run in runs:
        check_encoder(run, recipe.encoder.weights_sha256, recipe.tokenizer_sha256, what=f"bank {bank.path}")
        select(split, run.head)  # says so where the bank lacks tokens that the fusion mixes
        stored, _ = split.gather([example], run.spec.layers)
        states = to_torch(
            split.to_float(stored, np.arange(tokens.start, tokens.stop), run.spec.layers)
        ).float()
        weights[run.path] = _weights(run, states.to(material.device), first)
    several = len(material.banks) > 1
    where = f"row {row} of {split.name}{f' of {name_of(bank.path)}' if several else ''}"
    yield from _coloured(runs, weights, words, where)


def _of_text(material: Material, text: str) -> Iterator[Coloured]:
    """A text, which the encoder turns into states, as every head sees it."""
    runs = material.runs
    encoder = encoder_of(
        runs[0],
        encoder=material.encoder,
        device=str(material.device),
        trust_remote_code=material.trust_remote_code,
    )
    what = f"encoder {encoder.record.name}"
    check_encoder(runs[0], encoder.record.weights_sha256, encoder.tokenizer_sha256, what=what)
    rows = read_inputs(runs[0], [text], None)
    tokens = tokenize(encoder.tokenizer, [(rows.texts, rows.pairs)], max_length=runs[0].source.max_length)
    layers = sorted({layer for run in runs for layer in run.spec.layers})
    encoded = encode(encoder, tokens, "all", layers)
    first, words = _words.words(tokens.kind, tokens.input_ids, encoder.tokenizer)
    weights = {run.path: _weights(run, layers_of(run, encoded), first) for run in runs}
    yield from _coloured(runs, weights, words, "a text")


def _example(split: Split, row: int) -> int:
    """The example that is a row of the source.

    Raises:
        PipelineError: there is no such row.
    """
    found = np.flatnonzero(split.row == row)
    if not len(found):
        raise PipelineError(
            f"--sentence {row}: split {split.name} has rows 0 to {split.n_examples - 1}; give one of "
            "them, or a text"
        )
    return int(found[0])


@torch.inference_mode()
def _weights(
    run: Run, states: Float[Tensor, "layer token width"], first: Int[ndarray, " word"]
) -> Float64[ndarray, "word layer"]:
    """The weights of the words' first sub-words."""
    lengths = torch.tensor([states.shape[1]], device=states.device)
    found = run.head.to(states.device).fusion.weights(states, lengths)
    assert found is not None, f"{run.path}: its fusion promised weights"
    return found[0].double().cpu().numpy()[first]


def _coloured(
    runs: Sequence[Run], weights: Mapping[str, Float64[ndarray, "word layer"]], words: list[str], where: str
) -> Iterator[Coloured]:
    """One sentence for each target, fusion and set of layers."""
    tasks: dict[tuple[str, str, tuple[int, ...]], list[Run]] = {}
    for run in runs:
        tasks.setdefault((run.target.name, run.spec.fusion, run.spec.layers), []).append(run)
    for (target, fusion, layers), alike in tasks.items():
        yield Coloured(
            task=f"{target}, {fusion}",
            where=where,
            words=tuple(words),
            layers=layers,
            weights=np.mean([weights[run.path] for run in alike], axis=0),
            heads=len(alike),
        )


def _name(sentence: Coloured) -> str:
    return file_name("sentence", sentence.where, sentence.task)


def _title(sentence: Coloured) -> str:
    return f"Layers of each word of {sentence.where}: {sentence.task}"


def _table(sentence: Coloured) -> Table:
    """A row a word, a column a layer."""
    rows: list[dict[str, Cell]] = []
    for k, (word, values) in enumerate(zip(sentence.words, sentence.weights.tolist(), strict=True)):
        weights = {f"layer_{n}": value for n, value in zip(sentence.layers, values, strict=True)}
        rows.append({"place": k, "word": word, **weights})
    return Table(
        name=_name(sentence),
        title=_title(sentence),
        columns=(
            Column(name="place", title="place"),
            Column(name="word", title="word"),
            *(Column(name=f"layer_{n}", title=str(n), digits=3) for n in sentence.layers),
        ),
        rows=tuple(rows),
    )


def _figure(sentence: Coloured) -> Figure:
    chart = figures.heat(
        list(_cells(sentence)), x="word", y="layer", value="weight", x_title="", y_title="layer",
        value_title="weight",
    )  # fmt: skip
    return Figure(
        name=_name(sentence),
        title=_title(sentence),
        about=f"Grid: weight of each layer (upwards) in each word of the sentence, mean of "
        f"{sentence.heads} heads: {' '.join(sentence.words)}",
        chart=chart,
    )


def _cells(sentence: Coloured) -> Iterator[dict[str, Cell]]:
    """The last layer first, so that it is drawn on top; a number tells equal words apart."""
    for column in reversed(range(len(sentence.layers))):
        for k, word in enumerate(sentence.words):
            weight = float(sentence.weights[k, column])
            yield {"word": f"{k} {word}", "layer": sentence.layers[column], "weight": weight}


QUESTION = Sentence
