"""The stacked AdamW against torch's own on single heads; the schedule."""

from dataclasses import replace

import numpy as np
import pytest
import tiny
import torch
from torch import nn

from cache import Target
from pipeline import parts
from pipeline.head import Inputs, plan_head
from pipeline.job import HeadRates, Schedule, build_one, prepare
from pipeline.optimizer import StackedAdamW, linear_schedule
from pipeline.stack import Linear, stack, unstack
from pipeline.train import fit

LR, DECAY = [1e-3, 1e-2, 3e-4], [0.0, 0.1, 1.0]


class Two(nn.Module):
    """Two layers and a parameter that is not trained."""

    def __init__(self, seed):
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.first = Linear(5, 4, generator=generator)
        self.second = Linear(4, 2, generator=generator, bias=False)
        self.fixed = nn.Parameter(torch.full((1, 3), float(seed)), requires_grad=False)

    def forward(self, x):
        return self.second(self.first(x).tanh())


def batch(step):
    return torch.randn(1, 6, 5, generator=torch.Generator().manual_seed(step))


def loss(part, step):
    return part(batch(step)).square().mean((1, 2))


def scales():
    return [linear_schedule(s, n_steps=100, warmup_steps=15) for s in range(100)]


def test_each_head_is_updated_as_torch_updates_it_alone():
    alone = [Two(seed) for seed in range(3)]
    stacked = stack(alone)
    ours = StackedAdamW(stacked, lr=LR, weight_decay=DECAY)
    theirs = [
        torch.optim.AdamW(part.parameters(), lr=lr, weight_decay=decay)
        for part, lr, decay in zip(alone, LR, DECAY, strict=True)
    ]
    for step, scale in enumerate(scales()):
        ours.zero_grad()
        loss(stacked, step).sum().backward()
        ours.step(scale)
        for part, optimizer, lr in zip(alone, theirs, LR, strict=True):
            optimizer.param_groups[0]["lr"] = lr * scale
            optimizer.zero_grad()
            loss(part, step).sum().backward()
            optimizer.step()
    for k, part in enumerate(alone):
        for name, value in part.named_parameters():
            found = stacked.get_parameter(name)[k : k + 1]
            torch.testing.assert_close(found, value, rtol=0, atol=1e-6)


@pytest.mark.parametrize("lr", [LR, [1e-3] * 3], ids=["own rates", "shared rates"])
def test_only_trained_parameters_move_and_gradients_are_dropped(lr):
    stacked = stack([Two(seed) for seed in range(3)])
    before = [p.detach().clone() for p in stacked.parameters()]
    optimizer = StackedAdamW(stacked, lr=lr, weight_decay=[0.0] * 3)
    for old, parameter in zip(before, stacked.parameters(), strict=True):
        assert torch.equal(old, parameter)
    for step in range(3):
        optimizer.zero_grad()
        assert all(p.grad is None for p in stacked.parameters())
        loss(stacked, step).sum().backward()
        optimizer.step(1.0)
    for old, parameter in zip(before, stacked.parameters(), strict=True):
        for k in range(3):
            assert torch.equal(old[k], parameter[k]) != parameter.requires_grad


def test_shared_rates_update_as_own_rates_do():
    ways = [stack([Two(seed) for seed in range(3)]) for _ in range(2)]
    optimizers = [StackedAdamW(ways[0], lr=[1e-2] * 3, weight_decay=[0.1] * 3)]
    optimizers.append(StackedAdamW(ways[1], lr=[1e-2, 1e-2, 2e-2], weight_decay=[0.1] * 3))
    for step in range(5):
        for part, optimizer in zip(ways, optimizers, strict=True):
            optimizer.zero_grad()
            loss(part, step).sum().backward()
            optimizer.step(0.5)
    for shared, own in zip(*(part.parameters() for part in ways), strict=True):
        torch.testing.assert_close(shared[:2], own[:2], rtol=0, atol=1e-7)


def test_scale_zero_moves_nothing():
    stacked = stack([Two(0), Two(1)])
    optimizer = StackedAdamW(stacked, lr=[1.0, 1.0], weight_decay=[0.5, 0.5])
    before = [p.detach().clone() for p in stacked.parameters()]
    loss(stacked, 0).sum().backward()
    optimizer.step(0.0)
    for old, parameter in zip(before, stacked.parameters(), strict=True):
        assert torch.equal(old, parameter)


def test_stack_without_parameters_is_no_trouble():
    optimizer = StackedAdamW(nn.Identity(), lr=[1e-3, 1e-3], weight_decay=[0.0, 0.0])
    assert optimizer.parameters == []
    optimizer.zero_grad()
    optimizer.step(1.0)


@pytest.mark.parametrize(
    ("n_steps", "warmup_steps", "expected"),
    [
        (4, 0, [1.0, 0.75, 0.5, 0.25]),
        (4, 2, [0.5, 1.0, 1.0, 0.5]),
        (5, 1, [1.0, 1.0, 0.75, 0.5, 0.25]),
        (3, 3, [1 / 3, 2 / 3, 1.0]),
        (1, 0, [1.0]),
    ],
)
def test_schedule_rises_then_falls(n_steps, warmup_steps, expected):
    found = [linear_schedule(s, n_steps=n_steps, warmup_steps=warmup_steps) for s in range(n_steps)]
    assert found == pytest.approx(expected)


RATES = [
    HeadRates(seed=5, lr=3e-3, weight_decay=0.0),
    HeadRates(seed=6, lr=1e-3, weight_decay=0.3),
    HeadRates(seed=7, lr=1e-2, weight_decay=0.01),
    HeadRates(seed=7, lr=2e-3, weight_decay=0.01),
]
SIXTEEN = [replace(rate, seed=rate.seed + 10 * k) for k in range(4) for rate in RATES]
CHOSEN = 9  # of the sixteen
DECODERS = {
    "classifier": ("label", {"dropout": 0.2}),
    "tagger": ("tags", {"dropout": 0.1}),
    "tagger, crf": ("tags", {"crf": True}),
    "regressor": ("value", {"pooling": "mean"}),
}


def fitting(fusion):
    """Values of the hyper-parameters without a default, and small ones for the large."""
    return {
        "single_layer": {"layer": 2},
        "transformer": {"n": 1},
        "mixture": {"random_sources": 3},
    }.get(fusion, {})


def parameters(head):
    """All values in a row, but for biases whose true gradient is 0: they follow rounding alone.

    Those of keys, and the last of scores that a softmax over tokens takes.
    """
    idle = ""
    if head.decoder.target_kind in ("span", "choice"):
        idle = f"decoder.scorer.products.{len(head.decoder.scorer.products) - 1}.bias"
    found = []
    for name, value in head.named_parameters():
        value = value.detach()
        kept = value.chunk(2, -1)[1] if name.endswith("key_value.bias") else value
        found += [kept.flatten()] if name != idle else []
    return torch.cat(found)


def off(together, alone):
    """How far the weights of a head are off those of another, relative to these."""
    values = [parameters(head) for head in (together, alone)]
    return (values[0] - values[1]).norm() / values[1].norm()


@pytest.mark.parametrize("decoder", DECODERS)
@pytest.mark.parametrize("fusion", parts.names("fusion"))
def test_head_in_a_stack_of_sixteen_trains_as_it_does_alone(fusion, decoder):
    target, options = DECODERS[decoder]
    bank = tiny.shared(sizes=(("train", 60), ("dev", 20)))
    job = prepare(bank, target, fusion=fusion, options={"hidden": 12, **options, **fitting(fusion)})
    schedule = Schedule(epochs=5, batch_size=6, dev_epochs=(5,))  # 50 steps
    together, alone = fit(job, SIXTEEN, schedule)[CHOSEN], fit(job, SIXTEEN[CHOSEN:][:1], schedule)[0]
    losses = [[line.loss for line in trained.epochs] for trained in (together, alone)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
    assert off(together.head, alone.head) <= 1e-5


LENGTHS = torch.tensor([5, 3, 6, 4, 7, 2])
ENDS = LENGTHS.cumsum(0) - 1
FURTHER = {  # kind of target, options, labels of examples of those lengths
    "span": (
        "span",
        {"layers": "mlp", "hidden": 12, "dropout": 0.1},
        torch.stack([torch.ones_like(LENGTHS), LENGTHS - 1], 1),
    ),
    "choice": (
        "choice",
        {"hidden": 12, "dropout": 0.1},
        torch.zeros(int(LENGTHS.sum()), dtype=torch.long).index_fill(0, ENDS, 1),
    ),
    "masked_lm": ("token", {"learn": "all", "dropout": 0.1}, torch.arange(int(LENGTHS.sum())) % 5),
}


def trained_on_random_states(spec, rates):
    """Heads of some rates after 50 steps, as `fit` takes them, on states that no bank is needed for."""
    heads = stack([build_one(spec, rate) for rate in rates]).train()
    decays = [rate.weight_decay for rate in rates]
    optimizer = StackedAdamW(heads, lr=[rate.lr for rate in rates], weight_decay=decays)
    labels = FURTHER[spec.decoder][2]
    generator = torch.Generator().manual_seed(3)
    for step in range(50):
        states = torch.randn(len(spec.layers), int(LENGTHS.sum()), spec.width, generator=generator)
        scores = heads(Inputs(states=states, lengths=LENGTHS, decoded=None, decoded_lengths=LENGTHS))
        optimizer.zero_grad()
        heads.decoder.loss(scores, labels, LENGTHS).sum().backward()
        optimizer.step(Schedule(epochs=1).scale(step, steps=50))
    return heads


@pytest.mark.parametrize("decoder", FURTHER)
@pytest.mark.parametrize("fusion", parts.names("fusion"))
def test_head_of_a_further_decoder_trains_in_a_stack_as_alone(fusion, decoder):
    kind, options, _ = FURTHER[decoder]
    settings = {"vocabulary": 5} if kind == "token" else {}
    target = Target(name="t", kind=kind, names=(), values=np.empty(0, np.int32), settings=settings)
    options = {**options, **fitting(fusion)}
    spec = plan_head(
        fusion=fusion, decoder=None, target=target, kept=range(4), last=3, width=8, options=options
    )
    together = trained_on_random_states(spec, SIXTEEN)
    alone = trained_on_random_states(spec, SIXTEEN[CHOSEN:][:1])
    assert off(unstack(together, CHOSEN), alone) <= 1e-5


def test_every_decoder_is_among_those_that_train_in_a_stack():
    named = {name.partition(",")[0] for name in (*DECODERS, *FURTHER)}
    assert named == set(parts.names("decoder"))


def test_same_seed_another_rate_is_another_head():
    job = prepare(tiny.shared(), "label", fusion="attention")
    a, b = (t.head.state_dict() for t in fit(job, RATES[2:], Schedule(epochs=1)))
    assert not any(torch.equal(a[name], b[name]) for name in a)


def test_plan_and_prepare_agree():
    bank = tiny.shared()
    job = prepare(bank, "tags", fusion="linear")
    spec = plan_head(
        fusion="linear", decoder=None, target=job.target, kept=bank.recipe.layers, last=3, width=8
    )
    assert job.spec == spec
