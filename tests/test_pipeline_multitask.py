"""Several tasks together: mixed batches, the gradient of what they share, what is kept."""

import numpy as np
import pytest
import tiny
import torch
from hypothesis import given
from hypothesis import strategies as st

from pipeline.errors import PipelineError
from pipeline.head import Head
from pipeline.job import HeadRates, Schedule, prepare
from pipeline.multitask import TaskFitting, deal, fit_tasks
from pipeline.train import fit

RATES = HeadRates(lr=1e-2)
SOURCES = {"random_sources": 3, "size": 4, "temperature": -2.0}
"""With a temperature at which the shares of the sources differ."""


def job(learns="label", **options):
    return prepare(tiny.shared(), learns, fusion="mixture", options={**SOURCES, **options})


def jobs(*targets, **options):
    return {target: job(target, **options) for target in targets}


def first_batches(fitting, sizes):
    """For each task a batch of some size, none for 0."""
    feeds = [one.train.feed for one in fitting.jobs]
    return [
        next(feed.batches(feed.order(seed=k, epoch=1), batch_size=size)) if size else None
        for k, (feed, size) in enumerate(zip(feeds, sizes, strict=True))
    ]


def shake(fitting):
    """Sources as long as trained ones: the network's gradient is then no rounding error."""
    generator = torch.Generator().manual_seed(3)
    sources = torch.randn(1, 3, tiny.WIDTH, generator=generator)
    for head in fitting.heads:
        head.fusion.sources.copy_(sources)


def plain_loss(head: Head, states, lengths, labels, network):
    """The loss of a linear classifier on [CLS] over `mixture`, by the equations, an example at a time."""
    down, up, scale, shift = network
    sources, query = head.fusion.sources[0], head.fusion.query[0].detach()
    [(weight, bias)] = [
        (m.weight[0].detach(), m.bias[0, 0].detach()) for m in head.decoder.modules() if hasattr(m, "bias")
    ]
    losses = []
    for example, label in zip(torch.split(states, lengths.tolist(), 1), labels, strict=True):
        if label < 0:
            continue
        pooled = example[0].max(0).values @ down
        hidden = (pooled * torch.sigmoid(pooled)) @ up
        hidden = (hidden - hidden.mean()) / (hidden.var(unbiased=False) + 1e-5).sqrt() * scale + shift
        scores = sources @ hidden / (tiny.WIDTH * np.exp(SOURCES["temperature"]))
        mixed = query + scores.exp() / scores.exp().sum() @ sources
        first = example[:, 0]
        weights = (first @ mixed).exp()
        fused = weights / weights.sum() @ first
        losses.append(-(fused @ weight + bias).log_softmax(0)[label])
    return torch.stack(losses).mean()


def network_of(head):
    mixer = head.fusion.mixer
    return [mixer.down.weight, mixer.up.weight, mixer.norm.weight, mixer.norm.bias]


def test_gradient_of_the_network_is_the_sum_of_the_tasks_gradients():
    fitting = TaskFitting(
        {"a": job(layers="linear"), "b": job(layers="linear"), "c": job("value", layers="linear")},
        RATES,
        Schedule(),
    )
    shake(fitting)
    sizes = (12, 5, 0)
    batches = first_batches(fitting, sizes)
    losses, loss = fitting.losses(batches)
    loss.backward()
    network = [
        p.detach()[0].flatten(0, -2).squeeze(0).clone().requires_grad_()
        for p in network_of(fitting.heads[0])
    ]
    expected = [torch.zeros_like(p) for p in network]
    for head, one, batch, own, size in zip(
        fitting.heads, fitting.jobs, batches, losses, sizes, strict=True
    ):
        if batch is None:
            assert own == 0
            continue
        inputs, labels, _ = one.train.of(batch)
        plain = plain_loss(head, inputs.states, inputs.lengths, labels, network)
        torch.testing.assert_close(own, plain)
        for total, gradient in zip(expected, torch.autograd.grad(plain, network), strict=True):
            total += size / sum(sizes) * gradient
    for parameter, gradient in zip(network_of(fitting.heads[0]), expected, strict=True):
        assert gradient.abs().max() > 1e-5
        torch.testing.assert_close(parameter.grad.reshape(gradient.shape), gradient, rtol=1e-4, atol=1e-7)


def test_a_task_that_is_not_in_a_batch_keeps_what_is_its_own():
    fitting = TaskFitting(jobs("label", "value"), RATES, Schedule())
    shake(fitting)
    before = [{n: v.clone() for n, v in head.state_dict().items()} for head in fitting.heads]
    losses, loss = fitting.step(first_batches(fitting, (8, 0)), 1.0)
    assert losses[1] == 0
    assert losses[0] == loss
    moved = [
        {n for n, v in head.state_dict().items() if not torch.equal(v, old[n])}
        for head, old in zip(fitting.heads, before, strict=True)
    ]
    assert moved[1] == {n for n in moved[0] if n.startswith("fusion.mixer.")} != set()
    assert "fusion.query" in moved[0]


def test_a_neighbour_without_examples_in_the_batch_changes_no_gradient():
    both, alone = (
        TaskFitting(jobs(*names), RATES, Schedule()) for names in (("label", "value"), ("label",))
    )
    for fitting, sizes in ((both, (8, 0)), (alone, (8,))):
        fitting.losses(first_batches(fitting, sizes))[1].backward()
    pairs = zip(both.heads[0].parameters(), alone.heads[0].parameters(), strict=True)
    assert all(torch.equal(a.grad, b.grad) for a, b in pairs)


def test_one_task_is_trained_as_a_stack_of_one_is():
    schedule = Schedule(epochs=3, batch_size=16, data_seed=5)
    [alone] = fit(job(), [RATES], schedule)
    together = fit_tasks({"only": job()}, RATES, schedule).tasks["only"]
    assert together.best_epoch == alone.best_epoch
    for mine, other in zip(together.epochs, alone.epochs, strict=True):
        assert (mine.epoch, mine.dev, mine.lr) == (other.epoch, other.dev, other.lr)
        assert mine.loss == pytest.approx(other.loss, rel=1e-5)
    pairs = zip(together.head.state_dict().values(), alone.head.state_dict().values(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)


def networks(found):
    states = [trained.head.state_dict() for trained in found.tasks.values()]
    return [{n: v for n, v in state.items() if n.startswith("fusion.mixer.")} for state in states]


def test_all_tasks_are_learned_and_the_network_is_one():
    found = fit_tasks(jobs("label", "tags", "value"), RATES, Schedule(epochs=4, batch_size=16))
    assert found.shared_parameters == 2 * 4 * tiny.WIDTH + 2 * tiny.WIDTH
    scores = {name: trained.dev for name, trained in found.tasks.items()}
    assert scores["label"] > 85
    assert scores["tags"] > 60
    assert scores["value"] > 70
    assert found.dev == pytest.approx(np.mean(list(scores.values())))
    first, *others = networks(found)
    assert first
    assert all(torch.equal(first[name], other[name]) for other in others for name in first)
    queries = [trained.head.fusion.query for trained in found.tasks.values()]
    assert not torch.equal(queries[0], queries[1])


@pytest.mark.parametrize(
    ("options", "shared"),
    [({"target": False}, 10 * tiny.WIDTH), ({"attention": False}, 0), ({"random_sources": 1}, 0)],
)
def test_ablations_share_the_network_where_there_is_one(options, shared):
    found = fit_tasks(jobs("label", "value", **options), RATES, Schedule(epochs=1, batch_size=60))
    assert found.shared_parameters == shared
    first, second = networks(found)
    assert bool(first) == bool(shared)
    assert all(torch.equal(first[name], second[name]) for name in first)
    queries = [trained.head.fusion.query for trained in found.tasks.values()]
    assert [query is None for query in queries] == 2 * [not options.get("target", True)]


def test_epoch_kept_is_the_best_on_average(monkeypatch):
    waiting = iter([90.0, 10.0, 60.0, 60.0, 10.0, 90.0])
    monkeypatch.setattr(
        "pipeline.metrics.report",
        lambda **_: {
            m: np.array([s]) for s in [next(waiting)] for m in ("accuracy", "spearman", "pearson")
        },
    )
    shown = []
    found = fit_tasks(
        jobs("label", "value"),
        RATES,
        Schedule(epochs=3),
        lambda epoch, lines: shown.append((epoch, *lines)),
    )
    assert found.best_epoch == 2
    assert found.dev == 60
    assert [line.dev["mean"] for _, line in shown] == [50, 60, 50]
    assert shown[0][1].dev["label.accuracy"] == 90
    assert [trained.dev for trained in found.tasks.values()] == [60, 60]


def test_result_does_not_depend_on_memory_and_repeats():
    def run(memory):
        from pipeline.batches import Feeds

        feeds = Feeds(memory_bytes=memory)
        found = {
            name: prepare(tiny.shared(), name, fusion="mixture", options=SOURCES, feeds=feeds)
            for name in ("label", "tags")
        }
        return fit_tasks(found, RATES, Schedule(epochs=1, batch_size=14))

    held, streamed = run(2**30), run(0)
    for name in held.tasks:
        a, b = (one.tasks[name].head.state_dict() for one in (held, streamed))
        assert all(torch.equal(a[n], b[n]) for n in a)


def test_a_loss_that_is_not_finite_is_an_error():
    with pytest.raises(PipelineError, match=r"NaN or infinite at step .*lower --lr"):
        fit_tasks(jobs("label", "value"), HeadRates(lr=1e30), Schedule(epochs=3, warmup_frac=0.0))


@given(
    counts=st.lists(st.integers(1, 40), min_size=1, max_size=4),
    size=st.integers(1, 50),
    epoch=st.integers(1, 9),
)
def test_every_example_is_dealt_once_an_epoch(counts, size, epoch):
    dealt = deal(counts, size, seed=0, epoch=epoch)
    assert dealt.sum(0).tolist() == counts
    *whole, last = dealt.sum(1).tolist()
    assert set(whole) <= {size}
    assert 1 <= last <= size


def test_batches_mix_the_tasks_by_their_sizes():
    dealt = deal([3000, 1000], 32, seed=0, epoch=1)
    assert (dealt > 0).all(1).mean() > 0.99
    assert np.abs(dealt[:, 0].mean() - 24) < 0.5
    assert not np.array_equal(dealt, deal([3000, 1000], 32, seed=0, epoch=2))
