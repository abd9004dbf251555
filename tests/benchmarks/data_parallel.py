"""Two processes of `torchrun` on the CPU against one: how far losses and weights lie apart."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

from _common import ROOT, parser, show

sys.path[:0] = [str(ROOT), str(ROOT / "tests")]


def main() -> None:
    """Trains both ways and prints how far they lie apart."""
    made = parser(__doc__ or "")
    made.add_argument("--epochs", type=int, default=3)
    arguments = made.parse_args()
    import safetensors.torch
    import tiny
    import tuning

    work: Path = arguments.work / "data-parallel"
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)
    tuning.data(work / "data")
    tiny.encoder(work / "encoder")
    config = json.loads((work / "encoder/config.json").read_text())
    # Without dropout, which every process draws for itself.
    config |= {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    (work / "encoder/config.json").write_text(json.dumps(config))
    command = [
        str(ROOT / "cli.py"), "tune", str(work / "data"), "--encoder", str(work / "encoder"),
        "--method", "attempt", "--set", "transfer=false", "--set", "length=4", "--target", "intent",
        "--task", f"{work / 'data'}::tags", "--epochs", str(arguments.epochs), "--batch-size", "9",
        "--device", "cpu", "--threads", "1",
    ]  # fmt: skip
    spawn = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--nproc-per-node",
        "2",
        "--master-port",
        "29617",
    ]
    for name, start in (("one", [sys.executable]), ("two", spawn)):
        env = {**os.environ, "OMP_NUM_THREADS": "1"}
        subprocess.run([*start, *command, "--out", str(work / name)], check=True, env=env)
    one, two = (
        safetensors.torch.load_file(str(work / name / "tuned.safetensors")) for name in ("one", "two")
    )
    losses = [
        [json.loads(line)["loss"] for line in (work / name / "metrics.jsonl").read_text().splitlines()]
        for name in ("one", "two")
    ]
    show(
        weights_apart=max(float((one[name] - two[name]).abs().max()) for name in one),
        losses_apart=max(abs(a - b) for a, b in zip(*losses, strict=True)),
    )


if __name__ == "__main__":
    main()
