"""Encoders of a shape with random weights, and sentences of massive's lengths for them."""

import json
from pathlib import Path

import numpy as np
import torch
import transformers

SHAPES = {
    "large": {
        "hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16, "intermediate_size": 4096,
    },
    "tiny": {
        "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64,
    },
}  # fmt: skip

N_TAGS = 55


def make_encoder(folder: Path, shape: str) -> Path:
    """A folder with random weights and a tokenizer of one token a word."""
    if not (folder / "tokenizer.json").exists():
        specials = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
        names = [*specials, *(f"w{i}" for i in range(30_000))]
        tokenizer = transformers.BertTokenizer(vocab={name: i for i, name in enumerate(names)})
        torch.manual_seed(0)
        config = transformers.BertConfig(vocab_size=len(names), **SHAPES[shape])
        transformers.BertModel(config).save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    return folder


def massive_lengths(data: Path) -> np.ndarray:
    """Tokens of each training sentence of massive/en-US by the packaged encoder, special ones left out."""
    from _common import encoder

    tokenizer = transformers.AutoTokenizer.from_pretrained(encoder())
    lines = (data / "massive/en-US/train.jsonl").read_text(encoding="utf-8").splitlines()
    texts = [" ".join(json.loads(line)["tokens"]) for line in lines]
    return np.array([len(ids) - 2 for ids in tokenizer(texts)["input_ids"]])


def make_data(folder: Path, rows: dict[str, int], lengths: np.ndarray) -> Path:
    """Sentences of words by chance, each word with a tag that follows from it.

    Args:
        folder: of the files, one a split.
        rows: how many rows each split has.
        lengths: words of the sentences, taken in turn.
    """
    folder.mkdir(parents=True, exist_ok=True)
    random = np.random.default_rng(0)
    for split, n_rows in rows.items():
        with (folder / f"{split}.jsonl").open("w", encoding="utf-8") as file:
            for length in lengths[np.arange(n_rows) % len(lengths)]:
                numbers = random.integers(0, 30_000, length).tolist()
                words, tags = [f"w{i}" for i in numbers], [f"B-{i % N_TAGS}" for i in numbers]
                file.write(json.dumps({"tokens": words, "tags": tags}) + "\n")
    return folder
