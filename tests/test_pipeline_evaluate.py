"""Scores of a run on banks: its own, others of its encoder, and those it has to refuse."""

import dataclasses
import shutil

import numpy as np
import pytest
import tiny

from cache import CacheError, Target, open_bank
from cache.targets import write_target
from pipeline.errors import PipelineError
from pipeline.evaluate import evaluate, open_bank_of
from pipeline.job import HeadRates, Schedule
from pipeline.results import load_run
from pipeline.run import train_run


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A trained head for each target."""
    folder = tmp_path_factory.mktemp("runs")
    options = {"label": {"dropout": 0.2}, "tags": {"crf": True}, "value": {"pooling": "mean"}}
    for target, chosen in options.items():
        train_run(
            tiny.shared().path,
            target=target,
            out=str(folder / target),
            options=chosen,
            rates=HeadRates(lr=1e-2),
            schedule=Schedule(epochs=4),
        )
    return {target: load_run(str(folder / target)) for target in options}


TARGETS = ["label", "tags", "value"]


@pytest.mark.parametrize("target", TARGETS)
def test_dev_score_is_the_one_of_training(runs, target):
    run = runs[target]
    found = evaluate(run, tiny.shared(), "dev")
    assert found["score"] == run.result["dev"]
    assert found["metrics"] == run.result["dev_metrics"]
    assert found["metrics"][found["metric"]] == found["score"]
    assert (found["run"], found["split"], found["metric"]) == (run.path, "dev", run.metric)
    assert evaluate(run, tiny.shared(), "test")["score"] > 60


def test_it_computes_in_the_precision_of_the_run(tmp_path):
    schedule = Schedule(epochs=1, precision="bfloat16")
    train_run(tiny.shared().path, target="value", out=str(tmp_path / "run"), schedule=schedule)
    run = load_run(str(tmp_path / "run"))
    assert evaluate(run, tiny.shared(), "dev")["metrics"] == run.result["dev_metrics"]
    plain = evaluate(dataclasses.replace(run, precision="float32"), tiny.shared(), "dev")["metrics"]
    assert plain["mse"] != run.result["dev_metrics"]["mse"]


@pytest.mark.parametrize("target", TARGETS)
def test_another_bank_of_the_same_encoder_will_do(runs, target, tmp_path):
    # Dealt in another order to smaller blocks, and named otherwise: the same rows, so the same score.
    encoder = dataclasses.replace(tiny.ENCODER, name="moved/tiny", revision="abc")
    other = tiny.bank(tmp_path / "b", seed=9, block_tokens=64, encoder=encoder)
    assert other.split("dev").row.tolist() != tiny.shared().split("dev").row.tolist()
    scores = [evaluate(runs[target], bank, "dev")["metrics"] for bank in (other, tiny.shared())]
    assert scores[0] == pytest.approx(scores[1], rel=1e-5)


def test_bank_of_fewer_tokens_layers_or_bits(runs):
    words = evaluate(runs["tags"], tiny.shared(keep="words"), "dev")
    assert words == evaluate(runs["tags"], tiny.shared(), "dev")
    half = evaluate(runs["label"], tiny.shared(dtype="float16"), "dev")
    assert half["score"] == pytest.approx(runs["label"].result["dev"], abs=5)
    with pytest.raises(PipelineError, match="extract with --keep words"):
        evaluate(runs["tags"], tiny.shared(keep="first"), "dev")
    with pytest.raises(PipelineError, match="extract with --keep all"):
        evaluate(runs["value"], tiny.shared(keep="words"), "dev")
    with pytest.raises(CacheError, match=r"layer 1 is not in the bank.*--layers all"):
        evaluate(runs["tags"], tiny.shared(layers=(0, 2)), "dev")


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"encoder": dataclasses.replace(tiny.ENCODER, weights_sha256="x" * 64)}, "other weights"),
        ({"tokenizer_sha256": "y" * 64}, "another tokenizer"),
    ],
    ids=["weights", "tokenizer"],
)
def test_bank_of_another_encoder_is_refused(runs, changes, said, tmp_path):
    other = tiny.bank(tmp_path / "b", sizes={"dev": 5}, **changes)
    with pytest.raises(PipelineError, match=said) as error:
        evaluate(runs["label"], other, "dev")
    assert runs["label"].path in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("target", "split", "said"),
    [
        ("label", "tset", "did you mean 'test'"),
        ("tags", "validation", "has no split 'validation'"),
    ],
)
def test_split_that_is_not_there(runs, target, split, said):
    with pytest.raises(PipelineError, match=said):
        evaluate(runs[target], tiny.shared(), split)


def test_target_that_is_not_there(runs, tmp_path):
    other = tiny.bank(tmp_path / "b", sizes={"dev": 5}, only=("tags",))
    with pytest.raises(PipelineError, match="has no target 'label' on split dev"):
        evaluate(runs["label"], other, "dev")


def renumbered(tmp_path, names, values):
    """A bank whose target ``label`` has other names in another order."""
    bank = tiny.bank(tmp_path / "b", sizes={"dev": 50})
    found = Target(name="label", kind="class", names=names, values=values.astype(np.int32))
    write_target(bank.writable_split("dev"), found)
    return open_bank(bank.path)


def test_classes_are_matched_by_name(runs, tmp_path):
    old = tiny.shared().split("dev").target("label")
    names = ("red", "blue")  # the second class, green, does not occur; the two others are swapped
    numbers = {0: 1, 1: -1, 2: 0, -1: -1}
    values = np.array(
        [
            numbers[int(v)]
            for v in tiny.bank(tmp_path / "x", sizes={"dev": 50}).split("dev").target("label").values
        ]
    )
    found = evaluate(runs["label"], renumbered(tmp_path, names, values), "dev")
    assert found["metrics"]["accuracy"] > 90
    assert old.names == tiny.CLASSES


def test_class_the_head_does_not_know(runs, tmp_path):
    values = tiny.shared().split("dev").target("label").values
    with pytest.raises(PipelineError, match=r"has a class 'violet' that .* was not trained on"):
        evaluate(runs["label"], renumbered(tmp_path, ("blue", "green", "violet"), values), "dev")


def test_target_of_another_kind(runs, tmp_path):
    bank = tiny.bank(tmp_path / "b", sizes={"dev": 5})
    found = Target(name="label", kind="float", names=(), values=np.zeros(5, np.float32))
    write_target(bank.writable_split("dev"), found)
    with pytest.raises(PipelineError, match="has the kind float"):
        evaluate(runs["label"], bank, "dev")


def test_split_without_labels_gets_no_score(runs, tmp_path):
    nothing = np.full(50, -1)
    with pytest.raises(PipelineError, match="has no label of target 'label'"):
        evaluate(runs["label"], renumbered(tmp_path, tiny.CLASSES, nothing), "dev")


def test_bank_is_the_one_of_training_unless_another_is_named(runs, tmp_path):
    run = runs["label"]
    assert open_bank_of(run).fingerprint == tiny.shared().fingerprint
    moved = shutil.copytree(tiny.shared().path, tmp_path / "moved")
    lost = dataclasses.replace(run, source=dataclasses.replace(run.source, store=str(tmp_path / "gone")))
    with pytest.raises(PipelineError, match=r"is no longer at .*gone: give --store"):
        open_bank_of(lost)
    assert evaluate(lost, open_bank_of(lost, str(moved)), "dev")["score"] == run.result["dev"]
    with pytest.raises(CacheError, match="no bank at"):
        open_bank_of(lost, str(tmp_path / "none"))
