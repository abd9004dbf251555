import importlib
import itertools
from pathlib import Path
from typing import get_args

import numpy as np
import pytest
import torch
import torchcrf
from hypothesis import given, settings
from hypothesis import strategies as st

import pipeline.decoders
from cache.targets import TargetKind
from pipeline import metrics
from pipeline.decoders import _base
from pipeline.decoders._base import Decoder, pool
from pipeline.decoders.regressor import Regressor
from pipeline.decoders.tagger import CRF, Tagger
from pipeline.stack import stack, unstack

NAMES = sorted(p.stem for p in Path(pipeline.decoders.__file__).parent.glob("[a-z]*.py"))
CASES = [(name, {}) for name in NAMES] + [
    ("classifier", {"pooling": "mean"}),
    ("classifier", {"pooling": "max", "layers": "linear"}),
    ("regressor", {"pooling": "mean"}),
    ("tagger", {"layers": "linear"}),
    ("tagger", {"crf": True}),
    ("span", {"layers": "mlp", "longest": 2}),
    ("choice", {"layers": "linear"}),
]
WIDTH = 8
BY_TOKEN = ("tags", "choice", "token")
"""Kinds of targets whose units are tokens of an example and not examples."""

each_case = pytest.mark.parametrize(("name", "options"), CASES, ids=lambda x: str(x))


def test_all_know_the_same_kinds_of_targets():
    # No part imports `cache`, so the decoders have a list of their own.
    assert get_args(_base.TargetKind) == get_args(TargetKind) == tuple(metrics.METRICS)


def build(name, options, seed=0, **more):
    decoder_class = importlib.import_module(f"pipeline.decoders.{name}").DECODER
    n_classes = 1 if decoder_class.target_kind == "float" else 5
    generator = torch.Generator().manual_seed(seed)
    return decoder_class(
        width=WIDTH, n_classes=n_classes, generator=generator, seed=seed, **options, **more
    )


def batch(decoder, heads=1, lengths=(3, 0, 1, 5)):
    """Vectors, lengths and labels of a few examples, one of them empty, for any decoder."""
    generator = torch.Generator().manual_seed(7)
    lengths = torch.tensor(lengths)
    if decoder.tokens == "first":
        lengths = lengths.clamp(max=1)
    fused = torch.randn(heads, int(lengths.sum()), WIDTH, generator=generator)
    n_units = int(lengths.sum()) if decoder.target_kind in BY_TOKEN else len(lengths)
    if decoder.target_kind == "float":
        return fused, lengths, torch.randn(n_units, generator=generator)
    if decoder.target_kind == "span":
        ends = torch.rand(n_units, 2, generator=generator) * lengths[:, None]
        return fused, lengths, torch.where(lengths[:, None] > 0, ends.long().sort(1).values, -1)
    if decoder.target_kind == "choice":
        labels = torch.zeros(n_units, dtype=torch.long)
        labels[(lengths.cumsum(0) - 1)[lengths > 0]] = 1
        return fused, lengths, labels
    return fused, lengths, torch.randint(0, 5, (n_units,), generator=generator)


def missing(labels):
    return torch.full_like(labels, float("nan") if labels.is_floating_point() else -1)


@pytest.mark.parametrize("name", NAMES)
def test_a_module_names_its_decoder(name):
    assert issubclass(importlib.import_module(f"pipeline.decoders.{name}").DECODER, Decoder)


@each_case
def test_every_parameter_starts_with_the_head_axis(name, options):
    decoder = build(name, options)
    tensors = [*decoder.parameters(), *decoder.buffers()]
    assert tensors
    assert all(t.shape[0] == 1 for t in tensors)
    assert all(t.shape[0] == 3 for t in stack([decoder] * 3).parameters())


@each_case
@pytest.mark.parametrize("shared", [True, False])
def test_a_stack_is_its_heads(name, options, shared):
    singles = [build(name, options, seed=k) for k in range(3)]
    joined = stack(singles)
    fused, lengths, labels = batch(joined, heads=1 if shared else 3)
    scores = joined(fused, lengths)
    loss, predicted = joined.loss(scores, labels, lengths), joined.predict(scores, lengths)
    for k, single in enumerate([*singles, unstack(joined, 2)]):
        k = min(k, 2)
        alone = single(fused if shared else fused[k : k + 1], lengths)
        torch.testing.assert_close(scores[k : k + 1], alone, rtol=0, atol=1e-6)
        torch.testing.assert_close(loss[k : k + 1], single.loss(alone, labels, lengths), rtol=0, atol=1e-6)
        torch.testing.assert_close(predicted[k : k + 1], single.predict(alone, lengths), rtol=0, atol=1e-6)


@each_case
def test_gradients_reach_every_parameter(name, options):
    decoder = stack([build(name, options, seed=k, dropout=0.1) for k in range(2)])
    fused, lengths, labels = batch(decoder, heads=2)
    decoder.loss(decoder(fused, lengths), labels, lengths).sum().backward()
    assert all(p.grad.flatten(1).abs().amax(1).min() > 0 for p in decoder.parameters())


@each_case
@pytest.mark.parametrize("lengths", [(3, 0, 1, 5), (0, 0)])
def test_without_labels_the_loss_is_zero_and_has_a_gradient(name, options, lengths):
    decoder = build(name, options)
    fused, lengths, labels = batch(decoder, lengths=lengths)
    scores = decoder(fused, lengths)
    loss = decoder.loss(scores, missing(labels), lengths)
    loss.sum().backward()
    assert loss.tolist() == [0.0]
    assert all((p.grad == 0).all() for p in decoder.parameters())
    assert decoder.predict(scores, lengths).shape == (1, *labels.shape)


@each_case
def test_units_without_a_label_do_not_count(name, options):
    decoder = build(name, options)
    fused, lengths, labels = batch(decoder, lengths=(3, 4))
    kept = slice(0, 3) if decoder.target_kind in BY_TOKEN else slice(0, 1)
    labels = torch.cat([labels[kept], missing(labels[kept.stop :])])
    scores = decoder(fused, lengths).detach().requires_grad_()
    loss = decoder.loss(scores, labels, lengths)
    loss.sum().backward()
    here = slice(0, 3) if decoder.target_kind == "span" else kept  # its scores are of tokens
    alone = decoder.loss(scores[:, here], labels[kept], lengths[:1])
    torch.testing.assert_close(loss, alone)
    assert scores.grad[:, here].abs().sum() > 0
    assert scores.grad[:, here.stop :].abs().sum() == 0


@pytest.mark.parametrize("name", ["classifier", "regressor"])
def test_pooling_decides_which_tokens_are_read(name):
    assert build(name, {}).tokens == "first"
    assert build(name, {"pooling": "max"}).tokens == "all"


@pytest.mark.parametrize("pooling", ["first", "mean", "max"])
@pytest.mark.parametrize("lengths", [(2, 0, 3, 1), (1, 1), (0,), (0, 0, 4)])
def test_pool_is_a_loop_over_examples(pooling, lengths):
    fused = torch.randn(2, sum(lengths), 4)
    pooled = pool(fused, torch.tensor(lengths), pooling)
    how = {"first": lambda x: x[0], "mean": lambda x: x.mean(0), "max": lambda x: x.max(0)}[pooling]
    for head in range(2):
        start = 0
        for k, n in enumerate(lengths):
            tokens = fused[head, start : start + n].numpy()
            expected = how(tokens) if n else np.zeros(4)
            np.testing.assert_allclose(pooled[head, k], expected, atol=1e-6)
            start += n


def test_regressor_gives_one_number():
    with pytest.raises(ValueError, match="1 number per example, not 2"):
        Regressor(width=4, n_classes=2, generator=torch.Generator(), seed=0)


def random_crf(n_tags, heads, scale, generator):
    crf = stack([CRF(n_tags, generator=generator) for _ in range(heads)])
    for parameter in crf.parameters():
        parameter.data.mul_(10 * scale)
    return crf


def path_score(crf, head, emissions, path):
    start, end, transitions = (p[head].double() for p in (crf.start, crf.end, crf.transitions))
    steps = sum(transitions[a, b] for a, b in itertools.pairwise(path))
    return start[path[0]] + end[path[-1]] + steps + sum(e[y] for e, y in zip(emissions, path, strict=True))


@given(
    lengths=st.lists(st.integers(0, 4), min_size=1, max_size=4),
    n_tags=st.integers(1, 3),
    scale=st.sampled_from([0.1, 1.0, 16.0]),
    seed=st.integers(0, 1000),
)
@settings(max_examples=40)
def test_crf_is_a_sum_over_all_paths(lengths, n_tags, scale, seed):
    generator = torch.Generator().manual_seed(seed)
    crf = random_crf(n_tags, 2, scale, generator).requires_grad_(False)
    n_words = sum(lengths)
    scores = torch.randn(2, n_words, n_tags, generator=generator) * scale
    labels = torch.randint(0, n_tags, (n_words,), generator=generator)
    loss = crf.loss(scores, labels, torch.tensor(lengths))
    decoded = crf.decode(scores, torch.tensor(lengths))
    for head in range(2):
        total, start = torch.zeros((), dtype=torch.float64), 0
        for n in filter(None, lengths):
            words = slice(start, start + n)
            emissions = scores[head, words].double()
            paths = list(itertools.product(range(n_tags), repeat=n))
            of_path = torch.stack([path_score(crf, head, emissions, p) for p in paths])
            total += of_path.logsumexp(0) - path_score(crf, head, emissions, labels[words].tolist())
            chosen = path_score(crf, head, emissions, decoded[head, words].tolist())
            assert chosen >= of_path.max() - 1e-5 * scale
            if n_tags > 1 and of_path.topk(2).values.diff().abs() > 1e-4:
                assert tuple(decoded[head, words].tolist()) == paths[of_path.argmax()]
            start += n
        assert loss[head].item() == pytest.approx(total.item() / max(1, n_words), abs=1e-4, rel=1e-6)


@pytest.mark.parametrize("lengths", [(5, 1, 9, 9, 2), (1,), (1, 1, 1)])
def test_crf_agrees_with_pytorch_crf(lengths):
    n_tags, generator = 7, torch.Generator().manual_seed(1)
    ours = random_crf(n_tags, 1, 2.0, generator)
    theirs = torchcrf.CRF(n_tags, batch_first=True)
    theirs.start_transitions.data = ours.start[0].detach().clone()
    theirs.end_transitions.data = ours.end[0].detach().clone()
    theirs.transitions.data = ours.transitions[0].detach().clone()
    scores = torch.randn(1, sum(lengths), n_tags, generator=generator).requires_grad_()
    labels = torch.randint(0, n_tags, (sum(lengths),), generator=generator)
    padded = torch.nn.utils.rnn.pad_sequence(scores[0].split(lengths), batch_first=True)
    tags = torch.nn.utils.rnn.pad_sequence(labels.split(lengths), batch_first=True)
    mask = torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]

    expected = -theirs(padded, tags, mask, reduction="sum") / sum(lengths)
    loss = ours.loss(scores, labels, torch.tensor(lengths))
    torch.testing.assert_close(loss[0], expected)
    ours_inputs = (scores, ours.start, ours.end, ours.transitions)
    theirs_inputs = (scores, theirs.start_transitions, theirs.end_transitions, theirs.transitions)
    gradients = torch.autograd.grad(loss.sum(), ours_inputs)
    expected = torch.autograd.grad(expected, theirs_inputs, materialize_grads=True)
    for gradient, theirs_gradient in zip(gradients, expected, strict=True):
        torch.testing.assert_close(gradient.view_as(theirs_gradient), theirs_gradient)

    decoded = ours.decode(scores, torch.tensor(lengths))[0].split(lengths)
    assert [d.tolist() for d in decoded] == theirs.decode(padded, mask)


def test_crf_gradient_is_that_of_finite_differences():
    crf = random_crf(3, 2, 1.0, torch.Generator().manual_seed(0)).double()
    lengths, labels = torch.tensor([3, 0, 1, 4]), torch.tensor([0, 1, 2, 1, 2, 2, 0, 1])
    scores = torch.randn(2, 8, 3, dtype=torch.float64, requires_grad=True)
    parameters = (crf.start, crf.end, crf.transitions)
    assert torch.autograd.gradcheck(lambda s, *_: crf.loss(s, labels, lengths), (scores, *parameters))


@pytest.mark.parametrize("size", [16.0, 50.0, 1e4])
def test_crf_survives_any_size_of_scores(size):
    generator = torch.Generator().manual_seed(3)
    crf = random_crf(6, 2, size, generator)
    lengths = torch.tensor([9, 4])
    scores = (torch.randn(2, 13, 6, generator=generator) * size).requires_grad_()
    crf.loss(scores, torch.randint(0, 6, (13,), generator=generator), lengths).sum().backward()
    marginals = scores.grad.sum(-1)
    torch.testing.assert_close(marginals, torch.zeros_like(marginals), rtol=0, atol=1e-5)
    assert all(p.grad.isfinite().all() for p in crf.parameters())


def test_one_missing_tag_takes_its_sequence_out_of_the_crf_loss():
    tagger = Tagger(width=WIDTH, n_classes=4, generator=torch.Generator().manual_seed(0), seed=0, crf=True)
    scores = torch.randn(1, 7, 4)
    labels = torch.tensor([0, 1, -1, 2, 3, 0, 1])
    loss = tagger.loss(scores, labels, torch.tensor([3, 4]))
    torch.testing.assert_close(loss, tagger.loss(scores[:, 3:], labels[3:], torch.tensor([4])))


def test_viterbi_in_groups_of_heads_is_the_same(monkeypatch):
    crf = random_crf(5, 4, 1.0, torch.Generator().manual_seed(0))
    scores, lengths = torch.randn(4, 20, 5), torch.tensor([7, 0, 13])
    whole = crf.decode(scores, lengths)
    monkeypatch.setattr("pipeline.decoders.tagger.MAX_PATHS", 1)
    assert torch.equal(crf.decode(scores, lengths), whole)


@given(
    lengths=st.lists(st.integers(0, 6), min_size=1, max_size=4),
    longest=st.integers(1, 7),
    seed=st.integers(0, 1000),
)
@settings(max_examples=60)
def test_a_span_is_the_best_of_all_that_are_allowed(lengths, longest, seed):
    generator = torch.Generator().manual_seed(seed)
    decoder = build("span", {"longest": longest})
    scores = torch.randn(2, sum(lengths), 2, generator=generator)
    found = decoder.predict(scores, torch.tensor(lengths))
    labels = torch.full((len(lengths), 2), -1)
    losses = [[], []]
    for k, n in enumerate(lengths):
        here = scores[:, sum(lengths[:k]) : sum(lengths[: k + 1])].double()
        for head in range(2):
            allowed = [(i, j) for i in range(n) for j in range(i, min(n, i + longest))]
            best = max(allowed, key=lambda s: here[head, s[0], 0] + here[head, s[1], 1], default=(-1, -1))
            assert tuple(found[head, k].tolist()) == best
        if n and k % 2 == 0:
            labels[k] = torch.randint(0, n, (2,), generator=generator).sort().values
            for head in range(2):
                logs = here[head].log_softmax(0)
                losses[head].append(-(logs[labels[k, 0], 0] + logs[labels[k, 1], 1]).item() / 2)
    loss = decoder.loss(scores, labels, torch.tensor(lengths))
    assert loss.tolist() == pytest.approx([np.mean(row) if row else 0.0 for row in losses], abs=1e-5)


@given(lengths=st.lists(st.integers(0, 5), min_size=1, max_size=4), seed=st.integers(0, 1000))
@settings(max_examples=60)
def test_a_choice_is_a_softmax_over_the_options_of_a_question(lengths, seed):
    generator = torch.Generator().manual_seed(seed)
    decoder = build("choice", {})
    scores = torch.randn(2, sum(lengths), 1, generator=generator) * 3
    labels = torch.randint(0, 2, (sum(lengths),), generator=generator)
    labels[: lengths[0]] = -1
    found = decoder.predict(scores, torch.tensor(lengths)).split(lengths, dim=1)
    losses = [[], []]
    for k, (own, right) in enumerate(zip(scores.split(lengths, 1), labels.split(lengths), strict=True)):
        for head in range(2):
            if lengths[k]:
                assert found[k][head].tolist() == [int(i == own[head].argmax()) for i in range(lengths[k])]
            if (right == 1).any():
                p = own[head, :, 0].double().softmax(0)
                losses[head].append(-p[right == 1].sum().log().item())
    loss = decoder.loss(scores, labels, torch.tensor(lengths))
    assert loss.tolist() == pytest.approx([np.mean(row) if row else 0.0 for row in losses], abs=1e-5)


def test_spans_of_no_length_are_refused():
    with pytest.raises(ValueError, match="longest is 0"):
        build("span", {"longest": 0})
