"""The paper estimate of docs/scale.md: formulas, a simulation of the same, and both against this machine.

Without flags: the table of the page, from the assumptions below, and the simulation beside each time. With
``--measure``: the rates of this machine (encoder, PUTs to a real S3 server on the loopback), the time that
the simulation predicts from them for an extraction into that server, and the time that one takes.
"""

import heapq
import json
import math
import os
import random
import shutil
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
from _common import ROOT, encoder, parser, show

sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

SMALL_OBJECTS = 3  # input_ids, word_id, kind
SMALL_BYTES = 9  # of a token in them
EXAMPLE_BYTES = 32  # start, length, n_words, row, text_hash
BUFFERS = 3  # blocks of an extraction in memory, see pipeline.extract


@dataclass(frozen=True)
class Bank:
    """What is kept."""

    tokens: float
    layers: int
    width: int
    state_bytes: int
    kept_frac: float = 1.0  # of the tokens that the encoder sees
    block_tokens: int = 2048  # that the encoder sees
    example_tokens: float = 64.0

    @property
    def chunk_bytes(self) -> int:
        """Of one layer of one block."""
        return int(self.block_tokens * self.kept_frac * self.width * self.state_bytes)

    @property
    def blocks(self) -> float:
        """Blocks of the bank."""
        return self.tokens / self.block_tokens

    @property
    def objects(self) -> float:
        """Chunks of states and of the small arrays."""
        return self.blocks * (self.layers + SMALL_OBJECTS)

    @property
    def total_bytes(self) -> float:
        """States, small arrays, arrays of the examples."""
        a_token = self.layers * self.width * self.state_bytes + SMALL_BYTES
        return self.tokens * (self.kept_frac * a_token + EXAMPLE_BYTES / self.example_tokens)


@dataclass(frozen=True)
class Fleet:
    """What makes it, and what it is stored in."""

    workers: int
    flop_s: float  # peak of one device
    utilisation: float
    workers_a_node: int
    node_bytes_s: float  # from a node to the store
    requests: int  # in flight, of one worker
    latency_s: float  # of a request before its bytes flow
    request_bytes_s: float  # of one request once they flow
    puts_s: float  # that the store takes
    gets_s: float


# BERT-large: 24 blocks of width 1,024; the embeddings are no products.
BLOCKS, WIDTH, LAYERS = 24, 1024, 25
PRICES = {"put": 0.005 / 1000, "get": 0.0004 / 1000, "byte_month": 0.023 / 1e9}
FLEET = Fleet(
    workers=64, flop_s=989e12, utilisation=0.4, workers_a_node=8, node_bytes_s=12.5e9, requests=16,
    latency_s=0.1, request_bytes_s=85e6, puts_s=3500 * LAYERS, gets_s=5500 * LAYERS,
)  # fmt: skip
BASE = Bank(tokens=1e9, layers=LAYERS, width=WIDTH, state_bytes=2)


def flops(bank: Bank) -> float:
    """Of a token's forward: two a weight of the blocks, and attention over an example's tokens."""
    return 2 * 12 * BLOCKS * WIDTH**2 + 4 * BLOCKS * WIDTH * bank.example_tokens


def limits(bank: Bank, fleet: Fleet) -> dict[str, float]:
    """Seconds that an extraction takes if only this limits it."""
    request_s = fleet.latency_s + bank.chunk_bytes / fleet.request_bytes_s
    in_flight_bytes_s = fleet.workers * fleet.requests * bank.chunk_bytes / request_s
    nodes = math.ceil(fleet.workers / fleet.workers_a_node)
    return {
        "compute": bank.tokens * flops(bank) / (fleet.workers * fleet.flop_s * fleet.utilisation),
        "requests in flight": bank.total_bytes / in_flight_bytes_s,
        "network": bank.total_bytes / (nodes * fleet.node_bytes_s),
        "request rate": bank.objects / fleet.puts_s,
    }


def simulate(
    bank: Bank,
    compute_s: float,
    fleet: Fleet,
    *,
    blocks: int,
    jitter: float = 0.3,
    seed: int = 0,
) -> float:
    """Seconds until every worker has made and stored its blocks.

    A worker computes a block while it stores the one before, and waits when all its buffers are full. A
    block's chunks go through a number of slots; its bytes through the node's share of the network; every
    PUT takes its turn at the store.

    Args:
        bank: what is stored.
        compute_s: seconds of a block's computation.
        fleet: who stores it.
        blocks: of each worker.
        jitter: standard deviation of a request's time, as a share of it.
        seed: of the jitter.
    """
    draw, store_free, ends = random.Random(seed), 0.0, 0.0
    chunks = bank.layers + SMALL_OBJECTS
    share = fleet.node_bytes_s / min(fleet.workers, fleet.workers_a_node)
    computed = [0.0] * fleet.workers
    stored: list[list[float]] = [[] for _ in range(fleet.workers)]
    turns = [(0.0, worker, 0) for worker in range(fleet.workers)]
    heapq.heapify(turns)
    while turns:
        _, worker, block = heapq.heappop(turns)
        done = stored[worker]
        room = done[block - BUFFERS + 1] if block >= BUFFERS - 1 else 0.0
        computed[worker] = max(computed[worker], room) + compute_s
        begin = max(computed[worker], done[-1] if done else 0.0)
        slots = [begin] * min(fleet.requests, chunks)
        for chunk in range(chunks):
            n_bytes = (
                bank.chunk_bytes if chunk < bank.layers else bank.block_tokens * SMALL_BYTES / SMALL_OBJECTS
            )
            store_free = max(store_free, begin) + 1 / fleet.puts_s
            at = max(heapq.heappop(slots), store_free)
            wait = (fleet.latency_s + n_bytes / fleet.request_bytes_s) * max(0.1, draw.gauss(1, jitter))
            heapq.heappush(slots, at + wait)
        done.append(max(max(slots), begin + bank.chunk_bytes * bank.layers / share))
        ends = max(ends, done[-1])
        if block + 1 < blocks:
            heapq.heappush(turns, (done[-1], worker, block + 1))
    return ends


def estimate(name: str, bank: Bank, fleet: Fleet, reader: Fleet) -> dict[str, object]:
    """A line of the page's table."""
    bounds = limits(bank, fleet)
    bound = max(bounds, key=lambda limit: bounds[limit])
    worker_tokens_s = fleet.flop_s * fleet.utilisation / flops(bank)
    sample = 40
    compute_s = bank.block_tokens / worker_tokens_s
    simulated = simulate(bank, compute_s, fleet, blocks=sample) * bank.blocks / (fleet.workers * sample)
    request_s = reader.latency_s + bank.chunk_bytes / reader.request_bytes_s
    reader_bytes_s = min(reader.node_bytes_s, reader.requests * bank.chunk_bytes / request_s)
    gets = bank.blocks * bank.layers
    return {
        "bank": name,
        "terabytes": bank.total_bytes / 1e12,
        "objects": bank.objects,
        "chunk_MiB": bank.chunk_bytes / 2**20,
        "tokens_s_a_device": worker_tokens_s,
        "bytes_s_a_device_computing": worker_tokens_s * bank.total_bytes / bank.tokens,
        **{f"{limit}_s": value for limit, value in bounds.items()},
        "bound": bound,
        "simulated_s": simulated,
        "simulated_to_formula": simulated / bounds[bound],
        "puts_s": bank.objects / simulated,
        "puts_cost": bank.objects * PRICES["put"],
        "month_cost": bank.total_bytes * PRICES["byte_month"],
        "pass_s": bank.total_bytes / reader_bytes_s,
        "pass_gets": gets,
        "pass_cost": gets * PRICES["get"],
        "pass_one_layer_s": bank.total_bytes / bank.layers / reader_bytes_s,
        "index_GB": bank.tokens * bank.kept_frac * SMALL_BYTES / 1e9,
        "examples_MB": bank.tokens / bank.example_tokens * EXAMPLE_BYTES / 1e6,
        "listing_s": bank.objects / 1000 * fleet.latency_s,
    }


def table(words_frac: float) -> None:
    """The page's table."""
    few = replace(BASE, layers=4, state_bytes=1)
    banks = {
        "float16, all": BASE,
        "int8, all": replace(BASE, state_bytes=1),
        "float16, words": replace(BASE, kept_frac=words_frac),
        "int8, words": replace(BASE, state_bytes=1, kept_frac=words_frac),
        "int8, words, 4 layers": replace(few, kept_frac=words_frac),
        "float16, all, 16 MiB chunks": replace(BASE, block_tokens=8192),
        "float16, all, 64 requests": BASE,
    }
    for name, bank in banks.items():
        fleet = replace(FLEET, requests=64) if "requests" in name else FLEET
        line = estimate(name, bank, fleet, replace(fleet, workers=1, workers_a_node=1))
        print(json.dumps({k: float(f"{v:.4g}") if isinstance(v, float) else v for k, v in line.items()}))
    print(json.dumps({"assumed": asdict(FLEET), "words_frac": words_frac, "prices": PRICES}))


def words_share(folder: Path) -> float:
    """Kept tokens of ``--keep words`` among all, of a data set."""
    from pipeline.corpus import load_corpus
    from pipeline.encoder import Encoder
    from pipeline.extract import _tokenize

    corpus, model = load_corpus(str(folder)), Encoder(encoder(), device="cpu", words=True)
    tokens = _tokenize(corpus, "train", model, model.max_length(None))
    return float(tokens.kept_length("words").sum() / tokens.kept_length("all").sum())


def measure(data: Path, work: Path) -> None:
    """Rates of this machine, the time they predict, and the time an extraction into the server takes."""
    import s3

    from cache import open_bank
    from cache.place import place
    from pipeline.corpus import load_corpus
    from pipeline.encoder import Encoder
    from pipeline.extract import extract

    corpus = load_corpus(str(data))
    model = Encoder(encoder(), device="cpu", words=corpus.words is not None)

    def run(path: str) -> tuple[float, float]:
        """Seconds from the first block on, tokens a second in them."""
        stamps: list[tuple[float, int]] = []
        extract(corpus, model, path, progress=lambda p: stamps.append((time.perf_counter(), p.tokens)))
        seconds = time.perf_counter() - stamps[0][0]
        return seconds, (stamps[-1][1] - stamps[0][1]) / (stamps[-1][0] - stamps[0][0])

    shutil.rmtree(work / "scale", ignore_errors=True)
    _, tokens_s = run(str(work / "scale"))
    with s3.Server() as server:
        os.environ.update(s3.environment(server.port))
        bank = open_bank(str(work / "scale"))
        splits = [bank.split(name) for name in bank.splits]
        total, room = sum(s.n_tokens for s in splits), max(s.block_tokens for s in splits)
        kept = Bank(
            tokens=total, layers=len(bank.recipe.layers), width=bank.recipe.encoder.width, state_bytes=2,
            block_tokens=room,
        )  # fmt: skip
        url = f"s3://{s3.BUCKET}/scale"
        probe, chunk = place(f"{url}-probe"), np.zeros(kept.chunk_bytes, np.uint8)
        small = _put_s(probe, np.zeros(2048, np.uint8))
        large = _put_s(probe, chunk)
        fleet = replace(
            FLEET, workers=1, workers_a_node=1, node_bytes_s=math.inf, puts_s=math.inf, latency_s=small,
            request_bytes_s=len(chunk) / max(1e-9, large - small),
        )  # fmt: skip
        blocks = sum(s.n_blocks for s in splits)
        predicted = simulate(kept, room / tokens_s, fleet, blocks=blocks) - room / tokens_s
        actual, _ = run(url)
        show(
            check="simulation against an extraction into S3 on the loopback", blocks=blocks,
            tokens_s=tokens_s, put_small_s=small, put_chunk_s=large, put_bytes_s=16 * len(chunk) / large,
            predicted_s=predicted, actual_s=actual, ratio=predicted / actual,
        )  # fmt: skip


def _put_s(where: object, values: np.ndarray, requests: int = 16, rounds: int = 6) -> float:
    """Seconds of one PUT while as many others are under way as an extraction sends."""
    spent = []

    def put(number: int) -> None:
        began = time.perf_counter()
        where.put(f"probe/{number}", values)
        spent.append(time.perf_counter() - began)

    with ThreadPoolExecutor(requests) as pool:
        list(pool.map(put, range(requests * rounds)))
    return float(np.median(spent))


if __name__ == "__main__":
    made = parser(__doc__)
    made.add_argument("--dataset", default="wnut17")
    made.add_argument(
        "--words-frac", type=float, help="share of the tokens kept by --keep words; measured by default"
    )
    made.add_argument("--measure", action="store_true")
    arguments = made.parse_args()
    if arguments.measure:
        measure(arguments.data / arguments.dataset, arguments.work)
    else:
        table(arguments.words_frac or words_share(arguments.data / arguments.dataset))
