import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from banks import TRAIN, copy_to, damage, files_of, recipe, rows, splits, states_of
from faults import FAULT, Killed
from hypothesis import given
from hypothesis import strategies as st

from cache import CacheError, Target, Writer, open_bank
from cache.place import place
from cache.targets import lengthen, ranges, read_target, recover, spans, write_target
from cache.verify import verify

N_WORDS = rows(TRAIN).n_words
BY_ROW = {
    "class": Target(
        name="intent", kind="class", names=("a", "b", "c"), values=np.arange(10, dtype=np.int32) % 3
    ),
    "float": Target(name="score", kind="float", names=(), values=np.arange(10, dtype=np.float32) / 7),
    "tags": Target(
        name="tags",
        kind="tags",
        names=("O", "B-x"),
        values=np.arange(N_WORDS.sum(), dtype=np.int32),
        metric="entity_f1",
    ),
}
"""Targets in row order; the tags count the words, so that each shows where it came from."""


@pytest.fixture(scope="module")
def template(tmp_path_factory):
    path = tmp_path_factory.mktemp("labelled") / "bank"
    copy_to(path)
    with Writer(str(path), recipe(), splits()) as writer:
        for target in BY_ROW.values():
            writer.write_target("train", target)
    return path


@pytest.fixture
def labelled(template, tmp_path):
    return Path(shutil.copytree(template, tmp_path / "bank"))


def read(path, name):
    return open_bank(str(path)).split("train").target(name)


@pytest.mark.parametrize("kind", ["class", "float"])
def test_labels_of_examples_follow_the_examples(labelled, kind):
    split, target = open_bank(str(labelled)).split("train"), BY_ROW[kind]
    found = read(labelled, target.name)

    assert found.values.tolist() == [target.values[row] for row in split.row]
    assert found.values.dtype == target.values.dtype
    assert (found.kind, found.names, found.metric) == (kind, target.names, None)


def test_tags_follow_the_words_of_their_example(labelled):
    split, found = open_bank(str(labelled)).split("train"), read(labelled, "tags")
    begins = np.concatenate([[0], np.cumsum(N_WORDS)])

    dealt = [begins[row] + word for row in split.row for word in range(N_WORDS[row])]
    assert found.values.tolist() == dealt
    assert (found.kind, found.names, found.metric) == ("tags", ("O", "B-x"), "entity_f1")


def test_states_stay_beside_their_labels(labelled):
    split, target = open_bank(str(labelled)).split("train"), read(labelled, "intent")

    for i, label in enumerate(target.values[:6]):
        row = split.row[i]
        assert label == row % 3
        assert np.array_equal(split.gather([i])[0], states_of(split.recipe, "train", row, TRAIN[row]))


def test_target_names_lists_kind_and_classes(labelled):
    assert open_bank(str(labelled)).split("train").target_names() == {
        "intent": {"kind": "class", "classes": 3},
        "score": {"kind": "float", "classes": 0},
        "tags": {"kind": "tags", "classes": 2},
    }
    assert open_bank(str(labelled)).split("dev").target_names() == {}


def test_an_unknown_target_lists_those_there_are(labelled):
    with pytest.raises(
        CacheError, match="split train has no target 'intents', it has: intent, score, tags"
    ):
        read(labelled, "intents")
    with pytest.raises(CacheError, match="split dev has no target 'intent', it has: none"):
        open_bank(str(labelled)).split("dev").target("intent")


def test_a_target_written_again_replaces_the_first(labelled):
    split = open_bank(str(labelled)).writable_split("train")
    write_target(split, Target(name="intent", kind="float", names=(), values=np.ones(10, np.float32)))

    found = read(labelled, "intent")
    assert (found.kind, found.names) == ("float", ())
    assert (found.values == 1).all()


def test_labels_that_are_all_zero_are_labels(labelled):
    split = open_bank(str(labelled)).writable_split("train")
    write_target(split, Target(name="zero", kind="class", names=("a",), values=np.zeros(10, np.int32)))

    assert read(labelled, "zero").values.tolist() == [0] * 10


def test_a_target_of_no_examples_is_written_and_read(tmp_path):
    lengths = {"train": rows([])}
    with Writer(str(tmp_path / "bank"), recipe(), lengths) as writer:
        for kind in ("class", "tags", "float"):
            values = np.zeros(0, np.float32 if kind == "float" else np.int32)
            writer.write_target("train", Target(name=kind, kind=kind, names=(), values=values))
        writer.finish()

    for kind in ("class", "tags", "float"):
        assert len(read(tmp_path / "bank", kind).values) == 0


def test_a_target_cut_off_half_way_does_not_count(labelled):
    meta = labelled / "train/targets/intent/zarr.json"
    content = json.loads(meta.read_text())
    meta.write_text(json.dumps(content | {"attributes": {}}))

    assert "intent" not in open_bank(str(labelled)).split("train").target_names()
    with pytest.raises(CacheError, match="no target 'intent', it has: score, tags"):
        read(labelled, "intent")


@pytest.mark.parametrize("harm", [damage, lambda path: path.unlink()], ids=["flipped bit", "gone"])
def test_a_damaged_target_says_how_to_write_it_again(labelled, harm):
    harm(labelled / "train/targets/intent/c/0")

    with pytest.raises(CacheError, match=r"train/targets/intent is damaged.* 'layerbank label'"):
        read(labelled, "intent")
    assert len(read(labelled, "score").values) == 10


@pytest.mark.parametrize("name", ["a/b", "/a", "a/", "..", ".hidden", "", "a\\b", "__a", "zarr.json"])
def test_names_that_cannot_name_an_array_are_refused(labelled, name):
    split = open_bank(str(labelled)).writable_split("train")
    target = Target(name=name, kind="float", names=(), values=np.ones(10, np.float32))

    with pytest.raises(CacheError, match="cannot be stored under that name: rename the column"):
        write_target(split, target)
    assert set(open_bank(str(labelled)).split("train").target_names()) == {"intent", "score", "tags"}


@pytest.mark.parametrize("name", ["with space", "größe", "a.b", "c", "states", "%41"])
def test_other_names_are_kept_as_they_are(labelled, name):
    split = open_bank(str(labelled)).writable_split("train")
    write_target(split, Target(name=name, kind="float", names=(), values=np.ones(10, np.float32)))

    assert (read(labelled, name).values == 1).all()
    assert name in open_bank(str(labelled)).split("train").target_names()


@given(runs=st.lists(st.tuples(st.integers(0, 50), st.integers(0, 6)), max_size=20))
def test_ranges_and_spans_agree_with_python(runs):
    start = np.array([first for first, _ in runs], dtype=np.int64)
    count = np.array([many for _, many in runs], dtype=np.int32)

    assert ranges(start, count).tolist() == [s + k for s, n in runs for k in range(n)]
    assert spans(count).tolist() == [sum(count[:i]) for i in range(len(count) + 1)]


def test_killed_at_any_change_a_target_is_the_earlier_one_or_the_new_one(labelled, tmp_path):
    new = Target(name="intent", kind="class", names=("x",), values=np.zeros(10, np.int32))
    old = read(labelled, "intent").values.tolist()

    def write(path):
        write_target(open_bank(str(path)).writable_split("train"), new)

    path = Path(shutil.copytree(labelled, tmp_path / "calm"))
    assert FAULT.run(path, 10**6, Killed(), lambda: write(path))
    changes, expected = 10**6 - FAULT.left, files_of(path)
    for change in range(changes):
        path = Path(shutil.copytree(labelled, tmp_path / f"killed-{change}"))
        assert not FAULT.run(path, change, Killed(), lambda at=path: write(at))
        with Writer(str(path), recipe(), splits()):  # whoever writes next clears up
            found = read(path, "intent")
        assert found.values.tolist() == (old if found.names == ("a", "b", "c") else [0] * 10)
        write(path)
        assert files_of(path) == expected, f"killed at change {change}"


def answers(n):
    """A target of spans whose every value and text says n."""
    extra = {"text": np.full(10 * n, n, np.uint8), "n_text": np.full(10, n, np.int32)}
    return Target(name="answer", kind="span", names=(), values=np.full((10, 2), n, np.int32), extra=extra)


def numbers(path):
    """The n that labels and texts say."""
    split = open_bank(str(path)).split("train")
    found = [split.target("answer").values, *split.target_extra("answer").values()]
    return {int(n) for values in found for n in values.flat}


def test_killed_at_any_change_labels_and_what_lies_beside_them_belong_together(labelled, tmp_path):
    write_target(open_bank(str(labelled)).writable_split("train"), answers(1))
    shutil.rmtree(labelled / "dev")  # many copies are made
    shutil.rmtree(labelled / "train/states/c")

    def write(path):
        write_target(open_bank(str(path)).writable_split("train"), answers(2))

    path = Path(shutil.copytree(labelled, tmp_path / "calm"))
    assert FAULT.run(path, 10**6, Killed(), lambda: write(path))
    changes, expected = 10**6 - FAULT.left, files_of(path)
    assert numbers(path) == {2}
    for change in range(changes):
        path = Path(shutil.copytree(labelled, tmp_path / f"killed-{change}"))
        assert not FAULT.run(path, change, Killed(), lambda at=path: write(at))
        place(str(path)).tidy()  # as whoever writes next
        recover(open_bank(str(path)).writable_split("train"))
        assert numbers(path) in ({1}, {2}), f"killed at change {change}"
        write(path)
        assert files_of(path) == expected, f"killed at change {change}"


def test_a_target_that_is_lengthened_keeps_what_lies_beside_it(labelled):
    split = open_bank(str(labelled)).writable_split("train")
    write_target(split, answers(3))
    write_target(split, lengthen(read_target(split, "answer"), 2), keep_extra=True)
    found = open_bank(str(labelled)).split("train")
    assert len(found.target("answer").values) == 12
    assert found.target_extra("answer")["text"].tolist() == [3] * 30


def test_labels_without_arrays_take_none_of_an_earlier_target(labelled):
    split = open_bank(str(labelled)).writable_split("train")
    write_target(split, answers(3))
    write_target(split, replace(answers(3), extra={}))
    assert open_bank(str(labelled)).split("train").target_extra("answer") == {}
    assert not list((labelled / "train/extra/answer").rglob("c"))


def test_arrays_that_lie_right_beside_a_target_are_read_and_replaced(labelled):
    split = open_bank(str(labelled)).writable_split("train")
    write_target(split, answers(1))
    folder = labelled / "train/extra/answer"
    (group,) = (child for child in folder.iterdir() if child.is_dir())
    for child in group.iterdir():
        if child.is_dir():
            child.rename(folder / child.name)
    shutil.rmtree(group)
    meta = labelled / "train/targets/answer/zarr.json"
    content = json.loads(meta.read_text())
    del content["attributes"]["extra"]
    meta.write_text(json.dumps(content))
    assert numbers(labelled) == {1}
    assert verify(open_bank(str(labelled))).ok
    write_target(open_bank(str(labelled)).writable_split("train"), answers(1))
    assert numbers(labelled) == {1}
    write_target(open_bank(str(labelled)).writable_split("train"), answers(2))
    assert numbers(labelled) == {2}
    assert len([child for child in folder.iterdir() if child.is_dir()]) == 1


def test_a_target_that_was_cut_off_is_reported(labelled):
    meta = labelled / "train/targets/intent/zarr.json"
    meta.write_text(json.dumps(json.loads(meta.read_text()) | {"attributes": {}}))
    (line,) = verify(open_bank(str(labelled))).bad
    assert line.startswith("train/targets/intent was cut off while it was written")
