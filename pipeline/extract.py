"""Stage 1: the frozen encoder runs once over a data set and fills a bank.

Here is what goes into a bank: rows, recipe, labels. `pipeline.stage` makes its blocks.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

import numpy as np
from jaxtyping import UInt64
from numpy import ndarray

from cache import Bank, CacheError, Recipe, Rows, Split, Writer, open_bank
from cache.bank import find_bank, find_twin
from cache.fingerprint import bank_fingerprint, hash_texts, rows_fingerprint
from cache.layout import ALIKE, Codec, Keep, block_tokens_for
from cache.targets import check_name
from pipeline.calibrate import pick_budget
from pipeline.corpus import Corpus
from pipeline.encoder import Encoder
from pipeline.errors import PipelineError
from pipeline.labels import Labels, find_labels, locate_labels, read_labels
from pipeline.masking import WHOLE, Masked, check_maskable, check_maskings, chunks, masked
from pipeline.memory import give_back
from pipeline.output_layer import OutputLayer, read_output_layer
from pipeline.room import check_room
from pipeline.stage import Progress, Stage
from pipeline.tokens import Tokens, batches_of, tokenize
from pipeline.versions import versions

_REPORTED = ("examples", "tokens", "blocks", "words_cut", "words_empty", "answers_cut")
"""What is said of a split, and kept in its attributes."""


@dataclass(frozen=True, kw_only=True)
class Extraction:
    """What an extraction did."""

    store: str
    splits: dict[str, dict[str, Any]]  # of each: examples, tokens, blocks, words cut off, share clipped
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
    repair: bool = False,
    asked: str | None = None,
    progress: Callable[[Progress], None] = lambda _: None,
    note: Callable[[str], None] = lambda _: None,
    spread: Callable[[Stage], int] | None = None,
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
        repair: read every byte of what is there, even where the files of a complete bank are as they were
            left.
        asked: what tells this extraction from others, to be noted on the bank, see `pipeline.repeat`.
        progress: called after every block.
        note: gets what the user is told before the first block.
        spread: how the blocks are made elsewhere, see `pipeline.spread`; in this process by default.

    Raises:
        PipelineError: the data or a choice is wrong.
        StoppedError: Ctrl-C was pressed.
        CacheError: the bank cannot be written, or is of another making.
    """
    began = time.perf_counter()
    length = encoder.max_length(max_length)
    check_maskings(keep, maskings)
    if keep == "masked":
        rows = _masked_rows(corpus, encoder, length, targets, maskings=maskings, seed=seed)
    else:
        rows = _plain_rows(corpus, encoder, length, targets)
    corpus.release()
    give_back()
    tokens = rows.tokens
    recipe = recipe_for(
        corpus, encoder, store, tokens, keep=keep, dtype=dtype, layers=layers, max_length=length,
        batch_tokens=batch_tokens, codec=codec, seed=seed,
    )  # fmt: skip
    twin = _twin(store, recipe, rows.hashes)
    if not force:
        check_room(store, recipe, tokens, rows.output_layer.n_bytes if rows.output_layer else 0)
    with Writer(store, recipe, rows.of_bank(keep), versions=versions(), repair=repair) as writer:
        if twin is not None:
            note(f"note: {twin.path} holds the very same states; they are made once more for {store}")
        kept = {name: split.kept(keep) for name, split in tokens.items()}
        stage = Stage(writer, encoder, tokens, kept, progress)
        encoded = stage.run() if spread is None else spread(stage)
        labels, cut = _located(corpus, encoder, length, rows.labels)
        if rows.output_layer is not None:
            rows.output_layer.save(writer.place)
        _write_labels(writer, labels)
        unlabelled = writer.lengthen_targets([label.name for label in labels])
        reports = {name: {**_report(writer, name, tokens[name]), **cut.get(name, {})} for name in tokens}
        names = [label.name for label in labels]
        writer.finish(reports, skipped=rows.skipped, asked=asked, written=names)
    return report(
        open_bank(store), began, encoded=encoded, targets=names, batch_tokens=batch_tokens,
        new_rows=writer.new_rows, unlabelled=unlabelled,
    )  # fmt: skip


def report(
    bank: Bank,
    began: float,
    *,
    targets: list[str],
    batch_tokens: int | None,
    encoded: int = 0,
    new_rows: Mapping[str, int] = MappingProxyType({}),
    unlabelled: Sequence[str] = (),
) -> Extraction:
    """What an extraction did that ended with a bank.

    Args:
        bank: the bank, complete.
        began: when it began, by `time.perf_counter`.
        targets: the columns that it writes as labels.
        batch_tokens: padded tokens in one forward that were asked for.
        encoded: blocks that it encoded.
        new_rows: rows that the bank lacked, of each split.
        unlabelled: the bank's targets that have no label on them.
    """
    opened = {name: bank.split(name) for name in bank.splits}
    splits = {name: _reported(split) for name, split in opened.items()}
    return Extraction(
        store=bank.path,
        splits=splits,
        examples=sum(facts["examples"] for facts in splits.values()),
        tokens=sum(facts["tokens"] for facts in splits.values()),
        bytes=bank.n_bytes,
        seconds=time.perf_counter() - began,
        blocks=sum(split.n_blocks for split in opened.values()),
        blocks_encoded=encoded,
        targets=targets,
        skipped=bank.attrs["skipped"],
        batch_tokens=bank.recipe.batch_tokens,
        precision=bank.recipe.precision,
        notes=_notes(bank.recipe, batch_tokens),
        new_rows=dict(new_rows),
        unlabelled=list(unlabelled),
    )


@dataclass(frozen=True, kw_only=True)
class _SourceRows:
    """The rows of a data set as they go into a bank, split by split."""

    tokens: Mapping[str, Tokens]
    hashes: Mapping[str, UInt64[ndarray, " row"]]
    labels: list[Labels]
    skipped: dict[str, str] = field(default_factory=dict)  # columns that are no targets, and why
    output_layer: OutputLayer | None = None  # of masked text

    def of_bank(self, keep: Keep) -> dict[str, Rows]:
        """What the writer is told of them."""
        return {
            name: Rows(
                lengths=tokens.lengths(keep),
                kept=ALIKE[keep].index(keep),
                n_words=tokens.n_words,
                text_hash=self.hashes[name],
            )
            for name, tokens in self.tokens.items()
        }


def _plain_rows(
    corpus: Corpus, encoder: Encoder, max_length: int, targets: Sequence[str] | None
) -> _SourceRows:
    labels, skipped = _labels(corpus, targets)
    return _SourceRows(
        tokens={name: _tokenize(corpus, name, encoder, max_length) for name in corpus.splits},
        hashes={name: hash_rows(corpus, name) for name in corpus.splits},
        labels=labels,
        skipped=skipped,
    )


def _masked_rows(
    corpus: Corpus,
    encoder: Encoder,
    max_length: int,
    targets: Sequence[str] | None,
    **draw: int,
) -> _SourceRows:
    """Chunks of the text with positions masked, which are what is to be predicted."""
    output_layer = open_output_layer(corpus, encoder, targets)
    draw = {**draw, "vocabulary": output_layer.vocabulary}
    texts = {name: _mask(corpus, name, encoder, max_length, draw) for name in corpus.splits}
    return _SourceRows(
        tokens={name: text.tokens for name, text in texts.items()},
        hashes={name: text.hashes() for name, text in texts.items()},
        labels=[_token_labels(texts, output_layer)],
        output_layer=output_layer,
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
    longest = max(max_length, *(int(t.kept_length(ALIKE[keep][0]).max(initial=0)) for t in tokens.values()))
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


def _twin(store: str, recipe: Recipe, hashes: Mapping[str, UInt64[ndarray, " row"]]) -> Bank | None:
    """A bank beside the one to make, that would do in its place."""
    fingerprints = {name: rows_fingerprint(split) for name, split in hashes.items()}
    return find_twin(store, recipe, bank_fingerprint(recipe, fingerprints))


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


def _tokenize(corpus: Corpus, split: str, encoder: Encoder, max_length: int) -> Tokens:
    batches = batches_of(corpus.reader(split), len(corpus.split(split)))
    return tokenize(encoder.tokenizer, batches, max_length=max_length)


def hash_rows(corpus: Corpus, split: str) -> UInt64[ndarray, " row"]:
    """Hashes of a split's texts, in row order, as a bank keeps them."""
    hashes = []
    for texts, pairs in batches_of(corpus.reader(split), len(corpus.split(split))):
        hashes.append(hash_texts(texts if pairs is None else zip(texts, pairs, strict=True)))
    return np.concatenate([*hashes, np.empty(0, np.uint64)])


def open_output_layer(
    corpus: Corpus, encoder: Encoder, targets: Sequence[str] | None = None
) -> OutputLayer:
    """The output layer of an encoder that is to predict masked tokens of a corpus.

    Raises:
        PipelineError: the text cannot be masked, or the encoder is no masked language model.
    """
    check_maskable(corpus, encoder.tokenizer, targets)
    return read_output_layer(encoder.record)


def mask_chunks(
    tokens: Tokens, split: str, *, encoder: Encoder, max_length: int, draw: Mapping[str, int]
) -> Masked:
    """Rows that were tokenized whole, joined, cut into chunks and masked; `draw` as for `masked`."""
    cut = chunks(tokens, max_length=max_length)
    return masked(cut, mask_id=encoder.tokenizer.mask_token_id, split=split, **draw)


def _mask(corpus: Corpus, split: str, encoder: Encoder, max_length: int, draw: Mapping[str, int]) -> Masked:
    tokens = _tokenize(corpus, split, encoder, WHOLE)
    return mask_chunks(tokens, split, encoder=encoder, max_length=max_length, draw=draw)


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


def _reported(split: Split) -> dict[str, Any]:
    """What the bank keeps of the report of a split."""
    attrs = split.group.attrs
    facts = {name: attrs[name] for name in _REPORTED if name in attrs}
    return facts if split.clipped_frac is None else {**facts, "clipped_frac": split.clipped_frac}


def _report(writer: Writer, split: str, tokens: Tokens) -> dict[str, Any]:
    plan = writer.plans[split]
    return {
        "examples": len(plan.row),
        "tokens": int(plan.length.sum()),
        "blocks": plan.n_blocks,
        "words_cut": tokens.words_cut,
        "words_empty": tokens.words_empty,
    }
