"""States of a bank against a plain `transformers` forward of each example alone: snips dev, every row."""

import json
import shutil
from functools import cache

import numpy as np
import torch
from _common import encoder, layerbank, parser, show
from transformers import AutoModel, AutoTokenizer

from cache import Kind, open_bank

arguments = parser(__doc__).parse_args()
torch.set_num_threads(arguments.threads)
source = arguments.data / "snips/dev.jsonl"
folder = arguments.work / "snips-dev"
folder.mkdir(parents=True, exist_ok=True)
shutil.copy(source, folder / "dev.jsonl")
rows = [json.loads(line)["tokens"] for line in source.read_text(encoding="utf-8").splitlines()]
tokenizer, model = AutoTokenizer.from_pretrained(encoder()), AutoModel.from_pretrained(encoder()).eval()


@cache
@torch.inference_mode()
def plain(row: int) -> np.ndarray:
    """All layers of one example alone: layer token width."""
    batch = tokenizer(rows[row], is_split_into_words=True, return_tensors="pt")
    return torch.stack(model(**batch, output_hidden_states=True).hidden_states)[:, 0].numpy()


def errors(keep: str, dtype: str) -> tuple[float, float]:
    """Largest absolute difference, and largest error relative to a token's norm."""
    store = arguments.work / f"states-{keep}-{dtype}"
    shutil.rmtree(store, ignore_errors=True)
    layerbank("extract", folder, "--encoder", encoder(), "--store", store, "--keep", keep, "--dtype", dtype)
    split = open_bank(str(store)).split("dev")
    absolute = relative = 0.0
    for i, row in enumerate(split.row):
        found = split.gather([i])[0].astype(np.float32)
        expected = plain(int(row))
        if keep == "words":
            ids = tokenizer(rows[row], is_split_into_words=True).word_ids()
            first = [t for t, w in enumerate(ids) if t == 0 or (w is not None and w != ids[t - 1])]
            expected = expected[:, first]
        assert found.shape == expected.shape, (row, found.shape, expected.shape)
        difference = np.abs(found - expected)
        absolute = max(absolute, float(difference.max()))
        norms = np.linalg.norm(expected, axis=-1)
        relative = max(relative, float((np.linalg.norm(found - expected, axis=-1) / norms).max()))
    assert int((split.kind == Kind.WORD).sum()) > 0
    return absolute, relative


for keep, dtype in (("all", "float32"), ("words", "float32"), ("all", "float16"), ("all", "bfloat16")):
    absolute, relative = errors(keep, dtype)
    show(check="states of snips dev", keep=keep, dtype=dtype, absolute=absolute, relative_of_norm=relative)
