"""The same sweep in this process and on a Dask cluster of two worker processes."""

import shutil

import pyarrow.parquet
from _common import bank, layerbank, parser, show

made = parser(__doc__)
made.add_argument("--epochs", type=int, default=4)
arguments = made.parse_args()
store = bank(arguments, "wnut17")
flags = [
    "--target",
    "tags",
    "--fusion",
    "linear,attention",
    "--seeds",
    "3",
    "--epochs",
    str(arguments.epochs),
]
seconds, tables = {}, []
for name, more in (("alone", ["--threads", "1"]), ("cluster", ["--scheduler", "local:2"])):
    out = arguments.work / f"sweep-{name}"
    shutil.rmtree(out, ignore_errors=True)
    seconds[name] = layerbank("sweep", store, *flags, *more, "--out", out)["seconds"]
    tables.append(pyarrow.parquet.read_table(out / "results.parquet").drop("seconds"))
show(
    check="sweep on a Dask cluster", same=tables[0].equals(tables[1]), rows=len(tables[0]), seconds=seconds
)
