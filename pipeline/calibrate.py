"""How many padded tokens one forward gets: tried on a few of the rows, where the data is large enough.

States depend on the composition of a batch in their last bits. So the outcome goes into the bank's
attributes before the first block, and whoever goes on with the bank uses it.
"""

import time
from collections.abc import Sequence

import numpy as np
import torch

from cache.plan import deal
from pipeline.device import one_thread_each
from pipeline.encoder import Encoder
from pipeline.errors import PipelineError
from pipeline.tokens import Tokens

_BUDGETS = {"cpu": (512, 1024, 2048, 4096), "cuda": (8192, 16_384, 32_768, 65_536)}
_SHARE = 0.02
"""Of the tokens, at most, that trying may cost; for fewer tokens a default is taken."""


def default_budget(encoder: Encoder) -> int:
    """The budget where nothing is tried; docs/log.md has the figures."""
    if encoder.device.type != "cpu":
        return 16_384
    return 1024 if encoder.precision == "float32" else 4096


def pick_budget(encoder: Encoder, tokens: Tokens, layers: Sequence[int]) -> int:
    """The budget that encodes a sample of the rows fastest, or the default for little data.

    Args:
        encoder: the encoder.
        tokens: the tokens of the largest split.
        layers: which layers are kept.
    """
    budgets = _BUDGETS.get(encoder.device.type, _BUDGETS["cpu"])
    rows = np.random.default_rng(0).permutation(len(tokens.length))
    n_rows = int(np.searchsorted(np.cumsum(tokens.length[rows]), budgets[-1])) + 1
    rows = rows[:n_rows]
    if (len(budgets) + 1) * int(tokens.length[rows].sum()) > _SHARE * len(tokens.input_ids):
        return default_budget(encoder)
    best, best_s = default_budget(encoder), np.inf
    with one_thread_each(encoder.device):  # as blocks are computed
        encode_seconds(encoder, tokens, rows, layers, best)  # the first forward of all is slow
        for budget in budgets:
            try:
                seconds = encode_seconds(encoder, tokens, rows, layers, budget)
            except PipelineError:  # too little memory: more tokens need more
                break
            if seconds < best_s:
                best, best_s = budget, seconds
    return best


def encode_seconds(
    encoder: Encoder, tokens: Tokens, rows: np.ndarray, layers: Sequence[int], budget_tokens: int
) -> float:
    """Seconds to encode some rows, every token of theirs kept."""
    length = tokens.length[rows]
    plan = deal(length, block_tokens=max(1, int(length.sum())), seed=0)
    shape = (len(layers), plan.block_tokens, encoder.record.width)
    out = torch.zeros(shape, dtype=torch.float16, device=encoder.device)
    began = time.perf_counter()
    encoder.encode(
        tokens,
        rows[plan.row],
        kept=tokens.kept("all"),
        layers=layers,
        start=plan.start,
        out=out,
        budget_tokens=budget_tokens,
    )
    if encoder.device.type == "cuda":
        torch.cuda.synchronize(encoder.device)
    return time.perf_counter() - began
