import json
import re
from dataclasses import replace

import numpy as np
import pytest
import zarr
from banks import RECIPE, complete, copy_to, damage, files_of, make, recipe, rows, splits

from cache import BankIncomplete, CacheError, Rows, Writer, layout, open_bank, plan, store
from cache.reader import is_bank


@pytest.fixture
def path(tmp_path):
    copy_to(tmp_path / "bank")
    return tmp_path / "bank"


def refusal(path, what=RECIPE, lengths=None):
    """What the writer says; the folder must stay as it was."""
    before = files_of(path.parent)
    with pytest.raises(CacheError) as caught, Writer(str(path), what, lengths or splits()):
        pass
    assert files_of(path.parent) == before, "a refused writer changed something"
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(
    "changed",
    [
        {"tokenizer_sha256": "u" * 64},
        {"columns": {"text": "other"}},
        {"max_length": 15},
        {"keep": "words"},
        {"layers": (0, 1)},
        {"dtype": "float32"},
        {"seed": 4},
        {"codec": "zstd"},
        {"block_tokens": 32},
    ],
    ids=lambda changed: next(iter(changed)),
)
def test_a_bank_of_another_recipe_is_refused(path, changed):
    (name,) = changed
    message = refusal(path, recipe(**changed))

    assert f"made with {name} = " in message
    assert "name another --store" in message


def test_a_bank_of_another_encoder_is_refused(path):
    other = replace(RECIPE.encoder, name="other", weights_sha256="v" * 64)

    assert "was made with another encoder (tiny), asked for other" in refusal(path, recipe(encoder=other))


@pytest.mark.parametrize(
    ("lengths", "said"),
    [
        (
            {**splits(), "dev": rows([4, 6, 0, 3], "other row")},
            "4 of 4 of split dev are",
        ),
        ({**splits(), "dev": rows([4, 6, 0], "dev row")}, "1 of 4 of split dev are"),
        ({"train": splits()["train"]}, "split dev of .* is not in the data"),
    ],
    ids=["other rows", "a row less", "a split less"],
)
def test_a_bank_whose_rows_are_not_all_in_the_data_is_refused(path, lengths, said):
    assert re.search(said + ".*name another --store", refusal(path, lengths=lengths))


@pytest.mark.parametrize("same", [{"batch_tokens": 1}, {"encoder": replace(RECIPE.encoder, name="copy")}])
def test_what_does_not_change_the_bank_may_differ(path, same):
    with Writer(str(path), recipe(**same), splits()) as writer:
        assert writer.complete
        assert writer.missing("train") == []


def test_a_bank_dealt_another_way_is_refused(path, monkeypatch):
    def other_lay(row, lengths, **how):
        found = plan.lay(row, lengths, **how)
        return replace(found, start=found.start + 1)

    monkeypatch.setattr("cache.growth.lay", other_lay)
    assert "was dealt another way (start differs)" in refusal(path)


def test_the_order_of_a_bank_is_its_own(path, monkeypatch):
    """A deal that other versions draw otherwise is read from the bank, and not drawn again."""

    def other_deal(lengths, *, seed, **how):
        return plan.deal(lengths, seed=seed + 1, **how)

    before = files_of(path)
    monkeypatch.setattr("cache.writer.deal", other_deal)
    with Writer(str(path), RECIPE, splits()) as writer:
        assert writer.missing("train") == []
    assert files_of(path) == before


def edit_root(path, **attrs):
    meta = path / "zarr.json"
    content = json.loads(meta.read_text())
    content["attributes"] |= attrs
    meta.write_text(json.dumps(content))


@pytest.mark.parametrize("version", [0, 2, "1", None])
def test_another_format_version_is_refused(path, version):
    edit_root(path, format_version=version)

    assert f"has bank format {version}, this layerbank knows 1" in refusal(path)
    with pytest.raises(CacheError, match=f"has bank format {version}, this layerbank knows 1"):
        open_bank(str(path))


def test_another_format_version_is_never_cleared_away(tmp_path):
    zarr.create_group(str(tmp_path / "bank"), attributes={"format_version": 2, "complete": False})
    (tmp_path / "bank/train").mkdir()
    (tmp_path / "bank/train/precious").write_text("data")

    assert "has bank format 2" in refusal(tmp_path / "bank")


def test_a_folder_with_other_files_is_refused(tmp_path):
    (tmp_path / "bank").mkdir()
    (tmp_path / "bank/notes.txt").write_text("notes")

    assert "the folder is not empty and no bank" in refusal(tmp_path / "bank")
    with pytest.raises(CacheError, match=r"no bank at .*: make one with 'layerbank extract'"):
        open_bank(str(tmp_path / "bank"))


@pytest.mark.parametrize("attrs", [{}, {"format_version": 1}, {"format_version": 1, "mine": 2}])
def test_another_zarr_group_is_refused(tmp_path, attrs):
    zarr.create_group(str(tmp_path / "bank"), attributes=attrs).create_group("train")

    assert "name another folder" in refusal(tmp_path / "bank")
    with pytest.raises(CacheError):
        open_bank(str(tmp_path / "bank"))


def test_what_is_no_bank_cannot_be_opened(tmp_path):
    with pytest.raises(CacheError, match="no bank at"):
        open_bank(str(tmp_path / "nowhere"))
    (tmp_path / "file").write_text("text")
    with pytest.raises(CacheError):
        open_bank(str(tmp_path / "file"))
    zarr.create_array(str(tmp_path / "array"), shape=(2,), dtype="int32")
    with pytest.raises(CacheError):
        open_bank(str(tmp_path / "array"))
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken/zarr.json").write_text('{"zarr_format": 3')
    with pytest.raises(CacheError, match="cannot be opened as a bank"):
        open_bank(str(tmp_path / "broken"))


def test_a_store_that_is_a_file_is_refused(tmp_path):
    (tmp_path / "file").write_text("text")
    assert "cannot write" in refusal(tmp_path / "file")


def test_is_bank_tells_banks_from_other_folders(path, tmp_path):
    assert is_bank(path)
    assert not is_bank(tmp_path)
    assert not is_bank(tmp_path / "nowhere")
    zarr.create_group(str(tmp_path / "other"))
    assert not is_bank(tmp_path / "other")


def test_a_bank_is_incomplete_until_it_is_finished(tmp_path):
    path = str(tmp_path / "bank")
    with Writer(path, RECIPE, splits()) as writer:
        with pytest.raises(BankIncomplete, match="run the same 'layerbank extract' again to end it"):
            open_bank(path)
        complete(writer)
        assert open_bank(path).attrs["complete"] is True
        assert writer.complete


def test_an_incomplete_bank_opens_for_those_who_ask(tmp_path):
    with Writer(str(tmp_path / "bank"), RECIPE, splits()):
        pass

    assert open_bank(str(tmp_path / "bank"), allow_incomplete=True).splits == ["train", "dev"]
    assert is_bank(tmp_path / "bank")


@pytest.mark.parametrize("array", layout.EXAMPLE_ARRAYS)
@pytest.mark.parametrize("harm", [damage, lambda chunk: chunk.unlink()], ids=["flipped bit", "gone"])
def test_damaged_example_arrays_are_written_again(path, array, harm):
    before = files_of(path)
    harm(path / "train" / array / "c/0")
    with Writer(str(path), RECIPE, splits()) as writer:
        assert writer.missing("train") == []

    assert files_of(path) == before


def test_versions_of_the_packages_are_kept(tmp_path):
    with Writer(str(tmp_path / "bank"), RECIPE, splits(), {"torch": "9.9"}):
        pass

    versions = open_bank(str(tmp_path / "bank"), allow_incomplete=True).attrs["versions"]
    assert versions == {"torch": "9.9"}


def test_an_example_longer_than_a_block_is_refused(tmp_path):
    with pytest.raises(CacheError, match="17 tokens does not fit a block of 16: lower --max-length"):
        Writer(str(tmp_path / "bank"), RECIPE, {"train": rows([3, 17])})


def test_arrays_name_their_axes_and_types(path):
    split = open_bank(str(path)).split("train")
    for name, dtype in {**layout.TOKEN_ARRAYS, **layout.EXAMPLE_ARRAYS}.items():
        axis = "token" if name in layout.TOKEN_ARRAYS else "example"
        assert split.group[name].dtype == np.dtype(dtype), name
        assert split.group[name].metadata.dimension_names == (axis,), name
    assert split.group["states"].chunks == (1, split.block_tokens, split.width)


def test_rows_of_any_integer_type_make_the_same_bank(tmp_path):
    wide = {
        name: Rows(
            lengths=split.lengths.astype(np.int64),
            n_words=split.n_words.astype(np.int64),
            text_hash=split.text_hash,
        )
        for name, split in splits().items()
    }
    make(tmp_path / "one")
    make(tmp_path / "other", wide)

    assert files_of(tmp_path / "one") == files_of(tmp_path / "other")


def test_blocks_are_as_large_as_the_aim_and_hold_the_longest_example():
    assert layout.block_tokens_for(384, 512) == 4096
    assert layout.block_tokens_for(1024, 512) == 2048
    assert layout.block_tokens_for(1024, 8192) == 8192
    assert layout.block_tokens_for(100_000, 512) == 512


def test_local_paths_and_urls_are_told_apart():
    assert store.local_path("a/b") is not None
    assert store.local_path("s3://a/b") is None
