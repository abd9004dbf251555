"""Scores of predictions against gold labels, for all heads of a stack at once.

Plain numpy over a leading head axis; it knows target kinds and class names, no decoder, no data set and
no torch. Scores are percentages, but for `mse`, `cross_entropy` and `perplexity`. A unit whose gold label
is missing (-1, or NaN for floats) does not count. A prediction of -1 means that there is none (the word was
cut off by a maximum length): it is wrong, and for entities it is the tag O. Where a score is undefined (0
divided by 0) it is 0.
"""

from collections.abc import Sequence
from typing import Any, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Bool, Float, Float64, Int, Num, Shaped

from cache.targets import TargetKind
from pipeline.errors import PipelineError, nearest

Scores = Float64[np.ndarray, " head"]

_MAX_NATS = 700.0
"""Above it, the perplexity is no number any more."""

METRICS: dict[str, tuple[str, ...]] = {
    "class": ("accuracy", "macro_f1", "matthews", "binary_f1"),
    "tags": ("f1", "precision", "recall", "accuracy"),
    "float": ("spearman", "pearson", "mse"),
    "span": ("span_f1", "exact_match"),
    "choice": ("accuracy",),
    "token": ("perplexity", "cross_entropy"),
}
"""What can be said of each kind of target; the first that applies is the default."""


def higher_is_better(metric: str) -> bool:
    """Whether the head with the higher score is the better one."""
    return metric not in ("mse", "perplexity", "cross_entropy")


def mean_score(metrics: Sequence[str], scores: Sequence[float]) -> float:
    """The mean of several tasks' scores, in which one that is better for being low is negative."""
    return float(np.mean([s if higher_is_better(m) else -s for m, s in zip(metrics, scores, strict=True)]))


def applicable(kind: TargetKind, names: Sequence[str] = ()) -> list[str]:
    """The metrics that apply to a target, the default first.

    Entity scores need tags that mark entities; the F1 of the positive class needs two classes.

    Args:
        kind: kind of the target.
        names: names of its classes or tags; none for floats.

    >>> applicable("tags", ["O", "B-city", "I-city"])
    ['f1', 'precision', 'recall', 'accuracy']
    >>> applicable("tags", ["NOUN", "VERB"])
    ['accuracy']
    """
    if kind == "tags" and not is_entity_scheme(names):
        return ["accuracy"]
    return [m for m in METRICS[kind] if m != "binary_f1" or len(names) == 2]


def resolve(metric: str | None, kind: TargetKind, names: Sequence[str] = ()) -> str:
    """The metric to use: the one asked for, or the target's default.

    Raises:
        PipelineError: the metric is unknown or does not apply to the target.
    """
    known = applicable(kind, names)
    if metric is None:
        return known[0]
    if metric not in known:
        target = f"a target of kind {kind!r}" + (f" with {len(names)} names" if names else "")
        raise PipelineError(f"metric {metric!r} does not apply to {target}: {nearest(metric, known)}")
    return metric


@runtime_checkable
class Texts(Protocol):
    """What scores answers: spans, texts of options, whole questions (see `pipeline.grading`)."""

    def score(self, predictions: Int[np.ndarray, "head unit ..."]) -> dict[str, Scores]:
        """The scores by name, such as `span_f1` and `exact_match`."""


def score(
    metric: str,
    *,
    predictions: Num[np.ndarray, "head unit"],
    gold: Num[np.ndarray, " unit"],
    names: Sequence[str] = (),
    lengths: Int[np.ndarray, " example"] | None = None,
) -> Scores:
    """One score for each head.

    Args:
        metric: a name out of `applicable`.
        predictions: class ids, tag ids or numbers.
        gold: the same for the labels; floats make the target a ``float`` one.
        names: names of the classes or tags, by id.
        lengths: words per example, which makes the target a ``tags`` one.

    Raises:
        PipelineError: the metric is unknown or does not apply to the target.
    """
    resolve(metric, _kind(gold, lengths), names)
    if metric in ("f1", "precision", "recall") and lengths is not None:
        return entity_f1(predictions, gold, names=names, lengths=lengths)[metric]
    return _PLAIN[metric](predictions, gold)


def report(
    *,
    predictions: Num[np.ndarray, "head unit ..."],
    gold: Num[np.ndarray, "unit ..."],
    names: Sequence[str] = (),
    lengths: Int[np.ndarray, " example"] | None = None,
    kind: TargetKind | None = None,
    answers: Texts | None = None,
) -> dict[str, Scores]:
    """All scores that apply to the target, the default first; arguments as for `score`.

    Args:
        predictions: as for `score`; first and last token for spans, 1 for the option taken and 0 for the
            others for choices, and for tokens the negative log-likelihood in nats of each label.
        gold: the labels.
        names: names of the classes or tags, by id.
        lengths: words or options per example.
        kind: the target's; told by `gold` and `lengths` if None.
        answers: what scores the answers of a span target; of others, what scores them further.
    """
    further = {} if answers is None else answers.score(predictions)
    kind = kind or _kind(gold, lengths)
    if kind == "span":
        assert answers is not None
        return further
    if kind == "choice":
        assert lengths is not None
        return {"accuracy": choice_accuracy(predictions, gold, lengths), **further}
    if kind == "token":
        nats = cross_entropy(predictions, gold)
        return {"perplexity": np.exp(np.minimum(nats, _MAX_NATS)), "cross_entropy": nats}
    known = applicable(kind, names)
    entities: dict[str, Scores] = {}
    if "f1" in known and lengths is not None:
        entities = entity_f1(predictions, gold, names=names, lengths=lengths)
    plain = {m: entities[m] if m in entities else _PLAIN[m](predictions, gold) for m in known}
    return {**plain, **further}


def choice_accuracy(
    predictions: Int[np.ndarray, "head option"],
    gold: Int[np.ndarray, " option"],
    lengths: Int[np.ndarray, " example"],
) -> Scores:
    """Share of examples of which a right option was taken; those without a right one do not count."""
    example = np.repeat(np.arange(len(lengths)), lengths)
    labelled = np.bincount(example, weights=gold == 1, minlength=len(lengths)) > 0
    return _percent(((predictions == 1) & (gold == 1)).sum(1), labelled.sum())


def cross_entropy(nats: Float[np.ndarray, "head token"], gold: Int[np.ndarray, " token"]) -> Scores:
    """Mean negative log-likelihood of the tokens with a label, in nats."""
    return np.asarray(nats[:, gold >= 0].mean(1, dtype=np.float64))


def accuracy(predictions: Int[np.ndarray, "head unit"], gold: Int[np.ndarray, " unit"]) -> Scores:
    """Share of units whose prediction is the label."""
    counted = gold >= 0
    return _percent(((predictions == gold) & counted).sum(1), counted.sum())


def binary_f1(predictions: Int[np.ndarray, "head unit"], gold: Int[np.ndarray, " unit"]) -> Scores:
    """F1 of the positive class, which is class 1."""
    both, predicted, labelled = _counts(predictions, gold)
    return _percent(2 * both[:, 1], predicted[:, 1] + labelled[1])


def macro_f1(predictions: Int[np.ndarray, "head unit"], gold: Int[np.ndarray, " unit"]) -> Scores:
    """Mean F1 over the classes that occur among a head's predictions or in the labels."""
    both, predicted, labelled = (c[..., :-1] for c in _counts(predictions, gold))
    found = predicted + labelled
    of_class = np.divide(200.0 * both, found, out=np.zeros(found.shape), where=found > 0)
    return of_class.sum(1) / np.maximum((found > 0).sum(1), 1)


def matthews(predictions: Int[np.ndarray, "head unit"], gold: Int[np.ndarray, " unit"]) -> Scores:
    """Matthews correlation, for any number of classes; -100 to 100."""
    both, predicted, labelled = (c.astype(np.float64) for c in _counts(predictions, gold))
    n = labelled.sum()
    covariance = both.sum(1) * n - predicted @ labelled
    spread = (n**2 - (predicted**2).sum(1)) * (n**2 - (labelled**2).sum())
    return _percent(covariance, np.sqrt(spread))


def pearson(predictions: Float[np.ndarray, "head unit"], gold: Float[np.ndarray, " unit"]) -> Scores:
    """Linear correlation, -100 to 100; 0 for a head that predicts a constant or something not finite."""
    predictions, gold, finite = _numbers(predictions, gold)
    return np.where(finite, _correlation(predictions, gold), 0.0)


def spearman(predictions: Float[np.ndarray, "head unit"], gold: Float[np.ndarray, " unit"]) -> Scores:
    """Correlation of ranks, ties at their mean rank; otherwise as `pearson`."""
    predictions, gold, finite = _numbers(predictions, gold)
    return np.where(finite, _correlation(_ranks(predictions), _ranks(gold[None])[0]), 0.0)


def mse(predictions: Float[np.ndarray, "head unit"], gold: Float[np.ndarray, " unit"]) -> Scores:
    """Mean squared error, in the square of the labels' unit; infinite where a prediction is not finite."""
    predictions, gold, finite = _numbers(predictions, gold)
    errors = ((predictions - gold) ** 2).sum(1) / max(1, len(gold))
    return np.where(finite, errors, np.inf)


def entity_f1(
    predictions: Int[np.ndarray, "head word"],
    gold: Int[np.ndarray, " word"],
    *,
    names: Sequence[str],
    lengths: Int[np.ndarray, " example"],
) -> dict[str, Scores]:
    """Micro-averaged F1, precision and recall of entities: those of seqeval in its default mode.

    An entity counts as found if its first word, its last word and its type are right. Any sequence of tags
    is read as seqeval reads it, those that break the scheme too (an I- after O opens an entity). A word
    without a gold label is the tag O, in the gold and for every head.

    Args:
        predictions: tag ids, example after example.
        gold: tag ids.
        names: names of the tags, by id.
        lengths: number of words in each example.
    """
    outside = len(names)  # one more tag, for words without one and for the borders of examples
    tags = np.concatenate([gold[None], np.where(gold >= 0, predictions, -1)])
    # An O before the first example and after each, as in seqeval: no entity crosses a border or a head.
    rows = np.full((len(tags), len(gold) + len(lengths) + 1), outside)
    rows[:, 1 + np.arange(len(gold)) + np.repeat(np.arange(len(lengths)), lengths)] = np.where(
        tags >= 0, tags, outside
    )
    kinds, continues = _scheme([*names, "O"])
    before, here = rows[:, :-1], rows[:, 1:]
    broken = ~continues[before, here]
    is_entity = np.array([n != "O" for n in [*names, "O"]])
    first = np.flatnonzero(broken & is_entity[here])
    last = np.flatnonzero(broken & is_entity[before])
    # An entity ends before the next one begins, so the k-th beginning belongs to the k-th end.
    head, start = np.divmod(first, here.shape[1])
    kind = kinds[here[head, start]]
    stop = last - first
    n_gold = np.count_nonzero(head == 0)
    truth = np.full((2, here.shape[1]), -1)
    truth[:, start[:n_gold]] = stop[:n_gold], kind[:n_gold]
    right = (truth[0, start] == stop) & (truth[1, start] == kind)
    found = np.bincount(head, minlength=len(tags))[1:]
    both = np.bincount(head[right], minlength=len(tags))[1:]
    return {
        "f1": _percent(2 * both, found + n_gold),
        "precision": _percent(both, found),
        "recall": _percent(both, n_gold),
    }


def is_entity_scheme(names: Sequence[str]) -> bool:
    """Whether the names of tags mark entities (IOB2 and its relatives with E- and S-).

    >>> is_entity_scheme(["O", "B-PER", "I-PER"]), is_entity_scheme(["O", "NOUN"])
    (True, False)
    """
    marked = [n for n in names if n != "O"]
    return bool(marked) and all(n[0:1] in ("B", "I", "E", "S") and n[1:2] in ("", "-") for n in marked)


def n_kinds(names: Sequence[str]) -> int:
    """How many kinds of thing are to be told apart: types of entity where tags mark entities, else classes.

    >>> n_kinds(["O", "B-PER", "I-PER", "B-LOC"]), n_kinds(["red", "blue"])
    (2, 2)
    """
    if not is_entity_scheme(names):
        return len(names)
    return len({name[2:] for name in names if name != "O"})


def _scheme(names: Sequence[str]) -> tuple[Int[np.ndarray, " tag"], Bool[np.ndarray, "tag tag"]]:
    """Each tag's type of entity, as a number, and which tag goes on with the entity of the tag before it.

    seqeval's rules for the end and the start of a chunk come down to this one: an I- or E- goes on with a
    B- or I- of its own type, and every other step ends what was open and opens what is no O.
    """
    mark = np.array([name[:1] for name in names])
    kinds = np.unique([name[2:] or "_" for name in names], return_inverse=True)[1]
    same = kinds[:, None] == kinds
    return kinds, np.isin(mark, ["B", "I"])[:, None] & np.isin(mark, ["I", "E"]) & same


def _kind(gold: Shaped[np.ndarray, " unit"], lengths: Int[np.ndarray, " example"] | None) -> TargetKind:
    if np.issubdtype(gold.dtype, np.floating):
        return "float"
    return "class" if lengths is None else "tags"


def _percent(
    part: Num[np.ndarray, " head"], whole: Num[np.ndarray, " head"] | np.number[Any] | int
) -> Scores:
    return np.divide(100.0 * part, whole, out=np.zeros(part.shape), where=np.asarray(whole) != 0)


def _counts(
    predictions: Int[np.ndarray, "head unit"], gold: Int[np.ndarray, " unit"]
) -> tuple[Int[np.ndarray, "head class"], Int[np.ndarray, "head class"], Int[np.ndarray, " class"]]:
    """Units per class that are right, predicted, labelled; the last class is that of no prediction."""
    predictions, gold = predictions[:, gold >= 0], gold[gold >= 0]
    n_heads = len(predictions)
    none = 1 + max(1, predictions.max(initial=0), gold.max(initial=0))
    ids = np.where(predictions >= 0, predictions, none) + (none + 1) * np.arange(n_heads)[:, None]

    def per_head(ids: Int[np.ndarray, " some"]) -> Int[np.ndarray, "head class"]:
        return np.bincount(ids, minlength=n_heads * (none + 1)).reshape(n_heads, none + 1)

    return per_head(ids[predictions == gold]), per_head(ids.ravel()), np.bincount(gold, minlength=none + 1)


def _numbers(
    predictions: Float[np.ndarray, "head unit"], gold: Float[np.ndarray, " unit"]
) -> tuple[
    Float64[np.ndarray, "head labelled"], Float64[np.ndarray, " labelled"], Bool[np.ndarray, " head"]
]:
    """The units with a label, in float64, and which heads are finite on all of them; the others are 0."""
    labelled = ~np.isnan(gold)
    predictions = predictions[:, labelled].astype(np.float64)
    finite = np.isfinite(predictions).all(1)
    return np.where(finite[:, None], predictions, 0.0), gold[labelled].astype(np.float64), finite


def _correlation(x: Float64[np.ndarray, "head unit"], y: Float64[np.ndarray, " unit"]) -> Scores:
    # Minus the first value: a constant then becomes 0 exactly, not noise of the last bit.
    x, y = x - x[:, :1], y - y[:1]
    x, y = x - x.sum(1, keepdims=True) / max(1, len(y)), y - y.sum() / max(1, len(y))
    whole = np.sqrt((x**2).sum(1) * (y**2).sum())
    return np.clip(_percent(x @ y, whole), -100.0, 100.0)


def _ranks(x: Float64[np.ndarray, "head unit"]) -> Float64[np.ndarray, "head unit"]:
    """Rank of each value in its row, from 0; equal values share the mean of their ranks."""
    order = x.argsort(1)
    ascending = np.take_along_axis(x, order, 1)
    is_new = np.ones(x.shape, dtype=bool)
    is_new[:, 1:] = ascending[:, 1:] != ascending[:, :-1]
    starts = np.flatnonzero(is_new)
    sizes = np.diff(starts, append=x.size)
    mean = starts % max(1, x.shape[1]) + (sizes - 1) / 2
    ranks = np.empty(x.shape)
    np.put_along_axis(ranks, order, np.repeat(mean, sizes).reshape(x.shape), 1)
    return ranks


_PLAIN = {f.__name__: f for f in (accuracy, macro_f1, matthews, binary_f1, spearman, pearson, mse)}
