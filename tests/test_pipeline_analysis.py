"""What is told of layers: against numpy on the states themselves; and what cannot be answered."""

import json
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import tiny
import torch

from cache import Kind, open_bank
from cache.targets import ranges
from pipeline import parts
from pipeline.analysis import _words
from pipeline.analysis._base import Question, analyze
from pipeline.analysis._material import gather
from pipeline.analysis._weights import read
from pipeline.analysis.similarity import _blocks, aligned, cka, cka_between
from pipeline.corpus import load_corpus
from pipeline.encoder import Encoder
from pipeline.errors import PipelineError
from pipeline.extract import extract
from pipeline.findings import load
from pipeline.grid import Grid
from pipeline.job import HeadRates, Schedule
from pipeline.results import load_run
from pipeline.run import train_run
from pipeline.runner import Plan
from pipeline.sweep import sweep

SCHEDULE = Schedule(epochs=2)


def train(bank, out, target, seed=0, **choices):
    rates = HeadRates(lr=1e-2, seed=seed)
    train_run(bank, target=target, out=str(out), rates=rates, schedule=SCHEDULE, **choices)
    return str(out)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Heads on the shared bank of synthetic states: three seeds of two targets, and other fusions."""
    folder, bank = tmp_path_factory.mktemp("runs"), tiny.shared().path
    made = {
        f"{target}-{seed}": train(bank, folder / f"{target}-{seed}", target, seed)
        for target in ("label", "tags")
        for seed in range(3)
    }
    for name in ("dwatt", "linear", "concat"):
        made[name] = train(bank, folder / name, "tags", fusion=name)
    made["mean"] = train(bank, folder / "mean", "label", options={"pooling": "mean"})
    return made


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    """An encoder, two banks of its text, and a head of each of two targets."""
    folder = tmp_path_factory.mktemp("text")
    tiny.encoder(folder / "encoder")
    rows = {split: tiny.rows_of_text(split, n) for split, n in (("train", 20), ("dev", 8))}
    rows["dev"][2]["tokens"] = ["open", "the", "radios", "7", "?"]
    rows["dev"][2]["tags"] = ["O"] * 5
    data = load_corpus(tiny.write_jsonl(folder / "data", rows, ["tokens", "tags", "intent"]))
    encoder = Encoder(str(folder / "encoder"), words=True, device="cpu")
    for keep in ("all", "words"):
        extract(data, encoder, str(folder / keep), keep=keep)
    made = {t: train(str(folder / "all"), folder / t, t) for t in ("intent", "tags")}
    words = train(str(folder / "words"), folder / "tags-words", "tags", 1)
    return SimpleNamespace(folder=folder, **made, words=words)


def softmax(x):
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def weights_of(run, split, example, tokens):
    """softmax_n(Q·z_n) of some tokens of an example, from the states as the reader gives them."""
    query = load_run(run).head.fusion.query[0].detach().double().numpy()
    states = split.numpy()[:, split.start[example] : split.start[example] + split.length[example]]
    return softmax((states[:, tokens].astype(np.float64) @ query).T)


def dev():
    return tiny.shared().split("dev")


def rows_of(result, table):
    return next(t["rows"] for t in result["tables"] if t["name"] == table)


# Weights over layers.


def expected(run, group):
    """Mean weights of each group of decoded tokens; `group` gives a token's group by example and token."""
    split, found = dev(), {}
    for example in range(split.n_examples):
        kind = split.kind[split.start[example] : split.start[example] + split.length[example]]
        of_tags = "tags" in run
        tokens = np.flatnonzero(kind == Kind.WORD) if of_tags else [0]
        for token, weights in zip(tokens, weights_of(run, split, example, tokens), strict=True):
            name = group(split, example, int(token))
            if name is not None:
                found.setdefault(name, []).append(weights)
    return {name: (len(weights), np.mean(weights, 0)) for name, weights in found.items()}


def a_class(split, example, token):
    value = split.target("label").values[example]
    return tiny.CLASSES[value] if value >= 0 else None


def an_entity(split, example, token):
    first = int(split.n_words[:example].sum())
    value = split.target("tags").values[first + split.word_id[split.start[example] + token]]
    return {0: "O", 1: "a", 2: "a", 3: "b", -1: None}[int(value)]


@pytest.mark.parametrize("memory", [2**30, 1])
@pytest.mark.parametrize(
    ("run", "grouping", "group"),
    [
        ("label-0", "all", lambda *_: "all"),
        ("tags-1", "all", lambda *_: "all"),
        ("label-0", "class", a_class),
        ("tags-0", "class", an_entity),
        ("tags-0", "position", lambda split, example, token: str(token)),
        ("tags-0", "kind", lambda *_: "word"),
        ("label-1", "kind", lambda *_: "special token"),
    ],
)
def test_weights_are_averaged_over_decoded_tokens(runs, run, grouping, group, memory):
    material = gather([runs[run]], memory_bytes=memory)
    found = read(material, material.runs)[0].means[grouping]
    wanted = expected(runs[run], group)
    assert found.keys() == wanted.keys()
    for name, (tokens, weights) in wanted.items():
        assert found[name].tokens == tokens
        np.testing.assert_allclose(found[name].weights, weights, atol=1e-5)
        assert found[name].weights.sum() == pytest.approx(1.0, abs=1e-6)


def test_weights_of_every_head_are_its_own_in_company(runs):
    together = gather([runs["tags-0"], runs["linear"], runs["tags-2"]])
    for reading in read(together, together.runs):
        alone = gather([reading.run.path])
        one = read(alone, alone.runs)[0]
        np.testing.assert_allclose(
            one.means["all"]["all"].weights, reading.means["all"]["all"].weights, rtol=1e-6
        )


def test_pooled_heads_weigh_every_token_they_pool(runs):
    material = gather([runs["mean"]])
    means = read(material, material.runs)[0].means
    assert means["all"]["all"].tokens == int(dev().length.sum())
    assert set(means["kind"]) == {"special token", "word", "later sub-word"}


def test_tasks_over_seeds(runs, tmp_path):
    paths = [runs[f"{target}-{seed}"] for target in ("label", "tags") for seed in range(3)]
    result = analyze(paths, out=str(tmp_path), what=["attention"], by="class")
    rows = rows_of(result, "attention")
    n_tokens = {"label": 50, "tags": expected(runs["tags-0"], lambda *_: 0)[0][0]}
    for target in ("label", "tags"):
        heads = np.array([expected(runs[f"{target}-{seed}"], lambda *_: 0)[0][1] for seed in range(3)])
        own = [row for row in rows if row["task"] == target]
        assert [row["layer"] for row in own] == [0, 1, 2, 3]
        np.testing.assert_allclose([row["weight"] for row in own], heads.mean(0), atol=1e-5)
        np.testing.assert_allclose([row["sd"] for row in own], heads.std(0, ddof=1), atol=1e-5)
        assert sum(row["weight"] for row in own) == pytest.approx(1.0, abs=1e-6)
        assert {(row["heads"], row["tokens"]) for row in own} == {(3, n_tokens[target])}
    apart = {(row["one"], row["other"]): row["pairs"] for row in rows_of(result, "attention-distance")}
    assert apart == {("label", "label"): 3, ("tags", "tags"): 3, ("label", "tags"): 9}
    back, _ = load(str(tmp_path))
    assert back.kind == "analysis"
    assert {figure.name for figure in back.figures} >= {"attention", "attention-by-class-label"}


def test_depth_is_a_question_of_its_own(runs, tmp_path):
    choices = {"what": ["depth", "attention"], "by": "class"}
    result = analyze([runs["dwatt"], runs["tags-0"]], out=str(tmp_path), **choices)
    rows = rows_of(result, "depth")
    assert [row["layer"] for row in rows] == [1, 2, 3]
    assert sum(row["weight"] for row in rows) == pytest.approx(1.0, abs=1e-6)
    assert {row["layer"] for row in rows_of(result, "attention")} == {0, 1, 2, 3}


def test_languages_are_banks(runs, tmp_path):
    other = tiny.bank(tmp_path / "other", seed=5, sizes={"dev": 20}, only=("tags",))
    paths = [runs["tags-0"], tiny.shared().path, other.path]
    result = analyze(paths, out=str(tmp_path / "out"), what=["attention"], by="language")
    rows = rows_of(result, "attention-by-language")
    assert [row["language"] for row in rows] == ["bank", "other"]
    for row in rows:
        assert sum(row[f"layer_{n}"] for n in range(4)) == pytest.approx(1.0, abs=1e-6)


# Probes.


def test_probes_are_the_scores_of_a_sweep(tmp_path):
    grid = Grid(targets=["label", "tags"], fusions=["single_layer"], lr=(1e-2, 1e-5), seeds=2)
    store = tiny.shared().path
    made = sweep(Plan(store=store, schedule=SCHEDULE), grid, out=str(tmp_path / "sweep"))
    result = analyze([str(tmp_path / "sweep")], out=str(tmp_path / "out"), what=["probes"])
    rows = rows_of(result, "probes")
    assert [(row["target"], row["layer"]) for row in rows] == [
        (t, n) for t in ("label", "tags") for n in range(4)
    ]
    for row in rows:
        heads = [
            [r["dev"] for r in made["rows"] if r["target"] == row["target"] and r["lr"] == lr
             and json.loads(r["options"])["layer"] == row["layer"]]
            for lr in (1e-2, 1e-5)
        ]  # fmt: skip
        best = max(heads, key=np.mean)
        assert (row["dev"], row["dev_sd"]) == pytest.approx((np.mean(best), np.std(best, ddof=1)))
        assert row["heads"] == 2
    (tmp_path / "sweep" / "results.parquet").unlink()
    with pytest.raises(PipelineError, match="has not ended: run the same 'layerbank sweep' again"):
        analyze([str(tmp_path / "sweep")], out=str(tmp_path / "out"))


def test_probes_of_runs(runs, tmp_path):
    store = tiny.shared().path
    made = [
        train(store, tmp_path / f"{n}", "label", fusion="single_layer", options={"layer": n})
        for n in (0, 2)
    ]
    rows = rows_of(analyze(made, out=str(tmp_path / "out"), what=["probes"]), "probes")
    assert [(row["layer"], row["dev"]) for row in rows] == [
        (n, load_run(path).result["dev"]) for n, path in zip((0, 2), made, strict=True)
    ]


# Similarity.


def plain_cka(x, y):
    x, y = x - x.mean(0), y - y.mean(0)
    cross, own = np.linalg.norm(y.T @ x) ** 2, np.linalg.norm(x.T @ x) * np.linalg.norm(y.T @ y)
    return cross / own


def tokens_of(split):
    """All states in row order, without fill."""
    order = np.argsort(split.row)
    return split.numpy()[:, ranges(split.start[order], split.length[order])].astype(np.float64)


@pytest.mark.parametrize("changes", [{}, {"dtype": "float16"}, {"dtype": "int8"}, {"keep": "words"}])
def test_cka_of_all_pairs_of_layers(changes):
    split = tiny.shared(**changes).split("train")
    assert split.n_blocks > 2
    states = tokens_of(split)
    wanted = [[plain_cka(x, y) for y in states] for x in states]
    np.testing.assert_allclose(cka(split, _blocks(split, 0)), wanted, atol=1e-5)


def test_cka_in_little_memory_is_the_same(monkeypatch):
    split = tiny.shared().split("train")
    whole = cka(split, _blocks(split, 0))
    monkeypatch.setattr("pipeline.analysis.similarity.PRODUCTS_BYTES", 1)
    np.testing.assert_array_equal(cka(split, _blocks(split, 0)), whole)


def test_one_block_is_read_at_a_time(monkeypatch):
    split, shapes = tiny.shared().split("train"), []
    real = torch.from_numpy
    monkeypatch.setattr(torch, "from_numpy", lambda a: shapes.append(a.shape) or real(a))
    cka(split, _blocks(split, 0))
    assert max(shape[1] for shape in shapes) <= split.block_tokens < split.n_tokens


def test_some_tokens_are_whole_blocks():
    split = tiny.shared().split("train")
    some = _blocks(split, split.block_tokens // 2)
    assert some == split.sequence[:1].tolist()
    assert _blocks(split, 10**9) == _blocks(split, 0) == sorted(split.sequence.tolist())
    inside = split.numpy()[:, some[0] * split.block_tokens : (some[0] + 1) * split.block_tokens]
    kind = split.kind[some[0] * split.block_tokens : (some[0] + 1) * split.block_tokens]
    states = inside[:, kind != Kind.FILL].astype(np.float64)
    np.testing.assert_allclose(cka(split, some)[0, 3], plain_cka(states[0], states[3]), atol=1e-5)


def test_banks_of_one_text_are_aligned_by_row(tmp_path):
    one = tiny.shared().split("train")
    other = tiny.bank(tmp_path / "other", seed=9, layers=(1, 3), dtype="int8").split("train")
    assert one.row.tolist() != other.row.tolist()
    found = cka_between(one, other, aligned(one, other), _blocks(one, 0))
    wanted = [[plain_cka(x, y) for y in tokens_of(other)] for x in tokens_of(one)]
    np.testing.assert_allclose(found, wanted, atol=1e-5)
    assert aligned(one, tiny.shared(keep="words").split("train")) is None
    assert aligned(one, dev()) is None


def test_similarity_of_banks(tmp_path):
    int8 = tiny.bank(tmp_path / "int8", dtype="int8")
    result = analyze([tiny.shared().path, int8.path], out=str(tmp_path / "out"), what=["similarity"])
    assert [table["name"] for table in result["tables"]] == [
        "similarity-bank", "similarity-int8", "similarity-bank-int8",
    ]  # fmt: skip
    both = rows_of(result, "similarity-bank-int8")
    assert [row[f"layer_{row['layer']}"] > 0.99 for row in both] == [True] * 4


# Words and sentences.


def test_kinds_of_words(text):
    split = open_bank(str(text.folder / "all")).split("dev")
    tokenizer = _words.open_tokenizer(open_bank(str(text.folder / "all")).recipe)
    example = int(np.flatnonzero(split.row == 2)[0])
    here = slice(int(split.start[example]), int(split.start[example] + split.length[example]))
    kind, ids = split.kind[here], split.input_ids[here]
    first, words = _words.words(kind, ids, tokenizer)
    assert words[:3] == ["[CLS]", "open", "the"]
    assert words[3:] == ["radios", "[UNK]", "[UNK]", "[SEP]"]
    kinds = [_words.KIND_NAMES[k] for k in _words.kinds(kind, ids, tokenizer)]
    assert kinds[0] == kinds[-1] == "special token"
    assert [kinds[k] for k in first[1:4]] == ["word"] * 3
    assert _words.kinds(kind, ids, None).tolist().count(_words.KIND_NAMES.index("word")) == 5


@pytest.mark.parametrize("sentence", ["2", "open the radios 7 ?"])
def test_a_row_and_its_text_have_the_same_colours(text, tmp_path, sentence):
    result = analyze([text.intent, text.tags], out=str(tmp_path), what=["sentence"], sentence=sentence)
    split = open_bank(str(text.folder / "all")).split("dev")
    example = int(np.flatnonzero(split.row == 2)[0])
    first = np.flatnonzero(
        split.kind[split.start[example] : split.start[example] + split.length[example]] != Kind.CONTINUATION
    )
    assert len(result["tables"]) == 2
    for table, run in zip(result["tables"], (text.intent, text.tags), strict=True):
        found = [[row[f"layer_{n}"] for n in range(4)] for row in table["rows"]]
        np.testing.assert_allclose(found, weights_of(run, split, example, first), atol=2e-3)
        np.testing.assert_allclose(np.sum(found, 1), 1, atol=1e-6)
    figure = load(str(tmp_path))[0].figures[0].chart
    assert "1 open" in json.dumps(figure)


def test_all_that_fits_is_told(text, tmp_path):
    notes = []
    result = analyze([text.intent, text.tags], out=str(tmp_path), note=notes.append)
    assert result["what"] == notes == ["attention", "sentence", "similarity"]
    encoder = shutil.move(text.folder / "encoder", text.folder / "moved")
    try:
        told = analyze([text.tags], out=str(tmp_path / "gone"), note=notes.append)
        assert any("no sentence is shown" in note for note in told["notes"])
        assert any("count as words" in note for note in notes)
        again = analyze([text.tags], out=str(tmp_path / "again"), encoder=str(encoder))
        assert not any("no sentence" in note for note in again["notes"])
    finally:
        shutil.move(text.folder / "moved", text.folder / "encoder")


# What cannot be answered.


def test_every_question_is_one():
    for name in parts.names("question"):
        assert issubclass(parts.load("question", name), Question)


@pytest.mark.parametrize(
    ("paths", "choices", "said"),
    [
        ([], {}, "nothing to analyze: name runs, sweeps or banks"),
        (["nowhere"], {}, "no run at nowhere"),
        (["concat"], {"what": ["attention"]}, "of fusion concat: train heads of attention, dwatt"),
        (["dwatt"], {"what": ["attention"]}, "is of dwatt: give --what depth"),
        (["tags-0"], {"what": ["depth"]}, "no run of dwatt"),
        (["tags-0"], {"what": ["probes"]}, "no head of single_layer"),
        (["tags-0"], {"what": ["atention"]}, "did you mean 'attention'"),
        (["tags-0"], {"split": "validation"}, "has no split 'validation'"),
        (["tags-0"], {"what": ["attention"], "by": "language"}, "all heads read one bank"),
        (["label-0"], {"what": ["attention"], "by": "position"}, "decode one token of an example"),
    ],
)  # fmt: skip
def test_what_cannot_be_answered(runs, tmp_path, paths, choices, said):
    with pytest.raises(PipelineError, match=said) as error:
        analyze([runs.get(path, path) for path in paths], out=str(tmp_path / "out"), **choices)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "out").exists()


def test_half_a_run(runs, tmp_path):
    half = tmp_path / "half"
    shutil.copytree(runs["tags-0"], half)
    (half / "result.json").unlink()
    with pytest.raises(PipelineError, match=r"no whole run folder, it lacks result\.json"):
        analyze([str(half)], out=str(tmp_path / "out"))


def changed(run, to, change):
    """A copy of a run whose config says otherwise."""
    shutil.copytree(run, to)
    config = json.loads((to / "config.json").read_text())
    change(config["source"])
    (to / "config.json").write_text(json.dumps(config))
    return str(to)


def test_a_bank_that_is_gone(runs, tmp_path):
    lost = changed(
        runs["tags-0"], tmp_path / "lost", lambda source: source.update(store=str(tmp_path / "gone"))
    )
    with pytest.raises(PipelineError, match=r"is no longer at .*gone: name where it is now beside the run"):
        analyze([lost], out=str(tmp_path / "out"))
    choices = {"what": ["attention"], "by": "class"}
    found = analyze([lost, tiny.shared().path], out=str(tmp_path / "out"), **choices)
    own = analyze([runs["tags-0"]], out=str(tmp_path / "own"), **choices)
    assert rows_of(found, "attention") == rows_of(own, "attention")


def test_heads_of_two_encoders(runs, tmp_path):
    other = changed(
        runs["tags-0"], tmp_path / "other", lambda source: source["encoder"].update(weights_sha256="x" * 64)
    )
    with pytest.raises(PipelineError, match="analyze each encoder alone"):
        analyze([runs["tags-1"], other], out=str(tmp_path / "out"))
    with pytest.raises(PipelineError, match="other weights"):
        analyze([other], out=str(tmp_path / "out"))


def test_a_row_that_is_not_there(text, tmp_path):
    with pytest.raises(PipelineError, match="split dev has rows 0 to 7"):
        analyze([text.tags], out=str(tmp_path), what=["sentence"], sentence="8")


def test_a_head_without_weights_is_noted_among_others(runs, tmp_path):
    found = analyze([runs["concat"], runs["tags-0"]], out=str(tmp_path))
    assert "attention" in found["what"]
    assert any("of fusion concat" in note for note in found["notes"])
