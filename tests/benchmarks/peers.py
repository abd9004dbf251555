"""Tokens a second of peers and of `layerbank extract`: the same encoder and sentences, every layer kept.

Each peer runs in a virtual environment of its own under the work folder, with the versions named below; how
it is called is in `PEERS`. Loading the encoder is outside on all sides. Tokens are counted by the encoder's
own tokenizer, special tokens included, and are the same number for all.
"""

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

from _common import encoder, layerbank, parser, show

PEERS = {
    # One sentence a forward, float32 into HDF5. Its pins (torch 1.8.1, numpy 1.19.5) cannot be installed on
    # Python 3.11: installed without them, beside current packages.
    "neurox": """
import sys, time
from neurox.data.extraction import transformers_extractor as extractor
load = time.perf_counter()
extractor.get_model_and_tokenizer(encoder)
load = time.perf_counter() - load
began = time.perf_counter()
sys.stdout = sys.stderr  # it prints two lines a sentence
extractor.extract_representations(encoder, sentences, out + "/neurox.hdf5", output_type="hdf5")
sys.stdout = sys.__stdout__
seconds = time.perf_counter() - began - load
""",
    # Batches of 32 in file order; it leaves storing to the user: float16 in one file at the end.
    "minicons": """
import time
import numpy as np
from minicons import cwe
model = cwe.CWE(encoder)
texts = open(sentences, encoding="utf-8").read().splitlines()
began, kept = time.perf_counter(), []
for first in range(0, len(texts), 32):
    ids, states = model.encode_text(texts[first : first + 32], layer="all")
    real = ids != model.tokenizer.pad_token_id
    kept.append(np.stack([state[real].numpy().astype(np.float16) for state in states]))
np.save(out + "/minicons.npy", np.concatenate(kept, axis=1))
seconds = time.perf_counter() - began
""",
    # One layer a run, packed contexts of 128 tokens, float16 into Arrow. It takes causal models only, so
    # the encoder is loaded as one; the states are then those of the packed text.
    "sae-lens": """
import time
from datasets import Dataset
from transformers import AutoConfig, AutoTokenizer
from sae_lens.cache_activations_runner import CacheActivationsRunner
from sae_lens.config import CacheActivationsRunnerConfig
texts = open(sentences, encoding="utf-8").read().splitlines()
tokenizer = AutoTokenizer.from_pretrained(encoder)
ids = [i for text in texts for i in tokenizer(text)["input_ids"]]
contexts = [ids[k : k + 128] for k in range(0, len(ids) - 127, 128)]
rows = Dataset.from_dict({"tokens": contexts[: len(contexts) // 8 * 8]})  # it waits for whole batches
config = AutoConfig.from_pretrained(encoder)
hooks = ["bert.embeddings", *(f"bert.encoder.layer.{k}" for k in range(config.num_hidden_layers))]
seconds = 0.0
for number, hook in enumerate(hooks):
    runner = CacheActivationsRunner(
        CacheActivationsRunnerConfig(
            dataset_path="", model_name=encoder, model_class_name="AutoModelForCausalLM", hook_name=hook,
            model_batch_size=8, d_in=config.hidden_size, context_size=128, training_tokens=128 * len(rows),
            new_cached_activations_path=f"{out}/sae-lens-{number}", dtype="float16", device="cpu",
            shuffle=False, prepend_bos=False, streaming=False, buffer_size_gb=0.1,
        ),
        override_dataset=rows,
    )
    began = time.perf_counter()
    runner.run()
    seconds += time.perf_counter() - began
""",
}

INSTALL = {
    "neurox": [
        ["--no-deps", "neurox==1.0.9"],
        [
            "torch==2.13.0",
            "transformers==4.57.6",
            "h5py",
            "imbalanced-learn",
            "seaborn",
            "svgwrite",
            "tqdm",
        ],
    ],
    "minicons": [["torch==2.13.0", "minicons==0.3.39"]],
    "sae-lens": [["torch==2.13.0", "sae-lens==6.54.0"]],
}

FRAME = """
import json, sys
encoder, sentences, out, threads = sys.argv[1:]
import torch
torch.set_num_threads(int(threads))
torch.set_grad_enabled(False)
{call}
print(json.dumps({{"seconds": seconds}}))
"""


def environment(name: str) -> Path:
    """The interpreter of a peer's environment, made once."""
    folder = arguments.work / f"peer-{name}"
    python = folder / "bin/python"
    if not (folder / "done").exists():
        subprocess.run([sys.executable, "-m", "venv", "--clear", folder], check=True)
        for packages in INSTALL[name]:
            subprocess.run([python, "-m", "pip", "install", "-q", *packages], check=True)
        (folder / "done").touch()
    return python


def peer(name: str, sentences: Path, out: Path) -> float | str:
    """Seconds of a peer, or why it did not run."""
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True)
    try:
        command = [environment(name), "-c", FRAME.format(call=PEERS[name]), encoder(), sentences, out]
        done = subprocess.run(
            [*map(str, command), str(arguments.threads)], check=True, capture_output=True, text=True
        )
    except subprocess.CalledProcessError as error:
        return " ".join(((error.stderr or "").strip().splitlines() or [str(error)])[-1].split())[:300]
    return float(json.loads(done.stdout.strip().splitlines()[-1])["seconds"])


def ours(folder: Path, precision: str) -> dict[str, Any]:
    store = arguments.work / "peers-bank"
    shutil.rmtree(store, ignore_errors=True)
    return layerbank(
        "extract", folder, "--encoder", encoder(), "--store", store, "--precision", precision,
        "--threads", str(arguments.threads),
    )  # fmt: skip


made = parser(__doc__)
made.add_argument("--sentences", type=int, default=2000)
made.add_argument("--peers", default=",".join(PEERS))
made.add_argument("--precision", default="float32", help="of our own forward; the peers' is float32")
arguments = made.parse_args()

folder = arguments.work / "peers"
folder.mkdir(parents=True, exist_ok=True)
with (arguments.data / "snips/train.jsonl").open(encoding="utf-8") as rows:
    texts = [" ".join(json.loads(next(rows))["tokens"]) for _ in range(arguments.sentences)]
(folder / "train.jsonl").write_text("".join(json.dumps({"text": t}) + "\n" for t in texts), "utf-8")
plain = arguments.work / "sentences.txt"
plain.write_text("\n".join(texts) + "\n", encoding="utf-8")
result = ours(folder, arguments.precision)
rates = {"layerbank": result["tokens"] / result["seconds"]}
failed = {}
for name in arguments.peers.split(","):
    found = peer(name, plain, arguments.work / "peer-out")
    if isinstance(found, str):
        failed[name] = found
    else:
        rates[name] = result["tokens"] / found
best = max((rate for name, rate in rates.items() if name != "layerbank"), default=None)
show(
    check="peers, every layer of the same sentences", sentences=len(texts), tokens=result["tokens"],
    tokens_per_s=rates, ratio_to_best=best and rates["layerbank"] / best, did_not_run=failed,
)  # fmt: skip
