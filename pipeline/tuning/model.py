"""A backbone, a method and the heads of its tasks as one module: batch in; loss or predictions out."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from pipeline.early_fusion._base import Method
from pipeline.head import Head, Inputs
from pipeline.tuning.backbone import Backbone
from pipeline.tuning.batches import Batch, Part
from pipeline.tuning.wording import Wording


class Tuned(nn.Module):
    """What is trained.

    Args:
        backbone: the model and how it is fed.
        method: what is trained of it and added to it.
        heads: one a task; none from text to text.
        layers: for each head, the layers it reads.
        wordings: for each task, how its labels are said; from text to text only.
    """

    def __init__(
        self,
        backbone: Backbone,
        method: Method,
        heads: Sequence[Head] = (),
        layers: Sequence[tuple[int, ...]] = (),
        wordings: Sequence[Wording] = (),
    ) -> None:
        super().__init__()
        self.backbone = backbone
        self.model: Any = backbone.model
        self.method = method
        self.heads = nn.ModuleList(heads)
        self.layers = layers
        self.wordings = wordings

    @property
    def device(self) -> torch.device:
        """Where it computes."""
        return self.backbone.model.get_input_embeddings().weight.device

    def forward(self, batch: Batch) -> Tensor:
        """The loss of a batch: each task's mean loss by its share, and the method's penalty."""
        batch = moved(batch, self.device)
        loss = self._text_loss(batch) if self.backbone.text_to_text else self._head_loss(batch)
        penalty = self.method.penalty()
        return loss if penalty is None else loss + penalty * batch.penalty_share

    def _head_loss(self, batch: Batch) -> Tensor:
        states = self._states(batch)
        losses = []
        for part in batch.parts:
            head: Any = self.heads[part.task]
            inputs = self._read(states, part)
            loss = head.decoder.loss(head(inputs).float(), part.labels, inputs.decoded_lengths)
            losses.append(loss.sum() * part.share)
        return torch.stack(losses).sum()

    def _text_loss(self, batch: Batch) -> Tensor:
        inputs = self.inputs(batch)
        scores = self.method.call(self.model, {**inputs, "labels": batch.answers}).logits
        assert batch.answers is not None
        assert batch.weights is not None
        losses = nn.functional.cross_entropy(
            scores.float().transpose(1, 2), batch.answers, ignore_index=-100, reduction="none"
        )
        # The mean over an answer's tokens: a class of long name weighs no more than others.
        return (losses.sum(1) / (batch.answers >= 0).sum(1).clamp(min=1) * batch.weights).sum()

    def inputs(self, batch: Batch) -> dict[str, Any]:
        """What the model reads: ids, or embeddings with the soft tokens among them."""
        inputs: dict[str, Any] = {"attention_mask": batch.mask.long()}
        if batch.types is not None:
            inputs["token_type_ids"] = batch.types
        if not self.method.n_slots:
            return {**inputs, "input_ids": batch.ids}
        embedded = self.model.get_input_embeddings()(batch.ids)
        slots = self.method.slots(embedded, batch.mask, batch.tasks)
        assert slots is not None
        at = self.backbone.slot_at
        inputs["inputs_embeds"] = torch.cat([embedded[:, :at], slots.to(embedded), embedded[:, at:]], 1)
        for name, value in (("attention_mask", 1), ("token_type_ids", 0)):
            if name in inputs:
                known = inputs[name]
                filled = known.new_full((len(known), slots.shape[1]), value)
                inputs[name] = torch.cat([known[:, :at], filled, known[:, at:]], 1)
        return inputs

    def _states(self, batch: Batch) -> dict[int, Float[Tensor, "place width"]]:
        """States of the layers that a head reads, flat over the padded batch with its soft tokens."""
        layers = sorted({layer for part in batch.parts for layer in self.layers[part.task]})
        last = self.backbone.record.n_layers - 1
        inputs = self.inputs(batch)
        found = self.method.call(self.model, {**inputs, "output_hidden_states": layers != [last]})
        states = found.hidden_states if layers != [last] else {last: found.last_hidden_state}
        return {layer: states[layer].flatten(0, 1).float() for layer in layers}

    def _read(self, states: Mapping[int, Tensor], part: Part) -> Inputs:
        """The inputs of one task's head: the tokens it reads, of its layers, without padding."""
        assert part.inputs is not None
        chosen = [states[layer].index_select(0, part.places) for layer in self.layers[part.task]]
        return replace(part.inputs, states=torch.stack(chosen))

    @torch.no_grad()
    def predict(self, batch: Batch) -> list[tuple[Part, Tensor]]:
        """What the scores look at for the units of each part."""
        batch = moved(batch, self.device)
        states = self._states(batch)
        found = []
        for part in batch.parts:
            head: Any = self.heads[part.task]
            inputs = self._read(states, part)
            outcome = head.decoder.outcome(head(inputs).float(), part.labels, inputs.decoded_lengths)
            found.append((part, outcome[0].cpu()))
        return found

    @torch.no_grad()
    def say(self, batch: Batch) -> list[str]:
        """What is generated, greedily, for each example of one task; from text to text."""
        batch = moved(batch, self.device)
        inputs = self.inputs(batch)
        made = self.model.generate(
            encoder_outputs=self.model.get_encoder()(**inputs),
            attention_mask=inputs["attention_mask"],
            max_new_tokens=self.wordings[batch.parts[0].task].longest,
            do_sample=False,
            num_beams=1,
        )
        texts: list[str] = self.backbone.tokenizer.batch_decode(made, skip_special_tokens=True)
        return texts


def moved(value: Any, device: torch.device) -> Any:
    """A batch on a device."""
    if isinstance(value, Tensor):
        return value.to(device, non_blocking=True)
    if isinstance(value, tuple):
        return tuple(moved(entry, device) for entry in value)
    if hasattr(value, "__dataclass_fields__"):
        fields = {name: moved(getattr(value, name), device) for name in value.__dataclass_fields__}
        return replace(value, **fields)
    return value
