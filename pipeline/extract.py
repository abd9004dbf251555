"""Stage 1: the frozen encoder runs once over a data set and fills a bank.

Blocks are encoded one after the other; while one is computed, the ones before it are written. What is
written stays: a run that ends early is continued by the same command.
"""

import queue
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from jaxtyping import Int, UInt64
from numpy import ndarray
from torch import Tensor

from cache import CacheError, Recipe, Rows, Writer, open_bank
from cache.fingerprint import hash_texts
from cache.layout import TOKEN_ARRAYS, Codec, Keep, block_tokens_for
from cache.reader import find_bank
from cache.store import local_path
from cache.targets import check_name, ranges
from pipeline.arrays import TORCH_DTYPES, to_numpy
from pipeline.calibrate import pick_budget
from pipeline.corpus import Corpus
from pipeline.encoder import Encoder
from pipeline.errors import PipelineError
from pipeline.labels import Labels, find_labels, locate_labels, read_labels
from pipeline.masking import Masked, check_maskable, chunked, masked
from pipeline.output_layer import OutputLayer, read_output_layer
from pipeline.quantise import Quantised, Quantiser
from pipeline.room import check_room
from pipeline.tokens import Batch, Tokens, batches_of, tokenize
from pipeline.versions import versions

_BUFFERS = 3
"""One block being computed, one being written, one in reserve."""


class StoppedError(PipelineError):
    """The user stopped the extraction; what is written stays."""


@dataclass(frozen=True, kw_only=True)
class Progress:
    """Where an extraction is. Counts are of this run; `n_` of all that it has to do."""

    split: str
    examples: int
    tokens: int
    written_bytes: int
    n_examples: int
    n_tokens: int


@dataclass(frozen=True, kw_only=True)
class Extraction:
    """What an extraction did."""

    store: str
    splits: dict[
        str, dict[str, Any]
    ]  # of each split: examples, tokens, blocks, words cut off, share clipped
    examples: int
    tokens: int  # kept tokens
    bytes: int  # of the bank
    seconds: float
    blocks: int
    blocks_encoded: int  # the others were whole already
    targets: list[str]
    skipped: dict[str, str] = field(default_factory=dict)  # columns that are no targets, and why
    batch_tokens: int  # padded tokens in one forward
    precision: str  # of the encoder's products
    notes: list[str] = field(default_factory=list)
    new_rows: dict[str, int] = field(default_factory=dict)  # rows that the bank lacked, of each split
    unlabelled: list[str] = field(default_factory=list)  # the bank's targets that have no label on them


def extract(
    corpus: Corpus,
    encoder: Encoder,
    store: str,
    *,
    keep: Keep = "all",
    dtype: str = "float16",
    layers: Sequence[int] | None = None,
    codec: Codec = "none",
    max_length: int | None = None,
    batch_tokens: int | None = None,
    seed: int = 0,
    targets: Sequence[str] | None = None,
    maskings: int = 1,
    force: bool = False,
    progress: Callable[[Progress], None] = lambda _: None,
    spread: Callable[["Stage"], int] | None = None,
) -> Extraction:
    """Fills a bank, or goes on filling it; does nothing where it is complete.

    A bank whose rows are all in the data grows by the rows that it lacks; those alone are encoded.

    Args:
        corpus: the data.
        encoder: the frozen encoder.
        store: folder of the bank.
        keep: which tokens are kept.
        dtype: how states are stored.
        layers: which layers are kept, all by default.
        codec: lossless compression.
        max_length: longest example in tokens; the encoder's own bound (at most 512) by default.
        batch_tokens: padded tokens in one forward; by default chosen for the encoder and the device
            (`pipeline.calibrate`). A bank that is there already goes on with its own.
        seed: of the deal of examples to blocks.
        targets: columns of labels; by default every column that can be one.
        maskings: how often each chunk of text is masked, for ``masked``.
        force: start even where the disk has no room for the bank.
        progress: called after every block.
        spread: how the blocks are made elsewhere, see `pipeline.spread`; in this process by default.

    Raises:
        PipelineError: the data or a choice is wrong.
        StoppedError: Ctrl-C was pressed.
        CacheError: the bank cannot be written, or is of another making.
    """
    began = time.perf_counter()
    length = encoder.max_length(max_length)
    texts: dict[str, Masked] = {}
    skipped: dict[str, str] = {}
    if maskings != 1 and keep != "masked":
        raise PipelineError(f"--maskings {maskings}: only --keep masked has any, asked was --keep {keep}")
    folder = local_path(store)
    if keep == "masked":
        if folder is None:
            raise PipelineError(
                f"--store {store}: a bank of --keep masked lies in a local folder, beside the encoder's "
                "output layer: give one"
            )
        check_maskable(corpus, encoder.tokenizer, targets)
        output_layer = read_output_layer(encoder)
        draw = {"maskings": maskings, "seed": seed, "vocabulary": output_layer.vocabulary}
        texts = {name: _mask(corpus, name, encoder, length, draw) for name in corpus.splits}
        tokens = {name: text.tokens for name, text in texts.items()}
        found = [_token_labels(texts, output_layer)]
    else:
        found, skipped = _labels(corpus, targets)
        tokens = {name: _tokenize(corpus, name, encoder, length) for name in corpus.splits}
    recipe = recipe_for(
        corpus, encoder, store, tokens, keep=keep, dtype=dtype, layers=layers, max_length=length,
        batch_tokens=batch_tokens, codec=codec, seed=seed,
    )  # fmt: skip
    kept = {name: split.kept(keep) for name, split in tokens.items()}
    hashes = {n: texts[n].hashes() if n in texts else hash_rows(corpus, n) for n in tokens}
    rows = {name: _rows(tokens[name], keep, hashes[name]) for name in tokens}
    if not force:
        check_room(store, recipe, tokens)
    with Writer(store, recipe, rows, versions=versions()) as writer:
        stage = Stage(writer, encoder, tokens, kept, progress)
        encoded = stage.run() if spread is None else spread(stage)
        labels, cut = _located(corpus, encoder, length, found)
        if keep == "masked" and folder is not None:
            output_layer.save(folder)
        _write_labels(writer, labels)
        unlabelled = writer.lengthen_targets([label.name for label in labels])
        reports = {name: {**_report(writer, name, tokens[name]), **cut.get(name, {})} for name in tokens}
        writer.finish(reports, skipped=skipped)
    bank = open_bank(store)
    if dtype == "int8":
        reports = {
            name: {**r, "clipped_frac": bank.split(name).clipped_frac} for name, r in reports.items()
        }
    return Extraction(
        store=store,
        splits=reports,
        examples=sum(r["examples"] for r in reports.values()),
        tokens=sum(r["tokens"] for r in reports.values()),
        bytes=bank.n_bytes,
        seconds=time.perf_counter() - began,
        blocks=sum(plan.n_blocks for plan in writer.plans.values()),
        blocks_encoded=encoded,
        targets=[label.name for label in labels],
        skipped=skipped,
        batch_tokens=recipe.batch_tokens,
        precision=recipe.precision,
        notes=_notes(recipe, batch_tokens),
        new_rows=writer.new_rows,
        unlabelled=unlabelled,
    )


def recipe_for(
    corpus: Corpus,
    encoder: Encoder,
    store: str,
    tokens: Mapping[str, Tokens],
    *,
    keep: Keep,
    dtype: str,
    layers: Sequence[int] | None,
    max_length: int,
    batch_tokens: int | None = None,
    codec: Codec = "none",
    seed: int = 0,
) -> Recipe:
    """What decides a bank, the choices that are left to us made; see `extract`.

    Raises:
        PipelineError: the encoder has no such layer.
    """
    chosen = _layers(layers, encoder.record.n_layers)
    # A question is as long as all its options together, and lies whole inside one block.
    longest = max(max_length, *(int(t.kept_length(keep).max(initial=0)) for t in tokens.values()))
    return Recipe(
        encoder=encoder.record,
        tokenizer_sha256=encoder.tokenizer_sha256,
        columns={
            "text": corpus.text,
            "text_pair": corpus.text_pair,
            "words": corpus.words,
            **({"options": corpus.options} if corpus.options else {}),
        },
        max_length=max_length,
        keep=keep,
        layers=chosen,
        dtype=dtype,
        seed=seed,
        block_tokens=block_tokens_for(encoder.record.width, longest),
        codec=codec,
        batch_tokens=_batch_tokens(store, batch_tokens, encoder, tokens, chosen),
        precision=encoder.precision,
    )


class Stage:
    """Computes the missing blocks and writes each behind the next one's computation.

    Args:
        writer: of the bank.
        encoder: the frozen encoder.
        tokens: of each split's rows.
        kept: which of the tokens are kept.
        progress: called after every block.
        todo: split and number of the blocks to make; those that are missing by default.
    """

    def __init__(
        self,
        writer: Writer,
        encoder: Encoder,
        tokens: Mapping[str, Tokens],
        kept: Mapping[str, ndarray],
        progress: Callable[[Progress], None],
        todo: Sequence[tuple[str, int]] | None = None,
    ) -> None:
        self.writer, self.encoder, self.tokens, self.kept = writer, encoder, tokens, kept
        if todo is None:
            todo = [(name, block) for name in tokens for block in writer.missing(name)]
        self.todo = list(todo)
        self._progress = progress
        self._totals = np.zeros(2, dtype=np.int64)  # examples, tokens
        for split, block in self.todo:
            self._totals += self._counts(split, block)
        self._done = np.zeros(2, dtype=np.int64)
        self._blocks_written = self.written_bytes = 0
        self._pending: list[Future[int]] = []
        self._free: queue.Queue[Tensor] = queue.Queue()

    def run(self) -> int:
        """Encodes and writes what is missing; returns how many blocks that was."""
        self._make_buffers()
        int8 = self.writer.recipe.dtype == "int8"
        self._int8 = Quantiser(self.writer, self.encoder.device, self._encode) if int8 else None
        with ThreadPoolExecutor(1, thread_name_prefix="bank-writer") as pool:
            try:
                for split, block in self.todo:
                    self._collect(wait=False)
                    buffer = self._free.get()
                    found = self._fill(split, block, buffer)
                    ready = self._event()
                    self._pending.append(pool.submit(self._write, split, block, buffer, found, ready))
                    self._report(split)
                self._collect(wait=True)
            except KeyboardInterrupt:
                self._collect(wait=True)
                raise self.stopped() from None
        return len(self.todo)

    def calibrate(self) -> None:
        """Makes the scale and shift of an int8 bank, before other processes write its blocks."""
        if self.writer.recipe.dtype == "int8":
            Quantiser(self.writer, self.encoder.device, self._encode)

    def stopped(self) -> StoppedError:
        """What to say when the user stopped it."""
        return StoppedError(
            f"stopped: {self._blocks_written} of {len(self.todo)} blocks were written and stay. "
            "Run the same command again to go on"
        )

    def note(self, split: str, blocks: Sequence[int], written_bytes: int) -> None:
        """Takes note of blocks that another process wrote."""
        for block in blocks:
            self._done += self._counts(split, block)
        self._blocks_written += len(blocks)
        self.written_bytes += written_bytes
        self._report(split)

    def _make_buffers(self) -> None:
        recipe, device = self.writer.recipe, self.encoder.device
        room = max((self.writer.plans[split].block_tokens for split, _ in self.todo), default=0)
        shape = (len(recipe.layers), room, recipe.encoder.width)
        for _ in range(min(_BUFFERS, len(self.todo))):
            self._free.put(torch.zeros(shape, dtype=TORCH_DTYPES[recipe.dtype], device=device))
        if device.type == "cuda":
            self._copies = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
            self._pinned = torch.zeros(shape, dtype=TORCH_DTYPES[recipe.dtype], pin_memory=True)

    def _fill(self, split: str, block: int, buffer: Tensor) -> Quantised | None:
        """Computes a block's states into a buffer, as they will be stored."""
        counts, found = self._counts(split, block), None
        if self._int8 is None:
            self._encode(split, block, buffer)
        else:
            found = self._int8.fill(split, block, buffer)
        buffer[:, int(counts[1]) :] = 0
        self._done += counts
        return found

    def _event(self) -> Any:
        """The event after which what was computed is there; None on a device that needs none."""
        device = self.encoder.device
        return torch.cuda.current_stream(device).record_event() if device.type == "cuda" else None

    def _encode(self, split: str, block: int, buffer: Tensor) -> None:
        plan = self.writer.plans[split]
        chosen = plan.examples(block)
        places = plan.start[chosen] - block * plan.block_tokens
        sequences, start = self.tokens[split].pieces_of(plan.row[chosen], places, self.kept[split])
        self.encoder.encode(
            self.tokens[split].pieces,
            sequences,
            kept=self.kept[split],
            layers=self.writer.recipe.layers,
            start=start,
            out=buffer,
            budget_tokens=self.writer.recipe.batch_tokens,
        )
        self.tokens[split].release()

    def _write(self, split: str, block: int, buffer: Tensor, found: Quantised | None, ready: Any) -> int:
        try:
            plan, tokens = self.writer.plans[split], self.tokens[split]
            rows = plan.row[plan.examples(block)]
            at = ranges(tokens.start[rows], tokens.length[rows])
            at = at[self.kept[split][at]]
            small = {}
            for name in TOKEN_ARRAYS:
                small[name] = np.full(plan.block_tokens, -1 if name == "word_id" else 0, dtype=np.int64)
                small[name][: len(at)] = getattr(tokens, name)[at]
            states = to_numpy(self._on_host(buffer, ready))[:, : plan.block_tokens]
            if found is None:
                return self.writer.write_block(split, block, states, small)
            with torch.cuda.stream(None if ready is None else self._copies):
                clipped = found.check(self.writer, split, block)
            return self.writer.write_block(split, block, states, small, clipped)
        finally:
            self._free.put(buffer)

    def _on_host(self, buffer: Tensor, ready: Any) -> Tensor:
        """The buffer in host memory, copied on a stream of its own while the device goes on."""
        if ready is None:
            return buffer.cpu()
        with torch.cuda.stream(self._copies):
            self._copies.wait_event(ready)
            self._pinned.copy_(buffer, non_blocking=True)
        self._copies.synchronize()
        return self._pinned

    def _counts(self, split: str, block: int) -> Int[ndarray, "2"]:
        """Examples and kept tokens of a block."""
        plan = self.writer.plans[split]
        chosen = plan.examples(block)
        return np.array([chosen.stop - chosen.start, int(plan.length[chosen].sum())])

    def _collect(self, *, wait: bool) -> None:
        """Takes note of blocks that are written; raises what their writing raised."""
        while self._pending and (wait or self._pending[0].done()):
            self.written_bytes += self._pending.pop(0).result()
            self._blocks_written += 1

    def _report(self, split: str) -> None:
        self._progress(
            Progress(
                split=split,
                examples=int(self._done[0]),
                tokens=int(self._done[1]),
                written_bytes=self.written_bytes,
                n_examples=int(self._totals[0]),
                n_tokens=int(self._totals[1]),
            )
        )


def _labels(corpus: Corpus, targets: Sequence[str] | None) -> tuple[list[Labels], dict[str, str]]:
    """The labels to write, and why each other column is none."""
    if targets is not None:
        for name in targets:
            check_name(name)
        return [read_labels(corpus, name) for name in targets], {}
    found, reasons = find_labels(corpus)
    skipped = {column: why for column, why in reasons.items() if column not in corpus.inputs}
    for labels in list(found):
        try:
            check_name(labels.name)
        except CacheError as error:
            found.remove(labels)
            skipped[labels.name] = str(error)
    return found, skipped


def _layers(asked: Sequence[int] | None, n_layers: int) -> tuple[int, ...]:
    if asked is None:
        return tuple(range(n_layers))
    wrong = [layer for layer in asked if not 0 <= layer < n_layers]
    if wrong or not asked:
        raise PipelineError(
            f"--layers {wrong[0] if wrong else ''}: the encoder has layers 0 to {n_layers - 1}"
        )
    return tuple(sorted(set(asked)))


def _notes(recipe: Recipe, batch_tokens: int | None) -> list[str]:
    if batch_tokens in (None, recipe.batch_tokens):
        return []
    return [
        f"--batch-tokens {batch_tokens}: the bank was begun with {recipe.batch_tokens}, which was used, so "
        "that all of it rounds alike"
    ]


def _batch_tokens(
    store: str, asked: int | None, encoder: Encoder, tokens: Mapping[str, Tokens], layers: Sequence[int]
) -> int:
    """Tokens in one forward: those of the bank that is there, so that a resumed run rounds alike."""
    if known := find_bank(store):
        return known.recipe.batch_tokens
    largest = max(tokens.values(), key=lambda t: len(t.input_ids))
    return asked or pick_budget(encoder, largest.pieces, layers)


def read_batch(corpus: Corpus, split: str) -> Callable[[int, int], Batch]:
    """Reads rows of a split, from one number up to another, as the tokenizer takes them."""

    def read(first: int, stop: int) -> Batch:
        rows = slice(first, stop)
        return corpus.texts(split, rows), corpus.pairs(split, rows)

    return read


def _tokenize(corpus: Corpus, split: str, encoder: Encoder, max_length: int) -> Tokens:
    batches = batches_of(read_batch(corpus, split), len(corpus.split(split)))
    return tokenize(encoder.tokenizer, batches, max_length=max_length)


def hash_rows(corpus: Corpus, split: str) -> UInt64[ndarray, " row"]:
    """Hashes of a split's texts, in row order, as a bank keeps them."""
    hashes = []
    for texts, pairs in batches_of(read_batch(corpus, split), len(corpus.split(split))):
        hashes.append(hash_texts(texts if pairs is None else zip(texts, pairs, strict=True)))
    return np.concatenate([*hashes, np.empty(0, np.uint64)])


def _mask(corpus: Corpus, split: str, encoder: Encoder, max_length: int, draw: Mapping[str, int]) -> Masked:
    batches = batches_of(read_batch(corpus, split), len(corpus.split(split)))
    chunks = chunked(encoder.tokenizer, batches, max_length=max_length)
    return masked(chunks, mask_id=encoder.tokenizer.mask_token_id, split=split, **draw)


def _token_labels(texts: Mapping[str, Masked], output_layer: OutputLayer) -> Labels:
    """What is to be predicted, and what a head that predicts it starts from."""
    return Labels(
        name="token",
        kind="token",
        names=(),
        values={name: text.labels for name, text in texts.items()},
        metric="perplexity",
        settings=output_layer.settings(),
    )


def _rows(tokens: Tokens, keep: Keep, text_hash: UInt64[ndarray, " row"]) -> Rows:
    return Rows(
        length=tokens.kept_length(keep),
        n_words=tokens.n_words,
        text_hash=text_hash,
    )


def _located(
    corpus: Corpus, encoder: Encoder, max_length: int, labels: Sequence[Labels]
) -> tuple[list[Labels], dict[str, dict[str, int]]]:
    """The labels with their answers found in the tokens; and of each split, how many were cut off."""
    found = [
        locate_labels(corpus, label, tokenizer=encoder.tokenizer, max_length=max_length) for label in labels
    ]
    spans = [label for label in found if label.kind == "span"]
    cut = {name: {"answers_cut": sum(label.cut[name] for label in spans)} for name in corpus.splits}
    return found, cut if spans else {}


def _write_labels(writer: Writer, labels: Sequence[Labels]) -> None:
    for label in labels:
        for split in label.values:
            writer.write_target(split, label.target(split))


def _report(writer: Writer, split: str, tokens: Tokens) -> dict[str, Any]:
    plan = writer.plans[split]
    return {
        "examples": len(plan.row),
        "tokens": int(plan.length.sum()),
        "blocks": plan.n_blocks,
        "words_cut": tokens.words_cut,
        "words_empty": tokens.words_empty,
    }
