"""What methods with soft tokens share: starting values, and where the tokens stand."""

import torch
from jaxtyping import Float
from torch import Tensor, nn

from pipeline.early_fusion._base import Host
from pipeline.errors import PipelineError


def check_length(length: int) -> None:
    """Refuses a prompt without tokens.

    Raises:
        PipelineError: the length is below 1.
    """
    if length < 1:
        raise PipelineError(f"--set length={length}: give 1 soft token or more")


def random_tokens(host: Host, length: int, generator: torch.Generator) -> Float[Tensor, "token width"]:
    """A prompt made of the embeddings of tokens drawn from the vocabulary (Lester et al. 2021)."""
    table = host.embeddings.weight
    drawn = torch.randint(table.shape[0], (length,), generator=generator)
    return table.detach()[drawn.to(table.device)].clone()


def prompt_lr(host: Host) -> float:
    """Learning rate of a prompt in the input.

    0.3 is that of the papers, for T5. With AdamW on a BERT-like encoder, whose layer normalisation follows
    the embeddings, it is too fast: measured on MiniLM, docs/log.md has the figures.
    """
    return 0.3 if host.model.config.is_encoder_decoder else 0.03


def check_sources(host: Host, method: str) -> None:
    """Refuses a method that starts from prompts when there are none.

    Raises:
        PipelineError: no prompt was given.
    """
    if not host.sources:
        raise PipelineError(
            f"it starts from prompts trained before: give --prompts, made by --method prompt_tuning "
            f"({method} has no start of its own)"
        )


def expanded(prompt: nn.Parameter | Tensor, n_examples: int) -> Float[Tensor, "example token width"]:
    """The same prompt for every example."""
    return prompt.expand(n_examples, -1, -1)
