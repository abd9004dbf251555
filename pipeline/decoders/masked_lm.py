"""A masked language model's output: a score of every token of the vocabulary, for each predicted place."""

from collections.abc import Mapping
from typing import ClassVar, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from pipeline.decoders._base import Decoder, TargetKind, Tokens, cross_entropy
from pipeline.stack import ACTIVATIONS, Dropout, LayerNorm, Linear, constant


class MaskedLM(Decoder):
    """logits = W LayerNorm(act(A h + a)) + b: the output layer of BERT (Devlin et al. 2019) and its kin.

    Starts as the encoder's own, which a bank of `--keep masked` has beside it. What is not learned is no
    parameter, so it counts for none.

    Args:
        width: size of the fused vectors.
        n_classes: size of the vocabulary.
        generator: source of the starting weights, where they are not the encoder's.
        seed: start of the dropout stream.
        output_layer: file of the encoder's own weights, which who builds the head reads and hands to
            `start_from`; ``none`` starts from random ones.
        learn: the transform A, a, the LayerNorm and b (``transform``), W as well (``all``), or ``none``.
        inner: rows of A; those of `width` by default.
        activation: between A and the LayerNorm.
        eps: of the LayerNorm.
        dropout: rate before the transform, in [0, 1).

    """

    target_kind: ClassVar[TargetKind] = "token"
    evaluated_at_once: ClassVar[int] = 8  # 75 places x 30,000 tokens are 9 MB an example

    def __init__(
        self,
        *,
        width: int,
        n_classes: int,
        generator: torch.Generator,
        seed: int,
        output_layer: str | None = None,
        learn: Literal["transform", "all", "none"] = "transform",
        inner: int | None = None,
        activation: Literal["gelu", "gelu_tanh", "relu", "silu", "tanh"] = "gelu",
        eps: float = 1e-12,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        inner = inner or width
        self.tokens: Tokens = "masked"
        self.activation = activation
        self.dropout = Dropout(dropout, seed=seed)
        self.transform = Linear(width, inner, generator=generator)
        self.norm = LayerNorm(inner, eps=eps)
        self.projection = Linear(inner, n_classes, generator=generator, bias=False)
        self.bias = constant((1, n_classes), 0.0)
        if learn != "all":
            _freeze(self.projection)
        if learn == "none":
            for module in (self.transform, self.norm, self):
                _freeze(module)

    def start_from(self, weights: Mapping[str, Tensor]) -> None:
        """Takes over the weights of an encoder's output layer, those that are given.

        Raises:
            ValueError: they are of other sizes.
        """
        own = {**dict(self.named_parameters()), **dict(self.named_buffers())}
        for name, value in weights.items():
            mine = own["bias" if name == "projection.bias" else name]
            if mine.shape[1:] != value.shape:
                raise ValueError(
                    f"the encoder's output layer has {name} of {tuple(value.shape)}, this head needs "
                    f"{tuple(mine.shape[1:])}: use another fusion, or --set output_layer=none"
                )
            mine.data.copy_(value[None])

    def forward(
        self, fused: Float[Tensor, "#head token width"], lengths: Int[Tensor, " example"]
    ) -> Float[Tensor, "head token vocabulary"]:
        """Scores every token of the vocabulary."""
        inner = ACTIVATIONS[self.activation](self.transform(self.dropout(fused)))
        scores: Tensor = self.projection(self.norm(inner)) + self.bias
        return scores

    def loss(
        self,
        scores: Float[Tensor, "head token vocabulary"],
        labels: Int[Tensor, " token"],
        lengths: Int[Tensor, " example"],
    ) -> Float[Tensor, " head"]:
        """Mean cross entropy of the true tokens, in nats."""
        return cross_entropy(scores, labels)

    def predict(
        self, scores: Float[Tensor, "head token vocabulary"], lengths: Int[Tensor, " example"]
    ) -> Int[Tensor, "head token"]:
        """The likeliest token."""
        return scores.argmax(-1)

    def outcome(
        self,
        scores: Float[Tensor, "head token vocabulary"],
        labels: Int[Tensor, " token"],
        lengths: Int[Tensor, " example"],
    ) -> Float[Tensor, "head token"]:
        """The negative log-likelihood of each true token, in nats: what perplexity is made of."""
        flat = nn.functional.cross_entropy(
            scores.flatten(0, 1), labels.long().repeat(len(scores)), ignore_index=-1, reduction="none"
        )
        return flat.view(len(scores), len(labels))


def _freeze(module: nn.Module) -> None:
    """Turns a module's own parameters into buffers."""
    for name, parameter in list(module.named_parameters(recurse=False)):
        delattr(module, name)
        module.register_buffer(name, parameter.data)


DECODER = MaskedLM
