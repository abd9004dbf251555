"""What every early fusion is: a choice of the backbone's weights to train, and of what is added to it."""

from abc import ABC
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, ClassVar

from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from pipeline.errors import PipelineError


@dataclass(frozen=True, kw_only=True)
class Host:
    """The backbone as a method sees it."""

    model: Any
    """An encoder, or an encoder-decoder with its language-model head; frozen when a method gets it."""

    slot_at: int = 1
    """Tokens that stand before the soft tokens: 1 where the first token is [CLS] or the like, else 0."""

    tasks: tuple[str, ...] = ("target",)
    """Names of the tasks that are learned together."""

    sources: Mapping[str, Float[Tensor, "token width"]] = field(default_factory=dict)
    """Prompts that were trained before, by name; all of this encoder, of one shape."""

    fingerprint: str = ""
    """Of the encoder's weights, as prompt files carry it."""

    @property
    def kind(self) -> str:
        """Family of the model, as its config calls it."""
        return str(self.model.config.model_type)

    @property
    def embeddings(self) -> nn.Embedding:
        """The table of the input tokens."""
        table: nn.Embedding = self.model.get_input_embeddings()
        return table

    @property
    def encoder(self) -> Any:
        """The part that reads the input."""
        return self.model.get_encoder() if self.model.config.is_encoder_decoder else self.model

    def blocks(self, stack: nn.Module) -> list[nn.Module]:
        """The layers of an encoder or a decoder, first to last; each is a module of its own.

        Raises:
            PipelineError: the layers share one module, or cannot be told.
        """
        config = self.model.config
        wanted = config.num_hidden_layers
        if stack is not self.encoder:
            wanted = getattr(config, "num_decoder_layers", None) or getattr(
                config, "decoder_layers", wanted
            )
        for module in stack.modules():
            if isinstance(module, nn.ModuleList) and len(module) == wanted:
                return list(module)
        raise PipelineError(
            f"its layers ({self.kind}) are not {wanted} modules of their own, so none can get weights of "
            "its own: use prompt_tuning or fine_tune"
        )


class Method(nn.Module, ABC):
    """A way of adapting a backbone.

    ``__init__(self, *, host, generator, <its own hyper-parameters>)``. The backbone comes frozen; a
    method unfreezes what it trains there. What it adds is its own parameters and buffers: they, and the
    backbone's weights that it unfroze, are what a run folder keeps.
    """

    lr: ClassVar[float] = 1e-3
    """Highest learning rate where the user names none."""

    weight_decay: ClassVar[float] = 0.01
    """Decoupled decay where the user names none."""

    warmup_steps: ClassVar[int | None] = None
    """Steps of warm-up where the user names none; None is a tenth of all steps."""

    n_slots: int = 0
    """Soft tokens that stand in the input."""

    leaves_prompt: ClassVar[bool] = False
    """Whether the outcome is one prompt that other methods can start from."""

    recomputes: ClassVar[bool] = True
    """Whether gradient checkpointing is possible."""

    def __init__(self, *, host: Host) -> None:
        super().__init__()
        self.host = host
        host.model.requires_grad_(False)

    def begin(self) -> None:
        """Takes starting values out of files. Not called when a run is read back."""

    def slots(
        self,
        embedded: Float[Tensor, "example token width"],
        mask: Bool[Tensor, "example token"],
        tasks: Int[Tensor, " example"],
    ) -> Float[Tensor, "example slot width"] | None:
        """The soft tokens of each example; None where the method has none.

        Args:
            embedded: input embeddings of the real tokens.
            mask: which of them are not padding.
            tasks: number of each example's task.
        """
        return None

    def attentions(
        self,
        embedded: Float[Tensor, "example token width"],
        mask: Bool[Tensor, "example token"],
        tasks: Int[Tensor, " example"],
    ) -> Float[Tensor, "example prompt"] | None:
        """Weights of the source prompts for each example; None where the method has none."""
        return None

    @property
    def attended(self) -> Sequence[Sequence[str]]:
        """For each task, what the columns of `attentions` stand for."""
        return ()

    def call(self, model: Any, inputs: Mapping[str, Any]) -> Any:
        """Runs the backbone with what is being trained."""
        return model(**inputs)

    def penalty(self) -> Tensor | None:
        """What is added to the loss."""
        return None

    def start_epoch(self, epoch: int, epochs: int) -> bool:
        """Told before each epoch but the first, and after the last one.

        Returns:
            Whether it changed what was learned, so that it has to be scored again.
        """
        return False

    def counts(self, epoch: int, epochs: int) -> bool:
        """Whether the weights after an epoch may be the ones that are kept."""
        return True

    @contextmanager
    def applied(self) -> Iterator[None]:
        """While it lasts, the backbone as it is computes with what was learned."""
        yield

    def rates(self, lr: float) -> list[dict[str, Any]]:
        """Groups of parameters with the learning rate of each."""
        trained = [p for _, p in self.trained()]
        return [{"params": [*self.parameters(), *trained], "lr": lr}]

    def usual_lr(self) -> float:
        """The learning rate on this backbone where the user names none."""
        return self.lr

    def trained(self) -> list[tuple[str, nn.Parameter]]:
        """The backbone's weights that are trained, by name."""
        return [(n, p) for n, p in self.host.model.named_parameters() if p.requires_grad]

    def n_parameters(self) -> int:
        """Numbers that are kept for the task, apart from its head."""
        own = sum(p.numel() for p in self.parameters())
        return own + sum(p.numel() for _, p in self.trained())

    def everything(self) -> dict[str, Tensor]:
        """All that training changes, to go on from after a kill."""
        own = {f"method.{name}": value for name, value in self.state_dict().items()}
        return {**own, **{f"model.{name}": p.detach() for name, p in self.trained()}}

    def load_everything(self, state: Mapping[str, Tensor]) -> None:
        """Puts back what `everything` gave.

        Raises:
            KeyError: something lacks.
            RuntimeError: something has another shape.
        """
        own = {n.removeprefix("method."): v for n, v in state.items() if n.startswith("method.")}
        self.load_state_dict(own)
        for name, parameter in self.trained():
            parameter.data.copy_(state[f"model.{name}"])

    def state(self) -> dict[str, Tensor]:
        """What was learned, as a run folder keeps it."""
        return self.everything()

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Puts back what `state` gave; raises as `load_everything`."""
        self.load_everything(state)

    def facts(self) -> dict[str, Any]:
        """Further entries of ``result.json``."""
        return {}

    def note_score(self, before: float, after: float) -> None:
        """Told the dev scores before and after what `start_epoch` changed."""
