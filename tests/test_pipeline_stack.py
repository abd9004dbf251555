"""The head axis: N heads as one give what each gives alone."""

import math

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from pipeline.stack import Dropout, LayerNorm, Linear, in_a_row, normal, stack, uniform, unstack


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def linears(count, n_in=5, n_out=3, **options):
    return [Linear(n_in, n_out, generator=generator(seed), **options) for seed in range(count)]


def test_linear_equals_torchs():
    ours = linears(1)[0]
    theirs = nn.Linear(5, 3)
    theirs.load_state_dict({"weight": ours.weight[0].T, "bias": ours.bias[0, 0]})
    x = torch.randn(7, 5, generator=generator())
    torch.testing.assert_close(ours(x[None])[0], theirs(x))


def test_linear_starts_like_torchs():
    ours = Linear(400, 300, generator=generator())
    bound = 1 / math.sqrt(400)
    theirs = nn.Linear(400, 300)
    for mine, other in ((ours.weight, theirs.weight), (ours.bias, theirs.bias)):
        assert mine.abs().max() <= bound
        assert other.abs().max() <= bound
        assert mine.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.1)
        assert other.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.1)
        assert mine.mean().abs() < 0.1 * bound


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("count", [1, 2, 4])
@pytest.mark.parametrize("rows", [6, 0])
def test_linear_on_shared_rows_equals_each_head_and_the_copied_rows(count, bias, rows):
    alone = linears(count, bias=bias)
    joined = stack(alone)
    x = torch.randn(1, rows, 5, generator=generator())
    expected = torch.cat([linear(x) for linear in alone])
    torch.testing.assert_close(joined(x), expected, atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(joined(x.repeat(count, 1, 1)), expected, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("shared", [True, False])
def test_linear_gradients_of_a_stack_are_those_of_each_head(shared):
    alone = linears(3)
    joined = stack(alone)
    x = torch.randn(1 if shared else 3, 6, 5, generator=generator())
    joined(x).square().sum().backward()
    for head, linear in enumerate(alone):
        linear(x if shared else x[head : head + 1]).square().sum().backward()
        torch.testing.assert_close(joined.weight.grad[head], linear.weight.grad[0])
        torch.testing.assert_close(joined.bias.grad[head], linear.bias.grad[0])


@pytest.mark.parametrize("count", [1, 3])
def test_layer_norm_equals_torchs_for_every_head(count):
    alone = []
    for seed in range(count):
        norm = LayerNorm(5)
        nn.init.normal_(norm.weight, generator=generator(seed))
        nn.init.normal_(norm.bias, generator=generator(seed + 10))
        alone.append(norm)
    joined = stack(alone)
    x = torch.randn(count, 6, 5, generator=generator())
    for head, norm in enumerate(alone):
        expected = nn.functional.layer_norm(x[head], (5,), norm.weight[0, 0], norm.bias[0, 0])
        torch.testing.assert_close(joined(x)[head], expected)


def test_dropout_masks_of_a_head_do_not_depend_on_its_company():
    x = torch.ones(1, 20, 10)
    steps = {}
    for heads in ([7], [3, 7], [7, 3, 5]):
        joined = stack([Dropout(0.3, seed=seed) for seed in heads])
        steps[len(heads)] = [joined(x)[heads.index(7)] for _ in range(3)]
    for step in range(3):
        assert torch.equal(steps[1][step], steps[2][step])
        assert torch.equal(steps[1][step], steps[3][step])
    assert not torch.equal(steps[1][0], steps[1][1])


def test_dropout_keeps_the_mean_and_each_heads_own_rate():
    joined = stack([Dropout(rate, seed=seed) for seed, rate in enumerate((0.0, 0.1, 0.5))])
    y = joined(torch.ones(1, 200, 100))
    assert y.mean((1, 2)).tolist() == pytest.approx([1, 1, 1], abs=0.02)
    assert (y == 0).float().mean((1, 2)).tolist() == pytest.approx([0, 0.1, 0.5], abs=0.02)


def test_dropout_returns_its_input_where_there_is_nothing_to_drop():
    x = torch.ones(1, 2, 3)
    assert Dropout(0.5, seed=0).eval()(x) is x
    assert Dropout(0.0, seed=0)(x) is x


@pytest.mark.parametrize("count", [1, 2])
def test_stacking_and_unstacking_put_dropout_streams_back_to_their_start(count):
    x = torch.ones(1, 20, 10)
    first = Dropout(0.5, seed=0)(x)
    used = [Dropout(0.5, seed=seed) for seed in range(count)]
    for dropout in used:
        dropout(x)
    joined = stack(used)
    assert torch.equal(joined(x)[:1], first)
    assert torch.equal(unstack(joined, 0)(x), first)


class Nest(nn.Module):
    """A part with all that a part can have."""

    def __init__(self, seed):
        super().__init__()
        self.frozen = nn.Parameter(torch.full((1, 2), float(seed)), requires_grad=False)
        self.inner = nn.Sequential(Linear(5, 3, generator=generator(seed)), Dropout(0.1 * seed, seed=seed))
        self.register_buffer("table", torch.full((1, 4), float(seed)))
        self.register_buffer("nothing", None)


def test_unstack_gives_back_what_was_stacked():
    alone = [Nest(seed) for seed in range(3)]
    joined = stack(alone)
    assert joined.table.shape == (3, 4)
    assert joined.nothing is None
    assert not joined.frozen.requires_grad
    for head, part in enumerate(alone):
        taken = unstack(joined, head)
        assert not taken.frozen.requires_grad
        assert taken.inner[1].seeds == [head]
        assert taken.inner[1].rates == [0.1 * head]
        assert taken.state_dict().keys() == part.state_dict().keys()
        for key, value in part.state_dict().items():
            assert torch.equal(taken.state_dict()[key], value)


def test_stack_and_unstack_share_no_memory_with_what_they_came_from():
    alone = [Nest(1)]
    joined = stack(alone)
    taken = unstack(joined, 0)
    with torch.no_grad():
        for tensor in [*joined.parameters(), *joined.buffers()]:
            tensor.fill_(9.0)
    for part in (alone[0], taken):
        assert not any((t == 9.0).any() for t in [*part.parameters(), *part.buffers()])


def test_stacks_of_stacks_are_stacks():
    alone = linears(3)
    twice = stack([stack(alone[:2]), alone[2]])
    assert torch.equal(twice.weight, stack(alone).weight)


def test_an_empty_stack_is_an_error():
    with pytest.raises(ValueError, match="at least one"):
        stack([])


def test_stacking_parts_of_different_structure_is_an_error():
    with pytest.raises(ValueError, match="zip"):
        stack([linears(1)[0], linears(1, bias=False)[0]])


def test_starting_values_come_from_the_generator_with_a_head_axis():
    assert uniform((2, 3), 0.1, generator()).shape == (1, 2, 3)
    assert torch.equal(normal((4,), 0.1, generator(1)), normal((4,), 0.1, generator(1)))
    assert not torch.equal(normal((4,), 0.1, generator(1)), normal((4,), 0.1, generator(2)))


def flops(call):
    with FlopCounterMode(display=False) as counted:
        call()
    return counted.get_total_flops()


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("count", [1, 3])
@pytest.mark.parametrize("rows", [2, 200])
def test_two_layers_in_a_row_are_one_after_the_other_and_never_cost_more(rows, count, bias):
    first = stack(linears(count, 90, 60, bias=bias)).double()
    second = stack(linears(count, 60, 3)).double()
    x = torch.randn(1, rows, 90, generator=generator(), dtype=torch.float64)
    parameters = [*first.parameters(), *second.parameters()]
    found, expected = in_a_row(x, first, second), second(first(x))
    torch.testing.assert_close(found, expected)
    weights = torch.randn(expected.shape, generator=generator(1), dtype=torch.float64)
    slopes = [torch.autograd.grad((y * weights).sum(), parameters) for y in (found, expected)]
    torch.testing.assert_close(*slopes)
    cost, plain = flops(lambda: in_a_row(x, first, second)), flops(lambda: second(first(x)))
    assert cost == plain if rows == 2 else cost < plain / 2
