"""A bank that is deleted, wholly or half."""

import pytest
import zarr
from banks import RECIPE, complete, copy_to, files_of, make, splits
from faults import FAULT, Killed

from cache import BankLocked, CacheError, Writer, open_bank, store
from cache.removal import remove


def test_a_bank_is_removed_and_nothing_beside_it(tmp_path):
    copy_to(tmp_path / "bank")
    (tmp_path / "notes").write_text("mine")
    remove(str(tmp_path / "bank"))
    assert [path.name for path in tmp_path.iterdir()] == ["notes"]


def test_an_unfinished_bank_is_removed_too(tmp_path):
    with Writer(str(tmp_path / "bank"), RECIPE, splits()):
        pass
    remove(str(tmp_path / "bank"))
    assert not (tmp_path / "bank").exists()


def refused(path, said):
    before = files_of(path.parent)
    with pytest.raises(CacheError, match=said) as error:
        remove(str(path))
    assert "\n" not in str(error.value)
    assert files_of(path.parent) == before


def test_what_is_no_bank_is_left_alone(tmp_path):
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder/data").write_text("precious")
    (tmp_path / "file").write_text("precious")
    zarr.create_group(str(tmp_path / "other")).create_array("a", shape=(2,), dtype="int32")
    for name in ("folder", "file", "other", "nowhere"):
        refused(tmp_path / name, "is no bank: nothing was removed")


@pytest.mark.parametrize("name", ["notes.txt", "runs/r/config.json", "train/notes.txt"])
def test_a_bank_with_something_else_inside_is_left_alone(tmp_path, name):
    copy_to(tmp_path / "bank")
    (tmp_path / "bank" / name).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / "bank" / name).write_text("precious")
    refused(tmp_path / "bank", "which is no part of the bank: move it away first")


def test_a_bank_that_is_being_written_is_left_alone(tmp_path):
    copy_to(tmp_path / "bank")
    with store.writing(tmp_path / "bank"), pytest.raises(BankLocked):
        remove(str(tmp_path / "bank"))
    assert open_bank(str(tmp_path / "bank")).splits == ["train", "dev"]


def test_half_removed_it_never_opens_as_whole_and_may_be_removed_or_made_again(tmp_path):
    make(tmp_path / "whole")
    expected = files_of(tmp_path / "whole")
    for change in (0, 1, 2, 3, 9, 40, 70):
        path = tmp_path / f"bank-{change}"
        copy_to(path)
        if FAULT.run(path, change, Killed(), lambda at=path: remove(str(at))):
            continue
        try:
            open_bank(str(path))
        except CacheError:
            if path.exists() and change % 2:
                remove(str(path))
                assert not path.exists()
            with Writer(str(path), RECIPE, splits()) as writer:
                complete(writer)
        assert {k: v for k, v in files_of(path).items() if not k.endswith(".partial")} == expected
