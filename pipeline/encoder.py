"""A frozen encoder: the states of the kept tokens, for every layer, on its device.

Any `transformers` encoder, the encoder of an encoder-decoder, or a decoder-only model. Nothing here
trains: evaluation mode, no gradient, no dropout.
"""

import copy
import inspect
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from numpy import ndarray
from torch import Tensor, nn

from cache import EncoderRecord
from cache.targets import ranges
from pipeline import checkpoint
from pipeline.capture import find_blocks, hidden_states
from pipeline.device import pick_device
from pipeline.errors import PipelineError
from pipeline.grouping import group
from pipeline.precision import bank_precision, forward_precision, products_in, round_weights
from pipeline.tokens import Tokens, tokenizer_sha256

LONGEST = 512
"""Default for the longest example, where the encoder allows more."""


class PrecisionError(PipelineError):
    """The encoder does not compute in a type shorter than float32."""


class Encoder:
    """A frozen encoder and its tokenizer.

    Args:
        name: Hub id or directory.
        revision: Hub revision.
        device: where it computes; ``auto`` picks.
        words: whether it will be given rows that are lists of words.
        trust_remote_code: whether code that comes with the encoder may run.
        precision: float32, or the shorter type that its products are computed in.

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
        precision: str = "float32",
    ) -> None:
        self.opening: dict[str, Any] = {
            "name": name,
            "revision": revision,
            "device": device,
            "words": words,
            "trust_remote_code": trust_remote_code,
            "precision": precision,
        }
        """What opens it again in another process."""
        self.device, self.precision = pick_device(device), "float32"
        self.tokenizer = checkpoint.load_tokenizer(
            name, revision, words=words, trust_remote_code=trust_remote_code
        )
        self._model = checkpoint.load_model(name, revision, trust_remote_code=trust_remote_code).to(
            self.device
        )
        self._config: Any = self._model.config
        self._asks_type_ids = (
            "token_type_ids" in self.tokenizer.model_input_names
            and "token_type_ids" in inspect.signature(self._model.forward).parameters
        )
        self._n_ids = checkpoint.n_ids(self._model)
        pad_id = self.tokenizer.pad_token_id
        # A pad token may have been added to the tokenizer alone. Any id will do: padding is masked.
        self._pad_id = pad_id if pad_id is not None and pad_id < self._n_ids else 0
        weights_sha256 = checkpoint.weights_sha256(self._model)
        self._blocks: tuple[nn.Module, ...] = ()
        n_layers, width = self._try(name)
        self._lower(name, precision)
        self.record = EncoderRecord(
            name=name,
            revision=revision,
            weights_sha256=weights_sha256,
            n_layers=n_layers,
            width=width,
        )
        self.tokenizer_sha256 = tokenizer_sha256(self.tokenizer)

    @property
    def model(self) -> Any:
        """The `transformers` model itself, for what trains it (`layerbank tune`)."""
        return self._model

    @property
    def asks_type_ids(self) -> bool:
        """Whether the model reads segments."""
        return self._asks_type_ids

    @property
    def pad_id(self) -> int:
        """The token id that padding gets."""
        return self._pad_id

    @property
    def positions(self) -> int | None:
        """Longest input the position table allows, in tokens; None where there is no such bound."""
        for name, module in self._model.named_modules():
            if name.endswith("position_embeddings") and isinstance(module, nn.Embedding):
                return module.num_embeddings - (0 if module.padding_idx is None else module.padding_idx + 1)
        if self._config.model_type in ("t5", "mt5", "umt5"):
            return None
        return getattr(self._config, "max_position_embeddings", None)

    def side_by_side(self, most: int) -> list["Encoder"]:
        """This encoder for each of some threads that use it at a time: on a CPU as many as torch may use.

        They share the weights and have modules of their own, because hooks sit on modules. An encoder whose
        code holds what cannot be copied is used by one thread.

        Args:
            most: how many could be used.
        """
        if self.device.type != "cpu":
            return [self]
        try:
            return [self, *(self._twin() for _ in range(1, min(torch.get_num_threads(), most)))]
        except Exception:  # code that came with the encoder fails in a way of its own
            return [self]

    def _twin(self) -> "Encoder":
        weights = [*self._model.parameters(), *self._model.buffers()]
        copied: dict[int, Any] = {id(weight): weight for weight in weights}
        twin = copy.copy(self)
        twin._model = copy.deepcopy(self._model, copied)
        twin._blocks = tuple(copied[id(block)] for block in self._blocks)
        return twin

    def max_length(self, asked: int | None) -> int:
        """The longest example to encode, in tokens.

        Raises:
            PipelineError: more is asked than the encoder has positions.
        """
        limit = self.positions
        if asked is None:
            known = self.tokenizer.model_max_length
            return min(LONGEST, known, limit or LONGEST)
        if limit is not None and asked > limit:
            raise PipelineError(
                f"--max-length {asked}: the encoder has {limit} positions, give {limit} or less"
            )
        return asked

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
        for chosen in group(lengths, budget_tokens):
            rows, size = examples[chosen], lengths[chosen]
            padded, types, flat = _pad(tokens, rows, size, self._pad_id)
            self._check_ids(padded)
            states = self._forward_within_memory(padded, types, size, layers)
            source, target = _kept_positions(flat, kept, tokens.start[rows], size, start[chosen])
            take = torch.from_numpy(source).to(self.device, non_blocking=True)
            put = torch.from_numpy(target).to(self.device, non_blocking=True)
            for state, rows_out in zip(states, out, strict=True):
                flat_state = state.reshape(-1, state.shape[-1])
                if len(source) < len(flat_state):
                    flat_state = flat_state.index_select(0, take)
                rows_out.index_copy_(0, put, flat_state.to(out.dtype))

    def _try(self, name: str) -> tuple[int, int]:
        """Number of layers and width, from the forward of two tokens."""
        other_id = 0 if self._pad_id else 1
        try:
            states = self._probe(np.full((1, 2), other_id))
            shapes = sorted({tuple(state.shape) for state in states})
        except Exception as error:  # a model of something else than text fails in a way of its own
            raise PipelineError(
                f"--encoder {name}: it gives no states of text: {checkpoint.in_short(error)}"
            ) from error
        if len(shapes) != 1 or shapes[0][:2] != (1, 2):
            raise PipelineError(
                f"--encoder {name}: its layers have shapes {shapes} on a text of 2 tokens: not supported"
            )
        return len(states), shapes[0][2]

    def _lower(self, name: str, precision: str) -> None:
        """Goes to a shorter type, if it is one, and tries the encoder in it."""
        if precision == "float32":
            return
        round_weights(self._model, precision, self.device)
        self.precision = precision
        try:
            self._probe(np.zeros((1, 2), np.int64))
        except Exception as error:  # code that counts on one type everywhere fails in a way of its own
            raise PrecisionError(
                f"--precision {precision}: {name} does not compute in it "
                f"({checkpoint.in_short(error)}): use --precision float32"
            ) from error

    def _check_ids(self, padded: Int[ndarray, "row longest"]) -> None:
        if (found := int(padded.max())) >= self._n_ids:
            raise PipelineError(
                f"--encoder {self.record.name}: its tokenizer gives token {found}, its embeddings end at "
                f"{self._n_ids - 1}: the two do not belong together"
            )

    def _forward_within_memory(
        self, padded: ndarray, types: ndarray, size: ndarray, layers: Sequence[int]
    ) -> list[Tensor]:
        try:
            return self._forward(padded, types, size, layers)
        except torch.OutOfMemoryError as error:
            raise PipelineError(
                f"{self.device} has too little memory for a batch of {padded.size} tokens: "
                "give fewer --batch-tokens"
            ) from error

    @torch.inference_mode()
    def _probe(self, ids: ndarray) -> list[Tensor]:
        """All states of a small input; finds the blocks by them."""
        inputs = self._inputs(ids, np.zeros_like(ids), np.array([ids.shape[1]]))
        with products_in(self.precision, self.device):
            states: list[Tensor] = list(self._model(**inputs, output_hidden_states=True).hidden_states)
            self._blocks = find_blocks(self._model, inputs, states)
        return states

    @torch.inference_mode()
    def _forward(
        self, padded: ndarray, types: ndarray, size: ndarray, layers: Sequence[int]
    ) -> list[Tensor]:
        with products_in(self.precision, self.device):
            return hidden_states(self._model, self._inputs(padded, types, size), layers, self._blocks)

    def _inputs(self, padded: ndarray, types: ndarray, size: ndarray) -> dict[str, Tensor]:
        mask = np.arange(padded.shape[1]) < size[:, None]
        inputs = {"input_ids": padded, "attention_mask": mask}
        if self._asks_type_ids:
            inputs["token_type_ids"] = types
        return {name: torch.from_numpy(a.astype(np.int64)).to(self.device) for name, a in inputs.items()}


def open_encoder(
    name: str, *, precision: str = "auto", store: str | None = None, device: str = "auto", **options: Any
) -> Encoder:
    """Loads an encoder with the precision asked for.

    Args:
        name: Hub id or directory.
        precision: ``auto`` or one of `pipeline.precision.PRECISIONS`; see `forward_precision`.
        store: a bank to go on with, if it is there.
        device: where it computes.
        options: of `Encoder`.

    Raises:
        PipelineError: the encoder cannot be loaded, or neither it nor the device has that precision.
    """
    chosen = forward_precision(precision, pick_device(device), store)
    try:
        return Encoder(name, device=device, precision=chosen, **options)
    except PrecisionError:
        if precision != "auto" or (store and bank_precision(store)):
            raise
        return Encoder(name, device=device, **options)


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
