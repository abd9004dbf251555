"""Kills one extraction with SIGKILL at random moments, ends it, compares its arrays with a calm one's.

Also checks that no block that was whole at a kill was written again.
"""

import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import zarr
from _common import ROOT, encoder, layerbank, parser, show

made = parser(__doc__)
made.add_argument("--kills", type=int, default=10)
made.add_argument("--dataset", default="snips")
made.add_argument("--seed", type=int, default=0)
arguments = made.parse_args()
calm, killed = arguments.work / "calm", arguments.work / "killed"
flags = ["--encoder", encoder(), "--keep", "words", "--threads", str(arguments.threads)]


def blocks(store: Path) -> dict[str, int]:
    """Modification time of the last layer's chunk of every block: when the block's states were written."""
    return {str(p): p.stat().st_mtime_ns for p in store.glob("*/states/c/*/*/0")}


for store in (calm, killed):
    shutil.rmtree(store, ignore_errors=True)
began = time.perf_counter()
whole = layerbank("extract", arguments.data / arguments.dataset, "--store", calm, *flags)
duration = time.perf_counter() - began

random.seed(arguments.seed)
kills, rewritten, seen = 0, 0, {}
command = [sys.executable, str(ROOT / "cli.py"), "extract", str(arguments.data / arguments.dataset)]
for _ in range(arguments.kills):
    process = subprocess.Popen(
        [*command, "--store", str(killed), *flags], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    try:
        process.wait(random.uniform(0.02, 0.25) * duration)
    except subprocess.TimeoutExpired:
        process.send_signal(signal.SIGKILL)
        kills += process.wait() == -signal.SIGKILL
    found = blocks(killed)
    rewritten += sum(found[path] != seen[path] for path in seen)
    seen = found
last = layerbank("extract", arguments.data / arguments.dataset, "--store", killed, *flags)
rewritten += sum(blocks(killed)[path] != seen[path] for path in seen)

same, arrays = True, 0
for path, array in zarr.open_group(str(calm), mode="r").members(max_depth=None):
    if isinstance(array, zarr.Array):
        other = zarr.open_group(str(killed), mode="r")[path]
        same = same and np.array_equal(array[:], other[:])
        arrays += 1
show(
    check="kill -9 and resume", kills=kills, arrays=arrays, same=same, chunks_written_again=rewritten,
    blocks=whole["blocks"], blocks_in_the_last_run=last["blocks_encoded"],
)  # fmt: skip
