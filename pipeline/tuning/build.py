"""Puts backbone, method and heads together, for a new run or for one that is read back."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from cache import Target
from pipeline import parts
from pipeline.early_fusion._base import Host, Method
from pipeline.errors import PipelineError, nearest
from pipeline.head import DECODER_FOR, HeadSpec, build_head, option_names, plan_head
from pipeline.transfer import take_sources
from pipeline.tuning.backbone import Backbone, load_backbone
from pipeline.tuning.folder import TaskSpec, TunedRun
from pipeline.tuning.folder import load as load_folder
from pipeline.tuning.model import Tuned
from pipeline.tuning.verbalizer import spell


@dataclass(frozen=True, kw_only=True)
class Options:
    """What was set by ``--set``, by the part that takes it."""

    method: dict[str, Any]
    head: dict[str, Any]


def load_method(name: str) -> Any:
    """A method's class.

    Raises:
        PipelineError: there is no such method.
    """
    part = parts.load("method", name)
    if not (isinstance(part, type) and issubclass(part, Method)):
        raise PipelineError(f"--method {name}: it is no method, a method extends {Method.__module__}")
    return part


def split_options(
    given: Mapping[str, Any], *, method: str, fusion: str, decoder: str | None, text_to_text: bool
) -> Options:
    """Gives each option to the part that has it; of the head's it is `plan_head` that says more.

    Raises:
        PipelineError: no part has it, or a value does not fit.
    """
    part = load_method(method)
    own = parts.hyper_parameters(part)
    others: set[str] = set()
    if not text_to_text:
        heads = [parts.load("decoder", name) for name in ([decoder] if decoder else DECODER_FOR.values())]
        others = {
            name for p in [*heads, parts.load("fusion", fusion)] for name in parts.hyper_parameters(p)
        }
    for name in given:
        if name not in {*own, *others}:
            what = f"method {method}" if text_to_text else f"neither method {method} nor its head"
            has = "has no option" if text_to_text else "has an option"
            raise PipelineError(f"{what} {has} {name!r}: {nearest(name, {*own, *others})}")
    return Options(
        method=parts.options(part, {n: v for n, v in given.items() if n in own}),
        head={n: v for n, v in given.items() if n not in own},
    )


def plan_task_head(
    target: Target,
    backbone: Backbone,
    *,
    fusion: str,
    decoder: str | None,
    options: Mapping[str, Any],
    alone: bool = True,
) -> HeadSpec:
    """The head of a task on an encoder.

    Among several tasks (not `alone`) an option goes to those whose decoder has it.

    Raises:
        PipelineError: the parts do not fit the target.
    """
    n_layers = backbone.record.n_layers
    if not alone:
        known = option_names(target.kind, fusion=fusion, decoder=decoder)
        options = {name: value for name, value in options.items() if name in known}
    spec = plan_head(
        fusion=fusion,
        decoder=decoder,
        target=target,
        kept=list(range(n_layers)),
        last=n_layers - 1,
        width=backbone.record.width,
        options=options,
    )
    return take_sources(spec, backbone.record)


def assemble(
    backbone: Backbone,
    tasks: Sequence[TaskSpec],
    *,
    method: str,
    options: Mapping[str, Any],
    sources: Mapping[str, Tensor],
    seed: int,
) -> Tuned:
    """Builds what is trained, with the starting weights of a seed.

    Raises:
        PipelineError: the backbone cannot take the method, or an option has a value that is refused.
    """
    host = Host(
        model=backbone.model,
        slot_at=backbone.slot_at,
        tasks=tuple(task.name for task in tasks),
        sources=sources,
        fingerprint=backbone.record.weights_sha256,
    )
    generator = torch.Generator().manual_seed(seed)
    try:
        part = load_method(method)(host=host, generator=generator, **options)
    except (PipelineError, ValueError) as error:
        raise PipelineError(f"--method {method} with {backbone.record.name}: {error}") from error
    heads = [build_head(task.head, seed=seed) for task in tasks if task.head is not None]
    spelled = [spell(backbone.tokenizer, task.target, task.texts)[1] for task in tasks if task.texts]
    layers = [task.head.layers for task in tasks if task.head is not None]
    return Tuned(backbone, part, heads, layers, spelled)


def open_run(
    path: str,
    *,
    encoder: str | None = None,
    device: torch.device | None = None,
    trust_remote_code: bool = False,
) -> tuple[TunedRun, Tuned]:
    """Loads a run folder and its encoder, ready to predict.

    Args:
        path: the run folder.
        encoder: where the encoder is, if not where it was.
        device: where it computes, the CPU by default.
        trust_remote_code: whether code that comes with the encoder may run.

    Raises:
        PipelineError: one of them cannot be loaded, or the encoder is not the run's.
    """
    run, weights = load_folder(path)
    known = run.source.encoder
    backbone = load_backbone(
        encoder or known.name,
        revision=None if encoder else known.revision,
        words=any(task.columns.get("words") is not None for task in run.tasks),
        trust_remote_code=trust_remote_code,
    )
    if backbone.record.weights_sha256 != known.weights_sha256:
        raise PipelineError(
            f"encoder {backbone.record.name} has other weights than the one of {path} ({known.name}, "
            f"sha256 {known.weights_sha256[:12]}): what was learned works with its own encoder only"
        )
    if backbone.tokenizer_sha256 != run.source.tokenizer_sha256:
        raise PipelineError(
            f"encoder {backbone.record.name} has another tokenizer than {path} was trained with"
        )
    sources = {name: torch.zeros(*shape) for name, shape in run.sources.items()}
    tuned = assemble(backbone, run.tasks, method=run.method, options=run.options, sources=sources, seed=0)
    try:
        tuned.method.load_state(weights)
        heads = {n.removeprefix("heads."): v for n, v in weights.items() if n.startswith("heads.")}
        tuned.heads.load_state_dict(heads)
    except (KeyError, RuntimeError) as error:
        said = " ".join(str(error).split())
        raise PipelineError(f"{path} cannot be read as a run ({said}): tune it again") from error
    return run, tuned.to(device or torch.device("cpu")).eval()


def target_of(task: TaskSpec) -> Target:
    """The target of a task, without values."""
    kind: Any = task.kind
    return Target(name=task.target, kind=kind, names=task.names, values=np.empty(0, np.int32))
