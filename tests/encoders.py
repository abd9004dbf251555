"""Tiny encoders with random weights and tokenizers made on the spot, one of every family that counts.

Their weights are far larger than at a usual initialisation, so that a wrong mask, position or segment
changes the states by much more than rounding does.
"""

import atexit
import shutil
from collections.abc import Callable
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
import transformers
from safetensors.torch import load_file, save_file
from tokenizers.pre_tokenizers import ByteLevel

WIDTH = 32
POSITIONS = 40
"""Tokens that the position tables of the families that have one are good for."""

SENTENCES = (
    "the quick brown fox jumps over the lazy dog",
    "play the latest album by Björk on my café playlist, please",
    "book a table for two in Zürich at half past seven",
    "does it rain tomorrow? it does: take an umbrella!",
    "東京 is the capital of Japan, über alles 42 % of 1,000 people",
    "unbelievable, untranslatable, internationalization and extraordinariness",
)
"""What most rows of the tests are made of."""


_LETTERS = [*sorted(set("".join(SENTENCES).lower()) - {" "}), "-", "."]
_PIECES = ("the", "quick", "fox", "lazy", "un", "trans", "able", "play", "on", "tion", "al", "book")
"""Pieces of more than one letter. Nothing is learned: ties make a learned vocabulary differ by run."""


def _wordpiece(specials: list[str]) -> dict[str, int]:
    pieces = [*_LETTERS, *_PIECES]
    return {piece: i for i, piece in enumerate([*specials, *pieces, *(f"##{piece}" for piece in pieces)])}


def _unigram(specials: list[str]) -> list[tuple[str, float]]:
    pieces = [*_PIECES, *(f"▁{piece}" for piece in _PIECES)]
    return [
        *((piece, 0.0) for piece in specials),
        *((letter, -6.0) for letter in ["▁", *_LETTERS]),
        *((piece, -4.0) for piece in pieces),
    ]


def _bpe(
    specials: list[str], alphabet: list[str], space: str
) -> tuple[dict[str, int], list[tuple[str, str]]]:
    """Vocabulary and merges; pieces are put together from the left, letter by letter."""
    merges: dict[tuple[str, str], None] = {}
    for piece in _PIECES:
        for end in range(1, len(piece)):
            merges[piece[:end], piece[end]] = None
    merges |= dict.fromkeys((space, piece) for piece in _PIECES)
    whole = dict.fromkeys([*specials, *alphabet, *(left + right for left, right in merges)])
    return {piece: i for i, piece in enumerate(whole)}, list(merges)


def _byte_bpe(specials: list[str]) -> tuple[dict[str, int], list[tuple[str, str]]]:
    return _bpe(specials, sorted(ByteLevel.alphabet()), "Ġ")


_BERT = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
_ROBERTA = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]


def _small(**more: Any) -> dict[str, Any]:
    return {
        "hidden_size": WIDTH,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "intermediate_size": 48,
        "max_position_embeddings": POSITIONS,
        **more,
    }


Parts = tuple[Any, Any, Callable[[Any], Any]]
"""A tokenizer, a config, and the class of the model."""


def _bert() -> Parts:
    tokenizer = transformers.BertTokenizer(vocab=_wordpiece(_BERT))
    return tokenizer, transformers.BertConfig(vocab_size=len(tokenizer), **_small()), transformers.BertModel


def _distilbert() -> Parts:
    tokenizer = transformers.DistilBertTokenizer(vocab=_wordpiece(_BERT))
    config = transformers.DistilBertConfig(
        vocab_size=len(tokenizer),
        dim=WIDTH,
        n_layers=2,
        n_heads=4,
        hidden_dim=48,
        max_position_embeddings=POSITIONS,
    )
    return tokenizer, config, transformers.DistilBertModel


def _electra() -> Parts:
    tokenizer = transformers.ElectraTokenizer(vocab=_wordpiece(_BERT))
    config = transformers.ElectraConfig(vocab_size=len(tokenizer), embedding_size=16, **_small())
    return tokenizer, config, transformers.ElectraModel


def _albert() -> Parts:
    tokenizer = transformers.AlbertTokenizer(vocab=_unigram(["<pad>", "<unk>", "[CLS]", "[SEP]", "[MASK]"]))
    config = transformers.AlbertConfig(vocab_size=len(tokenizer), embedding_size=16, **_small())
    return tokenizer, config, transformers.AlbertModel


def _roberta() -> Parts:
    vocab, merges = _byte_bpe(_ROBERTA)
    tokenizer = transformers.RobertaTokenizer(vocab=vocab, merges=merges)
    config = transformers.RobertaConfig(
        vocab_size=len(tokenizer), type_vocab_size=1, **_small(max_position_embeddings=POSITIONS + 2)
    )
    return tokenizer, config, transformers.RobertaModel


def _xlm_roberta() -> Parts:
    vocab = _unigram(["<s>", "<pad>", "</s>", "<unk>", "<mask>"])
    tokenizer = transformers.XLMRobertaTokenizer(vocab=vocab)
    config = transformers.XLMRobertaConfig(
        vocab_size=len(tokenizer), type_vocab_size=1, **_small(max_position_embeddings=POSITIONS + 2)
    )
    return tokenizer, config, transformers.XLMRobertaModel


def _deberta() -> Parts:
    vocab, merges = _byte_bpe(["[CLS]", "[PAD]", "[SEP]", "[UNK]", "[MASK]"])
    tokenizer = transformers.DebertaTokenizer(vocab=vocab, merges=merges)
    config = transformers.DebertaConfig(
        vocab_size=len(tokenizer),
        relative_attention=True,
        pos_att_type=["c2p", "p2c"],
        pad_token_id=1,
        **_small(),
    )
    return tokenizer, config, transformers.DebertaModel


def _deberta_v2() -> Parts:
    vocab = _unigram(["[PAD]", "[CLS]", "[SEP]", "<unk>", "[MASK]"])
    tokenizer = transformers.DebertaV2Tokenizer(vocab=vocab, unk_token="<unk>", unk_id=3)
    config = transformers.DebertaV2Config(
        vocab_size=len(tokenizer),
        relative_attention=True,
        position_biased_input=False,
        share_att_key=True,
        pos_att_type=["c2p", "p2c"],
        position_buckets=8,
        norm_rel_ebd="layer_norm",
        **_small(),
    )
    return tokenizer, config, transformers.DebertaV2Model


def _t5() -> Parts:
    tokenizer = transformers.T5Tokenizer(vocab=_unigram(["<pad>", "</s>", "<unk>"]), extra_ids=4)
    config = transformers.T5Config(
        vocab_size=len(tokenizer), d_model=WIDTH, d_kv=8, d_ff=48, num_layers=2, num_heads=4
    )
    return tokenizer, config, transformers.T5Model


def _gpt2() -> Parts:
    # The end of text has the last id, as in GPT-2 itself: the one above it is in no table.
    vocab, merges = _byte_bpe([])
    end = vocab["<|endoftext|>"] = len(vocab)
    tokenizer = transformers.GPT2Tokenizer(vocab=vocab, merges=merges, pad_token="<|endoftext|>")
    config = transformers.GPT2Config(
        vocab_size=len(tokenizer),
        n_embd=WIDTH,
        n_layer=2,
        n_head=4,
        n_positions=POSITIONS,
        bos_token_id=end,
        eos_token_id=end,
    )
    return tokenizer, config, transformers.GPT2Model


def _llama() -> Parts:
    vocab, merges = _bpe(["<unk>", "<s>", "</s>"], ["▁", *_LETTERS], "▁")
    tokenizer = transformers.LlamaTokenizer(vocab=vocab, merges=merges)
    config = transformers.LlamaConfig(vocab_size=len(tokenizer), num_key_value_heads=2, **_small())
    return tokenizer, config, transformers.LlamaModel


_BUILDERS: dict[str, Callable[[], Parts]] = {
    "bert": _bert,
    "distilbert": _distilbert,
    "electra": _electra,
    "albert": _albert,
    "roberta": _roberta,
    "xlm_roberta": _xlm_roberta,
    "deberta": _deberta,
    "deberta_v2": _deberta_v2,
    "t5": _t5,
    "gpt2": _gpt2,
    "llama": _llama,
}

FAMILIES = tuple(_BUILDERS)


@cache
def _root() -> Path:
    folder = TemporaryDirectory(prefix="layerbank-encoders-")
    atexit.register(folder.cleanup)
    return Path(folder.name)


@cache
def tiny_encoder(family: str = "bert") -> str:
    """The folder of a tiny encoder, made once a session: tests that change it copy it first."""
    folder = str(_root() / family)
    tokenizer, config, model_class = _BUILDERS[family]()
    torch.manual_seed(0)
    model = model_class(config)
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(torch.randn_like(weight), alpha=0.15)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


MASKED_LM = {
    "bert": transformers.BertForMaskedLM,
    "distilbert": transformers.DistilBertForMaskedLM,
    "albert": transformers.AlbertForMaskedLM,
    "roberta": transformers.RobertaForMaskedLM,
    "electra": transformers.ElectraForMaskedLM,
}
"""Families that have an output layer, each of its own making."""


@cache
def tiny_masked_lm(family: str = "bert") -> str:
    """The folder of a tiny masked language model, its output layer included."""
    folder = str(_root() / f"{family}-masked-lm")
    tokenizer, config, _ = _BUILDERS[family]()
    torch.manual_seed(0)
    model = MASKED_LM[family](config)
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(torch.randn_like(weight), alpha=0.15)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@cache
def tiny_text_to_text() -> str:
    """The folder of a tiny T5 with a language-model head that is tied to its embeddings."""
    folder = str(_root() / "text-to-text")
    shutil.copytree(tiny_encoder("t5"), folder)
    config = transformers.T5Config.from_pretrained(folder, decoder_start_token_id=0)
    torch.manual_seed(1)
    transformers.T5ForConditionalGeneration(config).save_pretrained(folder)
    return folder


def copy_of(
    family: str, folder: Path, change: Callable[[dict[str, torch.Tensor]], None] | None = None
) -> str:
    """A copy of a tiny encoder, its weights changed by a function of their dictionary."""
    shutil.copytree(tiny_encoder(family), folder)
    if change:
        weights = load_file(folder / "model.safetensors")
        change(weights)
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return str(folder)
