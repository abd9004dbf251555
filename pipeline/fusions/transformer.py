"""More encoder layers on top of the frozen ones: the "Base+n" of the DWAtt paper."""

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from pipeline.fusions._base import Fusion
from pipeline.stack import LayerNorm, Linear


class EncoderLayer(nn.Module):
    """One layer of BERT: self-attention and a GELU network of 4 d, each added, then normalised.

    12 d² + 13 d parameters, which start like `torch.nn.Linear` (for d = 1024 a spread of 0.018 against
    BERT's 0.02); no dropout.

    Args:
        width: size of a token's vector, d.
        generator: source of the starting weights.
    """

    def __init__(self, width: int, generator: torch.Generator) -> None:
        super().__init__()
        # 64 values an attention head, as in BERT, where d allows it; else somewhat more.
        self.n_attentions = next(n for n in range(max(1, width // 64), 0, -1) if width % n == 0)
        self.qkv = Linear(width, 3 * width, generator=generator)
        self.out = Linear(width, width, generator=generator)
        self.norm_attention = LayerNorm(width)
        self.up = Linear(width, 4 * width, generator=generator)
        self.down = Linear(4 * width, width, generator=generator)
        self.norm_network = LayerNorm(width)

    def forward(
        self,
        x: Float[Tensor, "#head token width"],
        slots: Int[Tensor, " token"],
        filled: Bool[Tensor, "example longest"],
        chosen: Int[Tensor, " chosen"] | None = None,
    ) -> Float[Tensor, "head answer width"]:
        """Lets the tokens of each example look at one another.

        Args:
            x: the vectors, example after example, without padding.
            slots: place of each token in the padded batch, counted row by row.
            filled: which places of the padded batch hold a token; at least one in each row.
            chosen: the tokens whose vectors are wanted; None for all.
        """
        seen = self._attend(self.qkv(x), slots, filled)
        if chosen is not None:
            x, seen = x.index_select(1, chosen), seen.index_select(1, chosen)
        x = self.norm_attention(x + self.out(seen))
        return self.norm_network(x + self.down(nn.functional.gelu(self.up(x))))

    def _attend(
        self,
        qkv: Float[Tensor, "head token qkv"],
        slots: Int[Tensor, " token"],
        filled: Bool[Tensor, "example longest"],
    ) -> Float[Tensor, "head token width"]:
        n_heads, _, n_qkv = qkv.shape
        padded = qkv.new_zeros(n_heads, filled.numel(), n_qkv).index_copy(1, slots, qkv)
        split = padded.view(n_heads, *filled.shape, 3, self.n_attentions, -1)
        # Heads of the stack and examples share the batch axis: only 4 axes reach the fast kernels.
        q, k, v = split.permute(3, 0, 1, 4, 2, 5).flatten(1, 2)
        mask = filled.repeat(n_heads, 1)[:, None, None]
        mixed = nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        return mixed.transpose(1, 2).reshape(n_heads, filled.numel(), -1).index_select(1, slots)


class Transformer(Fusion):
    """h = n new encoder layers on z_L, as BERT's own (DWAtt paper, "Base+n").

    n (12 d² + 13 d) parameters, 25.19 M for n = 2, d = 1024. A token attends to the tokens of its own
    example only, so every token of an example has to be in the bank.

    Args:
        n_layers: number of layers handed to `forward`, 1.
        width: size of a state, d.
        generator: source of the starting weights.
        n: number of new layers, 1 or more.

    Raises:
        ValueError: n is below 1.
    """

    mixes_tokens: ClassVar[bool] = True

    def __init__(self, *, n_layers: int, width: int, generator: torch.Generator, n: int = 2) -> None:
        super().__init__()
        if n < 1:
            raise ValueError(f"transformer: n is {n}; it adds at least one layer")
        self.out_width = width
        self.blocks = nn.ModuleList(EncoderLayer(width, generator) for _ in range(n))

    @classmethod
    def reads(cls, kept: Sequence[int], last: int, **options: Any) -> list[int]:
        """The encoder's last layer, L."""
        return [last]

    def forward(
        self, states: Float[Tensor, "layer token width"], lengths: Int[Tensor, " example"]
    ) -> Float[Tensor, "#head token width"]:
        """Runs the new layers on the last layer of each example, for every head."""
        return self._run(states[-1:], lengths, None)

    def at(
        self,
        states: Float[Tensor, "layer token width"],
        lengths: Int[Tensor, " example"],
        chosen: Int[Tensor, " chosen"],
    ) -> Float[Tensor, "#head chosen width"]:
        """The same for some tokens: the others stop at the last attention, which is all that sees them."""
        return self._run(states[-1:], lengths, chosen)

    def _run(self, x: Tensor, lengths: Tensor, chosen: Tensor | None) -> Tensor:
        if not x.numel():
            return x if chosen is None else x.index_select(1, chosen)
        # An example without tokens would be a row of masked scores only, whose softmax is NaN.
        lengths = lengths[lengths > 0]
        filled = torch.arange(int(lengths.max()), device=lengths.device) < lengths[:, None]
        slots = filled.flatten().nonzero().squeeze(1)
        *lower, last = self.blocks
        for block in lower:
            x = block(x, slots, filled)
        found: Tensor = last(x, slots, filled, chosen)
        return found


FUSION = Transformer
