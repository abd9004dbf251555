"""`mixture` from few examples: 1 % of massive/de-DE intents, sources trained on the other languages.

Against `attention` from scratch and with a frozen query of another language; test accuracy of the epoch
with the best dev score, over seeds (of the weights, of the order and of which rows are the 1 %).
"""

import json
import math
import random
from pathlib import Path
from statistics import mean, stdev

from _common import encoder, layerbank, parser, show

made = parser(__doc__)
made.add_argument("--seeds", type=int, default=5)
made.add_argument("--share", type=float, default=0.01, help="of the training rows")
made.add_argument("--epochs", type=int, default=30, help="of a head on the few rows")
made.add_argument("--source-epochs", type=int, default=5)
made.add_argument("--source-rows", type=int, help="of a source's training rows only so many, by chance")
made.add_argument("--sources", default="en-US,es-ES,fr-FR,sw-KE,tr-TR", help="their languages")
made.add_argument("--rows", type=int, help="read only so many rows of each file, to try the script")
arguments = made.parse_args()
work = arguments.work / "few-shot"


def lines(language: str, split: str) -> list[str]:
    text = (arguments.data / "massive" / language / f"{split}.jsonl").read_text(encoding="utf-8")
    return text.splitlines()[: arguments.rows]


def write(language: str, splits: dict[str, list[str]]) -> Path:
    folder: Path = work / f"data-{language}"
    folder.mkdir(parents=True, exist_ok=True)
    for split, rows in splits.items():
        (folder / f"{split}.jsonl").write_text("\n".join(rows) + "\n", encoding="utf-8")
    return folder


def extract(language: str, keep: str, splits: dict[str, list[str]]) -> str:
    store = work / f"bank-{language}"
    layerbank(
        "extract", write(language, splits), "--encoder", encoder(), "--store", store, "--keep", keep,
        "--target", "intent", "--threads", str(arguments.threads),
    )  # fmt: skip
    return str(store)


def few(seed: int) -> list[str]:
    rows = lines("de-DE", "train")
    return random.Random(seed).sample(rows, round(arguments.share * len(rows)))


def source(language: str) -> str:
    """A trained `attention` head of a language, which reads the first token alone."""
    train = lines(language, "train")
    if arguments.source_rows:  # the rows of massive stand by scenario
        train = random.Random(0).sample(train, arguments.source_rows)
    known = {json.loads(line)["intent"] for line in train}  # of a part, not all of those in dev
    dev = [line for line in lines(language, "dev") if json.loads(line)["intent"] in known]
    store = extract(language, "first", {"train": train, "dev": dev})
    out = work / f"source-{language}"
    flags = ("--epochs", str(arguments.source_epochs), "--lr", "2e-3", "--overwrite")
    threads = ("--threads", str(arguments.threads))
    found = layerbank("train", store, "--target", "intent", "--out", out, *flags, *threads)
    show(check="source", language=language, dev=found["dev"])
    return str(out)


seeds = range(arguments.seeds)
target = extract(
    "de-DE", "all", {"dev": lines("de-DE", "dev"), "test": lines("de-DE", "test")}
    | {f"train{seed}": few(seed) for seed in seeds},
)  # fmt: skip
runs = [source(language) for language in arguments.sources.split(",")]

from cache import open_bank  # noqa: E402
from pipeline.device import set_threads  # noqa: E402
from pipeline.evaluate import evaluate  # noqa: E402
from pipeline.job import HeadRates, Schedule  # noqa: E402
from pipeline.results import load_run  # noqa: E402
from pipeline.run import train_run  # noqa: E402

bank, everything = open_bank(target), ",".join(runs)
root = -math.log(bank.recipe.encoder.width) / 2  # K of the √d of dot-product attention
settings = {
    "attention": ("attention", {}),
    "attention, frozen query": ("mixture", {"sources": runs[0], "target": False}),
    "mixture": ("mixture", {"sources": everything}),
    "mixture, scale √d": ("mixture", {"sources": everything, "temperature": root}),
    "no target": ("mixture", {"sources": everything, "target": False}),
    "no target, scale √d": ("mixture", {"sources": everything, "target": False, "temperature": root}),
    "no attention": ("mixture", {"sources": everything, "attention": False}),
    "single source": ("mixture", {"sources": runs[0]}),
    "random sources": ("mixture", {"random_sources": len(runs)}),
}


def score(name: str, seed: int) -> dict[str, float]:
    fusion, options = settings[name]
    out = str(work / "runs" / f"{name}-{seed}".replace(" ", "-"))
    result = train_run(
        target,
        target="intent",
        out=out,
        fusion=fusion,
        options=options,
        rates=HeadRates(lr=2e-3, seed=seed),
        schedule=Schedule(epochs=arguments.epochs, batch_size=16, data_seed=seed),
        splits={"train": f"train{seed}", "dev": "dev"},
        overwrite=True,
    )
    test = evaluate(load_run(out), bank, "test")["score"]
    return {
        "dev": result["dev"], "test": test, "seconds": result["seconds_per_epoch"],
        "fusion_parameters": result["fusion_parameters"],
    }  # fmt: skip


set_threads(arguments.threads)
for name in settings:
    found = [score(name, seed) for seed in seeds]
    test = [one["test"] for one in found]
    show(
        check="few-shot massive/de-DE intent, test accuracy", setting=name, mean=mean(test),
        sd=stdev(test) if len(test) > 1 else 0.0, test=test, dev=[one["dev"] for one in found],
        fusion_parameters=found[0]["fusion_parameters"],
        seconds_per_epoch=mean(one["seconds"] for one in found),
    )  # fmt: skip
