"""Every weight of the backbone is trained."""

from typing import ClassVar

import torch

from pipeline.early_fusion._base import Host, Method


class FineTune(Method):
    """All of the backbone, 100 % of its parameters.

    With ``--fusion dwatt`` and the like the layers are fused above a backbone that learns: the FT setting
    of the DWAtt paper, whose FE setting is stage 2. A pooler above the last layer takes no part in any
    state and is not trained.

    Args:
        host: the backbone.
        generator: unused, nothing is drawn.
    """

    lr: ClassVar[float] = 3e-4

    def __init__(self, *, host: Host, generator: torch.Generator) -> None:
        super().__init__(host=host)
        host.model.requires_grad_(True)


METHOD = FineTune
