"""Masked text as a task of early fusion: what `layerbank extract --keep masked` encodes, drawn alike."""

from dataclasses import dataclass
from typing import Any

import numpy as np

from cache import Target
from pipeline.corpus import Corpus
from pipeline.errors import PipelineError
from pipeline.head import Head
from pipeline.labels import Labels
from pipeline.masking import check_maskable, chunked, masked
from pipeline.output_layer import OutputLayer, read_output_layer
from pipeline.tokens import batches_of
from pipeline.tuning.backbone import Backbone
from pipeline.tuning.examples import Examples

TARGET = "token"
SEED = 0
"""Of the draw: that of an extraction that names no ``--seed``, so that perplexities compare."""

FLAG = "--maskings"


@dataclass(frozen=True, kw_only=True)
class MaskedText:
    """A corpus whose tokens are to be predicted, and the encoder's own output layer."""

    corpus: Corpus
    backbone: Backbone
    maskings: int
    output_layer: OutputLayer

    @classmethod
    def open(cls, corpus: Corpus, backbone: Backbone, *, target: str, maskings: int) -> "MaskedText":
        """Masked text of an encoder.

        Raises:
            PipelineError: the text, the target or the encoder do not fit.
        """
        if target != TARGET:
            raise PipelineError(
                f"{FLAG} makes the target {TARGET!r}, {target!r} was asked: give --target {TARGET}"
            )
        check_maskable(corpus, backbone.tokenizer, None, flag=FLAG)
        layer = read_output_layer(backbone.record, flag=FLAG)
        return cls(corpus=corpus, backbone=backbone, maskings=maskings, output_layer=layer)

    @property
    def labels(self) -> Labels:
        """The target, without its values; the decoder's weights come by `start_from`."""
        settings = {n: v for n, v in self.output_layer.settings().items() if n != "output_layer"}
        return Labels(
            name=TARGET,
            kind="token",
            names=(),
            values={split: np.empty(0, np.int32) for split in self.corpus.splits},
            metric="perplexity",
            settings=settings,
        )

    def examples(self, split: str, *, task: int, max_length: int) -> Examples:
        """The chunks of a split in all their maskings, as a bank of `--keep masked` has them.

        Raises:
            PipelineError: the split is not there, or `max_length` has no room for text.
        """
        tokenizer = self.backbone.tokenizer
        batches = batches_of(self.corpus.reader(split), len(self.corpus.split(split)))
        chunks = chunked(tokenizer, batches, max_length=max_length)
        text = masked(
            chunks,
            mask_id=tokenizer.mask_token_id,
            vocabulary=self.output_layer.vocabulary,
            maskings=self.maskings,
            seed=SEED,
            split=split,
        )
        target = Target(name=TARGET, kind="token", names=(), values=text.labels)
        return Examples(task=task, tokens=text.tokens, target=target)


def start_from(head: Head, output_layer: OutputLayer) -> None:
    """Gives a head's decoder the weights of the encoder's own output layer.

    Raises:
        PipelineError: they are of other sizes.
    """
    decoder: Any = head.decoder
    try:
        decoder.start_from(output_layer.weights)
    except ValueError as error:
        raise PipelineError(str(error)) from error
