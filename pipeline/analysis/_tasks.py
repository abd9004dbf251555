"""Heads of one task: of one target, fusion and settings. They differ by their seeds, rates and banks."""

from collections.abc import Mapping, Sequence
from typing import Any

from pipeline import parts
from pipeline.head import HeadSpec
from pipeline.results import Run

_NO_SETTING = ("sources", "output_layer")  # where files lie; every seed may have its own


def settings_of(spec: HeadSpec) -> dict[str, Any]:
    """The layers that a head reads and the options of its parts, those left to the defaults too."""
    found: dict[str, Any] = {"layers": ",".join(map(str, spec.layers))}
    for kind, name, given in (
        ("fusion", spec.fusion, spec.fusion_options),
        ("decoder", spec.decoder, spec.decoder_options),
    ):
        known = parts.hyper_parameters(parts.load(kind, name))
        found |= {option: parameter.default for option, parameter in known.items()} | given
    return {name: value for name, value in found.items() if name not in _NO_SETTING}


def telling(settings: Mapping[str, Any], others: Sequence[Mapping[str, Any]]) -> list[str]:
    """The settings in which some things differ, as text.

    Args:
        settings: of one of them.
        others: of all of them.

    >>> telling({"size": 4, "target": True}, [{"size": 4, "target": True}, {"size": 8, "target": True}])
    ['size=4']
    """
    return [
        f"{name}={value}"
        for name, value in settings.items()
        if any(name not in other or other[name] != value for other in others)
    ]


def task_names(runs: Sequence[Run]) -> list[str]:
    """The name of each head's task: its target, and of fusion and settings what tells it from other tasks.

    So heads whose names are equal are those of one task.
    """
    settings = [{"decoder": run.spec.decoder, **settings_of(run.spec)} for run in runs]
    fusions: dict[str, set[str]] = {}
    alike: dict[tuple[str, str], list[Mapping[str, Any]]] = {}
    for run, own in zip(runs, settings, strict=True):
        fusions.setdefault(run.target.name, set()).add(run.spec.fusion)
        alike.setdefault((run.target.name, run.spec.fusion), []).append(own)
    names = []
    for run, own in zip(runs, settings, strict=True):
        target, fusion = run.target.name, run.spec.fusion
        named = [fusion] if len(fusions[target]) > 1 else []
        names.append(", ".join([target, *named, *telling(own, alike[target, fusion])]))
    return names
