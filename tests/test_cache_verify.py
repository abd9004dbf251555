import json
import shutil

import numpy as np
import pytest
from banks import complete, copy_to, damage, files_of, make, recipe, splits

from cache import CacheError, Target, Writer, open_bank
from cache.verify import verify


@pytest.fixture(scope="module", params=["none", "zstd"])
def made(request, tmp_path_factory):
    """A bank with a target."""
    folder = tmp_path_factory.mktemp("verify")
    copy_to(folder / "bank", request.param)
    with Writer(str(folder / "bank"), recipe(codec=request.param), splits()) as writer:
        values = np.zeros(10, np.int32)
        writer.write_target("train", Target(name="y", kind="class", names=("a",), values=values))
    return folder / "bank"


@pytest.fixture
def path(made, tmp_path):
    """A copy of it, to be damaged."""
    return shutil.copytree(made, tmp_path / "bank")


def test_a_whole_bank_is_ok(path):
    bank = open_bank(str(path))
    report = verify(bank)

    assert report.bad == []
    assert report.ok
    assert report.blocks == sum(bank.split(name).n_blocks for name in ("train", "dev"))


def test_every_damage_is_listed_with_its_place(path):
    damage(path / "train/states/c/2/1/0")
    (path / "train/states/c/0/3/0").unlink()
    damage(path / "dev/states/c/3/0/0")
    damage(path / "train/kind/c/0")
    (path / "train/kind/c/2").unlink()
    damage(path / "train/start/c/0")
    damage(path / "train/targets/y/c/0")
    report = verify(open_bank(str(path)))

    assert not report.ok
    assert len(report.bad) == 7
    for place in (
        "split train, layer 2, block 1 is damaged",
        "split train, layer 0, block 3 is damaged",
        "split dev, layer 3, block 0 is damaged",
        "split train, kind, block 0 is damaged",
        "split train, kind, block 2 is damaged",
        "train/start is damaged",
        "train/targets/y is damaged",
    ):
        assert sum(place in line for line in report.bad) == 1, place
    assert all("\n" not in line and "layerbank" in line for line in report.bad)


@pytest.mark.parametrize("harm", ["flipped bit", "no chunk", "no array", "another array"])
def test_damage_beside_a_target_is_listed(path, harm):
    extra = {"text": np.arange(20, dtype=np.uint8), "n_text": np.full(10, 2, np.int32)}
    values = np.zeros((10, 2), np.int32)
    target = Target(name="answer", kind="span", names=(), values=values, extra=extra)
    with Writer(str(path), recipe(codec=open_bank(str(path)).recipe.codec), splits()) as writer:
        writer.write_target("train", target)
    assert verify(open_bank(str(path))).ok
    (text,) = path.glob("train/extra/answer/*/text")
    if harm == "flipped bit":
        damage(text / "c/0")
    elif harm == "no chunk":
        (text / "c/0").unlink()
    else:
        shutil.rmtree(text)
        if harm == "another array":
            shutil.copytree(text.with_name("n_text"), text)
    report = verify(open_bank(str(path)))
    assert report.bad == ["train/extra/answer is damaged: write it again with 'layerbank label'"]


def test_a_split_that_went_missing_is_noticed(path):
    shutil.rmtree(path / "dev")

    assert len(verify(open_bank(str(path))).bad) == 1


def test_a_bank_of_words_from_before_full_length_says_so_once(tmp_path):
    make(tmp_path / "bank", keep="words")
    for split in ("train", "dev"):
        shutil.rmtree(tmp_path / "bank" / split / "full_length")

    (line,) = verify(open_bank(str(tmp_path / "bank"))).bad
    assert "was made by an earlier version, without full_length: extract it again, into another" in line


def test_an_edited_attribute_is_noticed(path):
    meta = path / "zarr.json"
    content = json.loads(meta.read_text())
    content["attributes"]["max_length"] = 99
    meta.write_text(json.dumps(content))

    (line,) = verify(open_bank(str(path))).bad
    assert "attributes are not those the fingerprint was made of" in line


HARM = {"no JSON": "{", "an empty object": "{}", "a list": "[]", "gone": None}


def harm(path, content):
    if content is None:
        path.unlink()
    else:
        path.write_text(content)


@pytest.mark.parametrize("content", HARM.values(), ids=HARM)
@pytest.mark.parametrize("array", ["states", "kind", "start", "text_hash"])
def test_metadata_of_an_array_is_made_again_and_its_chunks_stay(path, array, content):
    before, what = files_of(path), open_bank(str(path)).recipe
    harm(path / "train" / array / "zarr.json", content)
    assert any(array in line for line in verify(open_bank(str(path))).bad)
    with Writer(str(path), what, splits()) as writer:
        assert writer.missing("train") == []
    assert files_of(path) == before


@pytest.mark.parametrize("content", ["{", "{}", "[]"])
@pytest.mark.parametrize("member", ["train", "train/targets", "train/targets/y"])
def test_metadata_that_is_damaged_is_told_in_one_line(path, member, content):
    what = open_bank(str(path)).recipe
    harm(path / member / "zarr.json", content)
    with pytest.raises(
        CacheError, match=f"{member}/zarr.json is damaged .*: remove that file, then"
    ) as read:
        verify(open_bank(str(path)))
    with (
        pytest.raises(CacheError, match="is damaged") as written,
        Writer(str(path), what, splits()) as writer,
    ):
        writer.lengthen_targets([])
    assert "\n" not in str(read.value) + str(written.value)
    harm(path / member / "zarr.json", None)
    with Writer(str(path), what, splits()) as writer:
        complete(writer)
    assert verify(open_bank(str(path))).ok
