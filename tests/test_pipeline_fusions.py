"""Every fusion of the folder keeps the contract; each of ours equals its paper's equation in numpy."""

import inspect
import math

import numpy as np
import pytest
import torch

from pipeline import parts
from pipeline.stack import Linear, stack, unstack

LAST, WIDTH = 3, 8
LENGTHS = [3, 0, 5, 1]
OPTIONS = {"layer": 2, "random_sources": 3}
"""Values of the hyper-parameters that have no default, or none that a fusion can be built with."""


def build(name, seed=0, last=LAST, width=WIDTH, **options):
    """A fusion with its random start (and random constants), and the numbers of the layers it reads."""
    fusion_class = parts.load("fusion", name)
    wanted = inspect.signature(fusion_class).parameters
    options = {key: value for key, value in OPTIONS.items() if key in wanted} | options
    reads = fusion_class.reads(range(last + 1), last, **options)
    generator = torch.Generator().manual_seed(seed)
    fusion = fusion_class(n_layers=len(reads), width=width, generator=generator, **options)
    return fusion, reads


def build_shaken(name, seed=0, **options):
    """The same with every parameter moved, so that a scale of 1 or a shift of 0 hides nothing."""
    fusion, reads = build(name, seed, **options)
    generator = torch.Generator().manual_seed(1000 + seed)
    with torch.no_grad():
        for parameter in fusion.parameters():
            parameter += 0.3 * torch.randn(parameter.shape, generator=generator)
    return fusion, reads


def batch(lengths=LENGTHS, last=LAST, width=WIDTH, seed=0):
    states = torch.randn(last + 1, sum(lengths), width, generator=torch.Generator().manual_seed(seed))
    return states, torch.tensor(lengths, dtype=torch.long)


every = pytest.mark.parametrize("name", parts.names("fusion"))


@every
def test_tensors_start_with_a_head_axis_and_the_output_has_the_promised_shape(name):
    fusion, reads = build(name)
    states, lengths = batch()
    assert all(t.shape[0] == 1 for t in [*fusion.parameters(), *fusion.buffers()])
    assert reads == sorted(set(reads))
    fused = fusion(states[reads], lengths)
    assert fused.shape == (1, sum(LENGTHS), fusion.out_width)
    assert fused.isfinite().all()


@every
def test_gradient_reaches_every_parameter(name):
    fusion, reads = build_shaken(name)
    states, lengths = batch()
    fused = fusion(states[reads], lengths)
    if any(p.requires_grad for p in fusion.parameters()):
        fused.backward(torch.randn(fused.shape, generator=torch.Generator().manual_seed(2)))
    for key, parameter in fusion.named_parameters():
        assert parameter.grad is not None, key
        assert parameter.grad.isfinite().all(), key
        assert parameter.grad.any(), key


@every
def test_a_stack_of_three_equals_each_alone_and_gives_it_back(name):
    alone = [build_shaken(name, seed)[0] for seed in range(3)]
    reads = build(name)[1]
    states, lengths = batch()
    joined = stack(alone)
    together = joined(states[reads], lengths)
    together = together.expand(3, -1, -1)
    for head, fusion in enumerate(alone):
        expected = fusion(states[reads], lengths)[0]
        torch.testing.assert_close(together[head], expected, atol=1e-6, rtol=1e-5)
        taken = unstack(joined, head)
        assert taken.state_dict().keys() == fusion.state_dict().keys()
        for key, value in taken.state_dict().items():
            torch.testing.assert_close(value, fusion.state_dict()[key], rtol=0, atol=0)
        torch.testing.assert_close(taken(states[reads], lengths)[0], expected, rtol=0, atol=0)


@every
@pytest.mark.parametrize("lengths", [[], [0], [0, 0]])
def test_no_tokens_give_no_vectors(name, lengths):
    states, lengths = batch(lengths)
    for n_heads in (1, 2):
        fusion = stack([build(name, seed)[0] for seed in range(n_heads)])
        reads = build(name)[1]
        fused = fusion(states[reads], lengths)
        assert fused.shape[0] in (1, n_heads)
        assert fused.shape[1:] == (0, fusion.out_width)


@every
def test_an_example_has_the_same_vectors_in_every_company(name):
    fusion, reads = build_shaken(name)
    states, lengths = batch()
    order = [2, 1, 3, 0]
    each = states.split(LENGTHS, dim=1)
    moved = fusion(torch.cat([each[i] for i in order], 1)[reads], lengths[order])
    moved = dict(zip(order, moved.split([LENGTHS[i] for i in order], dim=1), strict=True))
    for i, expected in enumerate(fusion(states[reads], lengths).split(LENGTHS, dim=1)):
        torch.testing.assert_close(moved[i], expected, atol=1e-6, rtol=1e-5)
        alone = fusion(each[i][reads], lengths[i : i + 1])
        torch.testing.assert_close(alone, expected, atol=1e-6, rtol=1e-5)


@every
def test_a_view_into_a_longer_block_is_as_good_as_a_copy(name):
    fusion, reads = build_shaken(name)
    states, lengths = batch()
    block = torch.cat([torch.full_like(states, math.nan), states], 1)[reads]
    view = block[:, sum(LENGTHS) :]
    torch.testing.assert_close(fusion(view, lengths), fusion(states[reads], lengths), atol=1e-6, rtol=1e-5)


@every
def test_the_start_depends_on_the_generator_alone(name):
    first, again, other = (build(name, seed)[0] for seed in (4, 4, 5))
    for key, value in first.state_dict().items():
        assert torch.equal(value, again.state_dict()[key]), key
    for (key, value), otherwise in zip(first.named_parameters(), other.parameters(), strict=True):
        is_drawn = len(value.unique()) > 1
        assert torch.equal(value, otherwise) != is_drawn, key


# The equations, in numpy and float64, from the papers.


def softmax(x, axis):
    e = np.exp(x - x.max(axis, keepdims=True))
    return e / e.sum(axis, keepdims=True)


def gelu(x):
    return x * 0.5 * (1 + np.vectorize(math.erf)(x / math.sqrt(2)))


def layer_norm(x, weight, bias):
    centred = x - x.mean(-1, keepdims=True)
    return centred / np.sqrt((centred**2).mean(-1, keepdims=True) + 1e-5) * weight + bias


def weights_of(module):
    """Parameters and buffers of the first head, without the head axis."""
    return {key: value[0].double().numpy() for key, value in module.state_dict().items()}


def by_last_layer(z, lengths, w):
    return z[LAST]


def by_single_layer(z, lengths, w):
    return z[OPTIONS["layer"]]


def by_average(z, lengths, w):
    return sum(z) / len(z)


def by_linear(z, lengths, w):
    s = softmax(w["scores"], 0)
    return w["scale"] * sum(s[n] * z[n] for n in range(len(z)))


def by_concat(z, lengths, w):
    return np.concatenate(list(z), axis=-1)


def by_attention(z, lengths, w):
    fused = np.zeros_like(z[0])
    for t in range(z.shape[1]):
        a = softmax(np.array([w["query"] @ z[n, t] for n in range(len(z))]), 0)
        fused[t] = sum(a[n] * z[n, t] for n in range(len(z)))
    return layer_norm(fused, w["norm.weight"], w["norm.bias"]) if "norm.weight" in w else fused


def by_affine(z, lengths, w):
    matrices = w["product.weight"].reshape(LAST, WIDTH, WIDTH)
    return sum(z[n] @ matrices[n - 1] for n in range(1, LAST + 1)) + w["product.bias"]


def bottleneck(x, w, prefix, n):
    hidden = gelu(x @ w[f"{prefix}.down"][n] + w[f"{prefix}.down_bias"][n])
    hidden = layer_norm(hidden, w[f"{prefix}.norm_weight"][n], w[f"{prefix}.norm_bias"][n])
    return hidden @ w[f"{prefix}.up"][n] + w[f"{prefix}.up_bias"][n]


def by_dwatt(z, lengths, w):
    inner = z[LAST] + bottleneck(z[LAST], w, "query", 0)
    query = 1 + np.where(inner > 0, inner, np.expm1(inner))
    scores, values = [], []
    for n in range(1, LAST + 1):
        scores.append(query @ (w["positions"][n - 1] @ w["key"]))
        v = bottleneck(z[n], w, "value", n - 1)
        values.append(layer_norm(v, w["norm_weight"][n - 1], w["norm_bias"][n - 1]))
    a = softmax(np.array(scores), 0)
    return z[LAST] + sum(a[n][:, None] * values[n] for n in range(LAST))


def by_transformer(z, lengths, w):
    examples = np.split(z[LAST], np.cumsum(lengths)[:-1])
    for k in range(2):
        b = {key.removeprefix(f"blocks.{k}."): v for key, v in w.items() if key.startswith(f"blocks.{k}.")}
        examples = [encoder_layer(x, b) for x in examples]
    return np.concatenate(examples)


def encoder_layer(x, b):
    q = x @ b["query.weight"] + b["query.bias"]
    k, v = np.split(x @ b["key_value.weight"] + b["key_value.bias"], 2, axis=-1)
    attended = softmax(q @ k.T / math.sqrt(WIDTH), -1) @ v if len(x) else x
    x = x + attended @ b["out.weight"] + b["out.bias"]
    x = layer_norm(x, b["norm_attention.weight"], b["norm_attention.bias"])
    network = gelu(x @ b["up.weight"] + b["up.bias"]) @ b["down.weight"] + b["down.bias"] if len(x) else x
    return layer_norm(x + network, b["norm_network.weight"], b["norm_network.bias"])


def by_mixture(z, lengths, w):
    fused, first = np.zeros_like(z[0]), 0
    for length in lengths:
        tokens = slice(first, first + length)
        first += length
        if not length:
            continue
        query = np.zeros(WIDTH)
        shares = np.full(len(w["sources"]), 1 / len(w["sources"]))
        if "mixer.down.weight" in w:
            inner = z[0, tokens].max(0) @ w["mixer.down.weight"]
            hidden = (inner / (1 + np.exp(-inner))) @ w["mixer.up.weight"]
            hidden = layer_norm(hidden, w["mixer.norm.weight"][0], w["mixer.norm.bias"][0])
            dots = np.array([source @ hidden for source in w["sources"]])
            shares = softmax(dots / (WIDTH * math.exp(w["temperature"])), 0)
        for share, source in zip(shares, w["sources"], strict=True):
            query = query + share * source
        if "query" in w:
            query = query + w["query"]
        fused[tokens] = by_attention(z[:, tokens], [length], {"query": query})
    return fused


@pytest.mark.parametrize(
    ("name", "equation", "options"),
    [
        ("last_layer", by_last_layer, {}),
        ("single_layer", by_single_layer, {}),
        ("average", by_average, {}),
        ("linear", by_linear, {}),
        ("concat", by_concat, {}),
        ("attention", by_attention, {}),
        ("attention", by_attention, {"layer_norm": True}),
        ("affine", by_affine, {}),
        ("dwatt", by_dwatt, {}),
        ("transformer", by_transformer, {}),
        ("mixture", by_mixture, {}),
        ("mixture", by_mixture, {"temperature": -2.0, "size": 5}),
        ("mixture", by_mixture, {"temperature": -2.0, "target": False}),
        ("mixture", by_mixture, {"attention": False}),
        ("mixture", by_mixture, {"random_sources": 1}),
    ],
)
def test_equals_the_equation(name, equation, options):
    fusion, reads = build_shaken(name, **options)
    if name == "mixture":  # queries as long as trained ones are: the shares differ
        fusion.sources.mul_(50)
    states, lengths = batch()
    constants = weights_of(fusion) | {"temperature": options.get("temperature", 1.0)}
    expected = equation(states.double().numpy(), LENGTHS, constants)
    fused = fusion(states[reads], lengths)[0].detach().numpy()
    np.testing.assert_allclose(fused, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("n_heads", [1, 3])
@pytest.mark.parametrize("lengths", [[3, 1], [40, 0, 60]], ids=["few", "many"])
@every
def test_scores_and_gradients_of_a_linear_layer_are_those_on_the_fused_vectors(name, lengths, n_heads):
    fusions, reads = zip(*(build_shaken(name, seed=seed) for seed in range(n_heads)), strict=True)
    fusion = stack(fusions).double()
    generator = torch.Generator().manual_seed(5)
    scorer = stack([Linear(fusion.out_width, 3, generator=generator) for _ in range(n_heads)]).double()
    states, lengths = batch(lengths)
    states = states[reads[0]].double()
    wanted = torch.randn(n_heads, states.shape[1], 3, generator=generator, dtype=torch.double)
    found = []
    for scores in (scorer(fusion(states, lengths)), fusion.scored(states, lengths, scorer)):
        (scores * wanted).sum().backward()
        parameters = [*fusion.parameters(), *scorer.parameters()]
        found.append([scores.detach(), *(p.grad for p in parameters if p.grad is not None)])
        fusion.zero_grad()
        scorer.zero_grad()
    for plain, short in zip(*found, strict=True):
        torch.testing.assert_close(short, plain, rtol=1e-9, atol=1e-9)


def test_dwatt_forms_no_value_where_that_takes_fewer_products(monkeypatch):
    fusion, reads = build("dwatt")
    scorer = Linear(WIDTH, 3, generator=torch.Generator().manual_seed(5))
    monkeypatch.setattr(fusion, "forward", None)
    states, lengths = batch([40, 60])
    fusion.scored(states[reads], lengths, scorer)
    with torch.autocast("cpu", dtype=torch.bfloat16), pytest.raises(TypeError):
        fusion.scored(states[reads], lengths, scorer)
    with pytest.raises(TypeError):
        fusion.scored(states[reads, :4], lengths.new_tensor([4]), scorer)


def weights_by_linear(z, lengths, w):
    return np.tile(softmax(w["scores"], 0), (z.shape[1], 1))


def weights_by_attention(z, lengths, w):
    return np.array([softmax(np.array([w["query"] @ n for n in z[:, t]]), 0) for t in range(z.shape[1])])


def weights_by_dwatt(z, lengths, w):
    inner = z[LAST] + bottleneck(z[LAST], w, "query", 0)
    query = 1 + np.where(inner > 0, inner, np.expm1(inner))
    return softmax(np.array([query @ (p @ w["key"]) for p in w["positions"]]), 0).T


def weights_by_mixture(z, lengths, w):
    query = w["query"] + w["sources"].mean(0)  # without its network all sources have one share
    return weights_by_attention(z, lengths, {"query": query})


@pytest.mark.parametrize(
    ("name", "equation", "options"),
    [
        ("linear", weights_by_linear, {}),
        ("attention", weights_by_attention, {}),
        ("attention", weights_by_attention, {"layer_norm": True}),
        ("dwatt", weights_by_dwatt, {}),
        ("mixture", weights_by_mixture, {"attention": False}),
    ],
)
def test_weights_over_layers_are_those_of_the_equation(name, equation, options):
    fusion, reads = build_shaken(name, **options)
    states, lengths = batch()
    expected = equation(states.double().numpy(), LENGTHS, weights_of(fusion))
    found = fusion.weights(states[reads], lengths)[0].detach().numpy()
    np.testing.assert_allclose(found, expected, atol=1e-6, rtol=1e-5)


WEIGHING = {"attention", "linear", "dwatt", "mixture"}


@every
def test_weights_over_layers_are_distributions_or_not_there(name):
    fusion, reads = build_shaken(name)
    states, lengths = batch()
    found = fusion.weights(states[reads], lengths)
    assert (found is not None) == (name in WEIGHING)
    if found is not None:
        assert found.shape == (1, sum(LENGTHS), len(reads))
        assert (found >= 0).all()
        torch.testing.assert_close(found.sum(-1), torch.ones(1, sum(LENGTHS)))
        assert fusion.weights(states[reads][:, :0], torch.tensor([0])).shape == (1, 0, len(reads))
        both = stack([build_shaken(name, seed)[0] for seed in range(2)]).weights(states[reads], lengths)
        torch.testing.assert_close(both[0], found[0], atol=1e-6, rtol=1e-5)


def test_transformer_equals_torchs_encoder_layers():
    width = 192  # three attention heads
    fusion, reads = build("transformer", width=width, n=2)
    states, lengths = batch([4, 0, 7], width=width)
    theirs = []
    for block in fusion.blocks:
        layer = torch.nn.TransformerEncoderLayer(
            width, 3, 4 * width, dropout=0.0, activation="gelu", batch_first=True
        )
        pairs = {
            "self_attn.out_proj.": block.out,
            "linear1.": block.up,
            "linear2.": block.down,
        }
        weights = {f"{key}weight": product.weight[0].T for key, product in pairs.items()}
        weights |= {f"{key}bias": product.bias[0, 0] for key, product in pairs.items()}
        asking, asked = block.query, block.key_value
        weights["self_attn.in_proj_weight"] = torch.cat([asking.weight[0].T, asked.weight[0].T])
        weights["self_attn.in_proj_bias"] = torch.cat([asking.bias[0, 0], asked.bias[0, 0]])
        layer.load_state_dict(weights | {k: v for k, v in layer.state_dict().items() if "norm" in k})
        theirs.append(layer)
    expected = torch.nn.Sequential(*theirs)
    fused = fusion(states[reads], lengths)[0].split([4, 0, 7])
    for x, y in zip(states[-1].split([4, 0, 7]), fused, strict=True):
        if len(x):
            torch.testing.assert_close(y, expected(x[None])[0], atol=1e-5, rtol=1e-5)


def test_transformer_sees_all_tokens_of_an_example_and_answers_for_those_chosen():
    lengths = [3, 0, 9, 1, 6, 2, 8, 4, 7, 5, 10, 3]  # more examples than are padded to one length
    fusion, reads = build("transformer", n=2)
    states, counts = batch(lengths)
    chosen = torch.tensor([0, 2, 5, 6, 7, 11, 12, 13, *range(30, 50), sum(lengths) - 1])
    alone = [
        fusion(x[reads], torch.tensor([x.shape[1]]))[0] for x in states.split(lengths, 1) if x.shape[1]
    ]
    found = fusion.at(states[reads], counts, chosen)[0]
    torch.testing.assert_close(found, torch.cat(alone)[chosen], atol=1e-5, rtol=1e-5)
    assert fusion.at(states[reads], counts, chosen[:0]).shape == (1, 0, WIDTH)


@pytest.mark.parametrize(
    ("name", "options", "count"),
    [
        ("last_layer", {}, 0),
        ("single_layer", {}, 0),
        ("average", {}, 0),
        ("linear", {}, 24 + 2),
        ("concat", {}, 0),
        ("attention", {}, 1_024),
        ("attention", {"layer_norm": True}, 3_072),
        ("affine", {}, 24 * 1024**2 + 1024),
        ("dwatt", {}, 25 * (1024**2 + 2560) + 2 * 24 * 1024 + 24 * 1024),
        ("transformer", {"n": 1}, 12 * 1024**2 + 13 * 1024),
        ("transformer", {}, 2 * (12 * 1024**2 + 13 * 1024)),
        ("mixture", {}, 1024 + 2 * 100 * 1024 + 2 * 1024),
        ("mixture", {"size": 7}, 1024 + 2 * 7 * 1024 + 2 * 1024),
        ("mixture", {"target": False}, 2 * 100 * 1024 + 2 * 1024),
        ("mixture", {"attention": False}, 1024),
        ("mixture", {"random_sources": 1}, 1024),
        ("mixture", {"random_sources": 1, "target": False}, 0),
    ],
)
def test_parameter_count_for_bert_large(name, options, count):
    with torch.device("meta"):
        fusion, _ = build(name, last=24, width=1024, **options)
    assert sum(p.numel() for p in fusion.parameters()) == count


def test_dwatt_count_is_the_papers_within_two_in_a_thousand():
    with torch.device("meta"):
        fusion, _ = build("dwatt", last=24, width=1024)
    assert sum(p.numel() for p in fusion.parameters()) == pytest.approx(26.38e6, rel=2e-3)


def test_concat_alone_changes_the_width():
    widths = {name: build(name)[0].out_width for name in parts.names("fusion")}
    assert widths.pop("concat") == (LAST + 1) * WIDTH
    assert set(widths.values()) == {WIDTH}


def test_which_layers_are_read():
    reads = {name: build(name)[1] for name in parts.names("fusion")}
    assert reads["last_layer"] == reads["transformer"] == [LAST]
    assert reads["single_layer"] == [2]
    assert reads["affine"] == reads["dwatt"] == [1, 2, 3]
    assert reads["average"] == reads["linear"] == reads["concat"] == reads["attention"] == [0, 1, 2, 3]
    assert reads["mixture"] == [0, 1, 2, 3]
    assert parts.load("fusion", "mixture").reads([2, 3], LAST) == [0, 2, 3]


def test_dwatt_asks_for_the_last_layer_even_where_it_is_not_kept():
    assert parts.load("fusion", "dwatt").reads([0, 2, 4], 6) == [2, 4, 6]


def test_last_and_single_layer_copy_nothing():
    states, lengths = batch([4])
    for name in ("last_layer", "single_layer"):
        fused = build(name)[0](states[-1:], lengths)
        assert fused.data_ptr() == states[-1:].data_ptr()


def test_linear_starts_as_the_average():
    states, lengths = batch()
    fused = build("linear")[0](states, lengths)
    torch.testing.assert_close(fused, build("average")[0](states, lengths))


@pytest.mark.parametrize("width", [64, 384])
def test_dwatt_starts_with_scores_of_order_one(width):
    fusion, _ = build("dwatt", last=12, width=width)
    scores = (fusion.positions @ fusion.key)[0].sum(-1)  # of a query of ones
    assert 0.1 < scores.std() < 2
    assert not torch.equal(fusion.positions, build("dwatt", seed=1, last=12)[0].positions)


@pytest.mark.parametrize(("width", "n_attentions"), [(32, 1), (384, 6), (768, 12), (312, 4), (200, 2)])
def test_transformer_divides_its_width_evenly(width, n_attentions):
    with torch.device("meta"):
        fusion, _ = build("transformer", width=width, n=1)
    assert fusion.blocks[0].n_attentions == n_attentions


def test_transformer_alone_mixes_tokens():
    mixing = [name for name in parts.names("fusion") if parts.load("fusion", name).mixes_tokens]
    assert "transformer" in mixing
    assert not {"attention", "dwatt", "linear"} & set(mixing)


def test_transformer_needs_a_layer():
    with pytest.raises(ValueError, match="at least one layer"):
        build("transformer", n=0)


def test_shares_differ_between_examples_and_not_within_one():
    fusion, reads = build_shaken("mixture", temperature=-2.0)
    fusion.sources.mul_(50)
    states, lengths = batch()
    shares = fusion.shares(states[reads], lengths)
    assert shares.shape == (1, len(LENGTHS), 3)
    torch.testing.assert_close(shares.sum(-1), torch.ones(1, len(LENGTHS)))
    assert (shares[0, 0] - shares[0, 2]).abs().max() > 0.01
    flat = build("mixture", attention=False)[0].shares(states[reads], lengths)
    assert torch.equal(flat, torch.full((1, len(LENGTHS), 3), 1 / 3))


def test_one_source_and_no_target_is_attention_with_that_query():
    mixture, reads = build("mixture", random_sources=1, target=False)
    attention = build("attention")[0]
    with torch.no_grad():
        attention.query.copy_(mixture.sources[0])
    states, lengths = batch()
    torch.testing.assert_close(mixture(states[reads], lengths), attention(states[reads], lengths))


@pytest.mark.parametrize(
    "options",
    [{"random_sources": 0}, {"random_sources": -1}, {"sources": "a", "random_sources": 2}],
    ids=str,
)
def test_mixture_needs_sources_of_one_kind(options):
    with pytest.raises(ValueError, match=r"--set sources=RUN,RUN .* or --set random_sources=N"):
        build("mixture", **options)


@pytest.mark.parametrize(
    "options", [{"temperature": 1000.0}, {"temperature": math.nan}, {"size": 0}], ids=str
)
def test_mixture_takes_numbers_of_its_range(options):
    with pytest.raises(ValueError, match=r"exponent from -20 to 20|sizes of 1 or more"):
        build("mixture", **options)


def test_attention_takes_the_query_of_one_run_and_has_no_parameter_then():
    fusion, _ = build("attention", sources="run")
    assert not list(fusion.parameters())
    assert [name for name, _ in fusion.named_buffers()] == ["query"]
    free, reads = build("attention")
    states, lengths = batch()
    assert torch.equal(fusion(states[reads], lengths), free(states[reads], lengths))
    with pytest.raises(ValueError, match="takes the query of one run"):
        build("attention", sources="a,b")
