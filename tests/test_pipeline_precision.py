"""The precision of the forward, and forwards that end where no further layer is wanted."""

import numpy as np
import pytest
import torch
from encoders import FAMILIES, SENTENCES, tiny_encoder
from torch import nn

from pipeline import precision as module
from pipeline.capture import find_blocks
from pipeline.encoder import Encoder, PrecisionError, open_encoder
from pipeline.errors import PipelineError
from pipeline.precision import forward_precision
from pipeline.tokens import tokenize

CPU = torch.device("cpu")
SHARED = {"albert"}
"""Families that run one block several times: there is no list of blocks to stop in."""


def states_of(encoder, layers):
    tokens = tokenize(encoder.tokenizer, [(list(SENTENCES), None)], max_length=30)
    out = torch.zeros(len(layers), len(tokens.input_ids), encoder.record.width)
    encoder.encode(
        tokens,
        np.arange(len(SENTENCES)),
        kept=tokens.kept("all"),
        layers=layers,
        start=tokens.start[:-1],
        out=out,
        budget_tokens=64,
    )
    return out


@pytest.mark.parametrize("family", FAMILIES)
def test_layers_past_the_last_one_kept_are_not_computed(family):
    encoder = Encoder(tiny_encoder(family), device="cpu")
    whole = states_of(encoder, (0, 1, 2))
    assert (encoder._blocks == ()) == (family in SHARED)
    ran = []
    for k, block in enumerate(encoder._blocks):
        block.register_forward_hook(lambda *_, k=k: ran.append(k))
    for layers in ((0,), (1,), (0, 1), (2,), (0, 2)):
        ran.clear()
        assert torch.equal(states_of(encoder, layers), whole[list(layers)])
        assert set(ran) == set(range(max(layers))) or family in SHARED


def test_a_list_of_other_modules_is_not_taken_for_the_blocks():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.others = nn.ModuleList(nn.Linear(3, 3) for _ in range(2))
            self.blocks = nn.ModuleList(nn.Linear(3, 3) for _ in range(2))

        def forward(self, x):
            self.others[0](x + 1)
            states = [x]
            for block in self.blocks:
                states.append(block(states[-1]))
            return states

    model, x = Model(), torch.randn(2, 3)
    assert find_blocks(model, {"x": x}, model(x)) == tuple(model.blocks)


@pytest.mark.parametrize("family", sorted({*FAMILIES} - {"deberta"}))
def test_bfloat16_products_leave_the_sums_in_float32(family):
    exact = Encoder(tiny_encoder(family), device="cpu")
    short = Encoder(tiny_encoder(family), device="cpu", precision="bfloat16")
    assert short.record.weights_sha256 == exact.record.weights_sha256
    one, other = states_of(exact, (0, 1, 2)), states_of(short, (0, 1, 2))
    error = (other - one).norm(dim=(1, 2)) / one.norm(dim=(1, 2))
    assert error[0] == 0
    # A product of bfloat16 numbers is off by 2^-9 or so; the tiny encoders have large weights.
    assert (error[1:] > 1e-4).all()
    assert (error < 0.03).all()
    # Not rounded once more: a state of the last layer is no bfloat16 number.
    assert (other[2] != other[2].bfloat16().float()).float().mean() > 0.9


def test_an_encoder_that_does_not_compute_in_it_says_so_and_auto_goes_back_to_float32(monkeypatch):
    with pytest.raises(PrecisionError, match=r"--precision bfloat16: .* does not compute in it"):
        open_encoder(tiny_encoder("deberta"), precision="bfloat16", device="cpu")
    monkeypatch.setattr(module, "is_fast", lambda *_: True)
    assert open_encoder(tiny_encoder("deberta"), device="cpu").precision == "float32"
    assert open_encoder(tiny_encoder(), device="cpu").precision == "bfloat16"


def test_auto_asks_the_device(monkeypatch):
    for units, wanted in (({"avx512_bf16": True}, "bfloat16"), ({"avx512_bf16": False}, "float32")):
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda units=units: units, raising=False)
        assert forward_precision("auto", CPU) == wanted
    monkeypatch.delattr(torch.cpu, "get_capabilities")
    assert forward_precision("auto", CPU) == "float32"
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (7, 5))
    assert forward_precision("auto", torch.device("cuda")) == "float32"
    assert forward_precision("float16", torch.device("cuda")) == "float16"
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (8, 0))
    assert forward_precision("auto", torch.device("cuda")) == "bfloat16"


def test_float16_is_refused_where_the_device_has_no_units_for_it(monkeypatch):
    monkeypatch.setattr(module, "is_fast", lambda *_: False)
    with pytest.raises(PipelineError, match="--precision float16: cpu has no units for it"):
        forward_precision("float16", CPU)
    assert forward_precision("bfloat16", CPU) == "bfloat16"
