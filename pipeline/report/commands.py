"""The command that makes a run again: the one that was recorded, or one put together from its settings."""

import json
import shlex
from collections.abc import Mapping
from typing import Any

from pipeline.records import Record


def of_run(record: Record) -> str:
    """The command of a run, on the data or the bank that its folder names.

    A run that another command made among others (a demo, a sweep) gets the command that makes it alone.
    """
    recorded = str(record.config.get("command", ""))
    if recorded.split()[1:2] == [record.kind]:
        return recorded
    try:
        return (
            _tune(record.config, record.path)
            if record.kind == "tune"
            else _train(record.config, record.path)
        )
    except (KeyError, TypeError, IndexError):  # older than what is read here
        return f"not recorded: see {record.path}/config.json"


def of_head(row: Mapping[str, Any], asked: Mapping[str, Any], store: str, out: str) -> str:
    """The command that trains one head of a sweep alone.

    Args:
        row: of ``results.parquet``.
        asked: of ``sweep.json``.
        store: the bank.
        out: folder for the run.
    """
    if _has_no_flags(asked, asked["schedule"]):
        return str(asked.get("command") or f"by no command of its own: see {out}")
    rates = {name: row[name] for name in ("seed", "lr", "weight_decay", "dropout")}
    schedule = {**asked["schedule"], "batch_size": row["batch_size"]}
    head = {"fusion": row["fusion"], "decoder": row["decoder"], "options": json.loads(row["options"])}
    return _line(
        "train", store, {"target": row["target"]}, _head(head), _rates(rates, schedule),
        {"metric": row["metric"]}, _splits(asked["splits"]), {"out": out},
    )  # fmt: skip


def _train(config: Mapping[str, Any], out: str) -> str:
    head, source = config["head"], config["source"]
    if "joint" in config or _has_no_flags({**source, **config}, config["schedule"]):
        return str(config.get("command") or f"by no command of its own: see {out}")
    chosen = {**head, "options": {**head["fusion_options"], **head["decoder_options"]}}
    return _line(
        "train", source["store"], {"target": config["target"]["name"]}, _head(chosen),
        _rates(config["rates"], config["schedule"]), {"metric": config["metric"]},
        _splits(source["splits"]), {"out": out},
    )  # fmt: skip


def _has_no_flags(made_of: Mapping[str, Any], schedule: Mapping[str, Any]) -> bool:
    """Whether a head was trained in a way that experiments alone know: pieces of banks, snapshots."""
    return bool(
        made_of.get("train_on")
        or made_of.get("depth") is not None
        or not schedule.get("decay", True)
        or schedule.get("warmup_steps") is not None
        or schedule.get("dev_epochs")
        or schedule.get("rungs")
    )


def _tune(config: Mapping[str, Any], out: str) -> str:
    asked, plan = config["asked"], config["plan"]
    first, *further = asked["tasks"]
    flags = {
        name: asked[name] for name in ("encoder", "encoder_revision", "method", "prompts", "max_length")
    }
    options = dict(asked["options"])
    numbers = {name: value for name, value in plan.items() if name != "checkpointing"}
    return _line(
        "tune", first["data"], {"target": first["target"], "revision": first["revision"]}, first["columns"],
        flags, _head({**asked, "options": options}), numbers, {"metric": first["metric"]},
        {"gradient_checkpointing": plan["checkpointing"], "maskings": first.get("maskings")},
        {"verbalizer": [f"{name}={text}" for name, text in first["verbalizer"].items()]},
        {"task": [f"{task['data']}::{task['target']}" for task in further]},
        _splits(asked["splits"]), {"trust_remote_code": asked["trust_remote_code"], "out": out},
    )  # fmt: skip


def _head(head: Mapping[str, Any]) -> dict[str, Any]:
    chosen = [f"{name}={value}" for name, value in head["options"].items()]
    return {"fusion": head["fusion"], "decoder": head["decoder"], "set": chosen}


def _rates(rates: Mapping[str, Any], schedule: Mapping[str, Any]) -> dict[str, Any]:
    names = ("epochs", "batch_size", "warmup_frac", "patience", "data_seed", "precision")
    return {**rates, **{name: schedule.get(name) for name in names}}


def _splits(splits: Mapping[str, str]) -> dict[str, str]:
    usual = {"train": "train", "dev": "dev"}
    return {f"{role}_split": splits[role] for role in usual if splits[role] != usual[role]}


def _line(command: str, subject: str, *flags: Mapping[str, Any]) -> str:
    """Puts a command together; a flag without a value (None, False, no entry) is left out."""
    parts = ["layerbank", command, subject]
    for name, value in [pair for some in flags for pair in some.items()]:
        flag = f"--{name.replace('_', '-')}"
        if value is True:
            parts.append(flag)
        elif value is not None and value is not False:
            for one in value if isinstance(value, list) else [value]:
                parts += [flag, str(one)]
    return shlex.join(parts)
