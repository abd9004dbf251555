"""The bias terms of the backbone are trained, and nothing else of it."""

from typing import ClassVar

import torch

from pipeline.early_fusion._base import Host, Method
from pipeline.errors import PipelineError


class BitFit(Method):
    """Every bias vector, those of the layer normalisations too (Ben Zaken et al. 2022).

    Parameters of BERT-large: 24 (3 d + d + 4 d + d + 2 d) + d = 271,360, d = 1024; the pooler's bias, which
    no state depends on, is not there.

    Args:
        host: the backbone.
        generator: unused, nothing is drawn.
    """

    lr: ClassVar[float] = 3e-3

    def __init__(self, *, host: Host, generator: torch.Generator) -> None:
        super().__init__(host=host)
        biases = [
            p for name, p in host.model.named_parameters() if name.rpartition(".")[2].endswith("bias")
        ]
        if not biases:
            raise PipelineError(
                f"a {host.kind} model has no bias terms, there is nothing to train: use adapter, "
                "prompt_tuning or fine_tune"
            )
        for bias in biases:
            bias.requires_grad_(True)


METHOD = BitFit
