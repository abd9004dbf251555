"""The output layer of a masked language model, taken from its checkpoint and kept beside the bank.

Models of this kind share one form: logits = W LayerNorm(act(A h + a)) + b, W mostly the input embeddings.
It is found in the model by its shapes, and believed only if it gives the model's own logits.
"""

from dataclasses import dataclass
from typing import Any

import safetensors.torch
import torch
from torch import Tensor, nn

from cache import EncoderRecord
from cache.layout import OUTPUT_LAYER
from cache.place import Place
from cache.tensors import CHECKSUM, tensors_checksum
from pipeline.checkpoint import in_short, silenced
from pipeline.errors import PipelineError
from pipeline.stack import ACTIVATIONS


@dataclass(frozen=True, kw_only=True)
class OutputLayer:
    """Its weights, in the layout of `pipeline.stack.Linear` (in, out), and what else decides it."""

    weights: dict[str, Tensor]
    activation: str
    eps: float

    @property
    def whole(self) -> bool:
        """Whether the checkpoint has the transform too, and not the embeddings alone."""
        return "transform.weight" in self.weights

    @property
    def vocabulary(self) -> int:
        """Tokens it scores."""
        return self.weights["projection.weight"].shape[1]

    def settings(self) -> dict[str, Any]:
        """What a decoder starts with."""
        return {
            "output_layer": OUTPUT_LAYER,
            "vocabulary": self.vocabulary,
            "inner": self.weights["projection.weight"].shape[0],
            "activation": self.activation,
            "eps": self.eps,
            "learn": "none" if self.whole else "transform",
        }

    @property
    def n_bytes(self) -> int:
        """Bytes of the weights."""
        return sum(weights.nbytes for weights in self.weights.values())

    def save(self, place: Place) -> None:
        """Writes the weights to where a bank lies, whole or not at all.

        Raises:
            CacheError: the place refused.
        """
        checksum = tensors_checksum({name: value.detach().numpy() for name, value in self.weights.items()})
        place.put_file(OUTPUT_LAYER, safetensors.torch.save(self.weights, metadata={CHECKSUM: checksum}))


def read_output_layer(encoder: EncoderRecord, *, flag: str = "--keep masked") -> OutputLayer:
    """The output layer of an encoder's checkpoint.

    Where the checkpoint has none, as that of a sentence encoder, it is the input embeddings alone: a head
    then learns the transform before them.

    Args:
        encoder: which one.
        flag: that asked for it, for the messages.

    Raises:
        PipelineError: the encoder is no masked language model, or one of another form.
    """
    name, revision = encoder.name, encoder.revision or "main"
    from transformers import AutoModelForMaskedLM

    try:
        with silenced():
            model, info = AutoModelForMaskedLM.from_pretrained(
                name, revision=revision, dtype=torch.float32, output_loading_info=True
            )
    except Exception as error:  # readers of weights raise classes of their own
        raise PipelineError(f"{flag}: {name} is no masked language model: {in_short(error)}") from error
    model.eval().requires_grad_(False)
    prefix = f"{model.base_model_prefix}."
    embeddings = model.get_input_embeddings().weight
    if any(not key.startswith(prefix) for key in info["missing_keys"]):
        weights = {"projection.weight": embeddings.T.contiguous()}
        return OutputLayer(weights=weights, activation="gelu", eps=1e-12)
    return _found(name, model, prefix, flag)


def _found(name: str, model: Any, prefix: str, flag: str) -> OutputLayer:
    """The output layer by its shapes, checked by its logits."""
    own = [module for key, module in model.named_modules() if not f"{key}.".startswith(prefix)]
    n_ids = model.get_input_embeddings().num_embeddings
    linears = [module for module in own if isinstance(module, nn.Linear)]
    projections = [module for module in linears if module.out_features == n_ids]
    transforms = [module for module in linears if module.out_features != n_ids]
    norms = [module for module in own if isinstance(module, nn.LayerNorm)]
    if (len(projections), len(transforms), len(norms)) == (1, 1, 1):
        projection, transform, norm = projections[0], transforms[0], norms[0]
        weights = {
            "transform.weight": transform.weight.T.contiguous(),
            "transform.bias": transform.bias[None].contiguous(),
            "norm.weight": norm.weight[None].contiguous(),
            "norm.bias": norm.bias[None].contiguous(),
            "projection.weight": projection.weight.T.contiguous(),
            "projection.bias": projection.bias[None].contiguous(),
        }
        ids = torch.arange(min(n_ids, 12))[None]
        given = model(input_ids=ids, output_hidden_states=True)
        for activation, function in ACTIVATIONS.items():
            x = function(transform(given.hidden_states[-1]))
            if torch.allclose(projection(norm(x)), given.logits, atol=1e-3, rtol=1e-4):
                return OutputLayer(weights=weights, activation=activation, eps=norm.eps)
    raise PipelineError(
        f"{flag}: the output layer of {name} is not of the form that is known (a product, an "
        "activation, a LayerNorm, a product): use an encoder such as BERT, RoBERTa, DistilBERT or ALBERT"
    )
