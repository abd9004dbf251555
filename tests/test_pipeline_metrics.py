import numpy as np
import pytest
import scipy.stats
import seqeval.metrics
import sklearn.metrics
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline import metrics
from pipeline.errors import PipelineError

IOB = ["O", "B-a", "I-a", "B-b", "I-b", "B-a-b", "I-a-b"]
SCHEMES = [
    IOB,
    ["B-x", "I-x"],
    ["I-a", "I-b", "O"],
    ["O", "B", "I"],
    ["O", "B-a", "I-a", "E-a", "S-a", "I-b", "E-b"],
    ["O", "B-_", "I-_", "B-", "I", "B-O", "I-O"],
]


@st.composite
def tagged(draw, missing=False):
    """Tags of two heads and of the gold, and the lengths of the sentences."""
    names = draw(st.sampled_from(SCHEMES))
    lengths = draw(st.lists(st.integers(0 if missing else 1, 6), min_size=1, max_size=5))
    tag = st.integers(-1 if missing else 0, len(names) - 1)
    row = st.lists(tag, min_size=sum(lengths), max_size=sum(lengths))
    gold = np.array(draw(row), dtype=np.int64)
    heads = [np.array(draw(row), dtype=np.int64) for _ in range(2)]
    # Mostly right, so that whole entities are found.
    flips = [draw(st.lists(st.booleans(), min_size=len(gold), max_size=len(gold))) for _ in heads]
    heads = [np.where(f, h, gold) for f, h in zip(flips, heads, strict=True)]
    return names, np.array(lengths), np.array(heads), gold


def sentences(tags, names, lengths):
    words = [names[t] if t >= 0 else "O" for t in tags]
    ends = np.cumsum(lengths)
    return [words[e - n : e] for e, n in zip(ends, lengths, strict=True)]


def assert_entity_scores(ours, names, lengths, predictions, gold):
    truth = sentences(gold, names, lengths)
    for head, tags in enumerate(predictions):
        found = sentences(tags, names, lengths)
        assert ours["f1"][head] == pytest.approx(100 * seqeval.metrics.f1_score(truth, found))
        assert ours["precision"][head] == pytest.approx(100 * seqeval.metrics.precision_score(truth, found))
        assert ours["recall"][head] == pytest.approx(100 * seqeval.metrics.recall_score(truth, found))


@given(case=tagged())
@settings(max_examples=150)
def test_entity_scores_are_those_of_seqeval(case):
    names, lengths, predictions, gold = case
    ours = metrics.entity_f1(predictions, gold, names=names, lengths=lengths)
    assert_entity_scores(ours, names, lengths, predictions, gold)


@given(case=tagged(missing=True))
@settings(max_examples=50)
def test_words_without_a_tag_are_outside_of_entities(case):
    names, lengths, predictions, gold = case
    ours = metrics.report(predictions=predictions, gold=gold, names=names, lengths=lengths)
    assert list(ours) == ["f1", "precision", "recall", "accuracy"]
    assert_entity_scores(ours, names, lengths, np.where(gold >= 0, predictions, -1), gold)
    labelled = max(1, (gold >= 0).sum())
    right = ((predictions == gold) & (gold >= 0)).sum(1)
    np.testing.assert_allclose(ours["accuracy"], 100 * right / labelled)


def test_many_random_tags_are_those_of_seqeval():
    rng = np.random.default_rng(0)
    names = ["O"] + [f"{m}-type{k}" for k in range(20) for m in "BI"]
    lengths = rng.integers(1, 30, 200)
    gold = rng.integers(0, len(names), lengths.sum())
    predictions = np.where(rng.random((3, len(gold))) < 0.2, rng.integers(0, len(names), len(gold)), gold)
    ours = metrics.entity_f1(predictions, gold, names=names, lengths=lengths)
    assert_entity_scores(ours, names, lengths, predictions, gold)
    assert ours["f1"].min() > 20


@pytest.mark.parametrize("n_classes", [2, 3, 7])
@pytest.mark.parametrize("seed", range(5))
def test_class_scores_are_those_of_sklearn(n_classes, seed):
    rng = np.random.default_rng(seed)
    names = [f"c{k}" for k in range(n_classes)]
    gold = rng.integers(0, n_classes, 12)
    predictions = rng.integers(0, n_classes, (4, 12))
    predictions[3] = 0  # a head that always says the same
    ours = metrics.report(predictions=predictions, gold=gold, names=names)
    for head, predicted in enumerate(predictions):
        expected = {
            "accuracy": sklearn.metrics.accuracy_score(gold, predicted),
            "macro_f1": sklearn.metrics.f1_score(gold, predicted, average="macro"),
            "matthews": sklearn.metrics.matthews_corrcoef(gold, predicted),
        }
        if n_classes == 2:
            expected["binary_f1"] = sklearn.metrics.f1_score(gold, predicted)
        assert {m: s[head] for m, s in ours.items()} == pytest.approx(
            {m: 100 * e for m, e in expected.items()}
        )


def test_units_without_a_label_do_not_count():
    gold, predictions = np.array([0, 1, -1, 1]), np.array([[0, 1, 0, 1], [0, 1, 1, -1]])
    ours = metrics.report(predictions=predictions, gold=gold, names=["no", "yes"])
    np.testing.assert_allclose(ours["accuracy"], [100, 200 / 3])
    np.testing.assert_allclose(ours["binary_f1"], [100, 200 / 3])
    assert ours["macro_f1"][0] == ours["matthews"][0] == 100
    numbers = np.array([1.0, np.nan, 2.0, 3.0]), np.array([[1.0, 9.0, 2.0, 4.0]])
    ours = metrics.report(predictions=numbers[1], gold=numbers[0])
    assert ours["spearman"][0] == pytest.approx(100)
    assert ours["mse"][0] == pytest.approx(1 / 3)


@given(
    rows=st.lists(st.lists(st.integers(0, 4), min_size=8, max_size=8), min_size=3, max_size=3),
    scale=st.sampled_from([1.0, 0.1, 1e-6]),
)
@settings(max_examples=60)
def test_correlations_are_those_of_scipy(rows, scale):
    gold, *predictions = np.array(rows) * scale
    ours = metrics.report(predictions=np.array(predictions), gold=gold)
    for head, predicted in enumerate(predictions):
        if np.ptp(predicted) == 0 or np.ptp(gold) == 0:
            assert ours["spearman"][head] == ours["pearson"][head] == 0
            continue
        spearman, pearson = scipy.stats.spearmanr(gold, predicted), scipy.stats.pearsonr(gold, predicted)
        assert ours["spearman"][head] == pytest.approx(100 * spearman.statistic, abs=1e-6)
        assert ours["pearson"][head] == pytest.approx(100 * pearson.statistic, abs=1e-6)
        assert ours["mse"][head] == pytest.approx(sklearn.metrics.mean_squared_error(gold, predicted))


def test_a_head_that_diverged_scores_worst():
    predictions = np.array([[1.0, np.nan, 3.0], [1.0, np.inf, 3.0], [1, 2, 4]], dtype=np.float32)
    ours = metrics.report(predictions=predictions, gold=np.array([1.0, 2.0, 3.0]))
    assert ours["spearman"].tolist() == [0, 0, 100]
    assert ours["pearson"][:2].tolist() == [0, 0]
    assert np.isinf(ours["mse"][:2]).all()


@pytest.mark.parametrize(
    ("gold", "names", "lengths"),
    [
        (np.array([-1, -1]), ["a", "b"], None),
        (np.array([-1, -1]), IOB, np.array([2, 0])),
        (np.array([np.nan, np.nan]), [], None),
    ],
)
def test_nothing_labelled_is_zero(gold, names, lengths):
    predictions = np.zeros((3, 2), dtype=gold.dtype)
    ours = metrics.report(predictions=predictions, gold=gold, names=names, lengths=lengths)
    assert all(s.tolist() == [0, 0, 0] for s in ours.values())


def test_score_is_one_of_the_report():
    gold, predictions, lengths = np.array([1, 2, 0, 3]), np.array([[1, 2, 0, 1]]), np.array([3, 1])
    ours = metrics.report(predictions=predictions, gold=gold, names=IOB, lengths=lengths)
    for name, expected in ours.items():
        one = metrics.score(name, predictions=predictions, gold=gold, names=IOB, lengths=lengths)
        np.testing.assert_array_equal(one, expected)


def test_the_default_and_what_applies():
    assert metrics.resolve(None, "class", ["a", "b", "c"]) == "accuracy"
    assert metrics.resolve(None, "tags", IOB) == "f1"
    assert metrics.resolve(None, "tags", ["NOUN", "O"]) == "accuracy"
    assert metrics.resolve(None, "float") == "spearman"
    assert "binary_f1" not in metrics.applicable("class", ["a", "b", "c"])
    assert "binary_f1" in metrics.applicable("class", ["a", "b"])
    assert [m for kind in metrics.METRICS.values() for m in kind if not metrics.higher_is_better(m)] == [
        "mse",
        "perplexity",
        "cross_entropy",
    ]


@pytest.mark.parametrize(("metric", "hint"), [("acuracy", "accuracy"), ("matthew", "matthews")])
def test_an_unknown_metric_names_the_nearest(metric, hint):
    with pytest.raises(PipelineError, match=f"did you mean '{hint}'") as error:
        metrics.score(metric, predictions=np.array([[0]]), gold=np.array([0]), names=["a", "b", "c"])
    assert "\n" not in str(error.value)


def test_entities_need_entity_tags():
    with pytest.raises(PipelineError, match="'f1' does not apply"):
        metrics.score(
            "f1", predictions=np.array([[0]]), gold=np.array([0]), names=["NOUN"], lengths=np.array([1])
        )


@given(data=st.data(), lengths=st.lists(st.integers(1, 4), min_size=1, max_size=6))
@settings(max_examples=60)
def test_the_accuracy_of_choices_is_a_loop_over_questions(data, lengths):
    flags = [data.draw(st.lists(st.sampled_from([0, 1]), min_size=n, max_size=n)) for n in lengths]
    gold = [[-1] * len(f) if data.draw(st.booleans()) else f for f in flags]
    taken = [[data.draw(st.integers(0, n - 1)) for n in lengths] for _ in range(2)]
    predictions = np.array(
        [[int(k == t) for n, t in zip(lengths, row, strict=True) for k in range(n)] for row in taken]
    )
    found = metrics.report(
        predictions=predictions,
        gold=np.concatenate(gold).astype(np.int32),
        lengths=np.array(lengths),
        kind="choice",
    )["accuracy"]
    for head in range(2):
        right = [g[t] == 1 for g, t in zip(gold, taken[head], strict=True) if 1 in g]
        assert found[head] == pytest.approx(100 * np.mean(right) if right else 0)


def test_perplexity_is_the_exponential_of_the_mean_cross_entropy():
    nats, gold = np.array([[1.0, 2.0, 50.0], [0.0, 1e9, 0.0]]), np.array([4, 9, -1])
    found = metrics.report(predictions=nats, gold=gold, kind="token")
    assert found["cross_entropy"].tolist() == [1.5, 5e8]
    assert found["perplexity"][0] == pytest.approx(np.exp(1.5))
    assert np.isfinite(found["perplexity"][1])
