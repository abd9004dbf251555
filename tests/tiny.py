"""Small material for the tests of stage 2 and the commands.

A bank of synthetic states written through `cache.Writer`, whose labels can be read off the states; and
a BERT of three blocks with a WordPiece tokenizer, for the tests that start from text.
"""

import atexit
import json
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch
from banks import codes_of, zeros

from cache import Bank, Calibration, EncoderRecord, Kind, Recipe, Rows, Target, Writer, open_bank
from cache.fingerprint import hash_texts
from cache.layout import ALIKE

LAST, WIDTH = 3, 8
CLASSES = ("blue", "green", "red")
TAGS = ("O", "B-a", "I-a", "B-b")
SIZES = {"train": 120, "dev": 50, "test": 30}
ENCODER = EncoderRecord(name="tiny", revision=None, weights_sha256="w" * 64, n_layers=LAST + 1, width=WIDTH)


@dataclass(frozen=True, kw_only=True)
class Example:
    """One row with all its tokens: [CLS], the sub-words of its words, [SEP]."""

    states: np.ndarray  # layer token width
    word_id: np.ndarray
    kind: np.ndarray
    n_words: int  # those cut off included
    label: int
    tags: np.ndarray  # one a word, those cut off included
    value: float

    def kept(self, keep):
        """Which tokens a bank of that `keep` has."""
        first = np.arange(len(self.kind)) == 0
        return {"all": first | True, "words": first | (self.kind == Kind.WORD), "first": first}[keep]


def example(split, row):
    """A row as a function of split and number.

    Every 7th has no words, of every 5th two are cut off, and of every 4th one amid the others has no token.
    """
    random = np.random.default_rng([len(split), row])
    n_seen = 0 if row % 7 == 3 else int(random.integers(1, 6))
    gap = int(row % 4 == 1 and n_seen > 1)
    n_words = n_seen + gap + (2 if row % 5 == 2 else 0)
    pieces = random.integers(1, 4, n_seen)
    word_id = np.concatenate([[-1], np.repeat(np.arange(n_seen), pieces), [-1]]).astype(np.int32)
    word_id[word_id > 0] += gap
    opens = np.diff(word_id, prepend=-2) != 0
    kind = np.where(opens, Kind.WORD, Kind.CONTINUATION)
    kind[word_id < 0] = Kind.SPECIAL
    label, tags = int(random.integers(len(CLASSES))), random.integers(len(TAGS), size=n_words)
    value = float(random.uniform(-1, 1))
    states = 0.3 * random.standard_normal((LAST + 1, len(word_id), WIDTH))
    states[1:, 0, label] += 2.0
    states[1:, 0, 4] += 2.0 * value
    words = np.flatnonzero(kind == Kind.WORD)
    states[1:, words, tags[word_id[words]]] += 2.0
    return Example(
        states=states,
        word_id=word_id,
        kind=kind.astype(np.uint8),
        n_words=n_words,
        label=label,
        tags=tags,
        value=value,
    )


def examples(split, n=None):
    """The rows of a split."""
    return [example(split, row) for row in range(SIZES[split] if n is None else n)]


def recipe(**changes):
    """The recipe of these banks, some of it changed."""
    values = {
        "encoder": ENCODER,
        "tokenizer_sha256": "t" * 64,
        "columns": {"text": None, "text_pair": None, "words": "tokens"},
        "max_length": 32,
        "keep": "all",
        "layers": tuple(range(LAST + 1)),
        "dtype": "float32",
        "seed": 1,
        "block_tokens": 128,
        "codec": "none",
        "batch_tokens": 64,
    }
    return Recipe(**{**values, **changes})


def targets(rows):
    """The three targets of some rows, in row order; the 4th example of each split has no label."""
    label = np.array([row.label for row in rows], np.int32)
    tags = [row.tags.astype(np.int32) for row in rows]
    value = np.array([row.value for row in rows], np.float32)
    label[4:5], value[4:5] = -1, np.nan
    if len(tags) > 4:
        tags[4] = np.full_like(tags[4], -1)
    flat = np.concatenate([*tags, np.empty(0, np.int32)])
    return [
        Target(name="label", kind="class", names=CLASSES, values=label),
        Target(name="tags", kind="tags", names=TAGS, values=flat),
        Target(name="value", kind="float", names=(), values=value),
    ]


def bank(path, *, sizes=None, skipped=None, only=("label", "tags", "value"), **changes) -> Bank:
    """A complete bank of synthetic states with the targets ``label``, ``tags`` and ``value``."""
    what, sizes = recipe(**changes), dict(sizes or SIZES)
    splits = {split: examples(split, n) for split, n in sizes.items()}
    rows = {
        split: Rows(
            lengths=np.array(
                [[row.kept(keep).sum() for row in found] for keep in ALIKE[what.keep]], np.int32
            ),
            kept=ALIKE[what.keep].index(what.keep),
            n_words=np.array([row.n_words for row in found], np.int32),
            text_hash=hash_texts(f"{split} {i}" for i in range(len(found))),
        )
        for split, found in splits.items()
    }
    with Writer(str(path), what, rows) as writer:
        if what.dtype == "int8":
            writer.calibrate(calibration_of(what, splits["train"]))
        for split, found in splits.items():
            for block in writer.missing(split):
                states, small = _block(writer, split, block, found)
                if what.dtype == "int8":
                    plan, first = writer.plans[split], np.zeros(states.shape[1], bool)
                    here = plan.examples(block)
                    first[(plan.start[here] - block * plan.block_tokens)[plan.length[here] > 0]] = True
                    states, clipped = codes_of(states, writer.calibration, first)
                    writer.write_block(split, block, states, small, clipped)
                else:
                    writer.write_block(split, block, states, small)
            for target in targets(found):
                if target.name in only:
                    writer.write_target(split, target)
        writer.finish(skipped=dict(skipped or {}))
    return open_bank(str(path))


def calibration_of(what, rows):
    """Scale and shift with which no state of any split is out of range."""
    largest = np.abs(np.concatenate([row.states for row in rows], axis=1)).max((1, 2))[list(what.layers)]
    scale = np.repeat(1.5 * largest[:, None] / 127, WIDTH, axis=1).astype(np.float32)
    scale, shift = np.stack([scale, 1.1 * scale]), np.full_like(scale, 0.05)
    return Calibration(scale=scale, shift=np.stack([shift, 2 * shift]))


@cache
def shared(**changes) -> Bank:
    """A bank that is made once, for tests that only read."""
    folder = TemporaryDirectory(prefix="layerbank-tests-")
    atexit.register(folder.cleanup)
    return bank(Path(folder.name) / "bank", **changes)


def _block(writer, split, block, rows):
    plan, states = writer.plans[split], zeros(writer, split)
    if states.dtype == np.int8:
        states = np.zeros(states.shape, np.float32)
    room = plan.block_tokens
    small = {
        "input_ids": np.zeros(room, np.int32),
        "word_id": np.full(room, -1, np.int32),
        "kind": np.full(room, Kind.FILL, np.uint8),
    }
    here = plan.examples(block)
    for number, start in zip(plan.row[here], plan.start[here] - block * room, strict=True):
        row = rows[number]
        kept = row.kept(writer.recipe.keep)
        inside = slice(start, start + int(kept.sum()))
        chosen = row.states[list(writer.recipe.layers)][:, kept]
        states[:, inside] = chosen.astype(states.dtype)
        small["word_id"][inside], small["kind"][inside] = row.word_id[kept], row.kind[kept]
    return states, small


NOUNS = ("lamp", "door", "radio", "clock")
COLOURS = ("blue", "green", "red")
VERBS = {"turn": "switch", "open": "move", "play": "sound"}


def rows_of_text(split, n):
    """Rows of words with a class, tags and a number: ``open the red door`` and its like."""
    random = np.random.default_rng([len(split), 77])
    made = []
    for _ in range(n):
        verb = str(random.choice(list(VERBS)))
        colour, noun = str(random.choice(COLOURS)), str(random.choice(NOUNS))
        made.append(
            {
                "tokens": [verb, "the", colour, noun],
                "tags": ["O", "O", "B-colour", "B-thing"],
                "intent": VERBS[verb],
                "score": float(COLOURS.index(colour)) + 0.5,
                "text": f"{verb} the {colour} {noun}",
                "text_pair": f"the {noun}",
            }
        )
    return made


def write_jsonl(folder, splits, columns):
    """A data folder with the rows' columns of those names."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    for split, rows in splits.items():
        lines = [json.dumps({name: row[name] for name in columns}) for row in rows]
        (folder / f"{split}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return str(folder)


def encoder(folder, *, seed=0):
    """Saves a BERT of width 16 with random weights; words of the grammar above and letters are known."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
    from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

    letters = "abcdefghijklmnopqrstuvwxyz"
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *VERBS, "the", *COLOURS, *NOUNS]
    vocabulary = {word: i for i, word in enumerate([*words, *letters, *(f"##{c}" for c in letters)])}
    whole = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
    whole.normalizer = normalizers.BertNormalizer()
    whole.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    whole.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[("[CLS]", 2), ("[SEP]", 3)],
    )
    special = {"unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]", "pad_token": "[PAD]"}
    PreTrainedTokenizerFast(tokenizer_object=whole, model_max_length=32, **special).save_pretrained(folder)
    config = BertConfig(
        vocab_size=len(vocabulary),
        hidden_size=16,
        num_hidden_layers=3,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=32,
        initializer_range=0.5,  # with the usual 0.02, [CLS] knows next to nothing of its sentence
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        BertModel(config).save_pretrained(folder)
    return str(folder)
