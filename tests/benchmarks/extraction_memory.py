"""Peak memory of an extraction: snips train once, and its rows ten times.

Each extraction is a process of its own; the figure is its `VmHWM` (`ru_maxrss` begins with the peak of
the process that started it). Rows of a copy get another last word, so that no two texts are equal.
"""

import json
import shutil
import subprocess
import sys

from _common import ROOT, encoder, parser, show
from _random_encoder import make_encoder

made = parser(__doc__)
made.add_argument("--times", type=int, default=10)
made.add_argument("--rows", type=int, default=0, help="only so many rows, to try the script")
made.add_argument("--encoder", default="", help="a folder, or tiny: two layers of width 32")
made.add_argument("--layers", default="all", help="fewer layers for a quicker run")
arguments = made.parse_args()

MEASURED = """
import json, runpy, sys
sys.path.insert(0, sys.argv[1])
sys.argv = ["layerbank", *sys.argv[2:]]
try:
    runpy.run_path(sys.path[0] + "/cli.py", run_name="__main__")
except SystemExit as end:
    assert not end.code, end.code
status = dict(line.split(":", 1) for line in open("/proc/self/status"))
print(json.dumps({"peak_bytes": 1024 * int(status["VmHWM"].split()[0])}))
"""

if arguments.encoder == "tiny":
    arguments.encoder = make_encoder(arguments.work / "tiny", "tiny")


def peak_bytes(times: int) -> int:
    """Peak of the resident memory of an extraction of so many copies of the rows."""
    folder, store = arguments.work / f"memory-{times}", arguments.work / "memory-bank"
    shutil.rmtree(store, ignore_errors=True)
    folder.mkdir(parents=True, exist_ok=True)
    lines = (arguments.data / "snips/train.jsonl").read_text(encoding="utf-8").splitlines()
    with (folder / "train.jsonl").open("w", encoding="utf-8") as file:
        for copy in range(times):
            for line in lines[: arguments.rows or None]:
                row = json.loads(line)
                row["tokens"][-1] += str(copy)
                file.write(json.dumps(row) + "\n")
    command = [
        sys.executable, "-c", MEASURED, str(ROOT), "extract", str(folder), "--store", str(store),
        "--encoder", str(arguments.encoder or encoder()), "--threads", str(arguments.threads),
        "--layers", arguments.layers, "--json",
    ]  # fmt: skip
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    shutil.rmtree(store)
    return int(json.loads(done.stdout.strip().splitlines()[-1])["peak_bytes"])


once, many = peak_bytes(1), peak_bytes(arguments.times)
show(check="peak memory", once=once, many=many, times=arguments.times, ratio=many / once)
