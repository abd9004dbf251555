"""The model that is tuned, with its tokenizer: an encoder, or an encoder-decoder from text to text."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import nn

from cache import EncoderRecord
from pipeline import checkpoint
from pipeline.encoder import LONGEST, Encoder
from pipeline.errors import PipelineError
from pipeline.tokens import tokenizer_sha256


@dataclass(frozen=True, kw_only=True)
class Backbone:
    """A loaded model, frozen, in evaluation mode."""

    model: Any
    tokenizer: Any
    record: EncoderRecord
    tokenizer_sha256: str
    text_to_text: bool
    positions: int | None  # longest input of the position table, in tokens; None where there is no bound
    asks_type_ids: bool
    pad_id: int

    @property
    def slot_at(self) -> int:
        """Tokens before the soft tokens: the special token that inputs begin with, if they do.

        A [CLS] keeps the position it was pre-trained at, and pooling ``first`` reads it, not a prompt.
        """
        opens = {self.tokenizer.cls_token_id, self.tokenizer.bos_token_id} - {None}
        return int(self.tokenizer("")["input_ids"][:1] in [[token] for token in opens])

    def max_length(self, asked: int | None, n_slots: int) -> int:
        """The longest example, in tokens, beside the soft tokens.

        Raises:
            PipelineError: the position table has no room for both.
        """
        known = min(LONGEST, self.tokenizer.model_max_length)
        if self.positions is None:
            return known if asked is None else asked
        room = self.positions - n_slots
        special = self.tokenizer.num_special_tokens_to_add()
        if room <= special:
            raise PipelineError(
                f"--set length={n_slots}: the position table of the encoder has {self.positions} entries, "
                f"soft tokens take one each: give length {self.positions - special - 1} or less, and leave "
                "room for the text"
            )
        if asked is not None and asked > room:
            raise PipelineError(
                f"--max-length {asked}: the encoder has {self.positions} positions, {n_slots} of them go "
                f"to soft tokens: give {room} or less"
            )
        return min(known, room) if asked is None else asked


def load_backbone(
    name: str, *, revision: str | None, words: bool, trust_remote_code: bool = False
) -> Backbone:
    """Loads a model on the CPU.

    Args:
        name: Hub id or directory.
        revision: Hub revision.
        words: whether it will be given rows that are lists of words.
        trust_remote_code: whether code that comes with the model may run.

    Raises:
        PipelineError: it cannot be loaded, or its checkpoint lacks weights.
    """
    if checkpoint.is_encoder_decoder(name, revision, trust_remote_code=trust_remote_code):
        return _text_to_text(name, revision, words=words, trust_remote_code=trust_remote_code)
    encoder = Encoder(
        name, revision=revision, device="cpu", words=words, trust_remote_code=trust_remote_code
    )
    drop_pooler(encoder.model)
    return Backbone(
        model=encoder.model,
        tokenizer=encoder.tokenizer,
        record=_found_again(encoder.record),
        tokenizer_sha256=encoder.tokenizer_sha256,
        text_to_text=False,
        positions=encoder.positions,
        asks_type_ids=encoder.asks_type_ids,
        pad_id=encoder.pad_id,
    )


def drop_pooler(model: nn.Module) -> None:
    """Takes the pooler out: heads read states, so nothing that trains or counts goes through it."""
    if getattr(model, "pooler", None) is not None:
        model.pooler = None  # type: ignore[assignment]


def _text_to_text(name: str, revision: str | None, *, words: bool, trust_remote_code: bool) -> Backbone:
    tokenizer = checkpoint.load_tokenizer(name, revision, words=words, trust_remote_code=trust_remote_code)
    model: Any = checkpoint.load_text_to_text(name, revision, trust_remote_code=trust_remote_code)
    config = model.config
    if tokenizer.pad_token_id is None or tokenizer.eos_token_id is None:
        raise PipelineError(f"--encoder {name}: its tokenizer has no padding or no end token: use another")
    # Checkpoints keep it in either of the two places, or leave it out; T5 starts with the padding.
    known = [getattr(c, "decoder_start_token_id", None) for c in (config, model.generation_config)]
    start = next((token for token in known if token is not None), tokenizer.pad_token_id)
    config.decoder_start_token_id = model.generation_config.decoder_start_token_id = start
    record = EncoderRecord(
        name=name,
        revision=revision,
        weights_sha256=checkpoint.weights_sha256(model),
        n_layers=config.num_hidden_layers + 1,
        width=config.hidden_size,
    )
    learned = any(n.endswith("embed_positions") for n, _ in model.get_encoder().named_modules())
    return Backbone(
        model=model,
        tokenizer=tokenizer,
        record=_found_again(record),
        tokenizer_sha256=tokenizer_sha256(tokenizer),
        text_to_text=True,
        positions=config.max_position_embeddings if learned else None,
        asks_type_ids=False,
        pad_id=tokenizer.pad_token_id,
    )


def _found_again(record: EncoderRecord) -> EncoderRecord:
    """The record with a directory's whole path, to be found from any folder."""
    if Path(record.name).is_dir():
        return replace(record, name=str(Path(record.name).resolve()))
    return record
