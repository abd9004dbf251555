"""Dev entity F1 on wnut17 tags: softmax, 5 epochs, batch 32, lr 2e-3, mean of 3 seeds."""

from statistics import mean, stdev

from _common import bank, layerbank, parser, show

made = parser(__doc__)
made.add_argument("--fusions", default="last_layer,linear,attention")
made.add_argument("--seeds", type=int, default=3)
arguments = made.parse_args()
store = bank(arguments, "wnut17")


def score(fusion: str, seed: int) -> float:
    out = arguments.work / f"wnut17-{fusion}-{seed}"
    flags = ("--epochs", "5", "--lr", "2e-3", "--batch-size", "32", "--seed", str(seed))
    seeds = ("--data-seed", str(seed), "--threads", str(arguments.threads), "--overwrite")
    result = layerbank("train", store, "--target", "tags", "--fusion", fusion, "--out", out, *flags, *seeds)
    return float(result["dev"])


for fusion in arguments.fusions.split(","):
    scores = [score(fusion, seed) for seed in range(arguments.seeds)]
    show(check="wnut17 tags, dev F1", fusion=fusion, mean=mean(scores), sd=stdev(scores), scores=scores)
