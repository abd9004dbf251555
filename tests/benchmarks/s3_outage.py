"""Stops a real S3 server for some seconds in mid-extraction and in mid-training; compares with a calm run.

The server is killed when some chunks of states have been asked for, and started again after the outage. A
proxy before it tells the moment and counts the requests.
"""

import json
import os
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path

from _common import ROOT, encoder, parser, show

sys.path.append(str(ROOT / "tests"))
import s3

made = parser(__doc__)
made.add_argument("--dataset", default="snips")
made.add_argument("--seconds", type=float, default=10.0, help="length of the outage")
made.add_argument("--epochs", type=int, default=3)
made.add_argument("--target", default="intent")
arguments = made.parse_args()
local, url = arguments.work / "outage-local", f"s3://{s3.BUCKET}/outage"
threads = ["--threads", str(arguments.threads), "--json"]


def command(
    *words: object, environment: dict[str, str] | None = None
) -> tuple[dict[str, object], float, str]:
    """Runs a command of this checkout; its JSON object, its seconds, what it wrote to standard error."""
    began = time.perf_counter()
    done = subprocess.run(
        [sys.executable, str(ROOT / "cli.py"), *map(str, words), *threads],
        env={**os.environ, **(environment or {})},
        capture_output=True,
        text=True,
    )
    if done.returncode:
        raise SystemExit(done.stderr)
    return json.loads(done.stdout.strip().splitlines()[-1]), time.perf_counter() - began, done.stderr


def outage(server: s3.Server, proxy: s3.Proxy, method: str, at: int) -> None:
    """Arranges for the server to be killed at the n-th request of a chunk of states."""
    seen = [0]

    def stop() -> None:
        server.stop()
        time.sleep(arguments.seconds)
        server.start()

    def fault(found: str, path: str) -> None:
        if found == method and "/states/c/" in path:
            seen[0] += 1
            if seen[0] == at:
                threading.Thread(target=stop).start()

    proxy.fault = fault
    proxy.requests.clear()


def same_files(one: Path, other: Path) -> bool:
    """Whether every file of one folder has the same bytes in the other."""
    files = [path for path in one.rglob("*") if path.is_file()]
    return all(path.read_bytes() == (other / path.relative_to(one)).read_bytes() for path in files)


def chunks(proxy: s3.Proxy) -> int:
    """Requests of chunks of states."""
    return sum("/states/c/" in path for _, path, _ in proxy.requests)


shutil.rmtree(local, ignore_errors=True)
extract = [
    "extract",
    arguments.data / arguments.dataset,
    "--encoder",
    encoder(),
    "--keep",
    "words",
    "--store",
]
train = ["--target", arguments.target, "--epochs", arguments.epochs, "--overwrite", "--out"]
whole, calm_s, _ = command(*extract, local)
with s3.Server() as server, s3.Proxy(server.port) as proxy:
    keys = s3.environment(proxy.port)
    outage(server, proxy, "PUT", 10)
    stored, outage_s, said = command(*extract, url, environment=keys)
    show(
        check="S3 server stopped in mid-extraction", stopped_s=arguments.seconds, calm_s=calm_s,
        took_s=outage_s, blocks=stored["blocks"], puts_of_states=chunks(proxy), said=said.splitlines()[-3:],
        same_files=same_files(local, server.bucket / "outage"),
    )  # fmt: skip
    first, calm_s, _ = command("train", local, *train, arguments.work / "outage-run-local")
    outage(server, proxy, "GET", 5)
    second, outage_s, said = command("train", url, *train, arguments.work / "outage-run", environment=keys)
    runs = (arguments.work / "outage-run-local", arguments.work / "outage-run")
    heads = [(run / "head.safetensors").read_bytes() for run in runs]
    show(
        check="S3 server stopped in mid-training", stopped_s=arguments.seconds, calm_s=calm_s,
        took_s=outage_s, gets_of_states=chunks(proxy), said=said.splitlines()[:1], dev_local=first["dev"],
        dev_after_the_outage=second["dev"], same_head=heads[0] == heads[1],
    )  # fmt: skip
