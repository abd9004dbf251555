"""Raw text in, labels out: one forward of the encoder serves the heads of several runs.

This is how the late-fusion papers mean to deploy: many tasks, one frozen encoder.
"""

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int, UInt8
from numpy import ndarray
from torch import Tensor

from cache.layout import Keep
from cache.targets import spans
from pipeline.answers import context_offsets
from pipeline.arrays import TORCH_DTYPES
from pipeline.device import pick_device
from pipeline.encoder import Encoder, open_encoder
from pipeline.errors import PipelineError
from pipeline.evaluate import check_encoder
from pipeline.fitting import scores_of
from pipeline.head import Inputs
from pipeline.metrics import is_entity_scheme
from pipeline.precision import is_fast
from pipeline.raw_inputs import RawInputs, words_based
from pipeline.results import Run, load_run
from pipeline.selection import Selection, select
from pipeline.tokens import Inputs as Texts
from pipeline.tokens import Tokens, tokenize

CHUNK_ROWS = 256
"""Inputs that share a forward and are held at once."""


@dataclass(frozen=True)
class Contexts:
    """The second texts of some inputs, and where their tokens stand in them."""

    texts: Sequence[str] = ()
    offsets: Sequence[Int[ndarray, "_ 2"]] = ()

    def answers(self, found: Int[ndarray, "example 2"]) -> list[str]:
        """The characters of the spans; an empty text where there is none."""
        return [
            text[offsets[first, 0] : offsets[last, 1]] if first >= 0 else ""
            for text, offsets, (first, last) in zip(self.texts, self.offsets, found, strict=True)
        ]


@dataclass(frozen=True)
class Encoded:
    """States of some inputs' tokens; a `pipeline.selection.TokenTable`."""

    keep: Keep
    start: Int[ndarray, " example"]
    length: Int[ndarray, " example"]
    kind: UInt8[ndarray, " token"]
    word_id: Int[ndarray, " token"]
    n_words: Int[ndarray, " example"]
    layers: tuple[int, ...]
    states: Float[Tensor, "layer token width"]
    contexts: Contexts = Contexts()


def encode(
    encoder: Encoder, tokens: Tokens, keep: Keep, layers: Sequence[int], *, batch_tokens: int = 4096
) -> Encoded:
    """States of some rows' kept tokens.

    Args:
        encoder: computes them.
        tokens: of the rows.
        keep: which tokens are kept.
        layers: which layers, ascending.
        batch_tokens: padded tokens in one forward.

    Raises:
        PipelineError: as `Encoder.encode`.
    """
    kept = tokens.kept(keep)
    length = np.diff(spans(kept.view(np.int8))[tokens.start])
    start = spans(length)[:-1]
    states = torch.zeros(len(layers), int(length.sum()), encoder.record.width, device=encoder.device)
    sequences, places = tokens.pieces_of(np.arange(len(length)), start, kept)
    encoder.encode(
        tokens.pieces,
        sequences,
        kept=kept,
        layers=layers,
        start=places,
        out=states,
        budget_tokens=batch_tokens,
    )
    return Encoded(
        keep=keep,
        start=start,
        length=length,
        kind=tokens.kind[kept],
        word_id=tokens.word_id[kept],
        n_words=tokens.n_words,
        layers=tuple(layers),
        states=states,
    )


class Predictor:
    """The heads of some runs behind one encoder.

    Args:
        runs: of one encoder, one tokenizer and one `max_length`.
        encoder: that encoder.
        batch_tokens: padded tokens in one forward.

    Raises:
        PipelineError: the runs do not belong together, or the encoder is not theirs.
    """

    def __init__(self, runs: Sequence[Run], encoder: Encoder, *, batch_tokens: int = 4096) -> None:
        self.runs = list(runs)
        self.note = ""
        known = self.runs[0].source.precision
        if encoder.precision != known:
            self.note = (
                f"{self.runs[0].path} was trained on states of a {known} forward; {encoder.device} has no "
                f"units for it, so the encoder runs in {encoder.precision}"
            )
        self._encoder = encoder
        self._batch_tokens = batch_tokens
        for run in self.runs:
            name = f"encoder {encoder.record.name}"
            check_encoder(run, encoder.record.weights_sha256, encoder.tokenizer_sha256, what=name)
        self._check_together()
        reads = {run.head.reads for run in self.runs}
        self._masks = "masked" in reads
        if self._masks and reads != {"masked"}:
            raise PipelineError(
                "a masked language model reads other tokens than the other runs: predict alone"
            )
        self._keep: Keep = "masked" if self._masks else "words" if "words" in reads else "first"
        if reads & {"all", "pair"}:
            self._keep = "all"
        self._layers = tuple(sorted({layer for run in self.runs for layer in run.spec.layers}))
        for run in self.runs:
            run.head.to(encoder.device).eval()

    def _check_together(self) -> None:
        first = self.runs[0]
        names = [run.target.name for run in self.runs]
        for run in self.runs[1:]:
            if _reading(run) != _reading(first):
                raise PipelineError(
                    f"{first.path} and {run.path} differ in max_length, in precision, or in words, texts "
                    "or pairs of texts: predict with each alone"
                )
        twice = [name for name in names if names.count(name) > 1]
        if twice:
            raise PipelineError(f"two runs predict the target {twice[0]!r}: give one run a target")

    def predict(self, texts: Texts, pairs: Texts | None = None) -> Iterator[dict[str, Any]]:
        """Predicts every target for every input, in order.

        Args:
            texts: strings, or lists of words where the runs were trained on words.
            pairs: second texts, where the runs were trained on pairs; lists of options for multiple choice.

        Yields:
            The prediction of each run under its target's name: a class name, a list of tags, a number, the
            text of an answer, the number of the option taken, or a token for each mask in the text.
            `words_cut` counts words that `max_length` cut off and `words_empty` those that the tokenizer
            makes no token of, if there are any; their tag is O.
        """
        for first in range(0, len(texts), CHUNK_ROWS):
            here = slice(first, first + CHUNK_ROWS)
            tokens = tokenize(
                self._encoder.tokenizer,
                [(texts[here], None if pairs is None else pairs[here])],
                max_length=self.runs[0].source.max_length,
            )
            if self._masks:
                mask = tokens.input_ids == self._encoder.tokenizer.mask_token_id
                tokens = replace(tokens, predicted=mask)
            encoded = encode(
                self._encoder, tokens, self._keep, self._layers, batch_tokens=self._batch_tokens
            )
            if any(run.target.kind == "span" for run in self.runs):
                encoded = replace(encoded, contexts=self._contexts(texts[here], pairs and pairs[here]))
            columns = {run.target.name: self._predict(run, encoded) for run in self.runs}
            for i in range(len(tokens.length)):
                row = {name: values[i] for name, values in columns.items()}
                if words_based(self.runs[0]):
                    lost = {"words_cut": int(tokens.cut[i]), "words_empty": int(tokens.empty[i])}
                    row |= {name: count for name, count in lost.items() if count}
                yield row

    def predict_rows(self, rows: RawInputs) -> Iterator[dict[str, Any]]:
        """Each input as it is shown, with its predictions; see `predict`."""
        for shown, predicted in zip(rows.shown, self.predict(rows.texts, rows.pairs), strict=True):
            yield {**shown, **predicted}

    def _contexts(self, texts: Any, contexts: Any) -> "Contexts":
        length = self.runs[0].source.max_length
        return Contexts(contexts, context_offsets(self._encoder.tokenizer, texts, contexts, length))

    @torch.inference_mode()
    def _predict(self, run: Run, encoded: Encoded) -> list[Any]:
        selection = select(encoded, run.head)
        inputs = _inputs(run, encoded, selection)
        scores = scores_of(run.head, inputs, run.precision)
        guess = run.head.decoder.predict(scores, inputs.decoded_lengths)[0].cpu().numpy()
        if run.target.kind == "tags":
            return _tags(run, encoded, selection, guess)
        if run.target.kind == "float":
            return [float(value) for value in guess]
        if run.target.kind == "span":
            return encoded.contexts.answers(guess)
        if run.target.kind == "choice":
            parts = np.split(guess, spans(encoded.n_words)[1:-1])
            return [int(part.argmax()) for part in parts]
        if run.target.kind == "token":
            tokens = self._encoder.tokenizer.convert_ids_to_tokens(guess.tolist())
            return [tokens[a:b] for a, b in itertools.pairwise(spans(selection.decoded.count))]
        return [run.target.names[i] for i in guess]


def layers_of(run: Run, encoded: Encoded) -> Float[Tensor, "layer token width"]:
    """States of the layers that a head reads, rounded to the data type of the bank it was trained on.

    Where that is int8, the encoder's states come as they are: the bank's are these and a rounding error.
    """
    rows = [encoded.layers.index(layer) for layer in run.spec.layers]
    states = encoded.states.index_select(0, torch.tensor(rows, device=encoded.states.device))
    return states if run.source.dtype == "int8" else states.to(TORCH_DTYPES[run.source.dtype]).float()


def _inputs(run: Run, encoded: Encoded, selection: Selection) -> Inputs:
    """What a head reads, in the precision that it was trained in."""
    device = encoded.states.device
    chosen = selection.chosen
    read = torch.from_numpy(selection.read.position).to(device)
    return Inputs(
        states=layers_of(run, encoded).index_select(1, read).to(getattr(torch, run.precision)),
        lengths=torch.from_numpy(selection.read.count).to(device),
        decoded=None if chosen is None else torch.from_numpy(chosen).to(device),
        decoded_lengths=torch.from_numpy(selection.decoded.count).to(device),
    )


def _tags(run: Run, encoded: Encoded, selection: Selection, guess: ndarray) -> list[list[str | None]]:
    """Tags of every word; a word without a token gets O, or None where there is no O."""
    names = run.target.names
    nothing = "O" if is_entity_scheme(names) else None
    tags: list[list[str | None]] = [[nothing] * int(n) for n in encoded.n_words]
    example = np.repeat(np.arange(len(tags)), selection.decoded.count)
    words = encoded.word_id[selection.decoded.position]
    for i, word, tag in zip(example, words, guess, strict=True):
        tags[i][word] = names[tag]
    return tags


def _reading(run: Run) -> tuple[int, str, bool, bool, bool]:
    """What runs must share to share a forward: the longest input, the precision, and what an input is."""
    source = run.source
    return (
        source.max_length,
        source.precision,
        words_based(run),
        source.columns.get("text_pair") is not None,
        source.columns.get("options") is not None,
    )


def open_predictor(
    paths: Sequence[str],
    *,
    encoder: str | None = None,
    device: str = "auto",
    trust_remote_code: bool = False,
) -> Predictor:
    """Loads runs and their encoder, which computes in the precision of the bank they were trained on.

    Args:
        paths: run folders of one encoder.
        encoder: where the encoder is, if not where it was when the bank was made.
        device: where it computes.
        trust_remote_code: whether code that comes with the encoder may run.

    Raises:
        PipelineError: a run or the encoder cannot be loaded, or they do not belong together.
    """
    runs = [load_run(path) for path in paths]
    return Predictor(
        runs, encoder_of(runs[0], encoder=encoder, device=device, trust_remote_code=trust_remote_code)
    )


def encoder_of(
    run: Run, *, encoder: str | None = None, device: str = "auto", trust_remote_code: bool = False
) -> Encoder:
    """The encoder of a run, as `open_predictor` loads it.

    Raises:
        PipelineError: it cannot be loaded.
    """
    known = run.source.encoder
    precision = run.source.precision
    if precision == "float16" and not is_fast(precision, pick_device(device)):
        precision = "float32"  # the exact states that the head saw rounded
    return open_encoder(
        encoder or known.name,
        revision=None if encoder else known.revision,
        device=device,
        precision=precision,
        words=words_based(run),
        trust_remote_code=trust_remote_code,
    )
