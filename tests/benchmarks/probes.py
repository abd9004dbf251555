"""Probes of all layers with 3 seeds on massive/en-US intent: one sweep, one table, one picture."""

import shutil

from _common import bank, layerbank, parser, show

arguments = parser(__doc__).parse_args()
store = bank(arguments, "massive/en-US")
out = arguments.work / "probes"
shutil.rmtree(out, ignore_errors=True)
found = layerbank(
    "sweep", store, "--target", "intent", "--fusion", "single_layer", "--seeds", "3", "--lr", "2e-3",
    "--out", out, "--threads", str(arguments.threads),
)  # fmt: skip
layers: dict[str, list[float]] = {}
for row in found["rows"]:
    layers.setdefault(row["options"], []).append(row["dev"])
show(
    check="probes of every layer", heads=found["heads"], seconds=found["seconds"], dev=layers,
    pictures=found["pictures"],
)  # fmt: skip
