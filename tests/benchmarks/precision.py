"""What a bfloat16 forward does to states and scores, against float32.

States: relative error (Frobenius, over all tokens) of each layer on the first rows of a data set, for three
ways to compute in bfloat16. Scores (`--scores`): dev scores of heads on banks of both precisions.
"""

import time
from statistics import mean

import numpy as np
import torch
from _common import encoder, layerbank, parser, show
from early_fusion_table import subset

from pipeline.corpus import load_corpus
from pipeline.encoder import Encoder
from pipeline.tokens import tokenize

made = parser(__doc__)
made.add_argument("--rows", type=int, default=700)
made.add_argument("--precision", default="bfloat16")
made.add_argument("--scores", action="store_true")
made.add_argument("--train-rows", type=int, default=20_000, help="of the scores: training rows by chance")
made.add_argument("--datasets", default="snips,wnut17")
made.add_argument("--fusions", default="attention,linear,concat")
made.add_argument("--seeds", type=int, default=3)
arguments = made.parse_args()
torch.set_num_threads(arguments.threads)


def variants() -> dict[str, Encoder]:
    """The same encoder: exact, as layerbank computes, and in two plainer ways."""
    folder, short = encoder(), arguments.precision
    found = {name: Encoder(folder, device="cpu", words=True) for name in ("float32", "autocast", "weights")}
    found["autocast"].precision = short  # every product and every weight is cast in every forward
    found["weights"]._model.to(getattr(torch, short))  # sums and norms are short too
    return {**found, "layerbank": Encoder(folder, device="cpu", words=True, precision=short)}


def states(made: Encoder, data: str) -> tuple[torch.Tensor, float]:
    corpus = load_corpus(str(arguments.data / data))
    rows = corpus.texts("dev", slice(0, arguments.rows))
    tokens = tokenize(made.tokenizer, [(rows, None)], max_length=256)
    out = torch.zeros(made.record.n_layers, len(tokens.input_ids), made.record.width)
    began = time.perf_counter()
    made.encode(
        tokens, np.arange(len(rows)), kept=tokens.kept("all"), layers=range(made.record.n_layers),
        start=tokens.start[:-1], out=out, budget_tokens=1024,
    )  # fmt: skip
    return out, time.perf_counter() - began


def errors() -> None:
    encoders = variants()
    for data in arguments.datasets.split(","):
        exact, exact_s = states(encoders["float32"], data)
        for name in ("layerbank", "autocast", "weights"):
            found, seconds = states(encoders[name], data)
            by_layer = (found - exact).norm(dim=(1, 2)) / exact.norm(dim=(1, 2))
            show(
                check=f"{arguments.precision} states of {data} dev", way=name, tokens=exact.shape[1],
                relative_error_by_layer=[round(float(e), 6) for e in by_layer],
                seconds_against_float32=seconds / exact_s,
            )  # fmt: skip


def score(store: str, target: str, fusion: str, seed: int) -> float:
    out = arguments.work / "precision-run"
    flags = ("--epochs", "5", "--lr", "2e-3", "--seed", str(seed), "--data-seed", str(seed), "--overwrite")
    threads = ("--threads", str(arguments.threads))
    options = ("--target", target, "--fusion", fusion, "--out", out)
    return float(layerbank("train", store, *options, *flags, *threads)["dev"])


def scores() -> None:
    for data, target in (("wnut17", "tags"), ("massive/en-US", "intent")):
        stores, name = {}, data.replace("/", "-")
        rows = subset(
            arguments.data / data, arguments.work / f"rows-{name}", arguments.train_rows, 20_000, target
        )
        for precision in ("float32", arguments.precision):
            stores[precision] = str(arguments.work / f"{name}-words-{precision}")
            layerbank(
                "extract", rows, "--encoder", encoder(), "--store", stores[precision],
                "--keep", "words", "--precision", precision, "--threads", str(arguments.threads),
            )  # fmt: skip
        for fusion in arguments.fusions.split(","):
            found = {
                precision: [score(store, target, fusion, seed) for seed in range(arguments.seeds)]
                for precision, store in stores.items()
            }
            means = {precision: mean(values) for precision, values in found.items()}
            change = means[arguments.precision] - means["float32"]
            show(check=f"{data} {target}, dev", fusion=fusion, change=change, means=means, scores=found)


scores() if arguments.scores else errors()
