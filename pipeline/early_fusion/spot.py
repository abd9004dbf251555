"""Prompt tuning that starts from prompts of other tasks."""

from typing import Any, ClassVar, Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from pipeline.early_fusion._base import Host, Method
from pipeline.early_fusion._soft import check_sources, expanded, prompt_lr
from pipeline.errors import PipelineError


class SPoT(Method):
    """A soft prompt that starts from source prompts (Vu et al. 2022), then trains as `prompt_tuning`.

    ``mode="generic"`` starts from one prompt, trained before on a mixture of source tasks (`prompt_tuning`
    with several ``--task``). ``mode="targeted"`` starts from Σ_k s_k P_k / Σ_k s_k over the `nearest`
    source prompts with the largest similarity s_k to the prompt `like`, which was trained on the target
    itself; s is the cosine of the prompts' mean tokens (the paper's task embedding). Similarities below 0
    count as 0, which the paper leaves open.

    Args:
        host: the backbone, with the source prompts.
        generator: unused, nothing is drawn.
        mode: generic or targeted.
        nearest: number of source prompts that are averaged (k in the paper).
        like: for ``targeted``: name of the source prompt trained on the target, which is not averaged.
    """

    weight_decay: ClassVar[float] = 1e-5
    leaves_prompt: ClassVar[bool] = True

    def __init__(
        self,
        *,
        host: Host,
        generator: torch.Generator,
        mode: Literal["generic", "targeted"] = "generic",
        nearest: int = 3,
        like: str | None = None,
    ) -> None:
        super().__init__(host=host)
        check_sources(host, "spot")
        if nearest < 1:
            raise PipelineError(f"--set nearest={nearest}: give 1 or more")
        names = ", ".join(host.sources)
        if mode == "generic" and len(host.sources) > 1:
            raise PipelineError(
                f"mode generic starts from one prompt, --prompts holds {len(host.sources)} ({names}): name "
                "one of them, or use --set mode=targeted"
            )
        if mode == "targeted" and (like not in host.sources or len(host.sources) < 2):
            raise PipelineError(
                f"mode targeted compares sources with a prompt of the target, --prompts holds {names}: put "
                "a prompt trained on the target among them and give its name by --set like=NAME"
            )
        self.mode, self.nearest, self.like = mode, nearest, like
        first = next(iter(host.sources.values()))
        self.n_slots = len(first)
        self.prompt = nn.Parameter(first.detach().clone())
        self.weights: dict[str, float] = {}

    def begin(self) -> None:
        """Averages the nearest source prompts."""
        if self.mode == "targeted":
            self.weights = self._nearest()
            start = sum(self.host.sources[name] * w for name, w in self.weights.items())
            self.prompt.data = torch.as_tensor(start)

    def _nearest(self) -> dict[str, float]:
        """Weights of the nearest source prompts; they add up to 1."""
        assert self.like is not None
        means = {name: prompt.mean(0) for name, prompt in self.host.sources.items()}
        target = means.pop(self.like)
        found = {n: float(torch.cosine_similarity(m, target, dim=0)) for n, m in means.items()}
        best = dict(sorted(found.items(), key=lambda item: -item[1])[: self.nearest])
        kept = {name: max(similarity, 0.0) for name, similarity in best.items()}
        total = sum(kept.values())
        if total == 0:
            raise PipelineError(
                "no source prompt is near the target's: start from one by --set mode=generic"
            )
        return {name: similarity / total for name, similarity in kept.items()}

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

    def facts(self) -> dict[str, Any]:
        """The source prompts it started from."""
        return {"start": self.weights or dict.fromkeys(self.host.sources, 1.0)}


METHOD = SPoT
