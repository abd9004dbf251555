"""What is there: the description of one bank, and the banks and runs below a folder."""

import json
import sys
from pathlib import Path
from typing import Any

from cache import Bank, CacheError, open_bank
from cache.bank import is_bank
from cache.place import Folder, Place, place
from cache.removal import check_removable, remove
from pipeline.errors import PipelineError, said_by
from pipeline.folders import CONFIG, RESULT, in_the_making

__all__ = ["describe", "inventory", "removable", "remove"]

_DEPTH = 4
"""Folders below the one asked for that are looked into."""


def describe(bank: Bank) -> dict[str, Any]:
    """What a bank holds, as ``layerbank inspect`` prints it."""
    recipe, targets = bank.recipe, _targets(bank)
    skipped = bank.attrs.get("skipped", {})
    return {
        "store": bank.path,
        "format_version": bank.attrs["format_version"],
        "fingerprint": bank.fingerprint,
        "complete": bool(bank.attrs["complete"]),
        "encoder": bank.attrs["encoder"],
        "tokenizer_sha256": recipe.tokenizer_sha256,
        "dtype": recipe.dtype,
        "keep": recipe.keep,
        "layers": list(recipe.layers),
        "codec": recipe.codec,
        "max_length": recipe.max_length,
        "columns": recipe.columns,
        "seed": recipe.seed,
        "batch_tokens": recipe.batch_tokens,
        "precision": recipe.precision,
        "bytes": bank.n_bytes,
        "splits": {name: _split(bank, name) for name in bank.splits},
        "targets": targets,
        # A column that was skipped at first may have been added by `layerbank label` since.
        "skipped": {name: reason for name, reason in skipped.items() if name not in targets},
        "versions": bank.attrs.get("versions", {}),
    }


def removable(store: str, *, ask: bool) -> dict[str, Any]:
    """What a bank that is to be removed holds, as far as it can be read.

    Raises:
        CacheError: it is no bank.
        PipelineError: the user is to be asked, and there is no terminal to ask at.
    """
    here = check_removable(store)
    if ask and not sys.stdin.isatty():
        raise PipelineError(f"{store} is removed only after asking, and there is no terminal: give --yes")
    return {
        "bytes": sum(here.sizes().values()),
        **_bank_line(here.name),
    }


def _split(bank: Bank, name: str) -> dict[str, Any]:
    split = bank.split(name)
    attrs = dict(split.group.attrs)
    return {
        "examples": split.n_examples,
        "tokens": split.n_tokens,
        "blocks": split.n_blocks,
        "block_tokens": split.block_tokens,
        "generations": split.generations,
        "words_cut": attrs.get("words_cut", 0),
        "words_empty": attrs.get("words_empty", 0),
        "fingerprint": attrs["fingerprint"],
        **({} if split.clipped_frac is None else {"clipped_frac": split.clipped_frac}),
    }


def _targets(bank: Bank) -> dict[str, dict[str, Any]]:
    found: dict[str, dict[str, Any]] = {}
    for name in bank.splits:
        for target, facts in bank.split(name).target_names().items():
            found.setdefault(target, {**facts, "splits": []})["splits"].append(name)
    return found


def inventory(folder: str) -> dict[str, list[dict[str, Any]]]:
    """The banks and the runs below a folder, by path; below a URL, the banks.

    Raises:
        PipelineError: there is no such folder.
    """
    root = place(folder)
    if isinstance(root, Folder) and not root.path.is_dir():
        raise PipelineError(f"no folder {folder}: name one that holds banks or runs")
    found: dict[str, list[dict[str, Any]]] = {"banks": [], "runs": []}
    _walk(root, _DEPTH, found)
    return found


def _walk(here: Place, depth: int, found: dict[str, list[dict[str, Any]]]) -> None:
    kind = _kind(here)
    if kind == "banks":
        found[kind].append(_bank_line(here.name))
    elif kind == "runs":
        found[kind].append(_run_line(Path(here.name)))
    elif depth:
        for child in here.folders():
            name = child.name.rpartition("/")[2]
            if not (name.startswith(".") or in_the_making(name)):
                _walk(child, depth - 1, found)


def _kind(here: Place) -> str | None:
    """What a place is, if it is one of these and may be looked into."""
    try:
        if is_bank(here.name):
            return "banks"
        is_run = isinstance(here, Folder) and all((here.path / n).is_file() for n in (RESULT, CONFIG))
    except PermissionError:
        return None
    return "runs" if is_run else None


def _bank_line(store: str) -> dict[str, Any]:
    try:
        facts = describe(open_bank(store, allow_incomplete=True))
    except CacheError as error:
        return {"store": store, "complete": False, "error": str(error)}
    names = ("store", "complete", "fingerprint", "encoder", "keep", "dtype", "bytes", "splits", "targets")
    return {name: facts[name] for name in names}


def _run_line(folder: Path) -> dict[str, Any]:
    try:
        config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
        result = json.loads((folder / RESULT).read_text(encoding="utf-8"))
        # A run of `layerbank tune` has no bank; what it was trained on is its data.
        store = config["tasks"][0]["data"] if "tasks" in config else config["source"]["store"]
        return {**result, "run": str(folder), "store": store}
    except (OSError, ValueError, KeyError, TypeError) as error:
        file = Path(getattr(error, "filename", None) or "a file").name
        return {"run": str(folder), "error": f"{file} cannot be read: {said_by(error)}"}
