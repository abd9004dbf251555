"""The methods of early fusion: what every one must hold, and each against its equations."""

import json
import math

import numpy as np
import pytest
import safetensors.torch
import tiny
import torch
import transformers
import tuning
from encoders import tiny_encoder

from pipeline import parts
from pipeline.decoders.classifier import Classifier
from pipeline.decoders.tagger import Tagger
from pipeline.early_fusion._base import Host
from pipeline.early_fusion._gates import Room, gate, gated_weights
from pipeline.early_fusion.adapter import Adapter, Bottleneck
from pipeline.early_fusion.attempt import Attempt
from pipeline.early_fusion.bitfit import BitFit
from pipeline.early_fusion.diff_prune import DiffPrune
from pipeline.early_fusion.fine_tune import FineTune
from pipeline.early_fusion.prefix_tuning import PrefixTuning
from pipeline.early_fusion.prompt_tuning import PromptTuning
from pipeline.early_fusion.spot import SPoT
from pipeline.errors import PipelineError
from pipeline.tuning import use
from pipeline.tuning.backbone import drop_pooler
from pipeline.tuning.batches import make_batch
from pipeline.tuning.run import TaskAsked

METHODS = parts.names("method")
OPTIONS = {
    "prompt_tuning": {"length": "4"},
    "prefix_tuning": {"length": "4"},
    "adapter": {"size": "4"},
    "attempt": {"size": "4"},
    "diff_prune": {"share": "0.01"},
}
FROM_PROMPTS = {"attempt": "sources", "spot": "sources/a"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Data, an encoder, and two source prompts of four tokens."""
    folder = tmp_path_factory.mktemp("early")
    for name, target in (("a", "intent"), ("b", "tags")):
        plan = {"epochs": 1}
        tuning.run(
            folder, "prompt_tuning", target, out=f"sources/{name}", options={"length": "4"}, plan=plan
        )
    return folder


def choices_of(folder, method):
    prompts = {"prompts": str(folder / FROM_PROMPTS[method])} if method in FROM_PROMPTS else {}
    return {"options": OPTIONS.get(method, {}), **prompts}


def host_of(model, **more):
    drop_pooler(model)
    return Host(model=model, **more)


def generator():
    return torch.Generator().manual_seed(0)


def are_of_the_vocabulary(prompt, model):
    """Whether every soft token is some token's embedding."""
    table = model.get_input_embeddings().weight
    return all((table == token).all(1).any() for token in prompt)


def batch_of(tuned, examples, rows):
    heads = list(tuned.heads)
    return make_batch([(examples, np.array(rows))], tuned.backbone, heads, n_slots=tuned.method.n_slots)


def plain(model, examples, row, at, soft):
    """States of one row, forwarded alone with soft tokens put into its embeddings by hand."""
    here = slice(examples.tokens.start[row], examples.tokens.start[row + 1])
    ids = torch.from_numpy(examples.tokens.input_ids[here].astype(np.int64))[None]
    embedded = model.get_input_embeddings()(ids)
    whole = torch.cat([embedded[:, :at], soft[None], embedded[:, at:]], 1)
    return model(inputs_embeds=whole, attention_mask=torch.ones(whole.shape[:2])).last_hidden_state[0]


# What every method must hold.


@pytest.mark.parametrize("method", METHODS)
def test_run_learns_something_and_can_be_used_again(folder, method):
    target = ("intent", "tags")[METHODS.index(method) % 2]
    out = f"run-{method}"
    start = tuning.ready(folder, method, target, **choices_of(folder, method))[0].method.state()
    result = tuning.run(folder, method, target, out=out, **choices_of(folder, method))
    path = folder / out
    assert use.evaluate(str(path), "dev")["metrics"] == pytest.approx(result["dev_metrics"], rel=1e-4)
    assert result["method"] == method
    assert 0 < result["trainable_frac"] <= 1
    saved = safetensors.torch.load_file(path / "tuned.safetensors")
    of_method = {n: v for n, v in saved.items() if not n.startswith("heads.")}
    assert any(not torch.equal(value, start[name]) for name, value in of_method.items() if name in start)
    if method != "attempt":  # keeps the source prompts too
        counted = sum(v.numel() for v in of_method.values())
        assert counted == result["method_parameters"] * (2 if method == "diff_prune" else 1)


@pytest.mark.parametrize("method", [m for m in METHODS if m != "fine_tune"])
def test_frozen_weights_stay_bit_for_bit(folder, method, monkeypatch):
    from pipeline.tuning import run as module

    kept = []
    real = module.prepare

    def watched(*args):
        made = real(*args)
        tuned = made[0]
        trained = {name for name, _ in tuned.method.trained()}
        weights = {n: p for n, p in tuned.model.named_parameters() if n not in trained}
        kept.append((weights, {n: p.detach().clone() for n, p in weights.items()}, trained))
        return made

    monkeypatch.setattr(module, "prepare", watched)
    out = f"frozen-{method}"
    tuning.run(folder, method, out=out, plan={"epochs": 2}, **choices_of(folder, method))
    weights, before, trained = kept[0]
    assert len(before) > 10
    assert all(torch.equal(weights[name], value) for name, value in before.items())
    assert (trained != set()) == (method in {"bitfit", "adapter"})


@pytest.mark.parametrize("method", METHODS)
def test_method_learns_by_itself(folder, method):
    # The head stays as it was drawn, so what lowers the loss is the method.
    encoder, plan = tiny_encoder("bert"), {"epochs": 6, "head_lr": 1e-9}
    if not (folder / "own").exists():
        options = {"length": "4"}
        tuning.run(
            folder, "prompt_tuning", out="own/a", encoder=encoder, options=options, plan={"epochs": 1}
        )
    choices = choices_of(folder, method)
    if method in FROM_PROMPTS:
        choices["prompts"] = str(folder / "own")
    choices["options"] = {**choices["options"], "layers": "linear"}
    losses = []
    tuning.run(
        folder, method, "tags", out=f"alone-{method}", encoder=encoder, plan=plan,
        progress=lambda _, lines: losses.append(lines[0].loss), **choices,
    )  # fmt: skip
    assert min(losses[1:]) < losses[0] - 0.02


@pytest.mark.parametrize("method", METHODS)
def test_options_are_not_the_heads(method):
    own = set(parts.hyper_parameters(parts.load("method", method)))
    for decoder in (Classifier, Tagger):
        assert not own & set(parts.hyper_parameters(decoder))


@pytest.mark.parametrize("method", METHODS)
def test_same_seed_same_start(folder, method):
    states = [
        tuning.ready(folder, method, **choices_of(folder, method))[0].method.everything() for _ in range(2)
    ]
    assert all(torch.equal(value, states[1][name]) for name, value in states[0].items())


# Counts of the papers, on models without weights.


@pytest.fixture
def bert_large():
    config = transformers.BertConfig(
        hidden_size=1024, num_hidden_layers=24, num_attention_heads=16, intermediate_size=4096
    )
    with torch.device("meta"):
        return transformers.BertModel(config)


@pytest.fixture
def t5_base():
    config = transformers.T5Config(
        d_model=768, d_ff=3072, num_layers=12, num_heads=12, decoder_start_token_id=0
    )
    with torch.device("meta"):
        return transformers.T5ForConditionalGeneration(config)


def count(method, model, **options):
    more = {name: options.pop(name) for name in ("sources", "tasks") if name in options}
    return method(host=host_of(model, **more), generator=generator(), **options).n_parameters()


def test_count_of_fine_tune(bert_large):
    found = count(FineTune, bert_large)
    assert found == sum(p.numel() for p in bert_large.parameters()) == 334_092_288


def test_count_of_bitfit(bert_large):
    d = 1024
    assert count(BitFit, bert_large) == 24 * (3 * d + d + 4 * d + d + 2 * d) + d == 271_360


def test_count_of_adapter(bert_large):
    d, m = 1024, 256
    module, norms = 2 * m * d + m + d, (2 * 24 + 1) * 2 * d
    assert 24 * module == 12_613_632  # the attention-fusion paper's 12.6 M: one bottleneck a layer
    assert count(Adapter, bert_large, size=m) == 2 * 24 * module + norms


def test_count_of_prompt_tuning(bert_large, t5_base):
    assert count(PromptTuning, bert_large, length=50) == 51_200
    assert count(PromptTuning, t5_base, length=100) == 76_800


def test_count_of_prefix_tuning(bert_large):
    assert count(PrefixTuning, bert_large, length=50) == 1_228_800
    assert count(PrefixTuning, bert_large, length=50, form="keys_values") == 2 * 1_228_800


def test_count_of_diff_prune():
    config = transformers.BertConfig(hidden_size=64, num_hidden_layers=2, num_attention_heads=2)
    with torch.device("meta"):
        model = transformers.BertModel(config)
    whole = sum(p.numel() for p in host_of(model).model.parameters())
    assert count(DiffPrune, model) == int(0.001 * whole)


def sources_of(model, n, length):
    width = model.get_input_embeddings().embedding_dim
    return {f"s{i}": torch.randn(length, width, generator=generator()) for i in range(n)}


def test_count_of_attempt(t5_base):
    sources = sources_of(t5_base, 6, 100)
    assert count(Attempt, t5_base, sources=sources, size=100) == 231_936
    four = count(Attempt, t5_base, sources=sources, size=100, tasks=tuple("abcd"))
    d, m, r = 768, 100, 100
    assert four / 4 == d * m + (2 * r * d + 2 * d) / 4
    assert count(Attempt, t5_base, sources=sources, attention=False) == d * m
    assert count(Attempt, t5_base, sources=sources, target=False) == 2 * r * d + 2 * d


def test_count_of_spot(t5_base):
    assert count(SPoT, t5_base, sources=sources_of(t5_base, 1, 100)) == 76_800


# Soft tokens.


@pytest.mark.parametrize("target", ["intent", "tags"])
def test_prompt_stands_after_cls_and_the_head_reads_the_text(folder, target):
    tuned, _, job = tuning.ready(folder, "prompt_tuning", target, options={"length": "4"})
    tuned.eval()
    assert tuned.backbone.slot_at == 1
    examples, rows = job.dev[0], [4, 1, 7]
    batch = batch_of(tuned, examples, rows)
    read = tuned._read(tuned._states(batch), batch.parts[0]).states[0]
    expected = []
    for row in rows:
        states = plain(tuned.model, examples, row, 1, tuned.method.prompt)
        text = torch.cat([states[:1], states[5:]])
        here = slice(examples.tokens.start[row], examples.tokens.start[row + 1])
        words = torch.from_numpy(examples.tokens.kind[here] == 2)
        expected.append(text[:1] if target == "intent" else text[words])
    assert torch.allclose(read, torch.cat(expected), atol=1e-5)


def test_prompt_starts_as_tokens_of_the_vocabulary(folder):
    tuned, _, _ = tuning.ready(folder, "prompt_tuning", options={"length": "6"})
    assert are_of_the_vocabulary(tuned.method.prompt, tuned.model)


def test_prompts_learn_slower_on_an_encoder(folder):
    tuned, _, _ = tuning.ready(folder, "prompt_tuning")
    assert tuned.method.usual_lr() == 0.03
    tuned, _, _ = tuning.ready(folder, "prompt_tuning", encoder=tiny_encoder("t5"))
    assert tuned.method.usual_lr() == 0.3


FIRST = {"roberta": 1, "bert": 1, "distilbert": 1, "electra": 1, "deberta": 1, "deberta_v2": 1, "gpt2": 0}


@pytest.mark.parametrize("family", FIRST)
@pytest.mark.parametrize("method", ["prompt_tuning", "prefix_tuning", "adapter"])
def test_every_family_learns_through_the_soft_tokens(folder, family, method):
    tuned, _, job = tuning.ready(
        folder, method, "tags", encoder=tiny_encoder(family), options=OPTIONS[method]
    )
    assert tuned.backbone.slot_at == FIRST[family]
    tuned(batch_of(tuned, job.train[0], [0, 1])).backward()
    grads = [p.grad for p in tuned.method.parameters()]
    assert all(g is not None and g.isfinite().all() for g in grads)
    assert any(g.abs().max() > 0 for g in grads)


@pytest.mark.parametrize("form", ["states", "keys_values"])
def test_prefix_is_what_every_layer_attends_to(folder, form):
    tuned, _, job = tuning.ready(folder, "prefix_tuning", options={"length": "3", "form": form})
    tuned.eval()
    with torch.no_grad():
        tuned.method.table.normal_(generator=generator())
    batch = batch_of(tuned, job.dev[0], [0, 1])
    found = tuned._states(batch)[3].view(2, -1, 16).detach()
    inputs = tuned.inputs(batch)
    assert bool(inputs["attention_mask"].bool().all())
    model, table = tuned.model, tuned.method.table.detach()
    states = model.embeddings(inputs_embeds=inputs["inputs_embeds"])
    for layer, soft in zip(model.encoder.layer, table, strict=True):
        states = numpy_layer(layer, states.detach(), soft, form)
    text = [0, *range(4, states.shape[1])]
    assert torch.allclose(found[:, text], states[:, text], atol=2e-4)


def numpy_layer(layer, states, soft, form):
    """One BERT layer by its equations, whose places 1 to 3 hold soft tokens."""
    if form == "states":
        states = torch.cat([states[:, :1], soft[0].expand(len(states), -1, -1), states[:, 4:]], 1)
    own = layer.attention.self
    query, key, value = own.query(states), own.key(states), own.value(states)
    if form == "keys_values":
        key, value = (
            torch.cat([x[:, :1], s.expand(len(x), -1, -1), x[:, 4:]], 1)
            for x, s in zip((key, value), soft, strict=True)
        )
    split = [
        x.detach().numpy().reshape(*x.shape[:2], 2, 8).transpose(0, 2, 1, 3) for x in (query, key, value)
    ]
    scores = split[0] @ split[1].transpose(0, 1, 3, 2) / math.sqrt(8)
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    mixed = (weights / weights.sum(-1, keepdims=True)) @ split[2]
    mixed = torch.from_numpy(mixed.transpose(0, 2, 1, 3).reshape(*states.shape))
    return layer.output(layer.intermediate(h := layer.attention.output(mixed, states)), h).detach()


def bert_pair():
    """A BERT twice, with the same weights."""
    folder = tiny_encoder("bert")
    return [
        transformers.BertModel.from_pretrained(folder, add_pooling_layer=False).eval() for _ in range(2)
    ]


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.*:FutureWarning")  # peft asks by an old name
@pytest.mark.parametrize("kind", ["prompt", "prefix"])
def test_soft_tokens_are_those_of_peft(kind):
    import peft

    ours, theirs = bert_pair()
    options = {"task_type": "FEATURE_EXTRACTION", "num_virtual_tokens": 5}
    config = (peft.PromptTuningConfig if kind == "prompt" else peft.PrefixTuningConfig)(**options)
    wrapped = peft.get_peft_model(theirs, config).eval()
    table = wrapped.prompt_encoder["default"].embedding.weight.detach()
    host = host_of(ours, slot_at=0)
    ids = torch.randint(5, 40, (2, 7), generator=generator())
    mask = torch.ones(2, 7, dtype=torch.long)
    with torch.no_grad():
        if kind == "prompt":
            method = PromptTuning(host=host, generator=generator(), length=5)
            method.prompt.copy_(table)
        else:
            method = PrefixTuning(host=host, generator=generator(), length=5, form="keys_values").eval()
            method.table.copy_(table.view(5, 2, 2, 32).permute(1, 2, 0, 3))
        embedded = ours.get_input_embeddings()(ids)
        soft = method.slots(embedded, mask.bool(), torch.zeros(2, dtype=torch.long))
        states = ours(
            inputs_embeds=torch.cat([soft, embedded], 1), attention_mask=torch.ones(2, 12)
        ).last_hidden_state
        expected = wrapped(input_ids=ids, attention_mask=mask).last_hidden_state
    assert torch.allclose(states[:, 5:], expected[:, -7:], atol=1e-4)


# Bottlenecks.


def test_bottleneck_is_its_equation_and_starts_near_the_identity():
    module = Bottleneck(6, 3, generator())
    x = torch.randn(4, 6, generator=generator())
    assert (module(x) - x).abs().max() < 1e-4
    assert module.down.abs().max() <= 2e-3
    assert module.down.std() > 3e-4
    with torch.no_grad():
        for p in module.parameters():
            p.normal_(generator=generator())
    a, b, c, d = (p.detach().double().numpy() for p in module.parameters())
    names = [name for name, _ in module.named_parameters()]
    assert names == ["down", "down_bias", "up", "up_bias"]
    hidden = x.double().numpy() @ a.T + b
    gelu = hidden * 0.5 * (1 + np.vectorize(math.erf)(hidden / math.sqrt(2)))
    assert np.allclose(module(x).detach().numpy(), x.numpy() + gelu @ c.T + d, atol=1e-5)


def test_adapters_work_on_both_sub_layers_before_the_sum():
    ours, bare = bert_pair()
    method = Adapter(host=host_of(ours), generator=generator(), size=3)
    with torch.no_grad():
        for p in method.bottlenecks.parameters():
            p.normal_(std=0.3, generator=generator())
        ids = torch.randint(5, 40, (2, 7), generator=generator())
        states = bare.embeddings(ids)
        for k, layer in enumerate(bare.encoder.layer):
            mixed, _ = layer.attention.self(states)
            output = method.bottlenecks[2 * k](layer.attention.output.dense(mixed))
            states = layer.attention.output.LayerNorm(output + states)
            output = method.bottlenecks[2 * k + 1](layer.output.dense(layer.intermediate(states)))
            states = layer.output.LayerNorm(output + states)
        assert torch.allclose(ours(ids).last_hidden_state, states, atol=1e-5)


# Differences.


def diff(share=0.02, **options):
    model = transformers.BertModel.from_pretrained(tiny_encoder("bert"), add_pooling_layer=False)
    return DiffPrune(host=host_of(model.eval()), generator=generator(), share=share, **options)


def test_difference_is_its_equation():
    method = diff().eval()
    with torch.no_grad():
        for p in method.parameters():
            p.normal_(generator=generator())
    w, a, g = (p.detach().double().numpy() for p in (method.values, method.gates, method.group_gates))

    def gate(log_alpha):
        return np.clip(3 / (1 + np.exp(-log_alpha)) - 1.5, 0, 1)

    groups = np.repeat(g, method.sizes)
    assert np.allclose(method.difference().detach().numpy(), w * gate(a) * gate(groups), atol=1e-5)
    open_share = 1 / (1 + np.exp(-a)) / (1 + np.exp(-groups))  # l = -r: the shift log(-l / r) is 0
    assert method.penalty().item() == pytest.approx(1.25e-7 * open_share.sum(), rel=1e-4)


def random_diff(**options):
    method = diff(**options).train()
    with torch.no_grad():
        for p in method.parameters():
            p.normal_(generator=generator())
    return method


def drawn_weights(method):
    """The weights of one draw, and what the same draw makes of them by autograd and the equations."""
    base = [p.detach() for p in method.host.model.parameters()]
    groups = method.group_gates.detach().sigmoid().requires_grad_()
    torch.manual_seed(3)
    *ours, opened = gated_weights(method.values, method.gates, groups, Room(base))
    torch.manual_seed(3)
    u = torch.cat([torch.empty(p.numel()).uniform_(1e-6, 1 - 1e-6) for p in base])
    sizes = torch.tensor(method.sizes)
    stretched = (u.log() - (-u).log1p() + method.gates).sigmoid() * 3 - 1.5
    difference = method.values * stretched.clamp(0, 1) * groups.repeat_interleave(sizes)
    theirs = torch.cat([p.flatten() for p in base]) + difference
    open_share = torch.stack([part.sum() for part in method.gates.sigmoid().split(method.sizes)])
    return groups, (torch.cat([p.flatten() for p in ours]), opened), (theirs, open_share)


def test_drawn_weights_and_their_gradients_are_those_of_the_equation():
    method = random_diff()
    groups, ours, theirs = drawn_weights(method)
    assert torch.allclose(ours[0], theirs[0], atol=1e-5)
    assert torch.allclose(ours[1], theirs[1], rtol=1e-4)
    signal = torch.randn(len(ours[0]), generator=generator())
    leaves = (method.values, method.gates, groups)
    wanted = torch.autograd.grad((theirs[0] * signal).sum() + theirs[1].square().sum(), leaves)
    found = torch.autograd.grad((ours[0] * signal).sum() + ours[1].square().sum(), leaves)
    for one, other in zip(found, wanted, strict=True):
        assert torch.allclose(one, other, rtol=1e-3, atol=1e-4)


def test_gradients_of_pieces_add_up():
    ids = torch.randint(5, 40, (2, 7), generator=generator())

    def step(method):
        torch.manual_seed(0)
        states = method.call(method.host.model, {"input_ids": ids}).last_hidden_state
        (states.square().sum() + method.penalty()).backward()
        return [p.grad.clone() for p in method.parameters()]

    once = random_diff()
    single = step(once)
    twice = step(once)
    for one, other in zip(single, twice, strict=True):
        assert torch.allclose(2 * one, other, rtol=1e-3, atol=1e-5)


def test_gates_are_drawn_as_the_hard_concrete_distribution_says():
    torch.manual_seed(0)
    log_alpha = torch.full((200_000,), 0.7)
    room = Room([torch.zeros(200_000)])
    ones = torch.ones(200_000)
    gated_weights(ones, log_alpha, torch.ones(1), room)
    # P(z = 0) = P(s <= 1/2) = σ(-log α) with l = -r = -1.5; P(z = 1) = P(s >= 5/6) = 1 - σ(log 5 - log α).
    for drawn in (gate(log_alpha, drawn=True), room.gates):
        for found, expected in (
            ((drawn == 0), 1 / (1 + math.exp(0.7))),
            ((drawn == 1), 1 / (1 + 5 / math.exp(0.7))),
        ):
            assert float(found.float().mean()) == pytest.approx(expected, abs=5e-3)


def test_projection_keeps_the_largest_differences():
    method = diff().eval()
    with torch.no_grad():
        method.values.normal_(generator=generator())
        before = method.difference()
        method.project()
    after = method.difference().detach()
    n_kept = int(0.02 * len(after))
    assert int((after != 0).sum()) == n_kept
    largest = before.abs().topk(n_kept).indices
    assert torch.equal(after[largest], before[largest])


def test_gradient_of_the_difference_is_that_of_the_weights():
    method = diff(penalty=0.0).eval()
    model = method.host.model
    ids = torch.randint(5, 40, (2, 7), generator=generator())
    method.train()
    method.projected = True  # no noise: δ = w
    method.call(model, {"input_ids": ids}).last_hidden_state.square().sum().backward()
    ours = method.values.grad
    for p in model.parameters():
        p.requires_grad_(True)
    model(input_ids=ids).last_hidden_state.square().sum().backward()
    theirs = torch.cat(
        [torch.zeros(p.numel()) if p.grad is None else p.grad.flatten() for p in model.parameters()]
    )
    assert torch.allclose(ours, theirs, rtol=1e-3, atol=1e-4)


def test_diff_prune_reports_both_scores_and_its_share(folder):
    for epochs in (1, 5):
        result = tuning.run(
            folder, "diff_prune", "tags", out=f"diff-{epochs}", plan={"epochs": epochs},
            options={"share": "0.005"},
        )  # fmt: skip
        assert 0 < result["nonzero_frac"] <= 0.005
        assert {"dev_before_projection", "dev_after_projection"} <= set(result)
        assert result["best_epoch"] >= (1 if epochs == 1 else 4)
    with pytest.raises(PipelineError, match="does not go with diff_prune"):
        tuning.run(folder, "diff_prune", out="no", plan={"checkpointing": True})


# ATTEMPT.


def attempt_of(**options):
    model = transformers.BertModel.from_pretrained(tiny_encoder("bert"), add_pooling_layer=False).eval()
    sources = {n: torch.randn(4, 32, generator=generator()) * s for n, s in (("a", 1.0), ("b", 3.0))}
    host = host_of(model, sources=sources, tasks=("one", "two"))
    method = Attempt(host=host, generator=generator(), size=5, **options)
    with torch.no_grad():
        for p in method.parameters():
            p.add_(torch.randn(p.shape, generator=generator()))
    return method


def attempt_inputs():
    embedded = torch.randn(3, 6, 32, generator=generator())
    mask = torch.arange(6) < torch.tensor([[6], [2], [4]])
    return embedded, mask, torch.tensor([1, 0, 1])


def numpy_attempt(method, embedded, mask, tasks, targets, temperature=1.0):
    """P and a_j by the paper's equations, in float64, an example at a time."""
    prompts = method.prompts.double().numpy()
    down, up = (p.detach().double().numpy() for p in (method.network.down, method.network.up))
    gain, shift = (
        p.detach().double().numpy() for p in (method.network.norm.weight, method.network.norm.bias)
    )
    mixed, weights = [], []
    for x, m, task in zip(embedded.double().numpy(), mask.numpy(), tasks.tolist(), strict=True):
        hidden = down @ x[m].max(0)
        found = up @ (hidden / (1 + np.exp(-hidden)))
        found = (found - found.mean()) / np.sqrt(found.var() + 1e-5) * gain + shift
        all_prompts = [*prompts, targets[task]]
        scores = np.array([p.max(0) @ found for p in all_prompts]) / (32 * np.e**temperature)
        a = np.exp(scores - scores.max())
        a /= a.sum()
        mixed.append(targets[task] + sum(w * p for w, p in zip(a, all_prompts, strict=True)))
        weights.append(a)
    return np.array(mixed), np.array(weights)


@pytest.mark.parametrize("temperature", [1.0, -1.0])
def test_attempt_is_its_equations(temperature):
    method, inputs = attempt_of(temperature=temperature), attempt_inputs()
    targets = method.targets.detach().double().numpy()
    mixed, weights = numpy_attempt(method, *inputs, targets, temperature)
    assert np.abs(method.slots(*inputs).detach().numpy() - mixed).max() < 1e-5
    assert np.abs(method.attentions(*inputs).detach().numpy() - weights).max() < 1e-5
    assert np.ptp(weights, axis=1).min() > 1e-3


def test_attempts_gradients_are_those_of_the_equations():
    method, inputs = attempt_of(temperature=-2.0), attempt_inputs()
    method.double()
    embedded, mask, tasks = inputs[0].double(), *inputs[1:]
    direction = torch.randn(3, 4, 32, generator=generator()).double()
    (method.slots(embedded, mask, tasks) * direction).sum().backward()

    def value(targets):
        mixed, _ = numpy_attempt(method, embedded, mask, tasks, targets, -2.0)
        return float((mixed * direction.numpy()).sum())

    targets = method.targets.detach().numpy().copy()
    for place in ((0, 1, 3), (1, 2, 7), (1, 0, 31), (0, 3, 0)):
        moved = [targets.copy(), targets.copy()]
        moved[0][place] += 1e-5
        moved[1][place] -= 1e-5
        slope = (value(moved[0]) - value(moved[1])) / 2e-5
        assert float(method.targets.grad[place]) == pytest.approx(slope, abs=1e-5, rel=1e-5)
    for weight in (method.network.down, method.network.up, method.network.norm.weight):
        place = (0,) * weight.dim()
        sides = []
        for step in (1e-5, -1e-5):
            with torch.no_grad():
                weight[place] += step
            sides.append(value(targets))
            with torch.no_grad():
                weight[place] -= step
        assert float(weight.grad[place]) == pytest.approx((sides[0] - sides[1]) / 2e-5, abs=1e-5, rel=1e-5)


def test_ablations_of_attempt():
    inputs = attempt_inputs()
    sources = attempt_of().prompts
    method = attempt_of(attention=False)
    assert method.network is None
    expected = method.targets[inputs[2]] + sources.mean(0)
    assert torch.allclose(method.slots(*inputs), expected, atol=1e-6)
    method = attempt_of(target=False)
    weights = method.attentions(*inputs)
    assert weights.shape == (3, 2)
    assert torch.allclose(method.slots(*inputs), torch.einsum("et,tsw->esw", weights, sources), atol=1e-5)
    method = attempt_of(single="b")
    assert torch.equal(method.prompts, sources[1:])
    assert method.attentions(*inputs).shape == (3, 2)
    method = attempt_of(transfer=False)
    assert are_of_the_vocabulary(method.prompts.flatten(0, 1), method.host.model)


def test_target_prompts_start_as_a_source():
    model = transformers.BertModel.from_pretrained(tiny_encoder("bert"), add_pooling_layer=False)
    sources = {"a": torch.zeros(4, 32), "b": torch.ones(4, 32)}
    host = host_of(model, sources=sources, tasks=("one", "two"))
    assert float(Attempt(host=host, generator=generator()).targets.detach().abs().max()) == 0
    assert float(Attempt(host=host, generator=generator(), start="b").targets.detach().min()) == 1


def test_attempt_of_several_tasks_and_with_a_network_trained_before(folder):
    data = str(folder / "data")
    further = [TaskAsked(data=data, target="tags"), TaskAsked(data=data, target="score")]
    choices = choices_of(folder, "attempt")
    result = tuning.run(folder, "attempt", out="multi", further=further, **choices)
    assert result["metric"] == "mean"
    assert list(result["tasks"]) == ["data.intent", "data.tags", "data.score"]
    weights = safetensors.torch.load_file(folder / "multi" / "attentions.safetensors")
    for task, found in weights.items():
        assert found.shape == (16, 3)
        assert torch.allclose(found.sum(1), torch.ones(16), atol=1e-5), task
    with safetensors.safe_open(folder / "multi" / "attentions.safetensors", "pt") as opened:
        assert json.loads(opened.metadata()["data.tags"]) == ["a", "b", "data.tags"]
    for task in ("data.intent", "tags", "score"):
        found = use.evaluate(str(folder / "multi"), "dev", target=task)
        assert found["task"] == f"data.{task.removeprefix('data.')}"
        known = {f"{found['task']}.{name}": score for name, score in found["metrics"].items()}
        assert known == pytest.approx({name: result["dev_metrics"][name] for name in known}, abs=1e-3)
    options = {**choices["options"], "network": str(folder / "multi")}
    tuned, _, _ = tuning.ready(folder, "attempt", **{**choices, "options": options})
    trained = safetensors.torch.load_file(folder / "multi" / "tuned.safetensors")
    assert torch.equal(tuned.method.network.down, trained["method.network.down"])


# SPoT.


def spot_of(sources, **options):
    model = transformers.BertModel.from_pretrained(tiny_encoder("bert"), add_pooling_layer=False)
    method = SPoT(host=host_of(model, sources=sources), generator=generator(), **options)
    method.begin()
    return method


def test_spot_starts_from_the_nearest_prompts():
    sources = {
        n: torch.randn(4, 32, generator=torch.Generator().manual_seed(i)) for i, n in enumerate("abcdt")
    }
    means = {n: p.double().mean(0).numpy() for n, p in sources.items()}
    near = {
        n: means[n] @ means["t"] / np.linalg.norm(means[n]) / np.linalg.norm(means["t"]) for n in "abcd"
    }
    best = sorted("abcd", key=lambda n: -near[n])[:2]
    kept = {n: max(near[n], 0) for n in best}
    assert sum(kept.values()) > 0
    expected = sum(kept[n] * sources[n].double() for n in best) / sum(kept.values())
    method = spot_of(sources, mode="targeted", like="t", nearest=2)
    assert torch.allclose(method.prompt.double(), expected, atol=1e-6)
    assert torch.equal(spot_of({"a": sources["a"]}).prompt, sources["a"])


def test_spot_says_what_it_lacks():
    sources = {n: torch.ones(4, 32) for n in "ab"}
    with pytest.raises(PipelineError, match="mode generic starts from one prompt, --prompts holds 2"):
        spot_of(sources)
    with pytest.raises(PipelineError, match="give its name by --set like=NAME"):
        spot_of(sources, mode="targeted")
    with pytest.raises(PipelineError, match="give --prompts"):
        spot_of({})


# Bad input.


@pytest.mark.parametrize(
    ("method", "family", "said"),
    [
        ("adapter", "albert", "use prompt_tuning or fine_tune"),
        ("prefix_tuning", "albert", "use prompt_tuning or fine_tune"),
        ("bitfit", "llama", "a llama model has no bias terms"),
    ],
)
def test_backbone_that_cannot_take_a_method(folder, method, family, said):
    with pytest.raises(PipelineError, match=f"--method {method} with .*{said}"):
        tuning.ready(folder, method, encoder=tiny_encoder(family))


def test_prompts_that_do_not_fit_are_refused(folder, tmp_path):
    def ready(prompts, encoder=None):
        more = {} if encoder is None else {"encoder": encoder}
        return tuning.ready(folder, "attempt", prompts=str(prompts), **more)

    other = tiny.encoder(tmp_path / "other", seed=3)
    with pytest.raises(PipelineError, match="was trained with another encoder"):
        ready(folder / "sources", other)
    with pytest.raises(PipelineError, match="the encoder's input embeddings are 32 wide"):
        ready(folder / "sources", tiny_encoder("bert"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(PipelineError, match="no prompt there: train some with"):
        ready(tmp_path / "empty")
    with pytest.raises(PipelineError, match="no such file or folder"):
        ready(tmp_path / "nowhere")
    for name, length in (("long", 6), ("short", 4)):
        with safetensors.safe_open(folder / "sources" / "a" / "prompt.safetensors", "pt") as opened:
            metadata, prompt = opened.metadata(), opened.get_tensor("prompt")
        resized = prompt.repeat(2, 1)[:length].contiguous()
        (tmp_path / "mixed").mkdir(exist_ok=True)
        safetensors.torch.save_file(
            {"prompt": resized}, tmp_path / "mixed" / f"{name}.safetensors", metadata
        )
    with pytest.raises(PipelineError, match="prompt short has 4 soft tokens, long has 6"):
        ready(tmp_path / "mixed")
    with pytest.raises(PipelineError, match="starts from prompts trained before: give --prompts"):
        tuning.ready(folder, "attempt")


def test_more_soft_tokens_than_positions(folder):
    with pytest.raises(PipelineError, match="position table of the encoder has 32 entries"):
        tuning.ready(folder, "prompt_tuning", options={"length": "40"})
    with pytest.raises(PipelineError, match="32 positions, 20 of them go to soft tokens: give 12 or less"):
        tuning.ready(folder, "prompt_tuning", options={"length": "20"}, max_length=20)
    _, run, _ = tuning.ready(folder, "prompt_tuning", options={"length": "20"})
    assert run.source.max_length == 12
