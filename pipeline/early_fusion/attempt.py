"""Source prompts of other tasks, mixed for each example by a small network, and a prompt of the target."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

import safetensors.torch
import torch
from jaxtyping import Bool, Float, Int
from safetensors import SafetensorError
from torch import Tensor, nn

from pipeline.early_fusion._base import Host, Method
from pipeline.early_fusion._soft import check_length, check_sources, prompt_lr, random_tokens
from pipeline.errors import PipelineError

_NETWORK = "method.network."


class Network(nn.Module):
    """G: H = LayerNorm(W_up SiLU(W_down X̂)); 2 r d + 2 d parameters.

    Args:
        width: d, of the input embeddings.
        size: r, of the bottleneck.
        generator: draws W_down and W_up, as `torch.nn.Linear` does; neither has a bias.
    """

    def __init__(self, width: int, size: int, generator: torch.Generator) -> None:
        super().__init__()
        self.down = nn.Parameter(_uniform((size, width), generator))
        self.up = nn.Parameter(_uniform((width, size), generator))
        self.norm = nn.LayerNorm(width)

    def forward(self, pooled: Float[Tensor, "example width"]) -> Float[Tensor, "example width"]:
        """What the scores of the prompts are taken with."""
        hidden = nn.functional.silu(nn.functional.linear(pooled, self.down))
        return self.norm(nn.functional.linear(hidden, self.up))


def _uniform(shape: tuple[int, int], generator: torch.Generator) -> Tensor:
    bound = 1 / math.sqrt(shape[1])
    return torch.empty(shape).uniform_(-bound, bound, generator=generator)


class Attempt(Method):
    """P = P_target + Σ_{j ≤ t+1} a_j P_j in the input, by example (Asai et al. 2022).

    P_1..P_t are frozen prompts of source tasks, P_{t+1} = P_target is trained, one a task.
    a_j = softmax_j(P̂_j·H / (d e^K)), H = LayerNorm(W_up SiLU(W_down X̂)); X̂ and P̂_j are maxima over the
    tokens of the input's embeddings and of the prompt. Parameters: m d a task, and 2 r d + 2 d of the
    network, which all tasks share: 76,800 + 155,136 = 231,936 for T5-base with m = r = 100.

    Open in the paper, and as in its authors' code: the scale, no biases in W, and P_target starting as a
    copy of a source prompt. Not as there: padding takes no part in X̂.

    Args:
        host: the backbone, with the source prompts.
        generator: draws the network's weights, and tokens where prompts start at random.
        size: r, the bottleneck of the network.
        temperature: K, the exponent of the scale.
        network_lr: learning rate of the network; ``--lr`` is that of the prompts.
        network: run folder whose network is the start, trained before on source tasks.
        start: source prompt that the target's start is a copy of; the first by name if not given.
        target: whether there is a target prompt (ablation "no target").
        attention: whether a_j is computed; otherwise 1 / t for every source (ablation "no attention").
        single: name of the only source prompt to use (ablation "single prompt").
        transfer: whether prompts were trained before; otherwise sources and target start as random tokens
            of the vocabulary (ablation "no prior transfer").
        length: m where `transfer` is off and there are no source prompts; else it is theirs.
        sources: t in the same case.
    """

    weight_decay: ClassVar[float] = 1e-5
    warmup_steps: ClassVar[int | None] = 500

    prompts: Tensor

    def __init__(
        self,
        *,
        host: Host,
        generator: torch.Generator,
        size: int = 100,
        temperature: float = 1.0,
        network_lr: float = 0.1,
        network: str | None = None,
        start: str | None = None,
        target: bool = True,
        attention: bool = True,
        single: str | None = None,
        transfer: bool = True,
        length: int = 20,
        sources: int = 3,
    ) -> None:
        super().__init__(host=host)
        if size < 1:
            raise PipelineError(f"--set size={size}: give a bottleneck of 1 or more")
        if not abs(temperature) <= 20:
            raise PipelineError(f"--set temperature={temperature}: it is an exponent, give -20 to 20")
        if transfer:
            check_sources(host, "attempt")
        self._network_file, self.network_lr = network, network_lr
        self.use_attention = attention
        known = dict(host.sources)
        if not transfer:
            count, m = (len(known), len(next(iter(known.values())))) if known else (sources, length)
            check_length(min(count, m))
            known = {f"random-{i}": random_tokens(host, m, generator) for i in range(count)}
        for name in (single, start):
            if name is not None and name not in known:
                raise PipelineError(f"no source prompt {name!r}, --prompts holds {', '.join(known)}")
        chosen = known if single is None else {single: known[single]}
        self.names = tuple(chosen)
        self.register_buffer("prompts", torch.stack([p.detach() for p in chosen.values()]))
        self.n_slots, width = self.prompts.shape[1:]
        self.targets: nn.Parameter | None = None
        if target:
            first = known[start or next(iter(chosen))]
            if not transfer:
                first = random_tokens(host, self.n_slots, generator)
            self.targets = nn.Parameter(first.detach().expand(len(host.tasks), -1, -1).clone())
        self.scale = width * math.exp(temperature)
        self.network = Network(width, size, generator) if attention else None

    def begin(self) -> None:
        """Takes over a network that was trained before."""
        if self._network_file is None:
            return
        if self.network is None:
            raise PipelineError("--set network=... and --set attention=false do not go together: drop one")
        file = Path(self._network_file)
        file = file / "tuned.safetensors" if file.is_dir() else file
        try:
            found = safetensors.torch.load_file(str(file))
            self.network.load_state_dict(
                {n.removeprefix(_NETWORK): v for n, v in found.items() if n.startswith(_NETWORK)}
            )
        except (OSError, SafetensorError, RuntimeError) as error:
            said = " ".join(str(error).split())
            raise PipelineError(
                f"--set network={self._network_file}: no network of this size there ({said}): give a run "
                "of --method attempt"
            ) from error

    def attentions(
        self,
        embedded: Float[Tensor, "example token width"],
        mask: Bool[Tensor, "example token"],
        tasks: Int[Tensor, " example"],
    ) -> Float[Tensor, "example prompt"]:
        """a_j of each example: the sources in the order of `names`, then the target if it has a weight."""
        n_sources = len(self.prompts)
        if self.network is None:
            return embedded.new_full((len(embedded), n_sources), 1 / n_sources)
        pooled = embedded.masked_fill(~mask[..., None], -torch.inf).amax(1)
        found = self.network(pooled)
        scores = found @ self.prompts.amax(1).T
        if self.targets is not None:
            own = (self.targets.amax(1)[tasks] * found).sum(1, keepdim=True)
            scores = torch.cat([scores, own], 1)
        return (scores / self.scale).softmax(1)

    @property
    def attended(self) -> Sequence[Sequence[str]]:
        """The sources, then the task's own prompt."""
        own = self.targets is not None and self.network is not None
        return [[*self.names, task] if own else self.names for task in self.host.tasks]

    def slots(
        self,
        embedded: Float[Tensor, "example token width"],
        mask: Bool[Tensor, "example token"],
        tasks: Int[Tensor, " example"],
    ) -> Float[Tensor, "example slot width"]:
        """P of each example."""
        weights = self.attentions(embedded, mask, tasks)
        n_sources = len(self.prompts)
        mixed = torch.einsum("et,tsw->esw", weights[:, :n_sources], self.prompts)
        if self.targets is None:
            return mixed
        factor = 1 + (weights[:, n_sources] if weights.shape[1] > n_sources else 0)
        own = self.targets[tasks]
        return mixed + own * torch.as_tensor(factor, device=own.device).view(-1, 1, 1)

    def usual_lr(self) -> float:
        """0.3 from text to text, less on an encoder."""
        return prompt_lr(self.host)

    def rates(self, lr: float) -> list[dict[str, Any]]:
        """The target prompts and the network, each with a rate of its own."""
        network = [] if self.network is None else list(self.network.parameters())
        targets = [] if self.targets is None else [self.targets]
        return [{"params": targets, "lr": lr}, {"params": network, "lr": self.network_lr}]


METHOD = Attempt
