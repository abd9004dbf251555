"""Extraction by two worker processes, one of them killed -9 half-way, against one process.

Prints the seconds of both, of whole commands and with the same number of threads in each process, and
whether every array is equal.
"""

import json
import os
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
made.add_argument("--dataset", default="snips")
made.add_argument("--workers", type=int, default=2)
made.add_argument("--calm", action="store_true", help="kill nobody")
arguments = made.parse_args()
threads = max(1, arguments.threads // arguments.workers)
data = arguments.data / arguments.dataset
flags = ["--encoder", encoder(), "--keep", "words", "--threads", str(threads)]
alone, spread = arguments.work / "one-process", arguments.work / "cluster"


def blocks(store: Path) -> int:
    """Blocks whose last array is there."""
    return len(list(store.glob("*/kind/c/*")))


def worker_of(parent: int) -> int:
    """A Dask worker below a process: the child that has grown largest, since it holds the encoder."""
    sizes = {}
    for status in Path("/proc").glob("[0-9]*/status"):
        try:
            lines = dict(line.split(":", 1) for line in status.read_text().splitlines() if ":" in line)
        except OSError:  # it has ended
            continue
        if int(lines["PPid"]) == parent:
            sizes[int(lines["Pid"])] = int(lines.get("VmRSS", "0 kB").split()[0])
    return max(sizes, key=lambda pid: sizes[pid])


for store in (alone, spread):
    shutil.rmtree(store, ignore_errors=True)
began = time.perf_counter()
whole = layerbank("extract", data, "--store", alone, *flags)
alone_s = time.perf_counter() - began

began, killed = time.perf_counter(), 0
command = [sys.executable, str(ROOT / "cli.py"), "extract", str(data), "--store", str(spread), *flags]
process = subprocess.Popen(
    [*command, "--scheduler", f"local:{arguments.workers}", "--json"], stdout=subprocess.PIPE, text=True
)
while process.poll() is None and not killed and not arguments.calm:
    if blocks(spread) >= whole["blocks"] // 2:
        killed = worker_of(process.pid)
        os.kill(killed, signal.SIGKILL)
    time.sleep(0.02)
result = json.loads(process.communicate()[0])
spread_s = time.perf_counter() - began

same, arrays = True, 0
for path, array in zarr.open_group(str(alone), mode="r").members(max_depth=None):
    if isinstance(array, zarr.Array):
        other = zarr.open_group(str(spread), mode="r")[path]
        same = same and np.array_equal(array[:], other[:], equal_nan=array.dtype.kind == "f")
        arrays += 1
show(
    check="extraction on Dask", workers=arguments.workers, threads_each=threads, killed=bool(killed),
    exit_code=process.returncode, blocks=result["blocks_encoded"], arrays=arrays, same=same,
    one_process_s=whole["seconds"], cluster_s=result["seconds"],
    one_command_s=alone_s, cluster_command_s=spread_s,
)  # fmt: skip
