"""A frozen encoder: the states of the kept tokens, for every layer, on its device.

Any `transformers` encoder, the encoder of an encoder-decoder, or a decoder-only model. Nothing here
trains: evaluation mode, no gradient, no dropout.
"""

import hashlib
import inspect
import json
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from numpy import ndarray
from torch import Tensor, nn

from cache import EncoderRecord
from cache.targets import ranges
from pipeline.device import pick_device
from pipeline.errors import PipelineError
from pipeline.tokens import Tokens, tokenizer_sha256

_LONGEST = 512
"""Default for the longest example, where the encoder allows more."""

_UNUSED = ("pooler.",)
"""Weights that no hidden state depends on; many checkpoints lack them, so loading draws them anew."""


class Encoder:
    """A frozen encoder and its tokenizer.

    Args:
        name: Hub id or directory.
        revision: Hub revision.
        device: where it computes; ``auto`` picks.
        words: whether it will be given rows that are lists of words.
        trust_remote_code: whether code that comes with the encoder may run.

    Raises:
        PipelineError: it cannot be loaded, or its checkpoint lacks weights.
    """

    def __init__(
        self,
        name: str,
        *,
        revision: str | None = None,
        device: str = "auto",
        words: bool = False,
        trust_remote_code: bool = False,
    ) -> None:
        self.device = pick_device(device)
        self.tokenizer = _load_tokenizer(name, revision, words, trust_remote_code)
        self._model = _load_model(name, revision, trust_remote_code).to(self.device)
        self._config: Any = self._model.config
        self._asks_type_ids = (
            "token_type_ids" in self.tokenizer.model_input_names
            and "token_type_ids" in inspect.signature(self._model.forward).parameters
        )
        self._n_ids = _n_ids(self._model)
        pad_id = self.tokenizer.pad_token_id
        # A pad token may have been added to the tokenizer alone. Any id will do: padding is masked.
        self._pad_id = pad_id if pad_id is not None and pad_id < self._n_ids else 0
        n_layers, width = self._try(name)
        self.record = EncoderRecord(
            name=name,
            revision=revision,
            weights_sha256=_weights_sha256(self._model),
            n_layers=n_layers,
            width=width,
        )
        self.tokenizer_sha256 = tokenizer_sha256(self.tokenizer)

    @property
    def positions(self) -> int | None:
        """Longest input the position table allows, in tokens; None where there is no such bound."""
        for name, module in self._model.named_modules():
            if name.endswith("position_embeddings") and isinstance(module, nn.Embedding):
                return module.num_embeddings - (0 if module.padding_idx is None else module.padding_idx + 1)
        if self._config.model_type in ("t5", "mt5", "umt5"):
            return None
        return getattr(self._config, "max_position_embeddings", None)

    def max_length(self, asked: int | None) -> int:
        """The longest example to encode, in tokens.

        Raises:
            PipelineError: more is asked than the encoder has positions.
        """
        limit = self.positions
        if asked is None:
            known = self.tokenizer.model_max_length
            return min(_LONGEST, known, limit or _LONGEST)
        if limit is not None and asked > limit:
            raise PipelineError(
                f"--max-length {asked}: the encoder has {limit} positions, give {limit} or less"
            )
        return asked

    def batches(
        self, lengths: Int[ndarray, " example"], budget_tokens: int
    ) -> Iterator[Int[ndarray, " one"]]:
        """Groups examples of like length, the padded size of a group within the budget where it can be.

        Yields:
            Positions in `lengths`; empty examples stand in none.
        """
        order = np.argsort(lengths, kind="stable")
        order = order[lengths[order] > 0]
        first = 0
        for i in range(len(order)):
            if (i + 1 - first) * int(lengths[order[i]]) > budget_tokens and i > first:
                yield order[first:i]
                first = i
        if first < len(order):
            yield order[first:]

    def encode(
        self,
        tokens: Tokens,
        examples: Int[ndarray, " example"],
        *,
        kept: Bool[ndarray, " token"],
        layers: Sequence[int],
        start: Int[ndarray, " example"],
        out: Float[Tensor, "layer room width"],
        budget_tokens: int,
    ) -> None:
        """Encodes some rows and writes the states of their kept tokens, cast to the type of `out`.

        Args:
            tokens: tokens of all rows.
            examples: which rows.
            kept: which tokens of all rows are kept.
            layers: which layers, 0 being the embeddings.
            start: where in `out` the kept tokens of each of those rows begin.
            out: filled in place, on this encoder's device.
            budget_tokens: padded tokens in one forward.

        Raises:
            PipelineError: a token has no embedding, or the device's memory is too small.
        """
        lengths = tokens.length[examples]
        for chosen in self.batches(lengths, budget_tokens):
            rows, size = examples[chosen], lengths[chosen]
            padded, types, flat = _pad(tokens, rows, size, self._pad_id)
            self._check_ids(padded)
            states = self._forward_within_memory(padded, types, size)
            source, target = _kept_positions(flat, kept, tokens.start[rows], size, start[chosen])
            take = torch.from_numpy(source).to(self.device, non_blocking=True)
            put = torch.from_numpy(target).to(self.device, non_blocking=True)
            for k, layer in enumerate(layers):
                state = states[layer].reshape(-1, states[layer].shape[-1])
                out[k].index_copy_(0, put, state.index_select(0, take).to(out.dtype))

    def _try(self, name: str) -> tuple[int, int]:
        """Number of layers and width, from the forward of two tokens."""
        other_id = 0 if self._pad_id else 1
        try:
            states = self._forward(np.full((1, 2), other_id), np.zeros((1, 2), np.int64), [2])
            shapes = sorted({tuple(state.shape) for state in states})
        except Exception as error:  # a model of something else than text fails in a way of its own
            raise PipelineError(
                f"--encoder {name}: it gives no states of text: {_first_line(error)}"
            ) from error
        if len(shapes) != 1 or shapes[0][:2] != (1, 2):
            raise PipelineError(
                f"--encoder {name}: its layers have shapes {shapes} on a text of 2 tokens: not supported"
            )
        return len(states), shapes[0][2]

    def _check_ids(self, padded: Int[ndarray, "row longest"]) -> None:
        if (found := int(padded.max())) >= self._n_ids:
            raise PipelineError(
                f"--encoder {self.record.name}: its tokenizer gives token {found}, its embeddings end at "
                f"{self._n_ids - 1}: the two do not belong together"
            )

    def _forward_within_memory(self, padded: ndarray, types: ndarray, size: ndarray) -> tuple[Tensor, ...]:
        try:
            return self._forward(padded, types, size)
        except torch.OutOfMemoryError as error:
            raise PipelineError(
                f"{self.device} has too little memory for a batch of {padded.size} tokens: "
                "give fewer --batch-tokens"
            ) from error

    @torch.inference_mode()
    def _forward(
        self, padded: ndarray, types: ndarray, size: Sequence[int] | ndarray
    ) -> tuple[Tensor, ...]:
        mask = np.arange(padded.shape[1]) < np.asarray(size)[:, None]
        inputs = {
            "input_ids": torch.from_numpy(padded.astype(np.int64)).to(self.device),
            "attention_mask": torch.from_numpy(mask.astype(np.int64)).to(self.device),
        }
        if self._asks_type_ids:
            inputs["token_type_ids"] = torch.from_numpy(types.astype(np.int64)).to(self.device)
        states: tuple[Tensor, ...] = self._model(**inputs, output_hidden_states=True).hidden_states
        return states


def _pad(tokens: Tokens, rows: ndarray, size: ndarray, pad_id: int) -> tuple[ndarray, ndarray, ndarray]:
    """Padded ids and segments of some rows, and the position of each real token in the padded batch."""
    longest = int(size.max())
    padded = np.full((len(rows), longest), pad_id, dtype=np.int32)
    types = np.zeros((len(rows), longest), dtype=np.int32)
    flat = ranges(np.arange(len(rows)) * longest, size)
    source = ranges(tokens.start[rows], size)
    padded.reshape(-1)[flat] = tokens.input_ids[source]
    types.reshape(-1)[flat] = tokens.type_id[source]
    return padded, types, flat


def _kept_positions(
    flat: ndarray, kept: ndarray, row_start: ndarray, size: ndarray, start: ndarray
) -> tuple[ndarray, ndarray]:
    """For each kept token of a batch: where it is in the padded batch, and where it goes."""
    mask = kept[ranges(row_start, size)]
    bounds = np.concatenate([[0], np.cumsum(mask)])
    ends = np.cumsum(size)
    counts = bounds[ends] - bounds[ends - size]
    return flat[mask], ranges(start, counts)


def _load_tokenizer(name: str, revision: str | None, words: bool, trust_remote_code: bool) -> Any:
    from transformers import AutoTokenizer

    options = {"revision": revision or "main", "trust_remote_code": trust_remote_code}
    try:
        with _quiet():
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


def _load_model(name: str, revision: str | None, trust_remote_code: bool) -> nn.Module:
    from transformers import AutoModel

    options: dict[str, Any] = {
        "revision": revision or "main",
        "trust_remote_code": trust_remote_code,
        "dtype": torch.float32,
        "output_loading_info": True,
    }
    try:
        with _quiet():
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


@contextmanager
def _quiet() -> Iterator[None]:
    """Holds back progress bars and warnings of `transformers`: what they warn of is checked here."""
    from transformers.utils import logging

    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    try:
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
        return PipelineError(f"--encoder {name}: its {what} cannot be loaded: {_first_line(error)}")
    return PipelineError(
        f"--encoder {name}: no such directory, and its {what} cannot be had from the Hub "
        f"({_first_line(error)}): check the name or the network, or give a directory"
    )


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return lines[0].strip().rstrip(".:")


def _n_ids(model: Any) -> int:
    """How many token ids have an embedding; no bound where the encoder has no table of them."""
    try:
        return getattr(model.get_input_embeddings(), "num_embeddings", sys.maxsize)
    except NotImplementedError:
        return sys.maxsize


def _weights_sha256(model: nn.Module) -> str:
    """Fingerprint of the weights that take part in the states, by name, shape and value."""
    digest = hashlib.sha256()
    for name, weight in sorted(model.state_dict().items()):
        if name.startswith(_UNUSED):
            continue
        digest.update(json.dumps([name, list(weight.shape), str(weight.dtype)]).encode())
        digest.update(weight.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    config: Any = model.config
    digest.update(config.model_type.encode())
    return digest.hexdigest()
