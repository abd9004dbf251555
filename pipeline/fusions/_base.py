"""What every late fusion is: states of all layers in, one vector per token out."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, ClassVar

from jaxtyping import Float, Int
from torch import Tensor, nn

from pipeline.stack import Linear


class Fusion(nn.Module, ABC):
    """Maps the layers of a token to one vector, for each head of a stack.

    A subclass is built for one head: ``__init__(self, *, n_layers, width, generator, <its own
    hyper-parameters>)``, where `n_layers` counts the layers that `reads` asked for. All its parameters
    and buffers start with a head axis of 1 (see `pipeline.stack`), and `forward` works for any length of
    that axis. It sets `out_width`, the size of the vectors it returns.
    """

    mixes_tokens: ClassVar[bool] = False
    """Whether a token's vector depends on the other tokens of its example (needs every token)."""

    takes: ClassVar[tuple[str, str] | None] = None
    """A fusion and the name of its parameter that this one takes from trained heads, if it takes one.

    Then its option `sources` names their runs, with commas between, and its buffer `taken_as` holds what
    they learned (see `pipeline.transfer`).
    """

    taken_as: ClassVar[str] = "sources"
    """The buffer that holds it: a vector a run, or a single one."""

    shared: ClassVar[str | None] = None
    """The name of the submodule that heads of several tasks have in common where they are trained together.

    See `pipeline.multitask`. An option may leave the submodule out (None): then nothing is shared.
    """

    out_width: int

    @classmethod
    def reads(cls, kept: Sequence[int], last: int, **options: Any) -> list[int]:
        """The layers this fusion reads, out of those the bank keeps.

        Args:
            kept: numbers of the layers in the bank, ascending; 0 is the embeddings.
            last: number of the encoder's last layer, L.
            options: the fusion's own hyper-parameters, as given to its constructor.

        Returns:
            Layer numbers, ascending. They may name a layer that is not kept: the caller says so.
        """
        return list(kept)

    @abstractmethod
    def forward(
        self, states: Float[Tensor, "layer token width"], lengths: Int[Tensor, " example"]
    ) -> Float[Tensor, "#head token out"]:
        """Fuses the layers.

        Args:
            states: states of a batch's tokens, example after example, without padding.
            lengths: number of tokens of each example; they add up to the token axis.

        Returns:
            One vector per head and token; a head axis of 1 where all heads share the result.
        """

    def weights(
        self, states: Float[Tensor, "layer token width"], lengths: Int[Tensor, " example"]
    ) -> Float[Tensor, "head token layer"] | None:
        """How much of each layer goes into each token's vector, where the fusion learns that.

        Args:
            states: as for `forward`.
            lengths: likewise.

        Returns:
            For each head and token a distribution over the layers that it reads: what `layerbank analyze`
            shows. None where no part of the fusion is one.
        """
        return None

    def at(
        self,
        states: Float[Tensor, "layer token width"],
        lengths: Int[Tensor, " example"],
        chosen: Int[Tensor, " chosen"],
    ) -> Float[Tensor, "#head chosen out"]:
        """The vectors of some tokens; a fusion may leave out what only the others need.

        Args:
            states: as for `forward`.
            lengths: as for `forward`.
            chosen: places on the token axis.
        """
        fused: Tensor = self(states, lengths)
        return fused.index_select(1, chosen)

    def scored(
        self,
        states: Float[Tensor, "layer token width"],
        lengths: Int[Tensor, " example"],
        scorer: Linear,
    ) -> Float[Tensor, "head token score"]:
        """The scores that a linear layer gives the fused vectors; a fusion may have a cheaper way to them.

        Args:
            states: as for `forward`.
            lengths: as for `forward`.
            scorer: what the decoder does to each vector.
        """
        return scorer(self(states, lengths))
