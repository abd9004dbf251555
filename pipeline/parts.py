"""The parts one can name: the files of a folder, and dotted paths to parts outside the project.

The folder is the registry. A module's name is the part's name, a constant at the module's end is the
part, and the keyword-only arguments of its constructor are its hyper-parameters. This module knows
folders and signatures; it knows no part, and listing names imports none.
"""

import importlib
import inspect
import pkgutil
import types
import typing
from collections.abc import Mapping
from typing import Any, Literal, Union

from pipeline.errors import PipelineError, nearest

PART_KINDS = {
    "fusion": ("pipeline.fusions", "FUSION"),
    "decoder": ("pipeline.decoders", "DECODER"),
    "method": ("pipeline.early_fusion", "METHOD"),
    "experiment": ("pipeline.experiments", "EXPERIMENT"),
    "question": ("pipeline.analysis", "QUESTION"),
}
"""For each kind of part, the package that holds the files and the constant that each ends with."""

SUPPLIED = frozenset({"n_layers", "width", "n_classes", "generator", "seed", "host"})
"""Arguments that the data and the run decide, so no hyper-parameters."""

WORDS = {"true": True, "yes": True, "1": True, "false": False, "no": False, "0": False}


def names(kind: str) -> list[str]:
    """The names of the project's own parts of a kind, sorted.

    >>> "attention" in names("fusion")
    True
    """
    package, _ = PART_KINDS[kind]
    found = pkgutil.iter_modules(importlib.import_module(package).__path__)
    return sorted(module.name for module in found if not module.name.startswith("_"))


def load(kind: str, name: str) -> Any:
    """Imports a part.

    Args:
        kind: a key of `PART_KINDS`.
        name: one of `names(kind)`; or the dotted path of a module outside the project that ends with
            the kind's constant; or the dotted path of the part itself, ``package.module.ClassName``.

    Returns:
        What the constant holds: for a fusion or a decoder its class.

    Raises:
        PipelineError: there is no such part.
    """
    package, constant = PART_KINDS[kind]
    if "." in name:
        return _outside(kind, name, constant)
    if name not in names(kind):
        raise PipelineError(f"no {kind} {name!r}; {nearest(name, names(kind))}")
    return getattr(importlib.import_module(f"{package}.{name}"), constant)


def _outside(kind: str, path: str, constant: str) -> Any:
    parent, _, last = path.rpartition(".")
    for module_name, attribute in ((path, constant), (parent, last)):
        module = _import_if_there(module_name)
        if module is not None and hasattr(module, attribute):
            return getattr(module, attribute)
    raise PipelineError(
        f"no {kind} {path!r}: there is neither a module of that name with the constant {constant} nor "
        f"a {last!r} in a module {parent!r}; is its folder on PYTHONPATH?"
    )


def _import_if_there(name: str) -> types.ModuleType | None:
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        # A part whose own imports fail is a broken part, not a missing one.
        if error.name is not None and f"{name}.".startswith(f"{error.name}."):
            return None
        raise PipelineError(f"importing {name!r} failed: {error}") from error
    except (ValueError, TypeError):  # empty names between the dots
        return None


def hyper_parameters(part: Any) -> dict[str, inspect.Parameter]:
    """The keyword-only arguments of a part's constructor that are its own choices."""
    return {
        p.name: p
        for p in inspect.signature(part).parameters.values()
        if p.kind is p.KEYWORD_ONLY and p.name not in SUPPLIED
    }


def options(part: Any, given: Mapping[str, Any]) -> dict[str, Any]:
    """Checks the hyper-parameters given for a part and converts those that are text.

    Args:
        part: a class as `load` returns it.
        given: values by name: text as in ``--set name=value``, or values of the right type already.

    Returns:
        The given hyper-parameters, converted to the types of the constructor's annotations. Those not
        given are left out: the constructor has their defaults.

    Raises:
        PipelineError: there is no such hyper-parameter, one without a default is missing, or a value
            does not fit its type.
    """
    name = part.__module__.rpartition(".")[2]
    types_of = typing.get_type_hints(part.__init__)
    own = hyper_parameters(part)
    for asked in given:
        if asked not in own:
            raise PipelineError(f"{name} has no option {asked!r}; {nearest(asked, own)}")
    for needed, parameter in own.items():
        if parameter.default is parameter.empty and needed not in given:
            raise PipelineError(f"{name} needs the option {needed!r}; give --set {needed}=...")
    return {key: _converted(name, key, value, types_of.get(key, Any)) for key, value in given.items()}


def _converted(part: str, option: str, value: Any, wanted: Any) -> Any:
    for kind in _alternatives(wanted):
        try:
            return _as(kind, value)
        except ValueError:
            continue
    raise PipelineError(f"{part}: option {option} is {value!r}; it takes {_described(wanted)}")


def _alternatives(wanted: Any) -> tuple[Any, ...]:
    """The types of a union, None first and text last, so that text is what nothing else fits."""
    if typing.get_origin(wanted) not in (Union, types.UnionType):
        return (wanted,)
    order = {types.NoneType: 0, str: 2}
    return tuple(sorted(typing.get_args(wanted), key=lambda kind: order.get(kind, 1)))


def _as(kind: Any, value: Any) -> Any:
    """The value as one plain type; ValueError where it is none."""
    if typing.get_origin(kind) is Literal:
        for choice in typing.get_args(kind):
            if str(choice) == str(value):
                return choice
    if kind is types.NoneType and value in (None, "none"):
        return None
    if kind is bool and str(value).lower() in WORDS:
        return WORDS[str(value).lower()]
    if kind in (int, float) and isinstance(value, (str, int, kind)) and not isinstance(value, bool):
        return kind(value)
    if kind is Any or (kind is str and isinstance(value, str)):
        return value
    raise ValueError(value)


def _described(wanted: Any) -> str:
    if typing.get_origin(wanted) is Literal:
        return "one of " + ", ".join(map(str, typing.get_args(wanted)))
    if wanted in (types.NoneType, bool):
        return "none" if wanted is types.NoneType else "true or false"
    alternatives = _alternatives(wanted)
    if len(alternatives) > 1:
        return " or ".join(map(_described, alternatives))
    return {int: "an integer", float: "a number", str: "text"}.get(wanted, str(wanted))
