"""Training that is killed after an epoch, and what runs leave behind."""

import json

import safetensors.torch


class KilledError(Exception):
    """Stands for a kill: nothing of the run catches it."""


def killed_after(epoch):
    def stop(done, lines):
        if done == epoch:
            raise KilledError

    return stop


def content_of(folder):
    """All that runs leave behind, but for the times and the places."""
    found = {}
    for path in sorted(folder.rglob("*.*")):
        name = str(path.relative_to(folder))
        if path.suffix == ".safetensors":
            found[name] = {n: v.tolist() for n, v in safetensors.torch.load_file(path).items()}
        elif path.is_file():
            found[name] = [without_times(json.loads(line)) for line in lines_of(path)]
    return found


def lines_of(path):
    text = path.read_text()
    return text.splitlines() if path.suffix == ".jsonl" else [text]


def without_times(value):
    gone = ("seconds", "seconds_per_epoch", "peak_memory_bytes", "run")
    if isinstance(value, dict):
        return {name: without_times(one) for name, one in value.items() if name not in gone}
    return [without_times(one) for one in value] if isinstance(value, list) else value
