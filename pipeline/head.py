"""A head: a fusion and a decoder, for one or many heads of one shape."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from functools import lru_cache
from typing import Any

import safetensors.torch
import torch
from jaxtyping import Float, Int
from safetensors import SafetensorError
from torch import Tensor, nn

from cache.place import place
from cache.store import local_path
from cache.targets import Target, TargetKind
from pipeline import parts
from pipeline.decoders._base import Decoder
from pipeline.errors import PipelineError, nearest, said_by
from pipeline.fusions._base import Fusion

DECODER_FOR: Mapping[str, str] = {
    "class": "classifier",
    "tags": "tagger",
    "float": "regressor",
    "span": "span",
    "choice": "choice",
    "token": "masked_lm",
}
"""The decoder a kind of target gets where none is asked for."""


@dataclass(frozen=True, kw_only=True)
class HeadSpec:
    """All that decides a head's shape; with a seed, its starting weights too."""

    fusion: str
    decoder: str
    layers: tuple[int, ...]  # numbers of the layers it reads, ascending
    width: int  # of the states
    n_classes: int  # scores it gives
    fusion_options: dict[str, Any] = field(default_factory=dict)
    decoder_options: dict[str, Any] = field(default_factory=dict)
    # What the fusion's buffers hold at the start, in place of what it draws; kept with the weights.
    taken: Mapping[str, Tensor] = field(default_factory=dict, compare=False, repr=False)

    def to_json(self) -> dict[str, Any]:
        """The spec as a run folder keeps it."""
        values = {one.name: getattr(self, one.name) for one in fields(self) if one.name != "taken"}
        return {**values, "layers": list(self.layers)}

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> "HeadSpec":
        """The spec of a run folder."""
        return cls(**{**values, "layers": tuple(values["layers"])})


@dataclass(frozen=True)
class Inputs:
    """What a head reads of some examples: states of tokens, example after example, no padding."""

    states: Float[Tensor, "layer token width"]
    lengths: Int[Tensor, " example"]  # tokens of each example
    decoded: Int[Tensor, " chosen"] | None  # which tokens go on to the decoder; None for all
    decoded_lengths: Int[Tensor, " example"]  # how many those are, of each example


class Head(nn.Module):
    """Fusion, then decoder. Every parameter starts with a head axis (see `pipeline.stack`)."""

    def __init__(self, fusion: Fusion, decoder: Decoder) -> None:
        super().__init__()
        self.fusion = fusion
        self.decoder = decoder

    @property
    def reads(self) -> str:
        """Which tokens of an example the head needs: its decoder's, or all where the fusion mixes."""
        return "all" if self.fusion.mixes_tokens else self.decoder.tokens

    def forward(self, inputs: Inputs) -> Float[Tensor, "head unit score"]:
        """Scores of every unit, for each head."""
        only_product = self.decoder.only_product
        if inputs.decoded is not None:
            fused = self.fusion.at(inputs.states, inputs.lengths, inputs.decoded)
        elif only_product is not None:
            return self.fusion.scored(inputs.states, inputs.lengths, only_product)
        else:
            fused = self.fusion(inputs.states, inputs.lengths)
        scores: Tensor = self.decoder(fused, inputs.decoded_lengths)
        return scores

    def n_parameters(self) -> tuple[int, int]:
        """Trainable parameters of one head: all, and those of the fusion."""
        counts = [sum(p[0].numel() for p in m.parameters()) for m in (self, self.fusion)]
        return counts[0], counts[1]


def plan_head(
    *,
    fusion: str,
    decoder: str | None,
    target: Target,
    kept: Sequence[int],
    last: int,
    width: int,
    options: Mapping[str, Any] | None = None,
) -> HeadSpec:
    """Checks a choice of parts against a bank and a target, before anything is computed.

    Args:
        fusion: name or dotted path.
        decoder: name or dotted path; None takes the one for the target's kind.
        target: what is to be learned.
        kept: layers in the bank.
        last: number of the encoder's last layer.
        width: of the states.
        options: hyper-parameters of fusion and decoder; each goes to the part that has it.

    Raises:
        PipelineError: a part or an option is unknown, or the parts do not fit the bank or the target.
    """
    decoder = decoder or DECODER_FOR[target.kind]
    fusion_part, decoder_part = _load("fusion", fusion), _load("decoder", decoder)
    if decoder_part.target_kind != target.kind:
        raise PipelineError(
            f"--decoder {decoder} learns {decoder_part.target_kind}, target {target.name!r} is "
            f"{target.kind}: use --decoder {DECODER_FOR[target.kind]}"
        )
    named = target.kind in ("class", "tags")
    if named and len(target.names) < 2:
        raise PipelineError(f"target {target.name!r} has {len(target.names)} class: nothing to learn")
    takes = parts.hyper_parameters(decoder_part)
    given = {name: value for name, value in target.settings.items() if name in takes} | dict(options or {})
    known = {*takes, *parts.hyper_parameters(fusion_part)}
    for name in given:
        if name not in known:
            raise PipelineError(
                f"neither fusion {fusion} nor decoder {decoder} has an option {name!r}: "
                f"{nearest(name, known)}"
            )
    of_decoder = {name: value for name, value in given.items() if name in takes}
    of_fusion = {name: value for name, value in given.items() if name not in takes}
    fusion_options = parts.options(fusion_part, of_fusion)
    layers = fusion_part.reads(kept, last, **fusion_options)
    lacking = [layer for layer in layers if layer not in kept]
    if lacking and not 0 <= lacking[0] <= last:
        raise PipelineError(f"--fusion {fusion} reads layer {lacking[0]}, the encoder has 0 to {last}")
    if lacking or not layers:
        raise PipelineError(
            f"--fusion {fusion} reads layer {lacking[0] if lacking else '1 or higher'}, the bank keeps "
            f"{', '.join(map(str, kept))}: extract with --layers all"
        )
    return HeadSpec(
        fusion=fusion,
        decoder=decoder,
        layers=tuple(layers),
        width=width,
        n_classes=len(target.names) if named else int(target.settings.get("vocabulary", 1)),
        fusion_options=fusion_options,
        decoder_options=parts.options(decoder_part, of_decoder),
    )


def option_names(kind: TargetKind, *, fusion: str, decoder: str | None) -> set[str]:
    """The options that a head for a kind of target has.

    Args:
        kind: of the target.
        fusion: name or dotted path.
        decoder: name or dotted path; None takes the one for the kind.

    Raises:
        PipelineError: a part is unknown.
    """
    pair = (_load("fusion", fusion), _load("decoder", decoder or DECODER_FOR[kind]))
    return {name for part in pair for name in parts.hyper_parameters(part)}


def build_head(spec: HeadSpec, *, seed: int) -> Head:
    """Builds one head with the starting weights of a seed.

    Raises:
        PipelineError: a hyper-parameter has a value its part refuses.
    """
    generator = torch.Generator().manual_seed(seed)
    try:
        fusion = _load("fusion", spec.fusion)(
            n_layers=len(spec.layers), width=spec.width, generator=generator, **spec.fusion_options
        )
        decoder = _load("decoder", spec.decoder)(
            width=fusion.out_width,
            n_classes=spec.n_classes,
            generator=generator,
            seed=seed,
            **spec.decoder_options,
        )
        if spec.decoder_options.get("output_layer"):
            decoder.start_from(_read_weights(spec.decoder_options["output_layer"]))
    except ValueError as error:
        raise PipelineError(f"--fusion {spec.fusion}, --decoder {spec.decoder}: {error}") from error
    for name, values in spec.taken.items():
        buffer = fusion.get_buffer(name)
        buffer.copy_(values.reshape(buffer.shape))
    return Head(fusion, decoder)


def _read_weights(path: str) -> dict[str, Tensor]:
    """Reads weights beside a bank."""
    file = local_path(path)
    try:
        return safetensors.torch.load(_at_url(path) if file is None else file.read_bytes())
    except (OSError, SafetensorError) as error:
        raise PipelineError(
            f"the encoder's output layer cannot be read from {path} ({said_by(error)}): extract the bank "
            "again, or give --set output_layer=none"
        ) from error


def _at_url(url: str) -> bytes:
    """What is stored at a URL now; fetched once for all heads of a stack."""
    folder, _, name = url.rpartition("/")
    return _fetched(folder, name, place(folder).read_file("zarr.json"))


@lru_cache(maxsize=1)
def _fetched(folder: str, name: str, bank: bytes) -> bytes:
    """A file at a URL. The root's attributes tell the bank from one made anew there."""
    return place(folder).read_file(name)


def kind_of(spec: HeadSpec) -> TargetKind:
    """The kind of target a head learns."""
    kind: TargetKind = _load("decoder", spec.decoder).target_kind
    return kind


def _load(kind: str, name: str) -> Any:
    """A part's class. What a dotted path leads to is not called before it is known to be one."""
    part, base = parts.load(kind, name), {"fusion": Fusion, "decoder": Decoder}[kind]
    if not (isinstance(part, type) and issubclass(part, base)):
        raise PipelineError(f"--{kind} {name}: it is no {kind}, a {kind} extends {base.__module__}")
    return part
