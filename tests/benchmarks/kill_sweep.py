"""Kills a sweep with SIGKILL at random moments, ends it, compares its table with a calm one's."""

import random
import shutil
import signal
import subprocess
import sys
import time

import pyarrow.parquet
from _common import ROOT, bank, layerbank, parser, show

made = parser(__doc__)
made.add_argument("--kills", type=int, default=5)
made.add_argument("--epochs", type=int, default=12)
made.add_argument("--heads", type=int, default=4, help="of each fusion")
made.add_argument("--seed", type=int, default=0, help="of the moments")
arguments = made.parse_args()
store = bank(arguments, "wnut17")
calm, killed = arguments.work / "calm-sweep", arguments.work / "killed-sweep"
for folder in (calm, killed):
    shutil.rmtree(folder, ignore_errors=True)
flags = [
    "--target", "tags", "--fusion", "linear,attention,concat", "--seeds", str(arguments.heads),
    "--epochs", str(arguments.epochs), "--dropout", "0.1", "--threads", str(arguments.threads),
]  # fmt: skip
began = time.perf_counter()
layerbank("sweep", store, *flags, "--out", calm)
duration = time.perf_counter() - began
random.seed(arguments.seed)
kills = 0
command = [sys.executable, str(ROOT / "cli.py"), "sweep", str(store), *flags, "--out", str(killed)]
for _ in range(arguments.kills):
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        process.wait(random.uniform(0.1, 0.6) * duration)
    except subprocess.TimeoutExpired:
        process.send_signal(signal.SIGKILL)
        kills += process.wait() == -signal.SIGKILL
last = layerbank("sweep", store, *flags, "--out", killed)
tables = [pyarrow.parquet.read_table(folder / "results.parquet") for folder in (calm, killed)]
same = tables[0].drop("seconds").equals(tables[1].drop("seconds"))
show(
    check="kill -9 of a sweep", kills=kills, rows=len(tables[0]), same=same, calm_s=duration,
    last_run_s=last["seconds"],
)  # fmt: skip
