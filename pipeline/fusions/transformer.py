"""More encoder layers on top of the frozen ones: the "Base+n" of the DWAtt paper."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from pipeline.fusions._base import Fusion
from pipeline.stack import LayerNorm, Linear

ROWS = 8
"""Examples padded to one length on a CPU (docs/log.md)."""


@dataclass(frozen=True)
class Rows:
    """Examples of about one length, a row of token numbers each; fill has the number of some token."""

    asking: Int[Tensor, "example longest_asking"]  # among the tokens that ask
    asked: Int[Tensor, "example longest"]  # among all tokens
    filled: Bool[Tensor, "example longest"]  # which places of `asked` hold a token


@dataclass(frozen=True)
class Layout:
    """Which tokens see each other, and which of them ask."""

    groups: list[Rows]
    places: Int[Tensor, " asking"]  # of each token that asks, among the rows of all groups

    @classmethod
    def of(cls, lengths: Int[Tensor, " example"], n_asking: Int[Tensor, " example"]) -> "Layout":
        """Groups the examples by length, for attention computes the fill as well.

        Args:
            lengths: tokens of each example.
            n_asking: how many tokens of each example ask.
        """
        device = lengths.device
        lengths, n_asking = lengths.cpu(), n_asking.cpu()  # a GPU would be waited for at every size
        starts, asking_starts = lengths.cumsum(0) - lengths, n_asking.cumsum(0) - n_asking
        by_length = lengths.argsort(stable=True)
        by_length = by_length[n_asking[by_length] > 0]
        groups, places, n_places = [], lengths.new_empty(int(n_asking.sum())), 0
        for few in torch.split(by_length, ROWS if device.type == "cpu" else max(1, len(by_length))):
            asking, asks = _in_rows(asking_starts[few], n_asking[few])
            asked, filled = _in_rows(starts[few], lengths[few])
            places[asking[asks]] = n_places + asks.flatten().nonzero().squeeze(1)
            n_places += asks.numel()
            groups.append(Rows(asking.to(device), asked.to(device), filled.to(device)))
        return cls(groups, places.to(device))


def _in_rows(
    starts: Int[Tensor, " example"], lengths: Int[Tensor, " example"]
) -> tuple[Int[Tensor, "example longest"], Bool[Tensor, "example longest"]]:
    """Numbers of the tokens of each example, a row an example, and which places of the rows hold one."""
    place = torch.arange(int(lengths.max()))
    filled = place < lengths[:, None]
    return starts[:, None] + torch.where(filled, place, 0), filled


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
        self.query = Linear(width, width, generator=generator)
        self.key_value = Linear(width, 2 * width, generator=generator)
        self.out = Linear(width, width, generator=generator)
        self.norm_attention = LayerNorm(width)
        self.up = Linear(width, 4 * width, generator=generator)
        self.down = Linear(4 * width, width, generator=generator)
        self.norm_network = LayerNorm(width)

    def forward(
        self,
        x: Float[Tensor, "#head token width"],
        layout: Layout,
        chosen: Int[Tensor, " asking"] | None = None,
    ) -> Float[Tensor, "head asking width"]:
        """Lets the tokens of each example look at one another.

        Args:
            x: the vectors, example after example, without padding.
            layout: which tokens see each other.
            chosen: the tokens that ask, whose vectors are wanted; None for all.
        """
        asking = x if chosen is None else x.index_select(1, chosen)
        seen = self._attend(self.query(asking), self.key_value(x), layout)
        asking = self.norm_attention(asking + self.out(seen))
        return self.norm_network(asking + self.down(nn.functional.gelu(self.up(asking))))

    def _attend(
        self,
        queries: Float[Tensor, "head asking width"],
        keys_values: Float[Tensor, "head token two_widths"],
        layout: Layout,
    ) -> Float[Tensor, "head asking width"]:
        n_heads = len(queries)
        found = []
        for rows in layout.groups:
            q = self._rows(queries, rows.asking)
            k, v = self._rows(keys_values, rows.asked).chunk(2, dim=1)
            mask = rows.filled.repeat(n_heads, 1)[:, None, None]
            mixed = nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask)
            found.append(mixed.transpose(1, 2).reshape(n_heads, rows.asking.numel(), -1))
        return torch.cat(found, dim=1).index_select(1, layout.places)

    def _rows(
        self, vectors: Float[Tensor, "head token width"], numbers: Int[Tensor, "example longest"]
    ) -> Float[Tensor, "row attention longest narrow"]:
        """Vectors of tokens in rows, divided among the attention heads.

        Heads of the stack and examples share the first axis: only 4 axes reach the fast kernels.
        """
        padded = vectors.index_select(1, numbers.flatten())
        width = self.query.weight.shape[-1] // self.n_attentions
        return padded.view(len(vectors) * len(numbers), numbers.shape[1], -1, width).transpose(1, 2)


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
        if not (x.shape[1] if chosen is None else len(chosen)):
            return x[:, :0]
        n_asking = lengths if chosen is None else _counts(chosen, lengths)
        *lower, last = self.blocks
        if lower:
            every = Layout.of(lengths, lengths)
            for block in lower:
                x = block(x, every)
        found: Tensor = last(x, Layout.of(lengths, n_asking), chosen)
        return found


def _counts(chosen: Int[Tensor, " chosen"], lengths: Int[Tensor, " example"]) -> Int[Tensor, " example"]:
    """How many of the tokens chosen belong to each example."""
    example = torch.searchsorted(lengths.cumsum(0), chosen, right=True)
    return torch.bincount(example, minlength=len(lengths))


FUSION = Transformer
