"""One soft prompt in the input, and nothing else, is trained."""

from typing import ClassVar

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from pipeline.early_fusion._base import Host, Method
from pipeline.early_fusion._soft import check_length, expanded, prompt_lr, random_tokens


class PromptTuning(Method):
    """m soft tokens in the input (Lester et al. 2021). m d parameters: 51,200 for m = 50, d = 1024.

    They start as embeddings of tokens drawn from the vocabulary. From text to text they stand before the
    text, as in the paper; on an encoder whose inputs begin with a [CLS] they stand after it, where [CLS]
    keeps its own position and is still what a classifier reads. Soft tokens take positions of the
    position table, and the text moves by m.

    Args:
        host: the backbone.
        generator: draws the tokens.
        length: m, number of soft tokens.
    """

    weight_decay: ClassVar[float] = 1e-5
    leaves_prompt: ClassVar[bool] = True

    def __init__(self, *, host: Host, generator: torch.Generator, length: int = 20) -> None:
        super().__init__(host=host)
        check_length(length)
        self.n_slots = length
        self.prompt = nn.Parameter(random_tokens(host, length, generator))

    def usual_lr(self) -> float:
        """0.3 from text to text, less on an encoder."""
        return prompt_lr(self.host)

    def slots(
        self,
        embedded: Float[Tensor, "example token width"],
        mask: Bool[Tensor, "example token"],
        tasks: Int[Tensor, " example"],
    ) -> Float[Tensor, "example slot width"]:
        """The prompt, for every example."""
        return expanded(self.prompt, len(embedded))


METHOD = PromptTuning
