"""Loads an encoder's files: its tokenizer, its weights, and what identifies them.

Everything that `transformers` may raise, print or make up on the way ends here, as one line.
"""

import hashlib
import json
import re
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from textwrap import shorten
from typing import Any

import torch
from torch import nn

from cache.store import one_line
from pipeline.errors import PipelineError
from pipeline.quiet import HUB, quiet

_UNUSED = ("pooler.",)
"""Weights that no hidden state depends on; many checkpoints lack them, so loading draws them anew."""

_SAID = 300
"""Characters of another library's message that are passed on."""

_OTHERS = {".h5", ".msgpack", ".onnx", ".ot", ".md"}
"""Endings of files that torch loads nothing from."""

_IDLE = re.compile(
    r"_.*|.*drop.*|output_.*|.*initializer.*|.*label.*|.*token_id|.*dtype|.*attn_implementation.*"
    r"|architectures|auto_map|bos|chunk_size_feed_forward|classifier_.*|eos|finetuning_task|gradient_.*"
    r"|is_encoder_decoder|pooler_.*|pretraining_tp|problem_type|return_dict|summary_.*|task_specific_params"
    r"|tie_word_embeddings|tokenizer_class|transformers_version|use_cache"
)
"""Settings of an encoder that no state depends on. `pad_token_id` is not among them: positions may."""


def load_tokenizer(
    name: str, revision: str | None, *, words: bool, trust_remote_code: bool, download: bool = True
) -> Any:
    """Loads a tokenizer; for rows of words, one that puts a space before each of them where it must.

    Raises:
        PipelineError: it cannot be loaded, or has no vocabulary.
    """
    from transformers import AutoTokenizer

    options = {"revision": revision or "main", "trust_remote_code": trust_remote_code}
    options["local_files_only"] = not download
    try:
        with silenced():
            tokenizer = AutoTokenizer.from_pretrained(name, **options)
            if words and getattr(tokenizer, "add_prefix_space", None) is False:
                tokenizer = AutoTokenizer.from_pretrained(name, add_prefix_space=True, **options)
    except Exception as error:  # its readers of many formats raise what they like
        raise _cannot_load("tokenizer", name, error) from error
    added = {token.content for token in tokenizer.added_tokens_decoder.values()}
    # Without files some classes still make a tokenizer, of the special tokens and "▁".
    if tokenizer.is_fast and len(tokenizer.get_vocab().keys() - added) < 2:
        raise PipelineError(
            f"--encoder {name}: its tokenizer has no vocabulary: add the tokenizer's files, such as "
            "tokenizer.json"
        )
    tokenizer.truncation_side = "right"
    if words:
        _set_prefix_space(tokenizer)
    return tokenizer


def _set_prefix_space(tokenizer: Any) -> None:
    """Makes a byte-level tokenizer read each word as one with a space before it.

    Classes such as RoBERTa's do that for ``add_prefix_space``; the general one ignores it.
    """
    pre_tokenizer: Any = tokenizer.backend_tokenizer.pre_tokenizer if tokenizer.is_fast else None
    if getattr(pre_tokenizer, "add_prefix_space", None) is False:
        pre_tokenizer.add_prefix_space = True


def load_model(name: str, revision: str | None, *, trust_remote_code: bool) -> nn.Module:
    """Loads the encoder in float32, in evaluation mode, without gradients.

    Of an encoder-decoder it is the encoder alone.

    Raises:
        PipelineError: it cannot be loaded, or its checkpoint lacks weights.
    """
    from transformers import AutoModel

    options: dict[str, Any] = {
        "revision": revision or "main",
        "trust_remote_code": trust_remote_code,
        "dtype": torch.float32,
        "output_loading_info": True,
    }
    try:
        with silenced():
            try:
                model, info = AutoModel.from_pretrained(name, attn_implementation="sdpa", **options)
            except ValueError:  # an architecture without fused attention says so in this way
                model, info = AutoModel.from_pretrained(name, attn_implementation="eager", **options)
    except Exception as error:  # readers of weights raise classes of their own
        raise _cannot_load("encoder", name, error) from error
    part = model.get_encoder() if model.config.is_encoder_decoder else model
    part.eval().requires_grad_(False)
    part.config.use_cache = False  # of keys and values, which a decoder-only model would hold for nothing
    _check_weights(name, model, part, info["missing_keys"])
    return part


def is_encoder_decoder(name: str, revision: str | None, *, trust_remote_code: bool) -> bool:
    """Whether a checkpoint is an encoder and a decoder, by its config.

    Raises:
        PipelineError: the config cannot be loaded.
    """
    from transformers import AutoConfig

    try:
        with silenced():
            config = AutoConfig.from_pretrained(
                name, revision=revision or "main", trust_remote_code=trust_remote_code
            )
    except Exception as error:
        raise _cannot_load("config", name, error) from error
    return bool(getattr(config, "is_encoder_decoder", False))


def load_text_to_text(name: str, revision: str | None, *, trust_remote_code: bool) -> nn.Module:
    """Loads an encoder-decoder with its language-model head, in float32, frozen.

    Raises:
        PipelineError: it cannot be loaded, or its checkpoint lacks weights.
    """
    from transformers import AutoModelForSeq2SeqLM

    options: dict[str, Any] = {
        "revision": revision or "main",
        "trust_remote_code": trust_remote_code,
        "dtype": torch.float32,
        "output_loading_info": True,
    }
    try:
        with silenced():
            model, info = AutoModelForSeq2SeqLM.from_pretrained(name, **options)
    except Exception as error:  # as in `load_model`
        raise _cannot_load("encoder-decoder", name, error) from error
    model.eval().requires_grad_(False)
    _check_weights(name, model, model, info["missing_keys"])
    return model


@contextmanager
def silenced() -> Iterator[None]:
    """Holds back progress bars and warnings of `transformers`: what they warn of is checked here."""
    from transformers.utils import logging

    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    try:
        with quiet(*HUB):
            yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()  # type: ignore[no-untyped-call]


def _check_weights(name: str, model: nn.Module, part: nn.Module, missing: Iterable[str]) -> None:
    """Refuses a checkpoint that lacks weights the states depend on: they would be random."""
    used = {
        id(weight) for key, weight in part.state_dict(keep_vars=True).items() if not key.startswith(_UNUSED)
    }
    lacking = [key for key, weight in model.state_dict(keep_vars=True).items() if id(weight) in used]
    lacking = sorted(set(lacking) & set(missing))
    if lacking:
        raise PipelineError(
            f"--encoder {name}: its checkpoint lacks {len(lacking)} weights, first {lacking[0]}: "
            "they would be random, use a whole checkpoint"
        )


def _cannot_load(what: str, name: str, error: BaseException) -> PipelineError:
    if Path(name).is_dir():
        return PipelineError(f"--encoder {name}: its {what} cannot be loaded: {in_short(error)}")
    return PipelineError(
        f"--encoder {name}: no such directory, and its {what} cannot be had from the Hub "
        f"({in_short(error)}): check the name or the network, or give a directory"
    )


def in_short(error: BaseException) -> str:
    """What an exception says, as one line that is not too long."""
    return shorten(one_line(error), width=_SAID, placeholder=" …").rstrip(".:")


def files_sha256(name: str, revision: str | None) -> str | None:
    """Digest of the files that an encoder and its tokenizer are loaded from, without loading them.

    None where they are not on this machine. It may differ where the encoder is the same: it is of all files
    that may take part.
    """
    folder = Path(name) if Path(name).is_dir() else _snapshot(name, revision)
    if folder is None:
        return None
    digest = hashlib.sha256()
    for path in sorted(folder.iterdir()):
        if path.is_file() and path.suffix not in _OTHERS and not path.name.startswith("."):
            with path.open("rb") as file:
                digest.update(path.name.encode() + hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()


def _snapshot(name: str, revision: str | None) -> Path | None:
    """The folder in the Hub's cache that such an encoder was loaded from; the network is not asked."""
    from huggingface_hub import try_to_load_from_cache

    try:
        config = try_to_load_from_cache(name, "config.json", revision=revision)
    except ValueError:  # no name of the Hub: whoever loads it says so
        return None
    return Path(config).parent if isinstance(config, str) else None


def n_ids(model: Any) -> int:
    """How many token ids have an embedding; no bound where the encoder has no table of them."""
    try:
        return getattr(model.get_input_embeddings(), "num_embeddings", sys.maxsize)
    except NotImplementedError:
        return sys.maxsize


def weights_sha256(model: nn.Module) -> str:
    """Fingerprint of the weights that take part in the states, by name, shape and value.

    And of the settings that change states without changing a weight's shape.
    """
    digest = hashlib.sha256()
    for name, weight in sorted(model.state_dict().items()):
        if name.startswith(_UNUSED):
            continue
        digest.update(json.dumps([name, list(weight.shape), str(weight.dtype)]).encode())
        digest.update(weight.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    digest.update(json.dumps(_settings(model.config), sort_keys=True, default=str).encode())
    return digest.hexdigest()


def _settings(config: Any) -> dict[str, Any]:
    """The settings that may change states, as far as they differ from the defaults of their class.

    Defaults are left out: a later `transformers` has more of them.
    """
    changed = config.to_diff_dict()
    return {
        name: value
        for name, value in changed.items()
        if name == "pad_token_id" or not _IDLE.fullmatch(name)
    }
